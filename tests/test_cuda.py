"""On a CUDA device: streams, graphs, no waiting, errors. Skipped where there is none; parity is `test_device.py`'s."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment

from tvm_gdn import cases, device, dispatch, parity
from tvm_gdn.ops import OPS

pytestmark = pytest.mark.skipif(device.architecture("cuda") is None, reason="no CUDA device is present")
ROOT = Path(__file__).resolve().parent.parent
DECODE = OPS["packed_decode_gated_delta_rule"]
POOL = ("initial_state_source", "initial_state_indices")
CASE = {"B": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 6, "dtype": "bfloat16", "with": POOL, "padding": True}

COLD = """
import torch
from tvm_gdn import cases, dispatch, parity
from tvm_gdn.ops import OPS
spec = OPS["packed_decode_gated_delta_rule"]
case = {case!r}
arguments = cases.draw(spec, case)
want = parity.expected(spec, arguments)
inputs = {{n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    o = torch.ops.tvm_gdn.packed_decode_gated_delta_rule(*inputs.values())
torch.cuda.synchronize()
assert torch.equal(inputs["initial_state_source"].cpu(), arguments["initial_state_source"]), "capturing ran the kernel"
graph.replay()
torch.cuda.synchronize()
got = {{"o": o, "initial_state_source": inputs["initial_state_source"]}}
errors, limits = parity.compare(spec, got, want)
assert all(errors[name] <= limits[name] for name in limits), errors
assert dispatch.served_by(spec.name).startswith("compiled (cuda"), dispatch.served_by(spec.name)
print("replayed")
"""


def on_device(arguments):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.fixture(autouse=True)
def cuda_target(monkeypatch):
    monkeypatch.setenv("TVM_GDN_TARGET", "cuda")
    dispatch.reset()
    yield
    monkeypatch.undo()
    dispatch.reset()


def test_graph_capture_of_the_very_first_call():
    parity.check_case(DECODE, CASE, device="cuda")  # compiled and in the cache; the module is not loaded in the new process
    env = environment(TVM_GDN_DISABLE_JIT="1")
    done = subprocess.run([sys.executable, "-c", COLD.format(case=CASE)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["replayed"], done.stderr


def test_runs_on_the_current_stream_without_waiting():
    inputs = on_device(cases.draw(DECODE, CASE))
    parity.run(DECODE, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            torch.ops.tvm_gdn.packed_decode_gated_delta_rule(*inputs.values())
        assert not stream.query(), "the call waited for its stream"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_order_within_a_stream_is_kept():
    arguments = cases.draw(DECODE, CASE)
    want = parity.expected(DECODE, arguments)
    inputs = on_device(arguments)
    parity.run(DECODE, on_device(arguments))
    source, inputs["mixed_qkv"] = inputs["mixed_qkv"], torch.zeros_like(inputs["mixed_qkv"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        inputs["mixed_qkv"].copy_(source)
        o = torch.ops.tvm_gdn.packed_decode_gated_delta_rule(*inputs.values()) + 0
    torch.cuda.synchronize()
    assert parity.rms_ratio(o, want["o"]) <= parity.limit(DECODE, "o", o.dtype)


def test_scratch_memory_in_captured_graphs():
    """What chunks keep for one another is allocated during the capture, and is there in every replay."""
    spec = OPS["chunk_gated_delta_rule"]
    case = {"B": 2, "T": 130, "H": 1, "HV": 2, "K": 64, "V": 32, "dtype": "bfloat16", "with": ("initial_state",)}
    arguments = cases.draw(spec, case)
    want, inputs = parity.expected(spec, arguments)["o"], on_device(arguments)
    parity.run(spec, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = parity.run(spec, inputs)["o"]
    for _ in range(2):
        o.zero_()
        torch.empty(1 << 20, device="cuda").fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert parity.rms_ratio(o, want) <= parity.limit(spec, "o", o.dtype)


def test_outputs_are_on_the_device_of_the_tensors():
    got = parity.run(DECODE, on_device(cases.draw(DECODE, CASE)))
    assert all(value.is_cuda for value in got.values())


def test_slots_past_two_to_the_31_elements():
    heads, size = 1, 128
    slots = 2**31 // (heads * size * size) + 3
    if torch.cuda.mem_get_info()[0] < slots * heads * size * size * 2 + 2**30:
        pytest.skip("not enough device memory")
    case = {
        "B": 2,
        "H": 1,
        "HV": heads,
        "K": size,
        "V": size,
        "S": 2,
        "dtype": "bfloat16",
        "state_dtype": "bfloat16",
        "with": POOL,
    }
    arguments = cases.draw(DECODE, case)
    arguments["initial_state_indices"] = torch.tensor([0, 1])
    want = parity.expected(DECODE, arguments)
    inputs = on_device(arguments)
    pool = torch.zeros(slots, heads, size, size, dtype=torch.bfloat16, device="cuda")
    far = torch.tensor([slots - 1, slots - 2], device="cuda")
    pool[far] = inputs["initial_state_source"]
    got = parity.run(DECODE, {**inputs, "initial_state_source": pool, "initial_state_indices": far})
    assert parity.rms_ratio(got["o"], want["o"]) <= parity.limit(DECODE, "o", torch.bfloat16)
    error = parity.rms_ratio(pool[far], want["initial_state_source"])
    assert error <= parity.limit(DECODE, "initial_state_source", torch.bfloat16)
    assert not pool[:-2].any()


def test_a_slot_out_of_range_reads_zeros_and_writes_nothing():
    arguments = cases.draw(DECODE, {**CASE, "padding": False})
    inputs = on_device(arguments)
    inputs["initial_state_indices"] = torch.tensor([0, 6, -5, 2**40], device="cuda")
    before = inputs["initial_state_source"].clone()
    got = parity.run(DECODE, inputs)
    torch.cuda.synchronize()
    assert torch.equal(before[1:], got["initial_state_source"][1:])
    assert got["o"].isfinite().all()
