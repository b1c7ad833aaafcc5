"""A whole decode step of a gated-delta-rule layer between its projections: specification and public function.

Convolution, split, gates, l2 norm and recurrence in one pass; the maths stands in `ops/tir/conv_step.py`, `ops/tir/gates.py`
and `ops/tir/delta_rule.py`, where the separate operators have it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.ops import arguments, draws
from tvm_gdn.ops.arguments import A_LOG, DT_BIAS, OWN_POOL, SCALE, SLOTS, V_FIRST
from tvm_gdn.ops.conv import ACTIVATIONS, check_conv
from tvm_gdn.ops.rules import check_recurrent
from tvm_gdn.spec import INTS, ITEMSIZE, Draw, Geometry, OpSpec, Output, Scalar, Tensor


def _sizes(case: Mapping[str, Any]) -> dict[str, int]:
    found = draws.packed_sizes({"W": 4, **case})
    return {"L": found["W"] - 1, "SC": found["N"] + 1, **found}


def _conv_slots(draw: Draw) -> torch.Tensor:
    """Slots of the convolution's states; padding where the recurrence has it."""
    slots = torch.randperm(draw.sizes["SC"], generator=draw.rng)[: draw.sizes["N"]]
    if draw.case.get("padding"):
        slots[:: max(2, draw.sizes["N"] // 2)] = draw.case.get("pad_slot_id", -1)
    return slots


def _cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: that of the recurrence, taps once, and every convolution state read and written once."""
    moved, flops = arguments.cost(sizes, geometry)
    R, W, L = sizes["R"], geometry.axis["W"], geometry.axis["L"]
    moved += R * W * ITEMSIZE[geometry.dtype["conv_weight"]]
    moved += 2 * sizes["N"] * R * L * ITEMSIZE[geometry.dtype["conv_state"]]
    return moved, flops + sizes["B"] * R * (2 * W + 4)


def _check(args: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    check_recurrent(args, sizes)
    check_conv(args, sizes)


_SIZES = {"H": 16, "HV": 32, "K": 128, "V": 128, "W": 4}
_STEP = ("conv_state_indices", "initial_state_indices")

FUSED_CONV_DECODE = OpSpec(
    name="fused_conv_gated_delta_rule_update",
    summary="one decode step between the projections: convolution, gates, l2 norm, recurrence, both states in place",
    algorithm="fused_decode",
    inputs=(
        Tensor("mixed_qkv", "B R", role="data"),
        Tensor("conv_state", "SC R L", role="conv_state", mutated=True, strides="any"),
        Tensor("conv_weight", "R W", strides="any"),
        Tensor("a", "B HV", strides="any"),
        Tensor("b", "B HV", strides="any"),
        A_LOG,
        DT_BIAS,
        OWN_POOL,
        Tensor("conv_bias", "R", optional=True, strides="dense"),
        Tensor("conv_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values=_conv_slots),
        SLOTS,
        SCALE,
        Scalar("use_qk_l2norm_in_kernel", "bool", True),
        Scalar("activation", "str", "silu", static=True, choices=ACTIVATIONS),
        Scalar("softplus_beta", "float", 1.0),
        Scalar("softplus_threshold", "float", 20.0),
        Scalar("pad_slot_id", "int", -1),
        V_FIRST,
    ),
    outputs=(Output("o", "B 1 HV V", like="data"),),
    static_axes=("K", "V", "W", "L"),
    cases=tuple(
        {**case, "dtype": dtype, "conv_state_dtype": dtype, "state_dtype": state, "state_v_first": v_first}
        for case in (
            {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": _STEP, "padding": True},
            {
                "B": 3,
                "H": 3,
                "HV": 3,
                "K": 20,
                "V": 12,
                "W": 3,
                "L": 4,
                "with": ("conv_bias",),
                "activation": None,
                "use_qk_l2norm_in_kernel": False,
            },
        )
        for dtype, state in (("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16"))
        for v_first in (False, True)
    ),
    bench=tuple(
        {
            "B": batch,
            "S": batch,
            "SC": batch,
            **_SIZES,
            "dtype": dtype,
            "conv_state_dtype": dtype,
            "state_dtype": "float32",
            "with": _STEP,
        }
        for dtype in ("bfloat16", "float32")
        for batch in (1, 8, 32)
    ),
    **{**arguments.FAMILY, "sizes": _sizes, "cost": _cost, "check": _check},
)

SPECS = (FUSED_CONV_DECODE,)


def fused_conv_gated_delta_rule_update(
    mixed_qkv: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state_source: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    activation: str | None = "silu",
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    pad_slot_id: int = -1,
    *,
    state_v_first: bool = False,
) -> torch.Tensor:
    """One decode step of a layer between its projections: `causal_conv1d_update`, then `packed_decode_gated_delta_rule`.

    In one pass, in fp32: what the convolution makes of the row is not rounded to the row's dtype on the way.

    Parameters
    ----------
    mixed_qkv : torch.Tensor
        ``[B, 2*H*K + HV*V]`` before the convolution: per row q heads, k heads, v heads; fp32, bf16 or fp16; rows may be strided.
    conv_state : torch.Tensor
        ``[slots, 2*H*K + HV*V, length]`` with length at least width - 1, fp32, bf16 or fp16, any strides: the last inputs of
        every sequence, the newest last; updated in place.
    conv_weight : torch.Tensor
        ``[2*H*K + HV*V, width]``, fp32, bf16 or fp16; width 1 to 8.
    a, b : torch.Tensor
        ``[B, HV]``, fp32, bf16 or fp16 each, any strides.
    A_log, dt_bias : torch.Tensor
        ``[HV]``, fp32, bf16 or fp16 each.
    initial_state_source : torch.Tensor
        Pool ``[slots, HV, K, V]``, updated in place; K, V are read from its shape, HV from `A_log`.
    conv_bias : torch.Tensor, optional
        ``[2*H*K + HV*V]``, fp32, bf16 or fp16.
    conv_state_indices : torch.Tensor, optional
        ``[B]``, int32 or int64: slot of `conv_state` of each sequence, each used once. Default: sequence n uses slot n.
    initial_state_indices, scale, use_qk_l2norm_in_kernel, state_v_first
        As in `fused_recurrent_gated_delta_rule_update`.
    activation : {"silu", "swish", None}
        Applied to what the convolution gives; "swish" is "silu".
    softplus_beta, softplus_threshold : float
        Sharpness of softplus, and where it becomes the identity.
    pad_slot_id : int
        The slot id of padding in `conv_state_indices`: computed from a zero state, no convolution state is written.

    Returns
    -------
    torch.Tensor
        ``[B, 1, HV, V]``, dtype of `mixed_qkv`.

    Raises
    ------
    ArgumentError
        A shape, stride or slot that is not allowed, or a slot that two sequences share; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464), behind the convolution of Mamba (arXiv:2312.00752).
    """
    return direct.call.fused_conv_gated_delta_rule_update(
        mixed_qkv,
        conv_state,
        conv_weight,
        a,
        b,
        A_log,
        dt_bias,
        initial_state_source,
        conv_bias,
        conv_state_indices,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        activation,
        softplus_beta,
        softplus_threshold,
        pad_slot_id,
        state_v_first,
    )
