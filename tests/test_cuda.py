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

CHUNK = "chunk_gated_delta_rule"
#: Kernels whose work depends on what lies on the device: slots, bounds of sequences, how many tokens an expert has.
DYNAMIC = [
    (DECODE.name, CASE),
    (CHUNK, {"lengths": (63, 0, 70, 1), "H": 1, "HV": 2, "K": 64, "V": 64, "dtype": "bfloat16", "with": ("cu_seqlens",)}),
    ("causal_conv1d_fn", {"D": 64, "W": 4, "lengths": (40, 1, 30), "dtype": "bfloat16", "with": ("query_start_loc",)}),
    ("fused_experts", {"T": 65, "k": 2, "E": 8, "D": 96, "I": 64, "dtype": "bfloat16"}),
]
COLD = """
import torch
from tvm_gdn import cases, dispatch, parity
from tvm_gdn.ops import OPS
spec = OPS[{op!r}]
case = {case!r}
arguments = cases.draw(spec, case)
want = parity.expected(spec, arguments)
inputs = {{n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = parity.run(spec, inputs)
torch.cuda.synchronize()
for tensor in spec.tensors:
    if tensor.mutated and arguments[tensor.name] is not None:
        assert torch.equal(inputs[tensor.name].cpu(), arguments[tensor.name]), "capturing ran the kernel"
graph.replay()
torch.cuda.synchronize()
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


@pytest.mark.parametrize(("op", "case"), DYNAMIC, ids=[op for op, _ in DYNAMIC])
def test_graph_capture_of_the_very_first_call(op, case):
    parity.check_case(OPS[op], case, device="cuda")  # compiled and in the cache; the module is not loaded in the new process
    env = environment(TVM_GDN_DISABLE_JIT="1")
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(op=op, case=case)], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["replayed"], done.stderr


@pytest.mark.parametrize(("op", "case"), DYNAMIC, ids=[op for op, _ in DYNAMIC])
def test_runs_on_the_current_stream_without_waiting(op, case):
    inputs = on_device(cases.draw(OPS[op], case))
    parity.run(OPS[op], inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            getattr(torch.ops.tvm_gdn, op)(*inputs.values())
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


@pytest.mark.parametrize(
    ("op", "case"),
    [
        (DECODE.name, {"B": 2, "S": 2, "with": POOL}),
        (DECODE.name, {"B": 520, "S": 520, "with": POOL}),  # by the copy engine, where there is one
        (f"{CHUNK}_update", {"lengths": (65, 1), "S": 2, "with": (*POOL, "cu_seqlens")}),
    ],
    ids=["decode", "decode of many", "prefill"],
)
def test_slots_past_two_to_the_31_elements(op, case):
    size, count, spec = 128, case["S"], OPS[op]
    slots = 2**31 // (size * size) + count
    if torch.cuda.mem_get_info()[0] < slots * size * size * 2 + 2**31:
        pytest.skip("not enough device memory")
    case = {**case, "H": 1, "HV": 1, "K": size, "V": size, "dtype": "bfloat16", "state_dtype": "bfloat16"}
    arguments = cases.draw(spec, case)
    arguments["initial_state_indices"] = torch.arange(count)
    want = parity.expected(spec, arguments)
    inputs = on_device(arguments)
    pool = torch.zeros(slots, 1, size, size, dtype=torch.bfloat16, device="cuda")
    far = torch.arange(slots - 1, slots - 1 - count, -1, device="cuda")
    pool[far] = inputs["initial_state_source"]
    got = parity.run(spec, {**inputs, "initial_state_source": pool, "initial_state_indices": far})
    assert parity.rms_ratio(got["o"], want["o"]) <= parity.limit(spec, "o", torch.bfloat16)
    error = parity.rms_ratio(pool[far], want["initial_state_source"])
    assert error <= parity.limit(spec, "initial_state_source", torch.bfloat16)
    assert not pool[:-count].any()


def test_a_slot_out_of_range_reads_zeros_and_writes_nothing():
    arguments = cases.draw(DECODE, {**CASE, "padding": False})
    inputs = on_device(arguments)
    inputs["initial_state_indices"] = torch.tensor([0, 6, -5, 2**40], device="cuda")
    before = inputs["initial_state_source"].clone()
    got = parity.run(DECODE, inputs)
    torch.cuda.synchronize()
    assert torch.equal(before[1:], got["initial_state_source"][1:])
    assert got["o"].isfinite().all()
