"""Causal depthwise convolution with a state of the last inputs: specification and public functions.

The maths stands in `ops/tir/conv.py`, once for prefill and decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import draws
from tvm_gdn.ops.rules import check_bounds, check_slots
from tvm_gdn.spec import INTS, ITEMSIZE, Draw, Geometry, OpSpec, Output, Scalar, Tensor, named_sizes

#: Activations of a convolution, and what they mean.
ACTIVATIONS = (("silu", "silu"), ("swish", "silu"), (None, "none"))
_WEIGHT = Tensor("weight", "D W", strides="any")
_BIAS = Tensor("bias", "D", optional=True, strides="dense")
_PAD = Scalar("pad_slot_id", "int", -1)
_OUT = Output("o", "B D T", axes_if=("query_start_loc", "D T"), like="data", strides_of="x")


def _sizes(case: Mapping[str, Any]) -> dict[str, int]:
    sizes = {"W": 4, **named_sizes(case)}
    if "lengths" in case:
        sizes |= {"T": sum(case["lengths"]), "N": len(case["lengths"])}
    sizes.setdefault("T", 1)
    # Without lengths the bounds are those of one packed sequence, and without bounds each batch item is a sequence.
    sizes.setdefault("N", 1 if "query_start_loc" in case.get("with", ()) else sizes.get("B", 1))
    return {"B": 1, "L": sizes["W"] - 1, "S": sizes["N"] + 1, **sizes}


def _x(draw: Draw) -> torch.Tensor:
    """Channels innermost, as the projection in front leaves them, seen as the operator's axes; ``tokens_inner`` for the other."""
    if draw.case.get("tokens_inner"):
        return torch.randn(draw.shape, generator=draw.rng)
    return torch.randn((*draw.shape[:-2], draw.shape[-1], draw.shape[-2]), generator=draw.rng).transpose(-1, -2)


