"""Calls of the public operators held against the float64 oracle (`oracle.py`)."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import sampling
import torch
from oracle import num, oracle_delta, oracle_gates

import tvm_gdn
from tvm_gdn import cases, dispatch, parity
from tvm_gdn.check import geometry_of
from tvm_gdn.ops import OPS

GATING = "fused_gdn_gating"
RECURRENT = "fused_recurrent_gated_delta_rule"
UPDATE = "fused_recurrent_gated_delta_rule_update"
SIGMOID = "fused_sigmoid_gating_delta_rule_update"
PACKED = "packed_decode_gated_delta_rule"

POOL = ("initial_state_source", "initial_state_indices")
BUFFER = ("intermediate_states_buffer", "intermediate_state_indices")
TREE = (*BUFFER, "retrieve_parent_token")


def _values(op, case, first):
    """What a case is told apart by from others of its algorithm; those of the algorithm's first operator by all of it again."""
    geometry = geometry_of(OPS[op], cases.meta(OPS[op], case))
    values = {**case, **geometry.dtype, **dict(geometry.attrs), "with": None}
    values |= {"square": case.get("K") == case.get("V"), "grouped": case.get("H") != case.get("HV")}
    own = values if op == first else {name: case.get(name) for name in ("dtype", "state_dtype")}
    return {**values, "op": op, **{(op, name): value for name, value in own.items()}}


@functools.cache
def every_case():
    """A test parameter for every case of every SPEC, slow but for a sample of every algorithm (`sampling.py`).

    The sample has every size, dtype, layout, scalar and optional tensor, given or not, that the cases of its operators have, and
    of each operator every dtype of data and of states.
    """
    found = [(op, case) for op, spec in OPS.items() for case in spec.cases]
    usual = set()
    for algorithm in {spec.algorithm for spec in OPS.values()}:
        own = [place for place, (op, _) in enumerate(found) if OPS[op].algorithm == algorithm]
        usual |= {own[n] for n in sampling.places([_values(*found[place], found[own[0]][0]) for place in own])}
    return tuple(
        pytest.param((op, case), id=f"{op} {cases.label(case)}", marks=() if place in usual else pytest.mark.slow)
        for place, (op, case) in enumerate(found)
    )


#: The first operator of every algorithm: the others are other uses of one definition.
ALGORITHMS = tuple({spec.algorithm: op for op, spec in reversed(OPS.items())}.values())
#: A parameter for every operator, slow but for those.
each_operator = [op if op in ALGORITHMS else pytest.param(op, marks=pytest.mark.slow) for op in OPS]


def usual_kernel(op):
    """The first case of an operator that every run has, as a kernel: it is compiled already."""
    return next(parameter.values[0] for parameter in every_case() if not parameter.marks and parameter.values[0][0] == op)


def kernels_of_a_model(dim_k, dim_v, dtype="float32"):
    """What a patched model calls in its gated-delta-net layers: prompts, steps of one sequence and of several."""
    sizes = {"B": 1, "T": 1, "H": 1, "HV": 1, "K": dim_k, "V": dim_v, "S": 2, "dtype": dtype, "state_dtype": "float32"}
    whole = dict.fromkeys(("A_log", "a", "b", "dt_bias"), dtype)
    taps = {"weight_dtype": dtype, "state_dtype": dtype, "activation": "silu"}
    return [
        ("chunk_gated_delta_rule", {**sizes, "output_final_state": True, "with": ()}),
        (
            "fused_conv_gated_delta_rule_update",
            {**sizes, "L": 4, "dtypes": {**whole, "conv_state": dtype, "conv_weight": dtype}, "with": ()},
        ),
        (SIGMOID, {**sizes, "dtypes": whole, "with": POOL[:1]}),
        ("causal_conv1d_update", {"B": 1, "D": 8, "L": 4, "T": 1, "dtype": dtype, **taps, "with": ()}),
        ("rms_norm_gated", {"M": 1, "G": 1, "D": dim_v, "dtype": dtype, "dtypes": {"weight": dtype}, "with": ("z",)}),
    ]


def kernels_of_packed_prompts(dim_k, dim_v, dtype, index_dtype):
    """What a patched model calls for sequences in one row, and for one of them alone, without a cache."""
    sizes = {"H": 1, "HV": 1, "K": dim_k, "V": dim_v, "dtype": dtype, "index_dtype": index_dtype}
    taps = {"D": 8, "W": 4, "L": 0, "activation": "silu", "dtype": dtype, "weight_dtype": dtype, "index_dtype": index_dtype}
    return [
        ("chunk_gated_delta_rule", {"lengths": (2, 2), **sizes, "with": ("cu_seqlens",)}),
        ("chunk_gated_delta_rule", {"B": 1, "T": 1, **sizes, "with": ()}),
        ("causal_conv1d_fn", {"lengths": (2, 2), **taps, "with": ("query_start_loc",)}),
    ]


