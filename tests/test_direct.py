"""Calls past torch's dispatcher: the same results and marks on tensors, and only where the dispatcher has nothing to do."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import tvm_gdn
from tvm_gdn import cases, direct, parity, torch_ops
from tvm_gdn.ops import OPS

NAME = "packed_decode_gated_delta_rule"
CASE = {
    "B": 3,
    "H": 1,
    "HV": 2,
    "K": 8,
    "V": 8,
    "S": 4,
    "dtype": "bfloat16",
    "state_dtype": "float32",
    "with": ("initial_state_source", "initial_state_indices"),
    "use_qk_l2norm_in_kernel": True,
}
KERNELS = [(NAME, CASE)]


@pytest.fixture
def ways(monkeypatch):
    """Names of the ways that calls take from now on."""
    taken = []
    space = direct.call.packed_decode_gated_delta_rule.__globals__
    implementations = space["implementations"]
    spied = {name: lambda *values, f=f: (taken.append("direct"), f(*values))[1] for name, f in implementations.items()}
    monkeypatch.setitem(space, "implementations", spied)
    for name in ("operator", "converting"):
        monkeypatch.setitem(space, name, lambda *values, f=space[name]: (taken.append("operator"), f(*values))[1])
    return taken


def call(arguments):
    return getattr(tvm_gdn, NAME)(**arguments)


def test_a_plain_call_goes_directly_and_leaves_what_the_operator_leaves(ways):
    arguments = cases.draw(OPS[NAME], CASE)
    want = parity.expected(OPS[NAME], arguments)
    other = cases.clone(arguments)
    torch.ops.tvm_gdn.packed_decode_gated_delta_rule(*other.values())
    o = call(arguments)
    assert ways == ["direct"]
    got = {"o": o, "initial_state_source": arguments["initial_state_source"]}
    errors, limits = parity.compare(OPS[NAME], got, want)
    assert all(errors[name] <= limits[name] for name in limits)
    assert arguments["initial_state_source"]._version == other["initial_state_source"]._version
    assert torch.equal(got["initial_state_source"], other["initial_state_source"])


def test_inference_mode_goes_directly(ways):
    arguments = cases.draw(OPS[NAME], CASE)
    with torch.inference_mode():
        inside = call(arguments)
    assert ways == ["direct"]
    assert inside.is_inference() and not call(arguments).is_inference()


def test_outputs_are_allocated_on_the_device_of_the_tensors():
    """Torch's fast function allocates on the current device."""

    class Elsewhere:
        def get_device(self):
            return 7

        def new_empty(self, shape, dtype):
            return "elsewhere", shape, dtype

    empty = torch_ops._allocator("cpu")
    hollow = empty(torch.zeros(1), (2, 0, 4), (0, 4, 1), torch.bfloat16)
    assert hollow.stride() == torch.zeros(2, 0, 4).stride()
    here = empty(torch.zeros(1), (2, 3), (3, 1), torch.bfloat16)
    assert (here.shape, here.stride(), here.dtype) == ((2, 3), (3, 1), torch.bfloat16)
    assert empty(Elsewhere(), (2, 3), (3, 1), torch.bfloat16) == ("elsewhere", (2, 3), torch.bfloat16)
    none = torch_ops._allocator("a device that torch has no such function for")
    assert none(Elsewhere(), (2, 3), (3, 1), torch.bfloat16) == ("elsewhere", (2, 3), torch.bfloat16)


def test_operators_take_names_where_torch_cannot_be_asked(monkeypatch):
    """As with a version of torch that lacks a function which a direct call asks."""
    arguments, want = cases.draw(OPS[NAME], CASE), call(cases.draw(OPS[NAME], CASE))
    monkeypatch.setattr(direct, "_questions", dict)
    monkeypatch.setattr(direct, "call", SimpleNamespace())
    direct.register(OPS[NAME], "", {})
    assert want.any() and torch.equal(getattr(direct.call, NAME)(**arguments), want)


def test_outputs_are_full_of_nan_where_torch_is_to_be_deterministic():
    """Parity relies on it: a kernel that skips elements cannot pass on what an earlier one left in its memory."""
    empty = torch_ops._allocator("cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert all(empty(torch.zeros(1), (50, 3), (3, 1), torch.float32).isnan().all() for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["a"].requires_grad_(),
        lambda a: a.update(scale=1),
        lambda a: a.update(b=a["b"].as_subclass(type("Own", (torch.Tensor,), {}))),
    ],
    ids=["gradient", "whole number", "subclass"],
)
def test_what_the_dispatcher_is_for_goes_through_it(ways, change):
    arguments = cases.draw(OPS[NAME], CASE)
    change(arguments)
    call(arguments)
    assert ways == ["operator"]


def test_tracing_profiling_and_modes_see_the_operator(ways):
    arguments = cases.draw(OPS[NAME], CASE)
    graph = make_fx(lambda x: call({**arguments, "mixed_qkv": x}))(arguments["mixed_qkv"])
    assert "tvm_gdn.packed_decode_gated_delta_rule" in graph.code
    with torch.autograd.profiler.profile() as profile:
        call(arguments)
    assert any("packed_decode" in event.name for event in profile.function_events)
    with torch.device("cpu"):
        call(arguments)
    assert ways == ["operator"] * 3
