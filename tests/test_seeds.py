"""The cases that the projects we follow publish, as they state them, each against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from calls import GATING, POOL, RECURRENT, SIGMOID, UPDATE, call, check, draw, oracle, same_bits
from torch import tensor

import tvm_gdn

BASIC = {"B": 2, "T": 4, "H": 2, "HV": 2, "K": 8, "V": 8}
LARGER = {"B": 4, "T": 8, "H": 4, "HV": 4, "K": 16, "V": 16}
SCENARIOS = {
    "basic": (BASIC, {}, 1e-9),
    "initial-state": ({**BASIC, "S": 2, "with": POOL}, {}, 1e-9),
    "l2norm": (BASIC, {"use_qk_l2norm_in_kernel": True}, 1e-7),
    "custom-scale": (BASIC, {"scale": 0.5}, 1e-9),
    "larger": (LARGER, {}, 1e-9),
}
PACKED_FIXED = {"B": 1, "T": 5, "H": 2, "HV": 2, "K": 8, "V": 8}
PACKED_VARLEN = {"lengths": (5, 7, 6), "H": 2, "HV": 2, "K": 8, "V": 8, "with": ("cu_seqlens",)}
PACKED_POOL = {"lengths": (4, 6, 5), "H": 2, "HV": 2, "K": 8, "V": 8, "S": 5, "with": (*POOL, "cu_seqlens")}

GATE_DTYPES = {"dtype": "bfloat16", "dtypes": {"A_log": "float32", "dt_bias": "bfloat16"}}
GATES = [(rows, heads) for heads in (6, 32, 64, 128) for rows in (1, 64, 1024, 2048)] + [(4096, 32)]

DECODE = {"T": 1, "H": 16, "HV": 16, "K": 128, "V": 128, "dtype": "bfloat16", "use_qk_l2norm_in_kernel": True, "with": POOL}
DECODES = {
    **{f"batch-{batch}": {"B": batch, "S": batch} for batch in (1, 4, 8, 16, 32)},
    **{f"heads-{heads}": {"B": 4, "S": 4, "H": heads, "HV": heads} for heads in (8, 16, 32)},
    "pool": {"B": 4, "S": 10},
    "pool-padding": {"B": 4, "S": 10, "padding": True},
    "grouped-values": {"B": 4, "S": 4, "H": 16, "HV": 32},
    "no-l2norm": {"B": 4, "S": 4, "use_qk_l2norm_in_kernel": False},
    "gate-parameters": {"B": 4, "S": 4, "softplus_beta": 0.5, "softplus_threshold": 2.0},
}
VERIFY = {
    "lengths": (4, 1, 3), "H": 4, "HV": 4, "K": 128, "V": 128, "S": 8, "dtype": "bfloat16", "index_dtype": "int32",
    "use_qk_l2norm_in_kernel": True, "with": (*POOL, "cu_seqlens"),
}  # fmt: skip
UNIT = {
    "B": 2, "T": 63, "H": 2, "HV": 4, "K": 128, "V": 64, "with": ("initial_state",), "output_final_state": True,
}  # fmt: skip

KERNELS = [
    *((SIGMOID, case) for case, _, _ in SCENARIOS.values()),
    (SIGMOID, PACKED_FIXED), (SIGMOID, PACKED_VARLEN), (SIGMOID, PACKED_POOL),
    (GATING, {"M": 1, "HV": 6, **GATE_DTYPES}),
    *((SIGMOID, {**DECODE, **case}) for case in DECODES.values()),
    (UPDATE, VERIFY),
    *((RECURRENT, {**UNIT, "state_v_first": v}) for v in (False, True)),
]  # fmt: skip


def small(arguments):
    """Every floating input times 0.1, as the published cases draw them."""
    names = ("A_log", "a", "dt_bias", "q", "k", "v", "b", "initial_state_source")
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(arguments[name].shape, generator=generator) * 0.1 for name in names if arguments[name] is not None}
    return {**arguments, **drawn}


def largest(out, ref):
    return (out.double() - ref).abs().max().item()


def check_states(got, want):
    """A stored state is off by a unit in the last place of the largest one at most."""
    for name in set(want) - {"o"}:
        assert largest(got[name], want[name]) < torch.finfo(torch.float32).eps * want[name].abs().max()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sigmoid_gating_scenarios(scenario):
    case, options, limit = SCENARIOS[scenario]
    a = small(draw(SIGMOID, case, **options))
    if a["initial_state_source"] is not None:
        # 1e-9 is the last place of fp32 outputs of 0.01: that is what states of 0.01 and these inputs give.
        a["initial_state_source"] *= 0.1
    want = oracle(SIGMOID, a)
    got = call(SIGMOID, a)
    assert got["o"].shape == (case["B"], case["T"], case["HV"], case["V"])
    assert largest(got["o"], want["o"]) < limit < want["o"].abs().max() / 100
    check_states(got, want)


def test_varlen_equals_fixed_length():
    a = small(draw(SIGMOID, PACKED_VARLEN))
    assert a["cu_seqlens"].tolist() == [0, 5, 12, 18]
    packed = call(SIGMOID, a)["o"]
    assert largest(packed, oracle(SIGMOID, a)["o"]) < 1e-9
    assert packed.abs().max() > 1e-4
    for first, last in ((0, 5), (5, 12), (12, 18)):
        alone = {**a, "cu_seqlens": None, **{n: a[n][:, first:last] for n in ("q", "k", "v", "a", "b")}}
        assert (call(SIGMOID, alone)["o"] - packed[:, first:last]).abs().max() == 0


def test_varlen_with_a_pool_and_long_indices():
    a = small(draw(SIGMOID, PACKED_POOL))
    assert a["cu_seqlens"].dtype == a["initial_state_indices"].dtype == torch.int64
    a["initial_state_source"] *= 0.1
    want = oracle(SIGMOID, a)
    got = call(SIGMOID, a)
    assert largest(got["o"], want["o"]) < 1e-9 < want["o"].abs().max() / 1000
    check_states(got, want)


@pytest.mark.parametrize(("rows", "heads"), GATES)
def test_gating(rows, heads):
    a = draw(GATING, {"M": rows, "HV": heads, **GATE_DTYPES})
    got = check(GATING, a)
    assert (got["g"].dtype, got["beta"].dtype) == (torch.float32, torch.bfloat16)
    assert (got["g"] < 0).all() and (got["beta"] > 0).all() and (got["beta"] <= 1).all()
    want = oracle(GATING, a)
    assert ((got["g"].double() - want["g"]).abs() <= 1e-5 * want["g"].abs()).all()
    assert torch.equal(got["beta"], want["beta"].float().to(torch.bfloat16)) or rows > 64


@pytest.mark.parametrize("scenario", DECODES)
def test_decode(scenario):
    a = draw(SIGMOID, {**DECODE, **DECODES[scenario]})
    before = a["initial_state_source"].clone()
    got = check(SIGMOID, a)
    assert got["o"].dtype == torch.bfloat16
    used = [slot for slot in a["initial_state_indices"].tolist() if slot >= 0]
    unused = [slot for slot in range(before.shape[0]) if slot not in used]
    assert same_bits(got["initial_state_source"][unused], before[unused])
    assert bool(unused) == scenario.startswith("pool")
    assert all(not torch.equal(got["initial_state_source"][slot], before[slot]) for slot in used)


@pytest.mark.parametrize("disable", [False, True], ids=["pool", "disabled-update"])
def test_recurrent_update(disable):
    a = draw(UPDATE, VERIFY, disable_state_update=disable)
    before = a["initial_state_source"].clone()
    got = check(UPDATE, a)
    used = a["initial_state_indices"].tolist()
    assert same_bits(got["initial_state_source"][used], before[used]) == disable
    unused = [slot for slot in range(8) if slot not in used]
    assert same_bits(got["initial_state_source"][unused], before[unused])


@pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
def test_full_precision_against_a_token_loop_in_fp32(v_first):
    a = draw(RECURRENT, {**UNIT, "state_v_first": v_first}, use_qk_l2norm_in_kernel=True)
    o, final = tvm_gdn.fused_recurrent_gated_delta_rule(**a)
    q, k = (torch.nn.functional.normalize(a[name], dim=-1).repeat_interleave(2, 2) for name in ("q", "k"))
    state = a["initial_state"].transpose(-1, -2).clone() if v_first else a["initial_state"].clone()
    for t in range(63):
        state = state * a["g"][:, t].exp()[..., None, None]
        error = a["v"][:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error * a["beta"][:, t, :, None])
        want = torch.einsum("bhkv,bhk->bhv", state, q[:, t] * 128**-0.5)
        assert (o[:, t] - want).abs().max() < 1e-6 < want.abs().max() / 1000
    final = final.transpose(-1, -2) if v_first else final
    assert (final - state).abs().max() < 1e-6


def test_one_slot_pool_and_long_run():
    """A pool written token by token for 500 tokens stays within the limit of one call's."""
    a = draw(SIGMOID, {**BASIC, "B": 1, "T": 500, "S": 1, "with": POOL}, initial_state_indices=tensor([0]))
    check(SIGMOID, a)
