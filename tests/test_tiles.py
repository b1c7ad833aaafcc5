"""Tile operations of single targets: what CI's CPU cannot run is emulated, and ragged work leaves nothing behind."""

import pytest
import torch

from tvm_gdn import cases, dispatch, kernel_cache, parity, schedule
from tvm_gdn.check import geometry_of
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve

CHUNK = OPS["chunk_gated_delta_rule"]
HEADS = {"H": 1, "K": 64, "V": 96, "output_final_state": True, "use_qk_l2norm_in_kernel": True, "dtype": "bfloat16"}


@pytest.fixture
def emulated(monkeypatch):
    """Calls run on the emulated matrix unit."""
    monkeypatch.setenv("TVM_GDN_TARGET", "x86-amx-emulated")
    if named("x86-amx-emulated").missing():
        pytest.skip("needs AVX2")
    dispatch.reset()
    yield resolve("x86-amx-emulated")
    monkeypatch.undo()
    dispatch.reset()


def test_the_matrix_unit_emulated(emulated):
    """Three value heads of one q/k head, lengths around the blocks of 16, 32 and 64 tokens, in one kernel."""
    case = {**HEADS, "lengths": (1, 0, 15, 17, 33, 63, 65, 129, 100), "HV": 3, "with": ("initial_state", "cu_seqlens")}
    assert not kernel_cache.prebuild([(CHUNK, geometry_of(CHUNK, cases.draw(CHUNK, case)))], emulated)
    result = parity.check_case(CHUNK, case)
    assert result.served.startswith("compiled (x86-amx-emulated")
    # The state is stored in fp32: it must show nothing of the operands' rounding to bf16.
    assert result.passed, (result.errors, result.limits)
    assert result.limits["final_state"] == 1e-5

    # What a bad sequence leaves in the worker's memory must not reach the next one.
    arguments = cases.draw(CHUNK, case)
    clean = parity.run(CHUNK, cases.clone(arguments))
    arguments["v"][:, 1 + 15 + 17 : 1 + 15 + 17 + 33] = float("nan")
    bad = parity.run(CHUNK, arguments)
    inside = torch.zeros(arguments["v"].shape[1], dtype=torch.bool)
    inside[33:66] = True
    assert bad["o"][:, inside].isnan().all()
    assert torch.equal(bad["o"][:, ~inside], clean["o"][:, ~inside])
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(bad["final_state"][others], clean["final_state"][others])


@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_states_keep_their_digits_in_two_parts(emulated, shared):
    """Hardly any decay, keys at random or near one direction: what products lose of a state has nowhere to go."""
    case = {**HEADS, "lengths": (1, 500), "HV": 3, "with": ("initial_state", "cu_seqlens")}
    arguments = cases.draw(CHUNK, case)
    arguments["g"] *= 0.01
    k = arguments["k"]
    arguments["k"] = (k + shared * k[:, :1]).to(k.dtype)
    want = parity.expected(CHUNK, arguments)
    errors, limits = parity.compare(CHUNK, parity.run(CHUNK, arguments), want)
    assert dispatch.served_by(CHUNK.name).startswith("compiled (x86-amx-emulated")
    assert errors["final_state"] < limits["final_state"] / 2, errors
    assert errors["o"] < limits["o"], errors


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_the_matrix_unit_serves_16_bit_data(dtype, unit):
    """fp32 data keeps fp32 products."""
    space, name = schedule.find_space("chunk", named("x86-amx"))
    assert name == "x86-amx"
    for more in ({}, {"K": 40}):
        case = {**HEADS, **more, "B": 1, "T": 4, "HV": 2, "dtype": dtype}
        geometry = geometry_of(CHUNK, cases.draw(CHUNK, case))
        tiles = space.tiles(geometry, **space.default(geometry))
        assert (type(tiles).__name__ == "AmxChunkTiles") == (unit and not more)
