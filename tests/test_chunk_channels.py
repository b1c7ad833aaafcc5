"""Chunks ahead of states with a gate per channel: the kernels emulated, at odd sizes and with gates of any size; where there are any."""

import pytest
import torch
from compilers import needs_cxx
from test_device import with_knobs
from tvm_gdn.schedules.gpu_chunk import ChunkHopper

from tvm_gdn import cases, parity
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED, resolve

OP = "chunk_kda"
CASE = {
    "B": 1, "T": 65, "H": 1, "HV": 2, "K": 64, "V": 48, "with": ("initial_state",), "output_final_state": True,
    "dtype": "bfloat16", "state_dtype": "float32", "use_qk_l2norm_in_kernel": True,
}  # fmt: skip


def gates(name, shape):
    gen = torch.Generator().manual_seed(2)
    if name == "steep":
        return torch.full(shape, -20.0)
    if name == "growing":
        return torch.rand(shape, generator=gen) / 4
    # Some channels keep everything, one token in nine lets go of all others.
    g = -torch.rand(shape, generator=gen)
    g[:, ::9] = -200.0
    g[..., ::5] = 0.0
    return g


@pytest.mark.parametrize(
    ("change", "knobs"),
    [
        ({}, {"chunk": 64, "ahead": 4}), ({"K": 128}, {"chunk": 32, "ahead": 4}), ({"K": 256, "V": 16}, {"chunk": 16, "ahead": 4}),
        ({"K": 48}, {"ahead": 0}), ({"dtype": "float32"}, {"ahead": 0}), ({"dtype": "float16"}, {"ahead": 0}),
    ],
)  # fmt: skip
def test_where_chunks_go_ahead(change, knobs):
    found = ChunkHopper.default(geometry_of_case(OPS[OP], {**CASE, **change}))
    assert {name: found[name] for name in knobs} == knobs


@needs_cxx
@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param({"K": 96, "V": 8, "chunk": 32, "ahead": 8, "warps": 8}, marks=pytest.mark.slow),
        pytest.param({"K": 32, "V": 32, "chunk": 16}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_chunks_ahead_meet_the_reference(tmp_path, change):
    """A channel per thread, two and three; a warp more than blocks of eight tokens, and fewer; chunks that end anywhere."""
    case = {**CASE, **{name: value for name, value in change.items() if name in CASE}}
    spec, arguments = OPS[OP], cases.draw(OPS[OP], case)
    knobs = {**ChunkHopper.default(geometry_of_case(spec, case)), **{name: change[name] for name in change if name not in CASE}}
    function = with_knobs(resolve(f"{EMULATED}cuda-sm90"), tmp_path, OP, arguments, **knobs)
    given = [arguments, *(cases.draw(spec, {**case, "T": tokens}) for tokens in (1, 63, 64, 500, 1000))]
    for name in ("steep", "growing", "mixed"):
        given.append(cases.clone(arguments))
        given[-1]["g"] = gates(name, arguments["g"].shape)
    for drawn in given:
        want = parity.expected(spec, drawn)
        errors, limits = parity.compare(spec, parity.run(spec, cases.clone(drawn), function), want)
        assert all(errors[name] <= limits[name] for name in limits), (tuple(drawn["g"].shape), errors)
        assert all(parity.rms_ratio(torch.zeros_like(value), value) > 0.5 for value in want.values())
