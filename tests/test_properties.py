"""Properties of the pool operators over drawn shapes, slots, sequence bounds and options, on a few geometries."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from calls import BUFFER, POOL, SIGMOID, UPDATE, call, check, draw, same_bits
from hypothesis import HealthCheck, given, settings

from tvm_gdn import cases

#: Every geometry is a kernel to compile: these are all SPEC cases', whatever sizes a test draws.
DENSE = [
    {"K": 8, "V": 8, "with": POOL, "dtype": "float32"},
    {"K": 64, "V": 32, "with": (*POOL, *BUFFER), "dtype": "float16", "state_dtype": "float16"},
]
PACKED = [
    {"K": 32, "V": 64, "with": (*POOL, "cu_seqlens"), "index_dtype": "int32", "dtype": "float32"},
    {"K": 32, "V": 64, "with": (*POOL, "cu_seqlens"), "index_dtype": "int32", "dtype": "bfloat16", "state_dtype": "bfloat16"},
]
SHAPE = {"H": 1, "HV": 1, "S": 4}
KERNELS = [
    (op, {**SHAPE, "B": 2, **case, **({"lengths": (1, 1)} if case in PACKED else {}), "state_v_first": v_first})
    for op in (UPDATE, SIGMOID)
    for case in DENSE + PACKED
    for v_first in (False, True)
]

few = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
each_op = pytest.mark.parametrize("op", [UPDATE, SIGMOID])


@st.composite
def arguments(draw_from, op, geometries):
    """Arguments of one call."""
    geometry = draw_from(st.sampled_from(geometries))
    heads = draw_from(st.integers(1, 3))
    case = {
        **geometry, "H": heads, "HV": heads * draw_from(st.integers(1, 3)), "state_v_first": draw_from(st.booleans()),
        "use_qk_l2norm_in_kernel": draw_from(st.booleans()), "disable_state_update": draw_from(st.booleans()),
        "scale": draw_from(st.sampled_from([None, 1.0, 0.37])),
    }  # fmt: skip
    if "cu_seqlens" in geometry["with"]:
        case["lengths"] = tuple(draw_from(st.lists(st.integers(0, 7), max_size=5)))
        sequences = len(case["lengths"])
    else:
        case |= {"B": draw_from(st.integers(0, 4)), "T": draw_from(st.integers(0, 9))}
        sequences = case["B"]
    case["S"] = sequences + draw_from(st.integers(0, 3))
    a = draw(op, case, seed=draw_from(st.integers(0, 2**16)))
    for name in ("initial_state_indices", "intermediate_state_indices"):
        if a[name] is not None:
            padding = draw_from(st.lists(st.booleans(), min_size=sequences, max_size=sequences))
            a[name][torch.tensor(padding, dtype=torch.bool)] = -1
    if op == UPDATE:
        a["g"] *= draw_from(st.sampled_from([1.0, 5.0, -0.2]))
    return a


@each_op
@few
@given(data=st.data())
def test_any_call_matches_the_oracle(op, data):
    a = data.draw(arguments(op, DENSE + PACKED))
    written = {name: a[name].clone() for name in ("initial_state_source", "intermediate_states_buffer") if a[name] is not None}
    read = cases.clone(a)
    got = check(op, a)
    used = set() if a["disable_state_update"] else set(a["initial_state_indices"].tolist())
    for slot in set(range(written["initial_state_source"].shape[0])) - used:
        assert same_bits(got["initial_state_source"][slot], written["initial_state_source"][slot])
    for name, value in read.items():
        if isinstance(value, torch.Tensor) and name not in written:
            assert same_bits(a[name], value)


@each_op
@few
@given(data=st.data())
def test_sequences_do_not_know_their_neighbours(op, data):
    """Any order of the packed sequences, and each alone, gives the same bits."""
    a = data.draw(arguments(op, PACKED))
    bounds = a["cu_seqlens"].tolist()
    order = data.draw(st.permutations(range(len(bounds) - 1)))
    names = [name for name in ("q", "k", "v", "g", "beta", "a", "b") if name in a]
    together = check(op, cases.clone(a))
    pool = a["initial_state_source"].clone()
    for n in order:
        rows = {name: a[name][:, bounds[n] : bounds[n + 1]] for name in names}
        alone = {
            **a, **rows, "cu_seqlens": torch.tensor([0, bounds[n + 1] - bounds[n]], dtype=torch.int32),
            "initial_state_indices": a["initial_state_indices"][n : n + 1], "initial_state_source": pool,
        }  # fmt: skip
        assert same_bits(call(op, alone)["o"], together["o"][:, bounds[n] : bounds[n + 1]])
    assert same_bits(pool, together["initial_state_source"])


@each_op
@few
@given(data=st.data())
def test_any_split_equals_the_whole(op, data):
    """fp32 states carry over from call to call without a rounding, whatever the cut."""
    a = data.draw(arguments(op, DENSE[:1]))
    a["disable_state_update"] = False
    used = a["initial_state_indices"] >= 0
    tokens = a["q"].shape[1]
    cut = data.draw(st.integers(0, tokens))
    names = [name for name in ("q", "k", "v", "g", "beta", "a", "b") if name in a]
    whole = check(op, cases.clone(a))
    parts = [call(op, {**a, **{name: a[name][:, rows] for name in names}})["o"] for rows in (slice(0, cut), slice(cut, None))]
    # Padding has no slot to carry its state over in.
    assert same_bits(torch.cat(parts, 1)[used], whole["o"][used])
    assert same_bits(a["initial_state_source"], whole["initial_state_source"])
