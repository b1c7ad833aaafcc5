"""Convolution and gated norm against transformers and torch, and as an engine uses them: splits, slots, padding, strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tvm_gdn
from tvm_gdn import dispatch
from tvm_gdn.errors import ArgumentError
from tvm_gdn.parity import rms_ratio

D, W = 70, 4
FN, UPDATE, NORM = "causal_conv1d_fn", "causal_conv1d_update", "rms_norm_gated"
STATE = {"D": D, "W": W}
#: Widths beyond the 2 to 4 of models.
WIDTHS = (1, 5, 8)
WIDE = [
    *((FN, {"D": D, "W": W, "B": 2, "T": 5, "with": ("conv_states", "has_initial_state") if W > 1 else ()}) for W in WIDTHS),
    *((UPDATE, {"D": D, "W": W, "B": 2, "T": 1, "activation": "silu", "with": ()}) for W in WIDTHS if W > 1),
]
KERNELS = [
    *WIDE,
    (FN, {**STATE, "B": 2, "T": 5, "with": ()}),
    (FN, {**STATE, "B": 2, "T": 5, "with": ("conv_states",)}),
    (FN, {**STATE, "B": 2, "T": 5, "with": ("conv_states", "has_initial_state")}),
    (FN, {**STATE, "lengths": (3, 4), "with": ("conv_states", "query_start_loc", "cache_indices", "has_initial_state")}),
    (UPDATE, {**STATE, "B": 2, "T": 1, "activation": "silu", "with": ()}),
    (UPDATE, {**STATE, "B": 2, "T": 1, "activation": "silu", "with": ("conv_state_indices",)}),
    (NORM, {"M": 2, "G": 3, "D": 100, "with": ("z",)}),
]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias=None, history=None):
    """Convolution with torch's own function in float64 behind `history` [D, W - 1] or zeros; silu."""
    x = x.double()
    if not x.shape[1]:
        return x  # torch's refuses to convolve nothing
    left = x.new_zeros(x.shape[0], weight.shape[1] - 1) if history is None else history.double()
    padded = torch.cat([left, x], 1)[None]
    out = F.conv1d(padded, weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[0])
    return F.silu(out)[0]


@pytest.mark.parametrize("tokens", [1, 2, 3, 63, 65, 500])
@pytest.mark.parametrize("layout", ["channels", "tokens", "strided"])
def test_against_torch_in_every_layout(tokens, layout):
    x, weight = drawn(2, D, tokens), drawn(D, W, seed=1)
    if layout == "channels":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = drawn(2, 2 * D, 3 * tokens)[:, ::2, ::3]
    o = tvm_gdn.causal_conv1d_fn(x, weight)
    assert dispatch.served_by(FN).startswith("compiled")
    want = torch.stack([exact(item, weight) for item in x])
    assert rms_ratio(o, want) < 1e-5
    assert o.stride() == torch.empty_like(x).stride()


def test_against_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x, weight, state = drawn(3, D, 1), drawn(D, W, seed=1), drawn(3, D, W, seed=2)
    want_state = state.clone()
    want = modeling.causal_conv1d_update(x, want_state, weight, None, "silu")
    o = tvm_gdn.causal_conv1d_update(x, state, weight, None, "silu")
    assert rms_ratio(o, want) < 1e-5
    assert torch.equal(state, want_state)
    long = drawn(2, D, 65)
    assert rms_ratio(tvm_gdn.causal_conv1d_fn(long, weight), modeling.causal_conv1d_fn(long, weight, activation="silu")) < 1e-5
    layer = modeling.Qwen3NextRMSNormGated(100)
    layer.weight.data = drawn(100, seed=3)
    x, z = drawn(7, 5, 100), drawn(7, 5, 100, seed=4)
    with torch.no_grad():
        got = tvm_gdn.rms_norm_gated(x, layer.weight, z)
        assert rms_ratio(got, layer(x, z)) < 1e-5


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_beyond_those_of_models(width):
    x, weight, before = drawn(2, D, 37), drawn(D, width, seed=1), drawn(2, D, width - 1, seed=2)
    pool, flags = before.clone(), torch.tensor([True, False])
    o = tvm_gdn.causal_conv1d_fn(x, weight, None, pool, None, None, flags)
    history = before * flags[:, None, None]
    assert rms_ratio(o, torch.stack([exact(x[n], weight, history=history[n]) for n in range(2)])) < 1e-5
    assert torch.equal(pool, torch.cat([history, x], 2)[:, :, 37:])
    if width == 1:
        return  # nothing to remember: no state to update
    step, history = drawn(2, D, seed=3), pool.clone()
    o = tvm_gdn.causal_conv1d_update(step, pool, weight, None, "silu")
    want = torch.stack([exact(step[n][:, None], weight, history=history[n])[:, 0] for n in range(2)])
    assert rms_ratio(o, want) < 1e-5
    assert torch.equal(pool, torch.cat([history, step[:, :, None]], 2)[:, :, 1:])
    assert dispatch.served_by(FN).startswith("compiled") and dispatch.served_by(UPDATE).startswith("compiled")


