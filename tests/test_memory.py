"""What a chunked call takes beside its tensors does not grow with the tokens: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TOKENS = (2048, 16384)
MEASURE = """
import json, re, sys
import torch
import tvm_gdn
from tvm_gdn import dispatch

dtype, H, HV, K, V = getattr(torch, sys.argv[1]), 1, 2, 64, 64
torch.set_num_threads(1)

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def measure(tokens):
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, heads, K, generator=random).to(dtype) for heads in (H, H, HV))
    g, beta = -torch.rand(1, tokens, HV, generator=random), torch.rand(1, tokens, HV, generator=random)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
    o, state = tvm_gdn.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    taken = status("VmHWM") - before - o.nbytes - state.nbytes
    assert torch.isfinite(o).all() and o.abs().max() > 0
    return taken

measure(32)  # loads the kernel
found = {tokens: measure(tokens) for tokens in map(int, sys.argv[2:])}
print(json.dumps({"served": dispatch.served_by("chunk_gated_delta_rule"), "bytes": found}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefill_takes_memory_for_a_chunk_not_for_its_tokens(dtype):
    done = subprocess.run([sys.executable, "-c", MEASURE, dtype, *map(str, TOKENS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["served"].startswith("compiled")
    short, long = (found["bytes"][str(tokens)] for tokens in TOKENS)
    # One copy of k in fp32 would be 4 MiB at 16,384 tokens, the products of tokens with those of their chunk as much or more.
    assert max(short, long) < 1 << 20, found
    assert long - short < 1 << 19, found
