"""Gate parameters of the gated delta rule: specification and public function."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tvm_gdn import direct
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import draws
from tvm_gdn.spec import ITEMSIZE, Geometry, OpSpec, Output, Scalar, Tensor


def _cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: a and b read, g (fp32) and beta written, once."""
    elements = sizes["M"] * sizes["HV"]
    item = ITEMSIZE[geometry.dtype["a"]]
    return elements * (3 * item + 4), elements * 10


FUSED_GDN_GATING = OpSpec(
    name="fused_gdn_gating",
    summary="log-decay g and write strength beta from the projections a and b",
    algorithm="gating",
    inputs=(
        Tensor("A_log", "HV", strides="dense", usual="float32", values=draws.log_rate),
        Tensor("a", "M HV", role="data", strides="any"),
        Tensor("b", "M HV", role="data", strides="any"),
        Tensor("dt_bias", "HV", strides="dense"),
        Scalar("softplus_beta", "float", 1.0),
        Scalar("softplus_threshold", "float", 20.0),
    ),
    outputs=(Output("g", "M HV", like="float32"), Output("beta", "M HV", like="data")),
    static_axes=(),
    cases=tuple(
        {"M": rows, "HV": heads, "dtype": dtype, "dtypes": {"A_log": "float32", "dt_bias": param}}
        for rows, heads in ((1, 6), (63, 32), (500, 33), (65, 128))
        for dtype, param in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"))
    ),
    bench=({"M": 1024, "HV": 32, "dtype": "bfloat16"}, {"M": 8192, "HV": 32, "dtype": "bfloat16"}),
    cost=_cost,
)

SPECS = (FUSED_GDN_GATING,)


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gates of a gated-delta-rule layer.

    ``g = -exp(A_log) * softplus(a + dt_bias)`` (natural logarithm of the decay, <= 0) and ``beta = sigmoid(b)``.

    Parameters
    ----------
    A_log, dt_bias : torch.Tensor
        ``[HV]``, fp32, bf16 or fp16 each.
    a, b : torch.Tensor
        ``[..., HV]``, one dtype of fp32, bf16, fp16; any strides.
    softplus_beta : float
        Sharpness of softplus.
    softplus_threshold : float
        Softplus is the identity where ``softplus_beta * x`` exceeds this.

    Returns
    -------
    g : torch.Tensor
        ``[..., HV]``, fp32.
    beta : torch.Tensor
        ``[..., HV]``, dtype of `b`.

    Raises
    ------
    ArgumentError
        Shapes that do not fit.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464), as implemented in Qwen3-Next. Everything is computed in fp32.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and max(a.ndim, b.ndim) > 2 and a.shape != b.shape:
        raise ArgumentError(f"fused_gdn_gating: b has shape {tuple(b.shape)}, a has {tuple(a.shape)}; they must be the same")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.ndim != 2 and a.ndim >= 1 and a.shape == b.shape:
        # flatten(0, -2) of a strided view may copy; the leading axes of a projection's slice always collapse without one.
        lead = a.shape[:-1]
        g, beta = direct.call.fused_gdn_gating(
            A_log, a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), dt_bias, softplus_beta, softplus_threshold
        )
        return g.view(*lead, -1), beta.view(*lead, -1)
    return direct.call.fused_gdn_gating(A_log, a, b, dt_bias, softplus_beta, softplus_threshold)