@pytest.mark.parametrize("width", [0, 9])
def test_other_widths_are_refused(width):
    pool = torch.ones(1, D, 8)
    for call in (
        lambda weight: tvm_gdn.causal_conv1d_fn(drawn(1, D, 7), weight, None, pool),
        lambda weight: tvm_gdn.causal_conv1d_update(drawn(1, D), pool, weight),
    ):
        with pytest.raises(ArgumentError, match=rf"weight has {width} taps \(axis 1\); allowed: 1 to 8"):
            call(drawn(D, width))
    assert (pool == 1).all()


@pytest.mark.parametrize("split", [(65,), (1, 64), (2, 1, 62), (1, 1, 1, 62), (40, 0, 25)])
def test_split_equals_whole(split):
    x, weight = drawn(D, 65), drawn(D, W, seed=1)
    pool, want = torch.full((3, D, W - 1), 7.0), exact(x, weight)
    parts, begin = [], 0
    for n, length in enumerate(split):
        part = x[:, begin : begin + length].T.contiguous().T
        bounds, slot, flag = torch.tensor([0, length]), torch.tensor([2]), torch.tensor([n > 0])
        parts.append(tvm_gdn.causal_conv1d_fn(part, weight, None, pool, bounds, slot, flag))
        begin += length
    assert rms_ratio(torch.cat(parts, 1), want) < 1e-5
    assert torch.equal(pool[2], x[:, -3:])
    assert (pool[:2] == 7.0).all()
    step = drawn(1, D, seed=5)
    o = tvm_gdn.causal_conv1d_update(step, pool, weight, None, "silu", torch.tensor([2]))
    assert rms_ratio(o[0], exact(step.T, weight, history=x[:, -3:])[:, 0]) < 1e-5
    assert torch.equal(pool[2], torch.cat([x[:, -2:], step.T], 1))


def test_packed_sequences_slots_and_padding():
    lengths, slots = (70, 0, 1, 2, 129, 5), [4, 0, -1, 2, 6, 1]
    flags = torch.tensor([True, True, True, False, True, False])
    x, weight, pool = drawn(sum(lengths), D).T, drawn(D, W, seed=1), drawn(8, D, W - 1, seed=2)
    before = pool.clone()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o = tvm_gdn.causal_conv1d_fn(x, weight, None, pool, bounds, torch.tensor(slots), flags)
    written = set()
    for n, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        piece = x[:, bounds[n] : bounds[n + 1]]
        history = before[slot] if flags[n] and slot >= 0 else torch.zeros(D, W - 1)
        assert rms_ratio(o[:, bounds[n] : bounds[n + 1]], exact(piece, weight, history=history)) < 1e-5
        if slot >= 0 and length:
            written.add(slot)
            assert torch.equal(pool[slot], torch.cat([history, piece], 1)[:, -3:])
    for slot in set(range(8)) - written:
        assert torch.equal(pool[slot], before[slot])


@pytest.mark.parametrize("pad", [-1, 2])
@pytest.mark.parametrize("count", [5, 40])
def test_sequences_must_not_share_a_slot_unless_it_is_padding(count, pad):
    """Few slots are compared with each other, many are ticked off in a table."""
    x, weight, pool = drawn(count, D), drawn(D, W, seed=1), drawn(50, D, W - 1, seed=2)
    slots = torch.arange(49, 49 - count, -1)
    slots[[0, 3, count - 2]] = pad
    before = pool.clone()
    o = tvm_gdn.causal_conv1d_update(x, pool, weight, None, "silu", slots, pad)
    for n, slot in enumerate(slots.tolist()):
        history = torch.zeros(D, W - 1) if slot == pad else before[slot]
        assert rms_ratio(o[n], exact(x[n : n + 1].T, weight, history=history)[:, 0]) < 1e-5
    pool.copy_(before)
    slots[count - 1] = slots[1]
    with pytest.raises(ArgumentError, match=rf"conv_state_indices\[1\] and conv_state_indices\[{count - 1}\] are both 48; "):
        tvm_gdn.causal_conv1d_update(x, pool, weight, None, "silu", slots, pad)
    assert torch.equal(pool, before)


