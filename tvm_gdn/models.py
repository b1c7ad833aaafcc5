"""Published models: the shapes of their layers, and the kernels that a server of them calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec


@dataclass(frozen=True)
class Model:
    """What the operators need to know of a model.

    Parameters
    ----------
    summary : str
        One line for listings.
    axes : mapping
        Sizes of its gated-delta-rule layers by axis name.
    dtype : str
        Dtype of its activations.
    """

    summary: str
    axes: Mapping[str, int]
    dtype: str = "bfloat16"

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether a case has this model's sizes; axes that the case does not state do not count."""
        return all(case.get(axis, size) == size for axis, size in self.axes.items())


MODELS = {
    "qwen3-next": Model("Qwen3-Next-80B-A3B", {"H": 16, "HV": 32, "K": 128, "V": 128}),
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


def kernels(name: str) -> list[tuple[OpSpec, Geometry]]:
    """Kernels that a server of a model calls.

    Parameters
    ----------
    name : str
        A name of `MODELS`.

    Returns
    -------
    list of (OpSpec, Geometry)
        Data in the model's dtype; states in fp32 and bf16, in both layouts; slots, bounds and parents in int32 and int64;
        decode with and without ``cu_seqlens``, verification of chains and trees, prefill with and without a state.

    Raises
    ------
    ArgumentError
        No such model.
    """
    found: dict[tuple[str, str], tuple[OpSpec, Geometry]] = {}
    for op, case in _cases(model(name)):
        geometry = geometry_of_case(OPS[op], case)
        found[op, geometry.key] = (OPS[op], geometry)
    return list(found.values())


def _cases(facts: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    base = {**facts.axes, "dtype": facts.dtype}
    # Checkpoints keep dt_bias in the dtype of the activations; engines that upcast it once hold it in fp32.
    for dt_bias in (facts.dtype, "float32"):
        yield "fused_gdn_gating", {**base, "M": 1, "dtypes": {"dt_bias": dt_bias}}
    states = [{"state_dtype": dtype, "state_v_first": v_first} for dtype in ("float32", facts.dtype) for v_first in (False, True)]
    for op, calls in _CALLS.items():
        for given in calls:
            for state in states:
                for index in ("int32", "int64"):
                    yield op, {**base, **state, "with": given, "index_dtype": index, "output_final_state": True}
    # transformers keeps one state per sequence and layer, in order: a pool without slots.
    for dtype in ("float32", facts.dtype):
        case = {**base, "state_dtype": dtype, "with": ("initial_state_source",)}
        yield "fused_recurrent_gated_delta_rule_update", case