def _slots(draw: Draw) -> torch.Tensor:
    sequences, pad = draw.sizes["N"], draw.case.get("pad_slot_id", -1)
    slots = torch.randperm(draw.sizes["S"], generator=draw.rng)[:sequences]
    if draw.case.get("padding"):
        slots[:: max(2, sequences // 2)] = pad
    return slots


def _flags(draw: Draw) -> torch.Tensor:
    return torch.arange(draw.shape[0]) % 3 != 1


def _cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: x read and o written once, taps read once, states read and written once."""
    D, W, L, dtypes = sizes["D"], geometry.axis["W"], geometry.axis["L"], geometry.dtype
    tokens = sizes["T"] * (1 if "query_start_loc" in dtypes else sizes["B"])
    state = dtypes.get("conv_states", dtypes.get("conv_state"))
    moved = 2 * tokens * D * ITEMSIZE[dtypes["x"]] + D * W * ITEMSIZE[dtypes["weight"]]
    if state:
        moved += 2 * sizes["N"] * D * L * ITEMSIZE[state]
    return moved, tokens * D * (2 * W + 4)


def check_conv(args: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Check taps, states, bounds and slots of a convolution, alone or in a fused step.

    Parameters
    ----------
    args : mapping
        Arguments by name, as given to the torch operator.
    sizes : mapping
        Axis sizes found in their shapes.

    Raises
    ------
    ArgumentError
        Names the argument, what is allowed, and what to do.
    """
    weight = "conv_weight" if "conv_weight" in args else "weight"
    states = "conv_state" if "conv_state" in args else "conv_states"
    indices = "conv_state_indices" if "conv_state" in args else "cache_indices"
    if not 1 <= sizes["W"] <= 8:
        raise ArgumentError(f"{weight} has {sizes['W']} taps (axis 1); allowed: 1 to 8")
    if args[states] is not None and sizes["L"] < sizes["W"] - 1:
        raise ArgumentError(
            f"{states} holds {sizes['L']} inputs per channel (axis 2), {weight} has {sizes['W']} taps; it must hold at least "
            f"{sizes['W'] - 1}"
        )
    bounds = args.get("query_start_loc")
    sequences = sizes["B"] if bounds is None else len(check_bounds("query_start_loc", bounds, sizes["T"]))
    check_slots(args, indices, states, sequences, written=True, pad=args["pad_slot_id"])
    flags = args.get("has_initial_state")
    if flags is not None and args[states] is None:
        raise ArgumentError(f"has_initial_state needs {states}")
    if flags is not None and flags.shape[0] != sequences:
        raise ArgumentError(f"has_initial_state has {flags.shape[0]} entries for {sequences} sequences; pass one per sequence")


def _state(name: str, optional: bool) -> Tensor:
    return Tensor(name, "S D L", role="state", optional=optional, mutated=True, strides="any")


_FAMILY: dict[str, Any] = {
    "outputs": (_OUT,),
    "static_axes": ("W", "L"),
    "check": check_conv,
    "cost": _cost,
    "derived": (("N", ("query_start_loc", "B")),),
    "sizes": _sizes,
    "smallest": {"D": 16},
}
_VARLEN = ("conv_states", "query_start_loc", "cache_indices")
_QWEN = {"D": 8192, "W": 4}
_DECODE = {"T": 1, "activation": "silu", "with": ("conv_state_indices",)}

CAUSAL_CONV1D_FN = OpSpec(
    name="causal_conv1d_fn",
    summary="causal depthwise convolution over whole sequences, state updated in place",
    algorithm="conv",
    inputs=(
        Tensor("x", "B D T", axes_if=("query_start_loc", "D T"), role="data", strides="any", values=_x),
        _WEIGHT,
        _BIAS,
        _state("conv_states", optional=True),
        Tensor("query_start_loc", "N+1", dtypes=INTS, optional=True, strides="dense", values=draws.bounds),
        Tensor("cache_indices", "N", dtypes=INTS, optional=True, strides="dense", values=_slots),
        Tensor("has_initial_state", "N", dtypes=("bool",), optional=True, strides="dense", values=_flags),
        Scalar("activation", "str", "silu", static=True, choices=ACTIVATIONS),
        _PAD,
    ),
    cases=tuple(
        {**case, "dtype": dtype, "state_dtype": dtype, "weight_dtype": weight}
        for case in (
            {"B": 2, "D": 70, "T": 65, "with": ("conv_states",)},
            {"B": 1, "D": 33, "T": 65, "with": ()},
            {"B": 2, "D": 33, "T": 500, "W": 3, "tokens_inner": True, "with": ("bias",), "activation": None},
            {
                "D": 48,
                "lengths": (63, 0, 1, 2, 129),
                "S": 7,
                "with": (*_VARLEN, "has_initial_state", "bias"),
                "padding": True,
                "index_dtype": "int32",
            },
            {
                "D": 17,
                "lengths": (1, 3, 41),
                "W": 2,
                "L": 3,
                "tokens_inner": True,
                "with": (*_VARLEN, "has_initial_state"),
                "activation": "swish",
            },
        )
        for dtype, weight in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"))
    ),
    bench=tuple(
        {**_QWEN, **size, "dtype": dtype, "state_dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for size in (
            {"B": 1, "T": 512, "with": ()},
            {"B": 1, "T": 8192, "with": ()},
            {"lengths": (300, 200, 11, 1), "with": (*_VARLEN, "has_initial_state")},
            {"lengths": (2048, 4000, 2143, 1), "with": (*_VARLEN, "has_initial_state")},
        )
    ),
    **_FAMILY,
)

CAUSAL_CONV1D_UPDATE = OpSpec(
    name="causal_conv1d_update",
    summary="causal depthwise convolution of a few tokens per sequence on a pool of states; decode",
    algorithm="conv",
    traits=(("update", True),),
    inputs=(
        Tensor("x", "B D T", role="data", strides="any", values=_x),
        _state("conv_state", optional=False),
        _WEIGHT,
        _BIAS,
        Scalar("activation", "str", None, static=True, choices=ACTIVATIONS),
        Tensor("conv_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values=_slots),
        _PAD,
    ),
    cases=tuple(
        {**case, "dtype": dtype, "state_dtype": dtype, "weight_dtype": weight}
        for case in (
            {"B": 5, "D": 70, "T": 1, "S": 7, "activation": "silu", "with": ("conv_state_indices",), "padding": True},
            {"B": 2, "D": 33, "T": 5, "W": 3, "L": 4, "tokens_inner": True, "with": ("bias",)},
        )
        for dtype, weight in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"))
    ),
    bench=tuple(
        {**_QWEN, **_DECODE, "B": batch, "S": batch, "dtype": dtype, "state_dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for batch in (1, 8, 32)
    ),
    **_FAMILY,
)

SPECS = (CAUSAL_CONV1D_FN, CAUSAL_CONV1D_UPDATE)


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    conv_states: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Causal depthwise convolution over whole sequences: prefill.

    ``o[c, t] = act(bias[c] + sum_k weight[c, k] * x[c, t - (width - 1) + k])``, in fp32; inputs before the first token are those
    of the state, or zero.

    Parameters
    ----------
    x : torch.Tensor
        ``[dim, total]`` of packed sequences with `query_start_loc`, else ``[B, dim, T]``; fp32, bf16 or fp16, any strides (fast
        where channels or tokens are contiguous).
    weight : torch.Tensor
        ``[dim, width]``, fp32, bf16 or fp16; width 1 to 8.
    bias : torch.Tensor, optional
        ``[dim]``, fp32, bf16 or fp16.
    conv_states : torch.Tensor, optional
        ``[slots, dim, length]`` with length at least width - 1, fp32, bf16 or fp16, any strides: the last inputs of every
        sequence, the newest last; updated in place.
    query_start_loc : torch.Tensor, optional
        ``[N + 1]``, int32 or int64: bounds of the packed sequences, first 0, last total, never decreasing.
    cache_indices : torch.Tensor, optional
        ``[N]``, int32 or int64: slot of each sequence, each used once. Default: sequence n uses slot n.
    has_initial_state : torch.Tensor, optional
        ``[N]``, bool: whether a sequence continues from its state. Default: none does. States are written either way.
    activation : {"silu", "swish", None}
        Applied to the sum; "swish" is "silu".
    pad_slot_id : int
        The slot id of padding sequences: computed from a zero state, nothing is written. A sequence without tokens writes
        nothing either.

    Returns
    -------
    torch.Tensor
        Shape, dtype and order of strides of `x`.

    Raises
    ------
    ArgumentError
        A shape, bound, slot or activation that is not allowed, or a slot that two sequences share; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: the convolution of Mamba (arXiv:2312.00752); signature of SGLang's causal_conv1d.
    """
    if isinstance(conv_states, torch.Tensor) and conv_states.ndim == 3 and conv_states.shape[2] == 0:
        conv_states = cache_indices = has_initial_state = None  # width 1: nothing to remember
    return direct.call.causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, pad_slot_id
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Causal depthwise convolution of the next tokens of every sequence, on a pool of states: decode.

    Parameters
    ----------
    x : torch.Tensor
        ``[B, dim]`` (one token) or ``[B, dim, T]``; fp32, bf16 or fp16, any strides.
    conv_state : torch.Tensor
        ``[slots, dim, length]`` with length at least width - 1, fp32, bf16 or fp16, any strides; updated in place.
    conv_state_indices : torch.Tensor, optional
        ``[B]``, int32 or int64: slot of each sequence, each used once. Default: sequence n uses slot n.
    weight, bias, activation, pad_slot_id
        As in `causal_conv1d_fn`.

    Returns
    -------
    torch.Tensor
        Shape, dtype and order of strides of `x`; `x` itself stays as it is.

    Raises
    ------
    ArgumentError
        A shape, slot or activation that is not allowed, or a slot that two sequences share; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: the convolution of Mamba (arXiv:2312.00752); signature of SGLang's causal_conv1d.
    """
    if isinstance(x, torch.Tensor) and x.ndim == 2:
        o = direct.call.causal_conv1d_update(
            x.unsqueeze(2), conv_state, weight, bias, activation, conv_state_indices, pad_slot_id
        )
        return o.squeeze(2)
    return direct.call.causal_conv1d_update(x, conv_state, weight, bias, activation, conv_state_indices, pad_slot_id)
