"""The contract's rules on the compiled operators: pools and slots, sequences, verification, layouts and strides."""

from __future__ import annotations

import pytest
import torch
from calls import (
    BUFFER,
    PACKED,
    POOL,
    RECURRENT,
    SIGMOID,
    UPDATE,
    bits,
    call,
    check,
    draw,
    function,
    same_bits,
)
from torch import tensor

import tvm_gdn
from tvm_gdn import dispatch, parity
from tvm_gdn.ops import OPS

POOLED = {"B": 3, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 6, "with": POOL}
ONE = {"B": 4, "T": 1, "H": 1, "HV": 3, "K": 8, "V": 8, "S": 6, "with": POOL}
VARLEN = {"lengths": (5, 0, 3, 1), "H": 2, "HV": 4, "K": 32, "V": 64, "S": 9, "with": (*POOL, "cu_seqlens")}
VERIFY = {"B": 2, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 3, "with": (*POOL, *BUFFER)}
TREE = {"B": 2, "T": 4, "H": 1, "HV": 2, "K": 32, "V": 48, "S": 3, "with": (*POOL, *BUFFER, "retrieve_parent_token")}
SEPARATE = {"B": 2, "T": 7, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
NO_STATE = {"B": 2, "T": 5, "H": 1, "HV": 2, "K": 128, "V": 32, "output_final_state": True}
PACKED_STEP = {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": POOL}
VARIANTS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16", "state_dtype": "float16"},
    "bf16-state": {"dtype": "bfloat16", "state_dtype": "bfloat16"},
}
ODD_SIZES = [(7, 20), (20, 7), (40, 256), (256, 40)]
INDEX_DTYPES = [("int32", "int64", "int32"), ("int64", "int32", "int32"), ("int64", "int64", "int64")]


def odd(dim_k, dim_v, v_first):
    return {
        "lengths": (3, 0, 2), "H": 1, "HV": 2, "K": dim_k, "V": dim_v, "S": 4, "with": (*POOL, "cu_seqlens"),
        "state_v_first": v_first,
    }  # fmt: skip


def mixed(cu, slots, buffer_slots):
    dtypes = {"cu_seqlens": cu, "initial_state_indices": slots, "intermediate_state_indices": buffer_slots}
    return {
        "lengths": (2, 3, 1), "H": 1, "HV": 2, "K": 8, "V": 20, "S": 5, "dtypes": dtypes,
        "with": (*POOL, *BUFFER, "cu_seqlens", "retrieve_parent_token"),
    }  # fmt: skip


KERNELS = [
    *((op, case) for op in (UPDATE, SIGMOID) for case in (POOLED, VERIFY)),
    *((op, {**VARLEN, "index_dtype": "int32", "state_v_first": v}) for op in (UPDATE, SIGMOID) for v in (False, True)),
    *((UPDATE, {**VARLEN, "index_dtype": "int32", **variant}) for variant in VARIANTS.values()),
    (UPDATE, TREE), (UPDATE, {**TREE, **VARIANTS["bf16-state"]}), (SIGMOID, TREE),
    *((UPDATE, mixed(*dtypes)) for dtypes in INDEX_DTYPES),
    *((RECURRENT, {**SEPARATE, "state_v_first": v}) for v in (False, True)),
    (RECURRENT, {**SEPARATE, "dtype": "bfloat16"}), (RECURRENT, NO_STATE),
    (RECURRENT, {**SEPARATE, "lengths": (3, 0, 4), "K": 32, "V": 256, "with": ("initial_state", "cu_seqlens")}),
    *((PACKED, {**PACKED_STEP, "state_v_first": v}) for v in (False, True)),
    (UPDATE, {**ONE, "with": ()}), (UPDATE, {**ONE, "with": POOL[:1]}),
]  # fmt: skip

each_layout = pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_pool_op = pytest.mark.parametrize("op", [UPDATE, SIGMOID])


def each_layout_of(case):
    """Both operators on pools, with every dtype and layout of states: a sample of the products of the three."""

    def parametrized(test):
        kernels = {
            f"{op} {name}{' v-first' if v_first else ''}": (op, {**case, **variant, "state_v_first": v_first})
            for op in (UPDATE, SIGMOID)
            for v_first in (False, True)
            for name, variant in VARIANTS.items()
        }
        return pytest.mark.sampled(pairs=True)(pytest.mark.parametrize("kernel", kernels.values(), ids=kernels)(test))

    return parametrized


def poison(states):
    """Fill with signalling NaNs, whose bits survive no arithmetic and no change of dtype."""
    bits(states)[...] = {torch.float32: 0x7FA00001, torch.bfloat16: 0x7FA1, torch.float16: 0x7D01}[states.dtype]


def flat_gates(op):
    return ("g", "beta") if op in {UPDATE, RECURRENT} else ("a", "b")


@each_layout_of(POOLED)
def test_pool_and_padding(kernel):
    op, case = kernel
    a = draw(op, case, initial_state_indices=tensor([4, -1, 1]))
    pool = a["initial_state_source"]
    before = pool.clone()
    got = check(op, {**a, "initial_state_source": pool.clone()})
    for slot in (0, 2, 3, 5):
        poison(pool[slot])
    again = call(op, a)
    assert same_bits(again["o"], got["o"])
    assert same_bits(pool[[1, 4]], got["initial_state_source"][[1, 4]])
    expected = before.clone()
    for slot in (0, 2, 3, 5):
        poison(expected[slot])
        assert same_bits(pool[slot], expected[slot])
    # Padding starts from a zero state: the same numbers as a call without a pool's history.
    zero = {**a, "initial_state_source": torch.zeros_like(before), "initial_state_indices": tensor([4, 0, 1])}
    assert same_bits(call(op, zero)["o"][1], got["o"][1])


@pytest.mark.parametrize("count", [2, 22, 23, 40, 300])
@each_pool_op
def test_slots_of_many_sequences(op, count):
    """Few slots are compared with each other, many are ticked off in a table: both let any order pass, and no shared slot."""
    a = draw(op, {**POOLED, "B": count, "T": 1, "S": count + 7})
    slots = a["initial_state_indices"]
    slots[torch.randperm(count)[: count // 3]] = -1
    check(op, {**a, "initial_state_source": a["initial_state_source"].clone()})
    slots = torch.randperm(count + 7)[:count]
    before = a["initial_state_source"].clone()
    for first, second in ((0, count - 1), (count - 2, count - 1), (count // 2 - 1, count // 2)):
        shared = slots.clone()
        shared[second] = shared[first]
        with pytest.raises(ValueError, match=rf"\[{first}\] and initial_state_indices\[{second}\] are both {shared[first]};"):
            function(op)(**{**a, "initial_state_indices": shared})
        # Verification reads only: any number of sequences may start from one state.
        call(op, {**a, "initial_state_indices": shared, "disable_state_update": True})
    assert same_bits(a["initial_state_source"], before)


def test_padding_alone_needs_no_slots():
    for count in (2, 40):
        a = draw(UPDATE, {**POOLED, "B": count, "S": count}, initial_state_indices=torch.full((count,), -1))
        check(UPDATE, {**a, "initial_state_source": a["initial_state_source"][:0]})


@each_layout
def test_packed_decode_padding(v_first):
    a = draw(PACKED, {**PACKED_STEP, "state_v_first": v_first}, initial_state_indices=tensor([6, -1, 0, -1, 3]))
    pool = a["initial_state_source"]
    for slot in (1, 2, 4, 5):
        poison(pool[slot])
    before = pool.clone()
    want = check(PACKED, {**a, "initial_state_source": pool.nan_to_num()})
    got = call(PACKED, a)
    assert same_bits(got["o"], want["o"])
    assert same_bits(pool[[0, 3, 6]], want["initial_state_source"][[0, 3, 6]])
    assert same_bits(pool[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


@each_layout_of({**VERIFY, "disable_state_update": True})
def test_disabled_update_leaves_every_bit_of_the_pool(kernel):
    op, case = kernel
    a = draw(op, case, initial_state_indices=tensor([2, 0]), intermediate_state_indices=tensor([-1, 1]))
    poison(a["initial_state_source"][1])
    pool, buffer = a["initial_state_source"].clone(), a["intermediate_states_buffer"].clone()
    clean = {**a, "initial_state_source": pool.nan_to_num(), "intermediate_states_buffer": buffer.clone()}
    want = check(op, clean)
    got = call(op, a)
    assert same_bits(a["initial_state_source"], pool)
    assert same_bits(got["o"], want["o"])
    stored = a["intermediate_states_buffer"]
    assert same_bits(stored[1, :4], want["intermediate_states_buffer"][1, :4])
    assert same_bits(stored[[0, 2]], buffer[[0, 2]]) and same_bits(stored[1, 4:], buffer[1, 4:])


@each_variant
def test_empty_sequences_keep_every_bit_of_their_state(variant):
    a = draw(UPDATE, {**VARLEN, "index_dtype": "int32", **VARIANTS[variant]})
    a["cu_seqlens"] = tensor([0, 0, 5, 9, 9], dtype=torch.int32)
    slots = a["initial_state_indices"] = tensor([7, 2, 4, 0], dtype=torch.int32)
    pool = a["initial_state_source"]
    idle = [s for s in range(9) if s not in {2, 4}]
    for slot in idle:
        poison(pool[slot])
    before = pool.clone()
    want = check(UPDATE, {**a, "initial_state_source": pool.nan_to_num()})
    assert same_bits(call(UPDATE, a)["o"], want["o"])
    assert same_bits(pool[idle], before[idle]) and same_bits(pool[[2, 4]], want["initial_state_source"][[2, 4]])
    assert slots.tolist() == [7, 2, 4, 0]


def test_no_sequences_and_no_tokens():
    for batch, tokens in ((0, 3), (2, 0), (0, 0)):
        a = draw(RECURRENT, {**SEPARATE, "B": batch, "T": tokens})
        got = call(RECURRENT, a)
        assert got["o"].shape == (batch, tokens, 4, 128)
        assert same_bits(got["final_state"], a["initial_state"])
        zero = call(RECURRENT, draw(RECURRENT, {**NO_STATE, "B": batch, "T": tokens}))
        assert torch.equal(zero["final_state"], torch.zeros(batch, 2, 128, 32))
        for op in (UPDATE, SIGMOID):
            a = draw(op, {**POOLED, "B": batch, "T": tokens, "S": 3})
            before = a["initial_state_source"].clone()
            assert call(op, a)["o"].shape == (batch, tokens, 4, 32)
            assert same_bits(a["initial_state_source"], before)
            a = draw(op, {**TREE, "B": batch, "T": tokens})
            a["retrieve_parent_token"] = a["retrieve_parent_token"][:, :tokens]
            assert call(op, a)["o"].shape == (batch, tokens, 2, 48)
            assert a["intermediate_states_buffer"].isnan().all() or batch
    for lengths in ((), (0,), (0, 0, 0)):
        a = draw(UPDATE, {**VARLEN, "lengths": lengths, "index_dtype": "int32"})
        before = a["initial_state_source"].clone()
        assert a["cu_seqlens"].shape == (len(lengths) + 1,)
        assert call(UPDATE, a)["o"].shape == (1, 0, 4, 64)
        assert same_bits(a["initial_state_source"], before)
    a = draw(PACKED, {**PACKED_STEP, "B": 0})
    assert call(PACKED, a)["o"].shape == (0, 1, 4, 64)
    empty = torch.empty(0, 4)
    assert [x.shape for x in tvm_gdn.fused_gdn_gating(torch.ones(4), empty, empty, torch.ones(4))] == [(0, 4), (0, 4)]


@each_layout
def test_initial_state_is_only_read(v_first):
    a = draw(RECURRENT, {**SEPARATE, "state_v_first": v_first})
    before = a["initial_state"].clone()
    got = check(RECURRENT, a)
    assert same_bits(a["initial_state"], before)
    assert got["final_state"].dtype == torch.float32 and got["final_state"].is_contiguous()
    a["output_final_state"] = False
    o, final = tvm_gdn.fused_recurrent_gated_delta_rule(**a)
    assert final is None and same_bits(o, got["o"])


def test_state_dtypes_of_separate_states():
    a = draw(RECURRENT, {**SEPARATE, "dtype": "bfloat16"})
    got = check(RECURRENT, a)
    assert (got["o"].dtype, got["final_state"].dtype) == (torch.bfloat16, torch.float32)
    assert check(RECURRENT, draw(RECURRENT, NO_STATE))["final_state"].dtype == torch.float32


@each_layout
@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_split_equals_whole(cut, v_first):
    a = draw(RECURRENT, {**SEPARATE, "state_v_first": v_first})
    whole = check(RECURRENT, a)
    parts, state = [], a["initial_state"]
    for rows in (slice(0, cut), slice(cut, 7)):
        part = call(RECURRENT, {**a, **{n: a[n][:, rows] for n in ("q", "k", "v", "g", "beta")}, "initial_state": state})
        parts.append(part["o"])
        state = part["final_state"]
    assert same_bits(torch.cat(parts, 1), whole["o"]) and same_bits(state, whole["final_state"])


@each_layout_of(POOLED)
def test_token_by_token_on_a_pool_equals_one_call(kernel):
    op, case = kernel
    a = draw(op, case)
    pool = a["initial_state_source"].clone()
    whole = check(op, a)
    steps = []
    for t in range(4):
        names = ("q", "k", "v", *flat_gates(op))
        step = {**a, "initial_state_source": pool, **{n: a[n][:, t : t + 1] for n in names}}
        steps.append(call(op, step)["o"])
    exact = pool.dtype == torch.float32
    # A low-precision pool rounds the state after every call, and only then.
    limit = 0.0 if exact else 2 * torch.finfo(pool.dtype).eps
    for got, want in ((torch.cat(steps, 1), whole["o"]), (pool, whole["initial_state_source"])):
        difference = (got.double() - want.double()).square().mean().sqrt()
        assert difference <= limit * want.double().square().mean().sqrt()


@each_pool_op
def test_each_batch_item_has_its_own_gates(op):
    a = draw(op, POOLED)
    together = check(op, {**a, "initial_state_source": a["initial_state_source"].clone()})
    for n in range(3):
        names = ("q", "k", "v", *flat_gates(op))
        alone = {**a, **{x: a[x][n : n + 1] for x in names}, "initial_state_indices": a["initial_state_indices"][n : n + 1]}
        assert same_bits(call(op, alone)["o"][0], together["o"][n])
    assert same_bits(a["initial_state_source"], together["initial_state_source"])
    first = {**a, **{name: a[name][:1].expand_as(a[name]) for name in flat_gates(op)}}
    assert not torch.equal(call(op, first)["o"][1:], together["o"][1:])


@pytest.mark.parametrize("op", [UPDATE, SIGMOID])
@pytest.mark.parametrize("disable", [False, True])
def test_tree(op, disable):
    parents = tensor([[-1, 0, 0, 1], [-1, -1, 1, 0]])
    a = draw(op, {**TREE, "disable_state_update": disable}, retrieve_parent_token=parents)
    a["initial_state_indices"], a["intermediate_state_indices"] = tensor([2, 0]), tensor([1, 2])
    start = a["initial_state_source"].clone()
    got = check(op, a)
    # Token 3 of sequence 0 follows 1, which follows 0; token 2 follows 0: two plain sequences, without a buffer.
    for path in ([0, 1, 3], [0, 2]):
        rows = {name: a[name][:1, path] for name in ("q", "k", "v", *flat_gates(op))}
        line = {
            **a, **rows, "initial_state_source": start.clone(), "initial_state_indices": tensor([2]),
            "intermediate_states_buffer": torch.zeros(1, 4, *start.shape[1:]), "retrieve_parent_token": None,
            "intermediate_state_indices": tensor([0]),
        }  # fmt: skip
        line["retrieve_parent_token"] = tensor([[-1, 0, 1, 2]])
        straight = call(op, line)
        assert same_bits(straight["o"][0], got["o"][0, path])
        assert same_bits(line["intermediate_states_buffer"][0, : len(path)], a["intermediate_states_buffer"][1, path])
    assert same_bits(a["initial_state_source"], start) == disable


def test_tree_starts_from_the_rounded_state_and_from_zero_without_a_slot():
    a = draw(UPDATE, {**TREE, **VARIANTS["bf16-state"]}, retrieve_parent_token=tensor([[-1, 0, 0, 1]] * 2))
    a["intermediate_state_indices"] = tensor([0, -1])
    want = parity.expected(OPS[UPDATE], a)
    got = call(UPDATE, a)
    for name, value in want.items():
        assert parity.rms_ratio(got[name], value) <= parity.limit(OPS[UPDATE], name, got[name].dtype)


@pytest.mark.parametrize("dtypes", INDEX_DTYPES, ids="-".join)
def test_mixed_index_dtypes(dtypes):
    a = draw(UPDATE, mixed(*dtypes))
    assert (str(a["cu_seqlens"].dtype), str(a["initial_state_indices"].dtype)) == (f"torch.{dtypes[0]}", f"torch.{dtypes[1]}")
    check(UPDATE, a)


@each_layout
@each_pool_op
def test_varlen_without_buffer_slots_and_defaults(op, v_first):
    check(op, draw(op, {**VARLEN, "index_dtype": "int32", "state_v_first": v_first}))


def test_defaults_of_pool_and_slots():
    a = draw(UPDATE, {**ONE, "with": POOL[:1]})
    got = check(UPDATE, {**a, "initial_state_source": a["initial_state_source"].clone()})
    a["initial_state_indices"] = torch.arange(4)
    assert same_bits(call(UPDATE, a)["o"], got["o"])
    check(UPDATE, draw(UPDATE, {**ONE, "with": ()}))


@pytest.mark.sampled
@pytest.mark.parametrize("kernel", [(UPDATE, odd(*sizes, v_first)) for sizes in ODD_SIZES for v_first in (False, True)])
def test_any_head_size(kernel):
    check(UPDATE, draw(*kernel))


def test_one_token_sequences_on_the_batch_axis():
    a = draw(UPDATE, {**VARLEN, "lengths": (1,) * 5, "index_dtype": "int32"})
    packed = call(UPDATE, {**a, "initial_state_source": a["initial_state_source"].clone()})
    rows = {name: a[name].transpose(0, 1) for name in ("q", "k", "v", "g", "beta")}
    got = call(UPDATE, {**a, **rows})
    assert got["o"].shape == (5, 1, 4, 64)
    assert same_bits(got["o"][:, 0], packed["o"][0])
    assert same_bits(got["initial_state_source"], packed["initial_state_source"])

    a = draw(SIGMOID, {**VARLEN, "lengths": (1,) * 5, "index_dtype": "int32"})
    packed = check(SIGMOID, {**a, "initial_state_source": a["initial_state_source"].clone()})
    for flat in (False, True):
        rows = {name: a[name].transpose(0, 1) for name in ("q", "k", "v", "a", "b")}
        if flat:
            rows |= {name: a[name][0] for name in ("a", "b")}
        pool = a["initial_state_source"].clone()
        o = tvm_gdn.fused_sigmoid_gating_delta_rule_update(**{**a, **rows, "initial_state_source": pool})
        assert o.shape == (5, 1, 4, 64) and same_bits(o[:, 0], packed["o"][0])

    a = draw(RECURRENT, {**SEPARATE, "lengths": (1,) * 3, "K": 32, "V": 256, "with": ("initial_state", "cu_seqlens")})
    packed = check(RECURRENT, a)
    o, final = tvm_gdn.fused_recurrent_gated_delta_rule(
        **{**a, **{name: a[name].transpose(0, 1) for name in ("q", "k", "v", "g", "beta")}}
    )
    assert same_bits(o[:, 0], packed["o"][0]) and same_bits(final, packed["final_state"])


def test_a_pool_given_to_the_recurrent_form():
    a = draw(UPDATE, POOLED)
    want = check(UPDATE, {**a, "initial_state_source": a["initial_state_source"].clone()})
    pool = a["initial_state_source"]
    o, final = tvm_gdn.fused_recurrent_gated_delta_rule(
        *(a[name] for name in ("q", "k", "v", "g", "beta")), initial_state=pool,
        initial_state_indices=a["initial_state_indices"],
    )  # fmt: skip
    assert final is None and same_bits(o, want["o"]) and same_bits(pool, want["initial_state_source"])


def test_grouped_value_heads_read_their_group():
    a = draw(UPDATE, {**POOLED, "HV": 6})
    check(UPDATE, {**a, "initial_state_source": a["initial_state_source"].clone()})
    repeated = {name: a[name].repeat_interleave(3, 2) for name in ("q", "k")}
    alone = call(UPDATE, {**a, **repeated, "initial_state_source": a["initial_state_source"].clone()})
    assert same_bits(alone["o"], call(UPDATE, a)["o"])


def allocated(function):
    """Bytes that a call allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    sizes = [event.self_cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
    if not sizes:
        sizes = [event.self_device_memory_usage or event.self_cpu_memory_usage for event in profile.key_averages()]
    return sum(size for size in sizes if size > 0)


@each_layout_of({**POOLED, "T": 65})
def test_slices_of_a_packed_projection_are_not_copied(kernel):
    op, case = kernel
    a = draw(op, case)
    want = check(op, {**a, "initial_state_source": a["initial_state_source"].clone()})
    mixed = torch.cat([a["q"].flatten(2), a["k"].flatten(2), a["v"].flatten(2), a["v"].flatten(2) * torch.nan], 2)
    q, k, v, _ = mixed.split([128, 128, 128, 128], 2)
    sliced = {**a, "q": q.unflatten(2, (2, 64)), "k": k.unflatten(2, (2, 64)), "v": v.unflatten(2, (4, 32))}
    assert not sliced["q"].is_contiguous() and sliced["q"].data_ptr() == mixed.data_ptr()
    got = []
    memory = allocated(lambda: got.append(call(op, sliced)))
    assert same_bits(got[0]["o"], want["o"]) and same_bits(got[0]["initial_state_source"], want["initial_state_source"])
    size = got[0]["o"].numel() * got[0]["o"].element_size()
    assert size <= memory < size + 1024
    # Tokens of a [T, B, ...] projection, and heads that are not neighbours.
    turned = {name: a[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v")}
    turned["k"] = torch.stack([a["k"], a["k"] * torch.nan], 3).flatten(2, 3)[:, :, ::2]
    assert not turned["k"].is_contiguous()
    pool = draw(op, case)["initial_state_source"]
    assert same_bits(call(op, {**a, **turned, "initial_state_source": pool})["o"], want["o"])


def test_packed_decode_rows_may_be_strided():
    a = draw(PACKED, PACKED_STEP)
    want = check(PACKED, {**a, "initial_state_source": a["initial_state_source"].clone()})
    rows = torch.cat([a["mixed_qkv"], torch.full((5, 3), torch.nan)], 1)[:, :-3]
    gates = {name: torch.stack([a[name], a[name] * torch.nan], -1)[..., 0] for name in ("a", "b")}
    assert same_bits(call(PACKED, {**a, **gates, "mixed_qkv": rows})["o"], want["o"])


@each_layout_of(POOLED)
def test_one_layer_of_a_pool_of_layers(kernel):
    op, case = kernel
    a = draw(op, case)
    pool = a["initial_state_source"].clone()
    want = check(op, a)
    layers = torch.empty(6, 3, *pool.shape[1:], dtype=pool.dtype)
    poison(layers)
    layers[:, 1] = pool
    before = layers.clone()
    got = call(op, {**a, "initial_state_source": layers[:, 1]})
    assert same_bits(got["o"], want["o"]) and same_bits(layers[:, 1], want["initial_state_source"])
    assert same_bits(layers[:, [0, 2]], before[:, [0, 2]])


def test_buffer_and_initial_state_may_be_strided():
    a = draw(UPDATE, VERIFY)
    want = check(UPDATE, {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in a.items()})
    wide = torch.full((3, 2, 8, *a["intermediate_states_buffer"].shape[2:]), torch.nan)
    view = wide[:, 0, :5]
    assert not view.is_contiguous()
    call(UPDATE, {**a, "intermediate_states_buffer": view})
    assert same_bits(view[:, :4], want["intermediate_states_buffer"][:, :4])
    assert wide[:, 1].isnan().all() and wide[:, 0, 5:].isnan().all()
    a = draw(RECURRENT, SEPARATE)
    wide = torch.stack([a["initial_state"], a["initial_state"] * torch.nan], 1)
    assert same_bits(call(RECURRENT, {**a, "initial_state": wide[:, 0]})["o"], check(RECURRENT, a)["o"])


@each_pool_op
def test_gates_take_any_strides(op):
    a = draw(op, POOLED)
    want = check(op, {**a, "initial_state_source": a["initial_state_source"].clone()})
    views = [
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda x: torch.stack([x, x * torch.nan], -1)[..., 0],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    for view in views:
        gates = {name: view(a[name]) for name in flat_gates(op)}
        pool = draw(op, POOLED)["initial_state_source"]
        assert same_bits(call(op, {**a, **gates, "initial_state_source": pool})["o"], want["o"])
    constant = {name: a[name][:1, :1, :1].expand(3, 4, 4) for name in flat_gates(op)}
    assert constant["g" if op == UPDATE else "a"].stride() == (0, 0, 0)
    check(op, {**a, **constant})


def test_gating_takes_any_strides_and_leading_axes():
    a_log, dt_bias = torch.rand(6), torch.rand(6)
    a, b = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    g, beta = tvm_gdn.fused_gdn_gating(a_log, a, b, dt_bias)
    assert (g.shape, beta.shape) == (a.shape, b.shape)
    packed = torch.cat([a, b], -1)
    views = [
        packed.split(6, -1),
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (a, b)],
        [torch.stack([x, x * torch.nan], -1)[..., 0] for x in (a, b)],
    ]
    for left, right in views:
        for got, want in zip(tvm_gdn.fused_gdn_gating(a_log, left, right, dt_bias), (g, beta), strict=True):
            assert same_bits(got, want)
    for got, want in zip(tvm_gdn.fused_gdn_gating(a_log, a[0, 0], b[0, 0], dt_bias), (g, beta), strict=True):
        assert same_bits(got, want[0, 0])


@each_layout_of(POOLED)
def test_tensors_aligned_to_one_element(kernel):
    op, case = kernel
    a = draw(op, case)

    def shifted(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)

    moved = {name: shifted(x) for name, x in a.items()}
    assert moved["q"].data_ptr() % 64 and moved["initial_state_source"].data_ptr() % 64
    want = check(op, a)
    got = call(op, moved)
    assert same_bits(got["o"], want["o"]) and same_bits(got["initial_state_source"], want["initial_state_source"])


def test_offsets_beyond_2_to_the_31():
    try:
        huge = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)  # address space alone: few of its pages are touched
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    case = {**POOLED, **VARIANTS["bf16-state"], "B": 1, "T": 2, "S": 2}
    a = draw(UPDATE, case, initial_state_indices=tensor([1]))
    far = huge.as_strided((2, 4, 64, 32), (2**31, 2048, 32, 1))
    rows = huge[8192 * 2 :].as_strided((1, 2, 2, 64), (0, 2**31, 64, 1))
    far[1], rows[...] = a["initial_state_source"][1], a["q"]
    want = check(UPDATE, a)
    got = call(UPDATE, {**a, "initial_state_source": far, "q": rows})
    assert same_bits(got["o"], want["o"]) and same_bits(far[1], want["initial_state_source"][1])


def test_sizes_do_not_compile_again(monkeypatch):
    for op, case in ((UPDATE, POOLED), (SIGMOID, POOLED), (RECURRENT, SEPARATE), (PACKED, PACKED_STEP)):
        call(op, draw(op, case))
    call(UPDATE, draw(UPDATE, {**VARLEN, "index_dtype": "int32"}))

    def refuse(spec, geometry, device):
        raise AssertionError(f"{spec.name} [{geometry}] is looked up again")

    monkeypatch.setattr(dispatch, "lookup", refuse)
    for op in (UPDATE, SIGMOID):
        for sizes in ({"B": 1, "S": 1}, {"B": 7, "T": 63, "S": 50}, {"H": 1, "HV": 1}, {"H": 3, "HV": 12, "T": 1}):
            check(op, draw(op, {**POOLED, **sizes}))
    check(RECURRENT, draw(RECURRENT, {**SEPARATE, "B": 5, "T": 1, "H": 1, "HV": 3}))
    check(PACKED, draw(PACKED, {**PACKED_STEP, "B": 1, "H": 1, "HV": 1, "S": 2}))
    check(UPDATE, draw(UPDATE, {**VARLEN, "lengths": (1, 65, 2), "index_dtype": "int32", "S": 3}))


def test_the_same_call_gives_the_same_bits_on_any_number_of_threads():
    a = draw(UPDATE, {**POOLED, "B": 5})
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(check(UPDATE, {**a, "initial_state_source": a["initial_state_source"].clone()}))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert all(same_bits(got[name], results[0][name]) for name in got)
