"""One decode step from the packed qkv projection: specification and public function.

The maths stands in `ops/tir/delta_rule.py`, once for all delta-rule operators.
"""

from __future__ import annotations

import torch

from tvm_gdn import direct
from tvm_gdn.ops import draws
from tvm_gdn.ops.arguments import A_LOG, DT_BIAS, FAMILY, OWN_POOL, SCALE, SLOTS, V_FIRST
from tvm_gdn.ops.recurrent import DECODE_BENCH, POOLED
from tvm_gdn.spec import OpSpec, Output, Scalar, Tensor

PACKED_DECODE = OpSpec(
    name="packed_decode_gated_delta_rule",
    summary="one decode step from the packed qkv projection, gates computed inside",
    algorithm="recurrent",
    inputs=(
        Tensor("mixed_qkv", "B R", role="data"),
        Tensor("a", "B HV", strides="any"),
        Tensor("b", "B HV", strides="any"),
        A_LOG,
        DT_BIAS,
        OWN_POOL,
        SLOTS,
        SCALE,
        Scalar("use_qk_l2norm_in_kernel", "bool", True),
        Scalar("softplus_beta", "float", 1.0),
        Scalar("softplus_threshold", "float", 20.0),
        V_FIRST,
    ),
    outputs=(Output("o", "B 1 HV V", like="data"),),
    static_axes=("K", "V"),
    cases=tuple(
        {**case, "dtype": dtype, "state_dtype": state, "state_v_first": v_first}
        for case in (
            {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": POOLED, "padding": True},
            {
                "B": 2,
                "H": 3,
                "HV": 3,
                "K": 8,
                "V": 20,
                "S": 2,
                "with": ("initial_state_source",),
                "use_qk_l2norm_in_kernel": False,
            },
        )
        for dtype, state in (("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16"))
        for v_first in (False, True)
    ),
    bench=tuple({k: v for k, v in case.items() if k != "T"} for case in DECODE_BENCH),
    **{**FAMILY, "sizes": draws.packed_sizes},
)

SPECS = (PACKED_DECODE,)


def packed_decode_gated_delta_rule(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    *,
    state_v_first: bool = False,
) -> torch.Tensor:
    """One decode step from the packed qkv projection, gates computed inside.

    Parameters
    ----------
    mixed_qkv : torch.Tensor
        ``[B, 2*H*K + HV*V]``: per row q heads, k heads, v heads; fp32, bf16 or fp16; rows may be strided.
    a, b : torch.Tensor
        ``[B, HV]``, fp32, bf16 or fp16 each, any strides.
    A_log, dt_bias : torch.Tensor
        ``[HV]``, fp32, bf16 or fp16 each.
    initial_state_source : torch.Tensor
        Pool ``[slots, HV, K, V]``, updated in place; K, V are read from its shape, HV from `A_log`.
    initial_state_indices, scale, use_qk_l2norm_in_kernel, state_v_first
        As in `fused_recurrent_gated_delta_rule_update`.
    softplus_beta, softplus_threshold : float
        Sharpness of softplus, and where it becomes the identity.

    Returns
    -------
    torch.Tensor
        ``[B, 1, HV, V]``, dtype of `mixed_qkv`.

    Raises
    ------
    ArgumentError
        A shape, stride or slot that is not allowed; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464), in the packed form of SGLang's decode path.
    """
    return direct.call.packed_decode_gated_delta_rule(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        softplus_beta,
        softplus_threshold,
        state_v_first,
    )
