"""Gated RMS norm: specification and public function. The maths stands in `ops/tir/norm.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.errors import ArgumentError
from tvm_gdn.spec import ITEMSIZE, Geometry, OpSpec, Output, Scalar, Tensor


def _cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: x and z read, o written, once."""
    elements, item = sizes["M"] * sizes["G"] * geometry.axis["D"], ITEMSIZE[geometry.dtype["x"]]
    gate = ITEMSIZE[geometry.dtype["z"]] if "z" in geometry.dtype else 0
    return elements * (2 * item + gate), elements * 12


def _check(args: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    del args
    if sizes["D"] == 0:
        raise ArgumentError("x has D = 0 (its last axis); it must be at least 1")


RMS_NORM_GATED = OpSpec(
    name="rms_norm_gated",
    summary="RMS norm of rows with a gate: norm(x) * act(z), or norm(x * act(z))",
    algorithm="norm",
    inputs=(
        Tensor("x", "M G D", role="data"),
        Tensor("weight", "D", strides="dense"),
        Tensor("z", "M G D", optional=True),
        Scalar("eps", "float", 1e-6),
        Scalar("norm_before_gate", "bool", True, static=True),
        Scalar("activation", "str", "silu", static=True, choices=(("silu", "silu"), ("swish", "silu"), ("sigmoid", "sigmoid"))),
    ),
    outputs=(Output("o", "M G D", like="data"),),
    static_axes=("D",),
    cases=tuple(
        {**case, "dtype": dtype, "weight_dtype": weight}
        for case in (
            {"M": 63, "G": 4, "D": 128, "with": ("z",)},
            {"M": 5, "G": 1, "D": 1000, "with": ("z",), "norm_before_gate": False, "activation": "sigmoid"},
            {"M": 1, "G": 65, "D": 20, "with": ("z",), "activation": "sigmoid"},
            {"M": 3, "G": 2, "D": 7, "with": ()},
        )
        for dtype, weight in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"))
    ),
    bench=tuple(
        {"M": tokens, "G": 32, "D": 128, "with": ("z",), "dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for tokens in (1, 32, 512, 8192)
    ),
    check=_check,
    cost=_cost,
    smallest={"D": 16},
)

SPECS = (RMS_NORM_GATED,)


def _rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """[..., D] seen as [M, G, D], without a copy."""
    if not isinstance(x, torch.Tensor) or x.ndim in {0, 3}:
        return x
    if x.ndim <= 2:
        return x.reshape(1, *x.shape) if x.ndim == 2 else x.reshape(1, 1, -1)
    try:
        return x.view(-1, *x.shape[-2:])
    except RuntimeError:
        raise ArgumentError(
            f"rms_norm_gated: {name} has shape {tuple(x.shape)} and strides {x.stride()}; all axes but the last two must "
            f"collapse into one without a copy: pass {name}.contiguous()"
        ) from None


def rms_norm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm_before_gate: bool = True,
    activation: str = "silu",
) -> torch.Tensor:
    """RMS norm of the last axis, with a gate.

    ``x / sqrt(mean(x^2) + eps) * weight * act(z)``, or the norm of ``x * act(z)`` times the weight; in fp32.

    Parameters
    ----------
    x : torch.Tensor
        ``[..., D]``, fp32, bf16 or fp16; the last axis contiguous, rows may be strided.
    weight : torch.Tensor
        ``[D]``, fp32, bf16 or fp16.
    z : torch.Tensor, optional
        Shape of `x`, fp32, bf16 or fp16; the last axis contiguous. Default: no gate.
    eps : float
        Added to the mean of squares.
    norm_before_gate : bool
        Whether the gate multiplies what is normalized already.
    activation : {"silu", "swish", "sigmoid"}
        Of the gate; "swish" is "silu".

    Returns
    -------
    torch.Tensor
        Shape and dtype of `x`, contiguous.

    Raises
    ------
    ArgumentError
        A shape, stride or activation that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: the gated norm of Mamba 2 (arXiv:2405.21060) and of Gated DeltaNet layers (arXiv:2412.06464).
    """
    if isinstance(x, torch.Tensor) and isinstance(z, torch.Tensor) and x.shape != z.shape:
        raise ArgumentError(f"rms_norm_gated: z has shape {tuple(z.shape)}, x has {tuple(x.shape)}; they must be the same")
    gate = None if z is None else _rows("z", z)
    o = direct.call.rms_norm_gated(_rows("x", x), weight, gate, eps, norm_before_gate, activation)
    return o if x.ndim == 3 else o.view(x.shape)
