"""Published models: the shapes of their layers, and the kernels that a server of them calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec


@dataclass(frozen=True)
class Experts:
    """Mixture of experts of a model.

    Parameters
    ----------
    axes : mapping
        D, I and E of the routed experts.
    shared : int
        I of the shared expert; 0 if there is none.
    route : mapping
        Static arguments of `moe_route`.
    logits : str
        Dtype of the router's logits, and so of the weights that transformers' routers return.
    """

    axes: Mapping[str, int]
    shared: int = 0
    route: Mapping[str, Any] = field(default_factory=dict)
    logits: str = "bfloat16"


@dataclass(frozen=True)
class Model:
    """What the operators need to know of a model.

    Parameters
    ----------
    summary : str
        One line for listings.
    axes : mapping
        Sizes of its gated-delta-rule layers by axis name; empty if it has none.
    experts : Experts, optional
        Its mixture of experts.
    dtype : str
        Dtype of its activations.
    taps : int
        Width of its convolution.
    """

    summary: str
    axes: Mapping[str, int]
    experts: Experts | None = None
    dtype: str = "bfloat16"
    taps: int = 4

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether a case has this model's sizes; axes that the case does not state do not count."""
        if not self.axes and ("HV" in case or "W" in case):
            return False
        return all(case.get(axis, size) == size for axis, size in self.axes.items())


_GDN = {"H": 16, "HV": 32, "K": 128, "V": 128}
_GROUPS = {"scoring": "sigmoid", "num_expert_group": 8, "topk_group": 4, "with": ("correction_bias",)}
#: Sizes: the published configurations, as transformers has them for defaults.
MODELS = {
    "qwen3-next": Model("Qwen3-Next-80B-A3B", _GDN, Experts({"D": 2048, "I": 512, "E": 512}, shared=512)),
    "qwen3.5": Model("Qwen3.5, dense", _GDN),
    "qwen3.5-moe": Model("Qwen3.5-35B-A3B", _GDN, Experts({"D": 2048, "I": 512, "E": 256}, shared=512)),
    "olmo-hybrid": Model("Olmo-Hybrid-7B", {"H": 30, "HV": 30, "K": 96, "V": 192}),
    "qwen3-moe": Model("Qwen3-30B-A3B", {}, Experts({"D": 2048, "I": 768, "E": 128})),
    "deepseek-v3": Model("DeepSeek-V3", {}, Experts({"D": 7168, "I": 2048, "E": 256}, 2048, _GROUPS, "float32")),
}

_POOL = ("initial_state_source", "initial_state_indices")
_VERIFY = (*_POOL, "cu_seqlens", "intermediate_states_buffer", "intermediate_state_indices")
#: Optional tensors of the calls that an engine makes, by operator.
_CALLS: dict[str, tuple[tuple[str, ...], ...]] = {
    # Prefill, in chunks or token by token: first and later pieces of a prompt, one batch or packed sequences.
    "chunk_gated_delta_rule": ((), ("cu_seqlens",), ("initial_state",), ("initial_state", "cu_seqlens")),
    "chunk_gated_delta_rule_update": (_POOL, (*_POOL, "cu_seqlens")),
    "fused_recurrent_gated_delta_rule": ((), ("cu_seqlens",), ("initial_state",), ("initial_state", "cu_seqlens")),
    # Decode as a batch or as packed one-token sequences; verification of drafted chains and trees.
    "fused_recurrent_gated_delta_rule_update": (_POOL, (*_POOL, "cu_seqlens"), _VERIFY, (*_VERIFY, "retrieve_parent_token")),
    "fused_sigmoid_gating_delta_rule_update": (_POOL, (*_POOL, "cu_seqlens"), _VERIFY, (*_VERIFY, "retrieve_parent_token")),
    "packed_decode_gated_delta_rule": (_POOL,),
}


def model(name: str) -> Model:
    """The model of that name.

    Raises
    ------
    ArgumentError
        There is none; the message lists those that exist.
    """
    if name not in MODELS:
        raise ArgumentError(f"model {name!r} is not known; allowed: {', '.join(MODELS)}")
    return MODELS[name]


def kernels(name: str | Model) -> list[tuple[OpSpec, Geometry]]:
    """Kernels that a server of a model calls, and a patched model of transformers (`integrations/transformers.py`).

    Parameters
    ----------
    name : str or Model
        A name of `MODELS`, or the facts themselves.

    Returns
    -------
    list of (OpSpec, Geometry)
        Data in the model's dtype. Delta rule: states in fp32 and bf16, in both layouts; slots, bounds and parents in int32 and
        int64; decode with and without ``cu_seqlens`` and with its convolution inside, verification of chains and trees, prefill
        with and without a state. Convolution with and without states, gated norm. Routing, and experts on dense weights and on
        packs of every scheme.

    Raises
    ------
    ArgumentError
        No such model.
    """
    facts = name if isinstance(name, Model) else model(name)
    found: dict[tuple[str, str], tuple[OpSpec, Geometry]] = {}
    for op, case in (*_delta_cases(facts), *_layer_cases(facts), *_expert_cases(facts)):
        geometry = geometry_of_case(OPS[op], case)
        found[op, geometry.key] = (OPS[op], geometry)
    return list(found.values())


