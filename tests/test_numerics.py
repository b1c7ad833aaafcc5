"""Numbers at the edge on the compiled operators: gates far out, zero scale, NaN and infinity, rounding of stores."""

from __future__ import annotations

import math

import pytest
import torch
from calls import GATING, PACKED, POOL, RECURRENT, SIGMOID, UPDATE, bits, call, check, draw, oracle, same_bits
from torch import tensor

from tvm_gdn import parity
from tvm_gdn.ops import OPS

POOLED = {"B": 3, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 6, "with": POOL}
VARLEN = {
    "lengths": (5, 4, 3, 1), "H": 2, "HV": 4, "K": 32, "V": 64, "S": 9, "with": (*POOL, "cu_seqlens"),
    "index_dtype": "int32",
}  # fmt: skip
SEPARATE = {"B": 2, "T": 65, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
PACKED_STEP = {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": POOL}
KDA, GROWING = "chunk_kda", {
    "B": 1, "T": 140, "H": 1, "HV": 2, "K": 7, "V": 16, "with": ("initial_state",), "output_final_state": True,
}  # fmt: skip
GATES = {"M": 63, "HV": 33, "dtypes": {"A_log": "float32", "dt_bias": "float32"}}
LOW = {
    "bf16": {"dtype": "bfloat16", "state_dtype": "bfloat16"},
    "fp16": {"dtype": "float16", "state_dtype": "float16"},
}
#: (data, gates) storage dtypes that no SPEC case has.
GATE_DTYPES = [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")]


def gate_dtypes(data, gates):
    names = ("g", "beta", "A_log", "a", "dt_bias", "b")
    return {
        "B": 2, "T": 5, "H": 1, "HV": 2, "K": 16, "V": 24, "S": 3, "with": POOL, "dtype": data,
        "dtypes": dict.fromkeys(names, gates), "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip


KERNELS = [
    *((op, {**POOLED, **low, "state_v_first": v}) for op in (UPDATE, SIGMOID) for low in ({}, *LOW.values())
      for v in (False, True)),
    *((op, {**VARLEN, "state_v_first": v}) for op in (UPDATE, SIGMOID) for v in (False, True)),
    *((op, gate_dtypes(*dtypes)) for op in (UPDATE, SIGMOID) for dtypes in GATE_DTYPES),
    *((RECURRENT, {**SEPARATE, "state_v_first": v}) for v in (False, True)),
    (PACKED, PACKED_STEP), (GATING, GATES), (KDA, GROWING),
    *((GATING, {**GATES, "dtype": d, "dtypes": {"A_log": "float32", "dt_bias": d}}) for d in ("bfloat16", "float16")),
]  # fmt: skip

each_layout = pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
each_low = pytest.mark.parametrize("low", LOW)


@pytest.mark.parametrize("op", [UPDATE, SIGMOID])
@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids="-".join)
def test_gate_dtypes(op, dtypes):
    check(op, draw(op, gate_dtypes(*dtypes)))


@each_layout
@pytest.mark.parametrize("g", [-100.0, -20.0, -1e-6, 0.0, 0.5, 3.0])
def test_any_log_decay(g, v_first):
    a = draw(RECURRENT, {**SEPARATE, "T": 8, "state_v_first": v_first})
    a["g"] = torch.full_like(a["g"], g)
    a["g"][:, ::3] *= 0.5
    got = check(RECURRENT, a)
    assert got["o"].isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_growing_states_keep_their_digits_in_chunks(seed):
    """The states of a long chunk of short keys would lose them: 1e-5 with 32 tokens per chunk, 7e-5 with 64."""
    spec, a = OPS[KDA], draw(KDA, GROWING, seed=seed)
    a["g"] *= -0.5
    got, want = parity.run(spec, a), parity.expected(spec, a)
    errors, limits = parity.compare(spec, got, want)
    assert want["final_state"].abs().max() > 1e4
    assert all(errors[name] < limits[name] == 1e-5 for name in ("o", "final_state")), errors


@pytest.mark.parametrize("tokens", [1, 65])
def test_a_large_decay_forgets_exactly(tokens):
    a = draw(RECURRENT, {**SEPARATE, "T": tokens})
    a["g"][:, 0] = -200.0
    fresh = check(RECURRENT, {**a, "initial_state": torch.zeros_like(a["initial_state"])})
    got = call(RECURRENT, a)
    assert torch.equal(got["o"], fresh["o"]) and torch.equal(got["final_state"], fresh["final_state"])


def test_a_positive_log_decay_near_the_range_of_fp32():
    a = draw(RECURRENT, {**SEPARATE, "T": 1})
    a["g"] = torch.full_like(a["g"], 80.0)
    assert check(RECURRENT, a)["o"].abs().max() > 1e30


@pytest.mark.parametrize(("softplus_beta", "threshold"), [(1.0, 20.0), (0.5, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("op", [GATING, SIGMOID, PACKED])
def test_gates_far_out(op, softplus_beta, threshold):
    case = {GATING: GATES, SIGMOID: POOLED, PACKED: PACKED_STEP}[op]
    a = draw(op, case, softplus_beta=softplus_beta, softplus_threshold=threshold)
    edge = threshold / softplus_beta
    values = tensor([edge, edge * 1.001, edge * 0.999, 60.0, 3.0, -3.0, -15.0, -17.5, -30.0, -80.0, -200.0])
    a["dt_bias"][:] = 0.0
    if op == GATING:
        a["a"].view(-1)[: len(values)] = values
        a["b"].view(-1)[: len(values)] = values
        got = check(op, a)
        assert (got["g"].view(-1)[:8] < 0).all()
        want = oracle(op, a)["g"]
        normal = want.abs() > torch.finfo(torch.float32).tiny
        assert ((got["g"].double() / want - 1)[normal].abs() < 1e-5).all()
        assert (got["g"][~normal] > -torch.finfo(torch.float32).tiny).all()
        return
    # Outputs of the recurrence do not show a relative error of tiny gates; that is the first branch's job.
    a["a"].view(-1)[: len(values)] = values.clamp(min=-30.0)
    a["b"].view(-1)[: len(values)] = values
    check(op, a)


@each_layout
def test_scale_zero(v_first):
    a = draw(RECURRENT, {**SEPARATE, "state_v_first": v_first}, scale=0.0)
    got = call(RECURRENT, a)
    assert got["o"].abs().max() == 0.0
    want = check(RECURRENT, {**a, "scale": None})
    assert same_bits(got["final_state"], want["final_state"])


@each_layout
@pytest.mark.parametrize("scale", [1.0, -0.3, 7.0])
def test_scale(scale, v_first):
    check(RECURRENT, draw(RECURRENT, {**SEPARATE, "T": 3, "state_v_first": v_first}, scale=scale))


@each_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("case", ["dense", "packed"])
@pytest.mark.parametrize("op", [UPDATE, SIGMOID])
def test_one_bad_sequence_leaves_its_neighbours_alone(op, case, value, v_first):
    a = draw(op, {**(POOLED if case == "dense" else VARLEN), "state_v_first": v_first})
    slots = a["initial_state_indices"].tolist()
    clean = check(op, {**a, "initial_state_source": a["initial_state_source"].clone()})
    bad_gate = {UPDATE: "g", SIGMOID: "a"}[op]
    rows = slice(1, 2) if case == "dense" else slice(0, 1)
    tokens = slice(2, 4) if case == "dense" else slice(6, 9)  # from the bad token to the end of sequence 1
    others = torch.ones(a["v"].shape[:2], dtype=torch.bool)
    others[rows, tokens] = False
    for name in ("q", "k", "v", bad_gate):
        pool, poisoned = a["initial_state_source"].clone(), a[name].clone()
        poisoned[rows, tokens.start] = value
        got = call(op, {**a, name: poisoned, "initial_state_source": pool})
        assert same_bits(got["o"][others], clean["o"][others])
        for n in (0, *range(2, len(slots))):
            assert same_bits(pool[slots[n]], clean["initial_state_source"][slots[n]])
        if name == "q":
            assert not got["o"][rows, tokens.start].isfinite().any()
            assert same_bits(pool, clean["initial_state_source"])
        elif math.isnan(value):
            assert got["o"][~others].isnan().all()
            assert pool[slots[1]].isnan().all()
    # A bad state, too, stays in its slot.
    pool = a["initial_state_source"].clone()
    pool[slots[1]] = value
    got = call(op, {**a, "initial_state_source": pool})
    whole = torch.ones(a["v"].shape[:2], dtype=torch.bool)
    whole[rows, slice(0, 4) if case == "dense" else slice(5, 9)] = False
    assert same_bits(got["o"][whole], clean["o"][whole])
    assert not got["o"][~whole].isfinite().any()


@each_low
@each_layout
@pytest.mark.parametrize("factor", [1.0, 1.5078125, -3.0, 3e-5])
def test_every_bit_pattern_is_stored_as_torch_rounds_it(factor, v_first, low):
    """With k = q = e0, scale = factor, g = 0 and beta = 1 the output is factor * v, and the state v, rounded once."""
    dtype = getattr(torch, LOW[low]["dtype"])
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(16, 1, 128, 32)
    unit = torch.zeros(16, 1, 1, 64, dtype=dtype)
    unit[..., 0] = 1.0
    case = {**POOLED, **LOW[low], "B": 16, "T": 1, "H": 1, "HV": 128, "S": 16, "state_v_first": v_first}
    a = draw(UPDATE, case, q=unit, k=unit, v=v, g=torch.zeros(16, 1, 128), scale=factor)
    a["beta"] = torch.ones_like(a["beta"])
    a["initial_state_indices"] = torch.arange(16)
    a["initial_state_source"] = torch.zeros_like(a["initial_state_source"])
    got = call(UPDATE, a)
    # 0 * inf is NaN in the rows of the state where k is 0, and so in the output.
    want = (v.float() * tensor(factor)).to(dtype).where(v.isfinite(), torch.nan)
    assert torch.equal(got["o"].isnan(), want.isnan())
    assert torch.equal(got["o"].nan_to_num(), want.nan_to_num())
    assert torch.equal(got["o"].isinf(), want.isinf())
    if factor != 1.0:
        assert want.isinf().any() or abs(factor) < 1
    state = got["initial_state_source"].transpose(-1, -2) if v_first else got["initial_state_source"]
    first = state[..., 0, :].view(v.shape)
    assert torch.equal(first.isnan(), v.isnan())
    number = ~v.isnan() & (v != 0)
    assert torch.equal(bits(first)[number], bits(v)[number])


@each_low
@each_layout
def test_states_round_to_nearest_even(v_first, low):
    """The state k0 * v is exact in fp32, so its stored value is torch's rounding of it, ties included."""
    dtype = getattr(torch, LOW[low]["dtype"])
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    v = values.where(values.isfinite(), 1.0).view(16, 1, 128, 32)
    k = torch.zeros(16, 1, 1, 64, dtype=dtype)
    k[..., 5] = 1.5078125
    case = {**POOLED, **LOW[low], "B": 16, "T": 1, "H": 1, "HV": 128, "S": 16, "state_v_first": v_first}
    a = draw(UPDATE, case, q=k, k=k, v=v, g=torch.zeros(16, 1, 128), initial_state_indices=torch.arange(16))
    a["beta"] = torch.ones_like(a["beta"])
    a["initial_state_source"] = torch.zeros_like(a["initial_state_source"])
    state = call(UPDATE, a)["initial_state_source"]
    state = state.transpose(-1, -2) if v_first else state
    want = (v.float() * 1.5078125).to(dtype)
    assert want.isinf().any()
    assert torch.equal(state[..., 5, :].view(v.shape), want)
    assert state[..., :5, :].count_nonzero() == state[..., 6:, :].count_nonzero() == 0


@each_low
def test_gating_stores_nan(low):
    dtype = LOW[low]["dtype"]
    a = draw(GATING, {**GATES, "dtype": dtype, "dtypes": {"A_log": "float32", "dt_bias": dtype}})
    a["b"][0, 0], a["a"][0, 1] = float("nan"), float("nan")
    a["b"][1, 0], a["b"][1, 1] = float("inf"), float("-inf")
    got = call(GATING, a)
    assert got["beta"].dtype == a["b"].dtype
    assert got["beta"].isnan().nonzero().tolist() == [[0, 0]] and got["g"].isnan().nonzero().tolist() == [[0, 1]]
    assert got["beta"][1, :2].tolist() == [1.0, 0.0]
