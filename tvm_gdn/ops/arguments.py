"""What the delta-rule operators share: arguments, cost model, the view of one-token batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tvm_gdn.ops import draws
from tvm_gdn.ops.rules import NO_STEPS, check_recurrent
from tvm_gdn.spec import INTS, ITEMSIZE, Geometry, Output, Scalar, Tensor


def default_scale(axes: Mapping[str, int]) -> float:
    """Attention's usual factor on q."""
    return float(axes["K"]) ** -0.5


def no_steps(axes: Mapping[str, int]) -> int:
    """What kernels get for `cache_steps` where the caller gives none."""
    del axes
    return NO_STEPS


def full_strength(beta: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor:
    """Write strength; ones where a neighbour's function has it left out."""
    return v.new_ones(v.shape[:-1]) if beta is None else beta


def cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor of a call: every state read and written once, every token's rows once; 3 multiply-adds per state element."""
    tokens, sequences = sizes["B"] * sizes["T"], sizes["N"]
    heads, H, K, V = sizes["HV"], sizes["H"], geometry.axis["K"], geometry.axis["V"]
    dtypes = geometry.dtype
    data = ITEMSIZE[dtypes.get("q", dtypes.get("mixed_qkv", "float32"))]
    state_name = next((n for n in ("initial_state_source", "initial_state") if n in dtypes), None)
    state = 0
    if state_name:
        state = 2 * sequences * heads * K * V * ITEMSIZE[dtypes[state_name]]
    elif geometry.attr.get("output_final_state"):
        state = sequences * heads * K * V * 4
    rows = tokens * (2 * H * K + 2 * heads * V) * data
    return state + rows, tokens * heads * K * V * 7


QUERY = Tensor("q", "B T H K", role="data", values=draws.unit)
KEY = Tensor("k", "B T H K", role="data", values=draws.unit)
VALUE = Tensor("v", "B T HV V", role="data")
GATE = Tensor("g", "B T HV", strides="any", usual="float32", values=draws.log_decay)
BETA = Tensor("beta", "B T HV", strides="any", values=draws.strength)
A_LOG = Tensor("A_log", "HV", strides="dense", usual="float32", values=draws.log_rate)
DT_BIAS = Tensor("dt_bias", "HV", strides="dense")
A = Tensor("a", "B T HV", strides="any")
B = Tensor("b", "B T HV", strides="any")
SCALE = Scalar("scale", "float", None, resolve=default_scale)
SOFTPLUS = (Scalar("softplus_beta", "float", drawn=1.0), Scalar("softplus_threshold", "float", drawn=20.0))
POOL = Tensor(
    "initial_state_source",
    "S HV K V",
    axes_if=("state_v_first", "S HV V K"),
    role="state",
    optional=True,
    mutated=True,
    strides="outer",
    usual="float32",
)
#: The pool of operators that have no other state.
OWN_POOL = replace(POOL, optional=False)
SLOTS = Tensor("initial_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values=draws.slots)
CU_SEQLENS = Tensor("cu_seqlens", "N+1", dtypes=INTS, optional=True, strides="dense", values=draws.bounds)
L2NORM = Scalar("use_qk_l2norm_in_kernel", "bool", False)
V_FIRST = Scalar("state_v_first", "bool", False, static=True, passed=False)
VERIFY = (
    Scalar("disable_state_update", "bool", False),
    Tensor(
        "intermediate_states_buffer",
        "C P HV K V",
        axes_if=("state_v_first", "C P HV V K"),
        role="state",
        optional=True,
        mutated=True,
        strides="outer2",
        usual="float32",
        values=draws.unset,
    ),
    Tensor("intermediate_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values=draws.buffer_slots),
    Scalar("cache_steps", "int", None, resolve=no_steps),
    Tensor("retrieve_parent_token", "N P2", dtypes=INTS, optional=True, values=draws.parents),
)
OUT = Output("o", "B T HV V", like="data")

INITIAL = Tensor(
    "initial_state",
    "N HV K V",
    axes_if=("state_v_first", "N HV V K"),
    role="state",
    optional=True,
    strides="outer",
    usual="float32",
)
OUTPUT_FINAL = Scalar("output_final_state", "bool", False, static=True, passed=False)
#: Where an operator on a pool puts the final states as well. An argument and not an output: the empty tensor that stands for an
#: output nobody asked for would cost a decode step a sixth of its call.
FINAL_TOO = Tensor(
    "final_state",
    "N HV K V",
    axes_if=("state_v_first", "N HV V K"),
    role="state",
    optional=True,
    mutated=True,
    strides="dense",
    values=draws.unset,
)
FINAL = Output("final_state", "N HV K V", axes_if=("state_v_first", "N HV V K"), like="state", when="output_final_state")

#: What every operator of the family has in its SPEC.
FAMILY: dict[str, Any] = {
    "check": check_recurrent,
    "cost": cost,
    "derived": (("N", ("cu_seqlens", "B")),),
    "sizes": draws.sizes,
    "smallest": {"K": 8, "V": 8},
    "steady": draws.steady,
}


def tokens_first(tensor: Any) -> Any:
    """[N, 1, ...] seen as [1, N, ...]: one-token sequences as one packed batch, without a copy."""
    return tensor.transpose(0, 1) if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 else tensor


def is_one_token_batch(q: Any, cu_seqlens: torch.Tensor | None) -> bool:
    """Whether q is [N, 1, H, K] with bounds of N one-token sequences."""
    return cu_seqlens is not None and isinstance(q, torch.Tensor) and q.ndim == 4 and q.shape[0] > 1 and q.shape[1] == 1