def kernels_of_experts(count, hidden, inner, dtype="float32", weights=None, **routing):
    """What a patched model calls in its mixtures of experts; `weights` is the dtype of the choices' weights."""
    sizes = {"T": 1, "E": count, "dtype": dtype}
    return [
        ("moe_route", {**sizes, "top_k": 1, **routing}),
        ("fused_experts", {**sizes, "k": 1, "D": hidden, "I": inner, "dtypes": {"topk_weights": weights or dtype}}),
    ]


def draw(op, case, seed=0, **changes):
    """Arguments of one call of an operator by name; `changes` replace drawn ones."""
    arguments = cases.draw(OPS[op], case, seed)
    assert set(changes) <= set(arguments)
    return {**arguments, **changes}


def function(op):
    """The public function of an operator, or its torch operator where that is called through another's function."""
    return getattr(tvm_gdn, op, None) or getattr(torch.ops.tvm_gdn, op)


def call(op, arguments):
    """Outputs of an operator's function by name, then the tensors it writes to (which `arguments` hold)."""
    result = function(op)(**arguments)
    assert dispatch.served_by(op).startswith("compiled")
    values = result if isinstance(result, tuple) else (result,)
    outputs = {output.name: value for output, value in zip(OPS[op].outputs, values, strict=True) if value is not None}
    written = [tensor.name for tensor in OPS[op].tensors if tensor.mutated]
    return outputs | {name: arguments[name] for name in written if arguments.get(name) is not None}


def oracle(op, arguments):
    """What the float64 oracle makes of arguments, in the layout of `call`'s results; arguments stay as they are."""
    a = arguments
    v_first = a.get("state_v_first", False)
    gates = [num(a[name]) for name in ("A_log", "a", "b", "dt_bias")] if "A_log" in a else None
    if gates is not None:
        g, beta = oracle_gates(*gates, a["softplus_beta"], a["softplus_threshold"])
        if op == GATING:
            return {"g": torch.from_numpy(g), "beta": torch.from_numpy(beta)}
    else:
        g, beta = num(a["g"]), num(a["beta"])
    initial = a["initial_state"] if op == RECURRENT else a["initial_state_source"]
    pool, buffer = (
        None if x is None else num(x.transpose(-1, -2) if v_first else x) for x in (initial, a.get("intermediate_states_buffer"))
    )
    if op == PACKED:
        heads, (dim_k, dim_v) = a["A_log"].shape[0], pool.shape[-2:]
        width = (a["mixed_qkv"].shape[1] - heads * dim_v) // 2
        parts = torch.split(a["mixed_qkv"], [width, width, heads * dim_v], 1)
        q, k, v = (num(x).reshape(x.shape[0], -1, dim) for x, dim in zip(parts, (dim_k, dim_k, dim_v), strict=True))
        bounds, shape = list(range(q.shape[0] + 1)), (q.shape[0], 1, heads, dim_v)
    else:
        q, k, v = (num(a[name]).reshape(-1, *a[name].shape[2:]) for name in ("q", "k", "v"))
        batch, tokens = a["q"].shape[:2]
        cu = a["cu_seqlens"]
        bounds = [n * tokens for n in range(batch + 1)] if cu is None else cu.tolist()
        shape = tuple(a["v"].shape)
    lists = {
        name: None if a.get(name) is None else a[name].tolist()
        for name in ("initial_state_indices", "intermediate_state_indices", "retrieve_parent_token")
    }
    o, finals = oracle_delta(
        q, k, v, g.reshape(-1, g.shape[-1]), beta.reshape(-1, beta.shape[-1]), bounds,
        scale=a["scale"], l2norm=a["use_qk_l2norm_in_kernel"], pool=pool, slots=lists["initial_state_indices"],
        update=op != RECURRENT and not a.get("disable_state_update"), buffer=buffer,
        buffer_slots=lists["intermediate_state_indices"], parents=lists["retrieve_parent_token"],
    )  # fmt: skip
    want = {"o": o.reshape(shape)}
    if op == RECURRENT:
        want |= {"final_state": finals} if a["output_final_state"] else {}
    else:
        written = {"initial_state_source": pool, "intermediate_states_buffer": buffer}
        want |= {name: value for name, value in written.items() if value is not None}
    return {
        name: torch.from_numpy(np.swapaxes(value, -1, -2) if v_first and name != "o" else value) for name, value in want.items()
    }


def check(op, arguments):
    """Run the compiled operator on arguments, hold everything it returns and writes against the oracle, return it."""
    want = oracle(op, arguments)
    got = call(op, arguments)
    assert set(got) == set(want)
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        error = parity.rms_ratio(value, want[name])
        assert error <= parity.limit(OPS[op], name, value.dtype), (name, error)
        if name == "o" and value.numel() and arguments.get("scale") != 0:
            assert parity.rms_ratio(torch.zeros_like(value), want[name]) > 0.5
    return got


def bits(tensor):
    """The bit patterns of a tensor: NaN payloads and signs of zeros count."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(left, right):
    return left.shape == right.shape and torch.equal(bits(left), bits(right))
