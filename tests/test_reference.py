"""The torch reference against a scalar-minded float64 numpy loop (oracle.py), and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import Data, num, oracle_gates
from torch import tensor

from tvm_gdn import reference

EXACT = 1e-12
RMS_LIMIT = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (5e-3, 2e-3)}


def assert_close(out, ref, limit=EXACT):
    out, ref = num(out), num(ref)
    assert out.shape == ref.shape
    assert np.isfinite(ref).all() and np.abs(ref).max() > 1e-2  # a zero reference would prove nothing
    assert np.abs(out - ref).max() <= limit * np.abs(ref).max()


def rms_ratio(out, ref):
    return np.sqrt(np.mean((num(out) - num(ref)) ** 2) / np.mean(num(ref) ** 2))


def to_layout(x, v_first):
    return x.transpose(-1, -2).contiguous() if v_first else x.clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softplus_beta", "threshold"), [(1.0, 20.0), (0.5, 1.0), (2.0, 3.0)])
def test_gating(dtype, softplus_beta, threshold):
    d = Data(batch=3, tokens=7, dtype=dtype)
    d.dt_bias[0] = 0
    edge = threshold / softplus_beta  # exactly at the threshold softplus is still the logarithm
    d.a[0, :6, 0] = torch.tensor([edge, edge * 1.1, edge * 0.9, 60.0, -30.0, 0.0], dtype=dtype)
    args = (d.A_log, d.a, d.b, d.dt_bias, softplus_beta, threshold)
    want = oracle_gates(*map(num, args[:4]), softplus_beta, threshold)
    for out, ref in zip(reference.fused_gdn_gating(*args, exact=True), want, strict=True):
        assert out.dtype == torch.float64
        np.testing.assert_allclose(num(out), ref, rtol=EXACT)
    g, beta = reference.fused_gdn_gating(*args)
    assert (g.dtype, beta.dtype, g.shape, beta.shape) == (torch.float32, dtype, d.a.shape, d.b.shape)
    np.testing.assert_allclose(num(g), want[0], rtol=1e-5)
    np.testing.assert_allclose(num(beta), want[1], rtol=max(1e-6, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize(("scale", "l2norm"), [(None, False), (None, True), (0.3, True)])
def test_dense_each_item_has_its_own_gates(scale, l2norm, heads, v_first):
    d = Data(batch=3, heads=heads[0], v_heads=heads[1])
    d.g = d.g + 0.4  # positive log-decays too
    initial = d.states(3)
    o, finals = d.oracle(scale=scale, l2norm=l2norm, pool=num(initial))
    given = to_layout(initial, v_first)
    out, final = reference.fused_recurrent_gated_delta_rule(
        *d.qkvgb, scale, given, True, None, l2norm, state_v_first=v_first, exact=True
    )
    assert_close(out, o)
    assert_close(to_layout(final, v_first), finals)
    assert final.is_contiguous() and torch.equal(given, to_layout(initial, v_first))
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, scale, None, False, None, l2norm, exact=True)
    assert_close(out, d.oracle(scale=scale, l2norm=l2norm)[0])
    assert final is None


def test_scale_zero():
    d = Data()
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, 0.0, None, True, exact=True)
    assert out.abs().max() == 0
    assert_close(final, d.oracle()[1])


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[0, 3, 3, 0, 1, 4, 0], [2, 2, 2], [0, 0], []])
def test_varlen_pool(lengths, index_dtype, v_first):
    bounds = [0, *np.cumsum(lengths, dtype=int).tolist()]
    d, slots = Data(tokens=bounds[-1]), [8, 1, -1, 0, 5, 6, -1][: len(lengths)]
    pool = d.states(9)
    want = num(pool)
    o, finals = d.oracle(bounds, l2norm=True, pool=want, slots=slots)
    cu, index = tensor(bounds, dtype=index_dtype), tensor(slots, dtype=index_dtype)
    for form in ("update", "recurrent"):
        mine = to_layout(pool, v_first)
        if form == "update":
            out = reference.fused_recurrent_gated_delta_rule_update(
                *d.qkvgb, None, mine, index, cu, True, state_v_first=v_first, exact=True
            )
        else:
            out, final = reference.fused_recurrent_gated_delta_rule(
                *d.qkvgb, None, mine, True, cu, True, initial_state_indices=index, state_v_first=v_first, exact=True
            )
            np.testing.assert_allclose(num(to_layout(final, v_first)), finals, rtol=0, atol=EXACT)
        assert out.shape == d.v.shape
        np.testing.assert_allclose(num(out), o, rtol=0, atol=EXACT)
        assert_close(to_layout(mine, v_first), want)
        untouched = [s for s in range(9) if s not in {n for n, length in zip(slots, lengths, strict=True) if length}]
        assert torch.equal(to_layout(mine, v_first)[untouched], pool[untouched])


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("v_first", [False, True])
def test_sigmoid_gating_update(v_first, verify):
    d = Data(batch=3)
    pool, slots = d.states(5), [4, -1, 2]
    want, want_buffer = num(pool), np.zeros((3, 6, *pool.shape[1:])) if verify else None
    gates = oracle_gates(num(d.A_log), num(d.a), num(d.b), num(d.dt_bias), 2.0, 1.0)
    o, _ = d.oracle(None, map(torch.from_numpy, gates), pool=want, slots=slots, update=not verify, buffer=want_buffer)
    mine, buffer = to_layout(pool, v_first), to_layout(torch.zeros(3, 6, *pool.shape[1:]).double(), v_first)
    out = reference.fused_sigmoid_gating_delta_rule_update(
        d.A_log, d.a, d.dt_bias, 2.0, 1.0, d.q, d.k, d.v, d.b, mine, tensor(slots),
        disable_state_update=verify, intermediate_states_buffer=buffer if verify else None,
        state_v_first=v_first, exact=True,
    )  # fmt: skip
    assert_close(out, o)
    assert_close(to_layout(mine, v_first), want)
    assert torch.equal(to_layout(mine, v_first), pool) == verify
    if verify:
        assert_close(to_layout(buffer, v_first), want_buffer)


def test_defaults_of_pool_and_slots():
    d = Data(batch=2)
    pool = d.states(3)
    want = num(pool)
    o, _ = d.oracle(pool=want)
    assert_close(reference.fused_recurrent_gated_delta_rule_update(*d.qkvgb, None, pool, exact=True), o)
    assert_close(pool, want)
    gates = reference.fused_gdn_gating(d.A_log, d.a[:1], d.b[:1], d.dt_bias, exact=True)
    one = (d.q[:1], d.k[:1], d.v[:1])
    sigmoid = reference.fused_sigmoid_gating_delta_rule_update(
        d.A_log, d.a[0], d.dt_bias, 1.0, 20.0, *one, d.b[0], None, tensor([7]), exact=True
    )
    assert_close(sigmoid, reference.fused_recurrent_gated_delta_rule(*one, *gates, exact=True)[0])


@pytest.mark.parametrize("lengths", [None, [4, 4, 4], [4, 3, 4], [2, 0, 3]])
def test_tree_follows_the_stored_rounded_parent(lengths):
    parents = [[-1, 0, 0, 1], [9, 0, -1, 2], [-1, 0, 1, -1]]
    slots, buffer_slots = [1, 0, 3], [2, 0, -1]
    if lengths is None:
        d, bounds = Data(batch=3, tokens=4), None
    else:
        bounds = [0, *np.cumsum(lengths).tolist()]
        d = Data(tokens=bounds[-1])
    pool = d.states(4)
    want, want_buffer = num(pool), np.zeros((4, 4, *pool.shape[1:]), np.float32)
    o, _ = d.oracle(bounds, pool=want, slots=slots, buffer=want_buffer, buffer_slots=buffer_slots, parents=parents)
    buffer, cu = torch.zeros(want_buffer.shape), None if bounds is None else tensor(bounds)
    out = reference.fused_recurrent_gated_delta_rule_update(
        *d.qkvgb, None, pool, tensor(slots), cu, False, False, buffer, tensor(buffer_slots), 4,
        tensor(parents, dtype=torch.int32), exact=True,
    )  # fmt: skip
    assert_close(out, o)
    assert_close(pool, want)
    np.testing.assert_allclose(num(buffer), num(want_buffer), rtol=1e-7)
    assert buffer[[1, 3]].abs().max() == 0


def test_padding_and_empty_sequences_leave_every_bit_of_the_pool():
    d = Data(tokens=3, dtype=torch.bfloat16)
    bits = torch.full((3, 4, 7, 5), 0x7FA5, dtype=torch.int16)  # a NaN that does not survive a change of dtype
    pool = bits.clone().view(torch.bfloat16)
    index, cu = tensor([1, -1]), tensor([0, 0, 3])
    out = reference.fused_recurrent_gated_delta_rule_update(*d.qkvgb, None, pool, index, cu)
    assert torch.equal(pool.view(torch.int16), bits)
    assert rms_ratio(out, d.oracle([0, 3])[0]) < RMS_LIMIT[torch.bfloat16][0]


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_split_equals_whole(cut):
    d = Data(batch=2, tokens=7)
    initial = d.states(2)
    whole = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, None, initial, True, exact=True)
    parts, state = [], initial
    for rows in (slice(0, cut), slice(cut, 7)):
        o, state = reference.fused_recurrent_gated_delta_rule(*(x[:, rows] for x in d.qkvgb), None, state, True, exact=True)
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole[0])
    assert_close(state, whole[1])


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("l2norm", [False, True])
def test_packed_decode_from_strided_rows(l2norm, v_first):
    d = Data(batch=4, tokens=1)
    pool, slots = d.states(6), [5, -1, 0, 3]
    want = num(pool)
    gates = oracle_gates(num(d.A_log), num(d.a), num(d.b), num(d.dt_bias))
    o, _ = d.oracle(None, map(torch.from_numpy, gates), l2norm=l2norm, pool=want, slots=slots, scale=0.7)
    rows = torch.cat([x.flatten(1) for x in (d.q, d.k, d.v)] + [torch.full((4, 3), torch.nan)], 1)
    mine = to_layout(pool, v_first)
    out = reference.packed_decode_gated_delta_rule(
        rows[:, :-3], d.a[:, 0], d.b[:, 0], d.A_log, d.dt_bias, mine, tensor(slots), 0.7, l2norm,
        state_v_first=v_first, exact=True,
    )  # fmt: skip
    assert_close(out, o)
    assert_close(to_layout(mine, v_first), want)


def test_one_token_sequences_on_the_batch_axis():
    d = Data(batch=6, tokens=1)
    pool, bounds = d.states(5), [0, 1, 3, 3, 4, 6]
    o, finals = d.oracle(bounds, pool=num(pool))
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, None, pool, True, tensor(bounds), exact=True)
    assert_close(out, o)
    assert_close(final, finals)


def test_strided_inputs_and_strided_pool():
    d = Data(batch=2, heads=2, v_heads=2, dim_k=5, dim_v=5)
    packed = torch.cat([d.q, d.k, d.v], 2)
    pools = torch.stack([d.states(3), torch.full_like(d.states(3), torch.nan)], 1)
    want = num(pools[:, 0])
    o, _ = d.oracle(pool=want)
    g, beta = (torch.stack([x, x], -1)[..., 0] for x in (d.g, d.beta))
    out = reference.fused_recurrent_gated_delta_rule_update(*packed.split(2, 2), g, beta, None, pools[:, 0], exact=True)
    assert_close(out, o)
    assert_close(pools[:, 0], want)


def test_nan_stays_in_its_sequence():
    d = Data(batch=3)
    pool = d.states(4)
    pool[3] = torch.nan
    clean = reference.fused_recurrent_gated_delta_rule_update(*d.qkvgb, None, pool.clone(), tensor([-1, 0, 1]))
    d.k[1, 2] = torch.nan
    out = reference.fused_recurrent_gated_delta_rule_update(*d.qkvgb, None, pool, tensor([-1, 0, 1]))
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and torch.equal(out[1, :2], clean[1, :2])
    assert out[1, 2:].isnan().all() and pool[0].isnan().all() and pool[1:3].isfinite().all()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_empty_batch_and_no_tokens(batch, tokens):
    d = Data(batch, tokens)
    initial = d.states(batch)
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, None, initial, True, exact=True)
    assert out.shape == d.v.shape
    assert torch.equal(final, initial)
    assert batch == 0 or final.data_ptr() != initial.data_ptr()


def test_empty_batch_of_more_tokens_than_the_tree_has_steps():
    d = Data(0, 5)
    buffer, before = d.states(5)[None], d.states(1)
    pool = before.clone()
    parents = torch.zeros(0, 4, dtype=torch.long)
    out = reference.fused_recurrent_gated_delta_rule_update(
        *d.qkvgb, None, pool, tensor([]).long(), None, False, False, buffer, tensor([]).long(), None, parents
    )
    assert out.shape == d.v.shape and torch.equal(pool, before)


def test_empty_packed_decode():
    d = Data(batch=0, tokens=1)
    rows = torch.empty(0, 48)
    out = reference.packed_decode_gated_delta_rule(rows, d.a[:, 0], d.b[:, 0], d.A_log, d.dt_bias, d.states(1))
    assert out.shape == (0, 1, 4, 5)
    assert out.dtype == rows.dtype


@pytest.mark.parametrize("state_dtype", RMS_LIMIT)
@pytest.mark.parametrize("dtype", RMS_LIMIT)
def test_storage_dtypes(dtype, state_dtype):
    d = Data(batch=2, tokens=63, dim_k=33, dim_v=17, dtype=dtype)
    initial = d.states(2, dtype=state_dtype)
    o, finals = d.oracle(l2norm=True, pool=num(initial))
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, None, initial, True, None, True)
    assert (out.dtype, final.dtype) == (dtype, state_dtype)
    assert rms_ratio(out, o) < RMS_LIMIT[dtype][0] and rms_ratio(final, finals) < RMS_LIMIT[state_dtype][1]
    assert reference.fused_recurrent_gated_delta_rule(*d.qkvgb, output_final_state=True)[1].dtype == torch.float32


def test_basic_case_in_fp32():
    d = Data(batch=2, tokens=4, heads=2, v_heads=2, dim_k=8, dim_v=8)
    qkvb = [(x * 0.1).float() for x in (d.q, d.k, d.v, d.b)]
    args = ((d.A_log * 0.1).float(), (d.a * 0.1).float(), (d.dt_bias * 0.1).float(), 1.0, 20.0, *qkvb, None, None)
    o = reference.fused_sigmoid_gating_delta_rule_update(*args, exact=True)
    assert (reference.fused_sigmoid_gating_delta_rule_update(*args) - o).abs().max() < 1e-9


def test_gradients():
    d = Data(batch=1, tokens=3, heads=1, v_heads=2, dim_k=3, dim_v=2)
    leaves = [x.requires_grad_() for x in (*d.qkvgb, d.states(1))]

    def run(q, k, v, g, beta, s):
        return reference.fused_recurrent_gated_delta_rule(q, k, v, g, beta, None, s, True, exact=True)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
@pytest.mark.parametrize("l2norm", [False, True])
def test_against_transformers(form, l2norm):
    model = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    d = Data(batch=2, tokens=65, dim_k=32, dim_v=24, dtype=torch.float32)
    initial = d.states(2)
    want, want_final = getattr(model, form)(
        *d.qkvgb, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=l2norm
    )
    out, final = reference.fused_recurrent_gated_delta_rule(*d.qkvgb, None, initial, True, None, l2norm)
    assert_close(out, want, 5e-6)
    assert_close(final, want_final, 5e-6)