def test_states_of_any_strides():
    x, weight = drawn(2, D), drawn(D, W, seed=1)
    outputs, states = [], []
    for shape in ((2, D, W - 1), (2, W - 1, D)):
        pool = torch.zeros(shape)
        pool = pool if shape[1] == D else pool.transpose(1, 2)
        pool.copy_(drawn(2, D, W - 1, seed=2))
        outputs.append(tvm_gdn.causal_conv1d_update(x, pool, weight, None, "silu"))
        states.append(pool)
    history = drawn(2, D, W - 1, seed=2)
    want = torch.stack([exact(x[n][:, None], weight, history=history[n])[:, 0] for n in range(2)])
    assert rms_ratio(outputs[0], want) < 1e-5
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    assert torch.equal(states[0], torch.cat([history, x[:, :, None]], 2)[:, :, 1:])


def test_a_poisoned_neighbour_changes_nothing():
    x, weight, bounds = drawn(210, D).T, drawn(D, W, seed=1), torch.tensor([0, 70, 140, 210])
    flags, slots = torch.zeros(3, dtype=torch.bool), torch.arange(3)
    clean = tvm_gdn.causal_conv1d_fn(x, weight, None, torch.zeros(3, D, W - 1), bounds, slots, flags)
    x[:, 70:140] = float("nan")
    o = tvm_gdn.causal_conv1d_fn(x, weight, None, torch.zeros(3, D, W - 1), bounds, slots, flags)
    assert torch.equal(o[:, :70], clean[:, :70])
    assert torch.equal(o[:, 140:], clean[:, 140:])
    assert o[:, 70:140].isnan().all()


def test_norm_of_strided_rows_and_both_orders():
    x, z, weight = drawn(6, 5, 300)[..., 100:200], drawn(6, 5, 200, seed=1)[..., :100], drawn(100, seed=2)
    for first in (True, False):
        y = x.double() if first else x.double() * F.silu(z.double())
        want = F.rms_norm(y, (100,), weight.double(), 1e-5) * (F.silu(z.double()) if first else 1)
        got = tvm_gdn.rms_norm_gated(x, weight, z, 1e-5, first)
        assert got.is_contiguous()
        assert rms_ratio(got, want) < 1e-5
    assert rms_ratio(tvm_gdn.rms_norm_gated(x, weight), F.rms_norm(x.double(), (100,), weight.double(), 1e-6)) < 1e-5
    assert tvm_gdn.rms_norm_gated(x[:0], weight, z[:0]).shape == (0, 5, 100)


@pytest.mark.parametrize("value", [-1e4, -100.0, -87.5, 88.0, 1e4])
def test_gates_far_out(value):
    x, weight, z = drawn(2, 3, 100), torch.ones(100), torch.full((2, 3, 100), value)
    want = F.rms_norm(x.double(), (100,), weight.double(), 1e-6) * F.silu(z.double())
    got = tvm_gdn.rms_norm_gated(x, weight, z)
    assert (got - want).abs().max() <= 1e-5 * max(want.abs().max().item(), 1e-25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; allowed: 'silu', 'swish', None"),
        ({"conv_states": torch.zeros(4, D, 2)}, "conv_states holds 2 inputs"),
        ({"cache_indices": torch.tensor([0, 4])}, r"cache_indices\[1\] = 4; allowed: 0 to 3"),
        ({"cache_indices": torch.tensor([0, -2])}, r"cache_indices\[1\] = -2"),
        ({"cache_indices": torch.tensor([3, 3])}, r"cache_indices\[0\] and cache_indices\[1\] are both 3"),
        ({"query_start_loc": torch.tensor([0, 5, 6])}, "query_start_loc must start with 0 and end with"),
        ({"query_start_loc": torch.tensor([0, 8, 7])}, "query_start_loc must never decrease"),
        ({"has_initial_state": torch.tensor([True])}, r"has_initial_state has 1 on axis 0 \(N\)"),
        ({"weight": torch.zeros(D + 1, W)}, "weight has 71"),
    ],
)
def test_errors_name_the_argument_and_nothing_is_written(change, message):
    arguments = {
        "x": drawn(D, 7), "weight": drawn(D, W), "conv_states": torch.zeros(4, D, W - 1),
        "query_start_loc": torch.tensor([0, 3, 7]), "cache_indices": torch.tensor([0, 1]),
        "has_initial_state": torch.tensor([True, False]),
    }  # fmt: skip
    tvm_gdn.causal_conv1d_fn(**arguments)
    arguments["conv_states"].zero_()
    arguments |= change
    with pytest.raises(ArgumentError, match=message):
        tvm_gdn.causal_conv1d_fn(**arguments)
    assert not arguments["conv_states"].any()
