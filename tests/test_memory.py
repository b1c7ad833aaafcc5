"""Memory beside the tensors of prefill and of packing in place: peaks of resident memory, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TOKENS = (2048, 16384)
PEAK = """
import json, sys
import torch
import tvm_gdn
from tvm_gdn.bench import machine

torch.set_num_threads(1)

def peak_memory(call):
    try:
        return machine.peak_memory(call)
    except OSError as error:
        sys.exit(f"UNMEASURED: {error}")
"""
PREFILL = """
dtype, H, HV, K, V = getattr(torch, sys.argv[1]), 1, 2, 64, 64

def measure(tokens):
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, heads, K, generator=random).to(dtype) for heads in (H, H, HV))
    g, beta = -torch.rand(1, tokens, HV, generator=random), torch.rand(1, tokens, HV, generator=random)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    (o, state), taken = peak_memory(lambda: tvm_gdn.chunk_gated_delta_rule(q, k, v, g, beta, **options))
    assert torch.isfinite(o).all() and o.abs().max() > 0
    return taken - o.nbytes - state.nbytes

measure(32)  # loads the kernel
found = {tokens: measure(tokens) for tokens in map(int, sys.argv[2:])}
print(json.dumps({"served": tvm_gdn.dispatch.served_by("chunk_gated_delta_rule"), "bytes": found}))
"""
PACKING = """
E, D, I = 3, 1024, 1024

def measure(seed):
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=random).to(getattr(torch, sys.argv[2])) for shape in ((E, 2 * I, D), (E, D, I))]
    pack, taken = peak_memory(lambda: tvm_gdn.pack_experts(*weights, sys.argv[1], in_place=True, progress=False))
    scales = [scale.nbytes for scale in (pack.w13_scale, pack.w2_scale) if scale is not None]
    return taken - sum(scales)

measure(0)  # the allocator's own
print(json.dumps({"taken": measure(1), "expert": 3 * D * I * getattr(torch, sys.argv[2]).itemsize}))
"""


def measured(program: str, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if "UNMEASURED" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefill_takes_memory_for_a_chunk_not_for_its_tokens(dtype):
    found = measured(PREFILL, dtype, *TOKENS)
    assert found["served"].startswith("compiled")
    short, long = (found["bytes"][str(tokens)] for tokens in TOKENS)
    # One copy of k in fp32 would be 4 MiB at 16,384 tokens, the products of tokens with those of their chunk as much or more.
    assert max(short, long) < 1 << 20, found
    assert long - short < 1 << 19, found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4_kgroup"])
def test_packing_in_place_takes_memory_of_one_expert(scheme, dtype):
    found = measured(PACKING, scheme, dtype)
    assert found["taken"] <= found["expert"], found