def bench(spec: OpSpec, name: str | None = None) -> list[dict[str, Any]]:
    """Benchmark shapes of an operator; of experts with a model's hidden sizes where it is named and has experts."""
    facts = None if name is None else model(name)
    sizes = {axis: facts.experts.axes[axis] for axis in "DI"} if facts and facts.experts else {}
    return [{**case, **sizes} if {"D", "I"} <= set(case) else dict(case) for case in spec.bench]


_Case = tuple[str, dict[str, Any]]
_DENSE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _parameters(facts: Model) -> tuple[dict[str, str], ...]:
    """Dtypes of A_log and dt_bias: a model cast as a whole, a checkpoint with an A_log in fp32, an engine that upcasts both."""
    pairs = ((facts.dtype, facts.dtype), ("float32", facts.dtype), ("float32", "float32"))
    return tuple({"A_log": rate, "dt_bias": bias} for rate, bias in dict.fromkeys(pairs))


def _delta_cases(facts: Model) -> Iterator[_Case]:
    """Gates and delta rule."""
    if not facts.axes:
        return
    base = {**facts.axes, "dtype": facts.dtype}
    for dtypes in _parameters(facts):
        yield "fused_gdn_gating", {**base, "M": 1, "dtypes": dtypes}
    states = [{"state_dtype": dtype, "state_v_first": v_first} for dtype in ("float32", facts.dtype) for v_first in (False, True)]
    for op, calls in _CALLS.items():
        for given in calls:
            for state in states:
                for index in ("int32", "int64"):
                    yield op, {**base, **state, "with": given, "index_dtype": index, "output_final_state": True}
    # transformers keeps one state per sequence and layer, in order: a pool without slots; and none at all without a cache.
    for dtype in ("float32", facts.dtype):
        case = {**base, "state_dtype": dtype, "with": ("initial_state_source",)}
        yield "fused_recurrent_gated_delta_rule_update", case
        for dtypes in _parameters(facts):
            yield "fused_sigmoid_gating_delta_rule_update", {**case, "dtypes": dtypes}
            # A step of one sequence, whose convolution state holds as many inputs as there are taps.
            step = {"B": 1, "W": facts.taps, "L": facts.taps, "conv_state_dtype": facts.dtype, "state_dtype": dtype, "with": ()}
            yield "fused_conv_gated_delta_rule_update", {**base, **step, "dtypes": dtypes}
    yield "chunk_gated_delta_rule", {**base, "with": (), "output_final_state": False}
    for index in ("int32", "int64"):
        case = {**base, "with": ("cu_seqlens",), "index_dtype": index, "output_final_state": False}
        yield "chunk_gated_delta_rule", case


def _layer_cases(facts: Model) -> Iterator[_Case]:
    """Convolution and gated norm around the delta rule."""
    if not facts.axes:
        return
    H, HV, K, V = (facts.axes[axis] for axis in ("H", "HV", "K", "V"))
    base = {"D": 2 * H * K + HV * V, "W": facts.taps, "dtype": facts.dtype, "state_dtype": facts.dtype, "activation": "silu"}
    # transformers keeps as many inputs as there are taps, and hands its convolution the earlier ones in front of the new.
    yield "causal_conv1d_fn", {**base, "T": 2, "with": ()}
    yield "causal_conv1d_update", {**base, "L": facts.taps, "with": ()}
    for index in ("int32", "int64"):
        for given in ((), ("conv_states", "cache_indices", "has_initial_state")):
            case = {**base, "lengths": (1, 1), "with": ("query_start_loc", *given), "index_dtype": index}
            yield "causal_conv1d_fn", case
        yield "causal_conv1d_update", {**base, "with": ("conv_state_indices",), "index_dtype": index}
    for weight in (facts.dtype, "float32"):
        yield "rms_norm_gated", {"M": 1, "G": HV, "D": V, "with": ("z",), "dtype": facts.dtype, "weight_dtype": weight}


def _expert_cases(facts: Model) -> Iterator[_Case]:
    """Routing and experts, with the routing of transformers (ids int64, weights as its logits) and with that of `moe_route`."""
    if facts.experts is None:
        return
    mixture = facts.experts
    bias = {"dtypes": {"correction_bias": "float32"}} if "with" in mixture.route else {}
    yield "moe_route", {"T": 1, "E": mixture.axes["E"], "top_k": 1, "dtype": mixture.logits, **mixture.route, **bias}
    routings = dict.fromkeys((("int64", mixture.logits), ("int64", "float32"), ("int32", "float32")))
    for index, weights in routings:
        yield "moe_sort", {"T": 1, "k": 1, "num_experts": 1, "E": 1, "index_dtype": index}
        for inner in dict.fromkeys((mixture.axes["I"], mixture.shared or mixture.axes["I"])):
            base = {**mixture.axes, "I": inner, "T": 1, "k": 1, "dtype": facts.dtype, "index_dtype": index}
            base["dtypes"] = {"topk_weights": weights}
            yield "fused_experts", base
            # A pack of the activations' dtype and, at 4 and 2 times fewer bytes, the quantized ones.
            yield "fused_experts_packed", {**base, "scheme": _DENSE[facts.dtype]}
            for scheme in ("int8", "int4", "int4_kgroup"):
                scale = "bfloat16" if scheme == "int4_kgroup" else "float32"
                yield "fused_experts_quantized", {**base, "scheme": scheme, "scale_dtype": scale}
