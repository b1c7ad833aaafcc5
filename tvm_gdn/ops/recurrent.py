"""Gated delta rule on a state pool, token by token: decode and speculative verification.

The maths stands in `ops/tir/delta_rule.py`, once for all delta-rule operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.ops.arguments import (
    A_LOG,
    BETA,
    CU_SEQLENS,
    DT_BIAS,
    FAMILY,
    FINAL_TOO,
    GATE,
    KEY,
    L2NORM,
    OUT,
    POOL,
    QUERY,
    SCALE,
    SLOTS,
    SOFTPLUS,
    V_FIRST,
    VALUE,
    VERIFY,
    A,
    B,
    is_one_token_batch,
    tokens_first,
)
from tvm_gdn.spec import OpSpec

_DECODE = {"T": 1, "H": 16, "HV": 32, "K": 128, "V": 128, "state_dtype": "float32"}
#: The tensors of a state pool.
POOLED = ("initial_state_source", "initial_state_indices")
#: One token of some sequences of Qwen3-Next.
DECODE_BENCH = tuple(
    {"B": batch, "S": batch, **_DECODE, "dtype": dtype, "with": POOLED, "use_qk_l2norm_in_kernel": True}
    for dtype in ("bfloat16", "float32")
    for batch in (1, 8, 32)
)


def _pooled_cases() -> tuple[Mapping[str, Any], ...]:
    """Shapes and options on which the pool operators are held against the reference."""
    verify = (*POOLED, "intermediate_states_buffer", "intermediate_state_indices")
    cases: list[dict[str, Any]] = [
        {"B": 3, "T": 1, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 5, "with": POOLED, "use_qk_l2norm_in_kernel": True},
        {"B": 2, "T": 65, "H": 2, "HV": 2, "K": 64, "V": 32, "S": 4, "with": POOLED},
        {"B": 4, "T": 1, "H": 1, "HV": 3, "K": 8, "V": 8, "S": 4, "with": POOLED, "padding": True},
        {
            "lengths": (5, 0, 63, 1),
            "H": 2,
            "HV": 4,
            "K": 32,
            "V": 64,
            "S": 9,
            "with": (*POOLED, "cu_seqlens"),
            "padding": True,
            "index_dtype": "int32",
        },
        {
            "B": 2,
            "T": 4,
            "H": 2,
            "HV": 4,
            "K": 64,
            "V": 32,
            "S": 3,
            "with": verify,
            "disable_state_update": True,
            "note": "buffer",
        },
        {
            "B": 2,
            "T": 6,
            "H": 1,
            "HV": 2,
            "K": 32,
            "V": 48,
            "S": 3,
            "with": (*verify, "retrieve_parent_token"),
            "disable_state_update": True,
            "note": "tree",
        },
        {
            "lengths": (3, 4),
            "H": 2,
            "HV": 2,
            "K": 20,
            "V": 12,
            "S": 2,
            "with": (*POOLED, "cu_seqlens", "intermediate_states_buffer"),
            "note": "buffer",
        },
        {"B": 2, "T": 3, "H": 1, "HV": 1, "K": 256, "V": 128, "with": ()},
    ]
    variants = [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "state_dtype": "float16"},
        {"dtype": "bfloat16", "state_dtype": "bfloat16"},
    ]
    return tuple(
        {**case, **variant, "state_v_first": v_first} for case in cases for variant in variants for v_first in (False, True)
    )


FUSED_RECURRENT_UPDATE = OpSpec(
    name="fused_recurrent_gated_delta_rule_update",
    summary="token-recurrent gated delta rule on a state pool; decode and speculative verification",
    algorithm="recurrent",
    inputs=(QUERY, KEY, VALUE, GATE, BETA, SCALE, POOL, SLOTS, CU_SEQLENS, L2NORM, *VERIFY, V_FIRST, FINAL_TOO),
    outputs=(OUT,),
    static_axes=("K", "V"),
    cases=_pooled_cases(),
    bench=DECODE_BENCH,
    storage_matters_with="retrieve_parent_token",
    **FAMILY,
)

FUSED_SIGMOID_GATING_UPDATE = OpSpec(
    name="fused_sigmoid_gating_delta_rule_update",
    summary="the same with the gates computed from A_log, a, dt_bias and b inside",
    algorithm="recurrent",
    inputs=(
        A_LOG,
        A,
        DT_BIAS,
        *SOFTPLUS,
        QUERY,
        KEY,
        VALUE,
        B,
        POOL,
        SLOTS,
        SCALE,
        L2NORM,
        CU_SEQLENS,
        *VERIFY,
        V_FIRST,
    ),
    outputs=(OUT,),
    static_axes=("K", "V"),
    cases=_pooled_cases(),
    bench=DECODE_BENCH,
    storage_matters_with="retrieve_parent_token",
    **FAMILY,
)

SPECS = (FUSED_RECURRENT_UPDATE, FUSED_SIGMOID_GATING_UPDATE)


def fused_recurrent_gated_delta_rule_update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state_source: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    *,
    state_v_first: bool = False,
    final_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gated delta rule on a state pool, token by token: decode, and verification of speculated tokens.

    Parameters
    ----------
    q, k, v, g, beta, scale, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first
        As in `chunk_gated_delta_rule`.
    initial_state_source : torch.Tensor, optional
        Pool ``[slots, HV, K, V]``, fp32, bf16 or fp16, updated in place. Default: zero states, nothing written.
    initial_state_indices : torch.Tensor, optional
        ``[N]``, int32 or int64: pool slot of each sequence, each used once; -1 is padding (zero state read, output computed,
        nothing written). Default: sequence n uses slot n.
    disable_state_update : bool
        Leave the pool bit-identical (verification).
    intermediate_states_buffer : torch.Tensor, optional
        ``[slots, steps, HV, K, V]``, dtype of the pool: gets the state after every step.
    intermediate_state_indices : torch.Tensor, optional
        ``[N]``, int32 or int64: buffer slot of each sequence, -1 stores nothing. Default: n.
    cache_steps : int, optional
        Number of steps of the buffer; must equal its axis 1.
    retrieve_parent_token : torch.Tensor, optional
        ``[N, T]``, int32 or int64: a step t > 0 starts from the stored state of this earlier step; -1 means the initial state.
    final_state : torch.Tensor, optional
        ``[N, HV, K, V]``, contiguous, dtype of the pool: gets the state after every sequence, padding included.

    Returns
    -------
    torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.

    Raises
    ------
    ArgumentError
        A shape, stride, bound, slot or parent that is not allowed; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464); signature of SGLang.
    """
    args = (
        scale,
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        disable_state_update,
        intermediate_states_buffer,
        intermediate_state_indices,
        cache_steps,
        retrieve_parent_token,
        state_v_first,
        final_state,
    )
    if is_one_token_batch(q, cu_seqlens):
        return tokens_first(direct.call.fused_recurrent_gated_delta_rule_update(*map(tokens_first, (q, k, v, g, beta)), *args))
    return direct.call.fused_recurrent_gated_delta_rule_update(q, k, v, g, beta, *args)


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor | None,
    initial_state_indices: torch.Tensor | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    *,
    state_v_first: bool = False,
) -> torch.Tensor:
    """`fused_recurrent_gated_delta_rule_update` with the gates computed inside, as `fused_gdn_gating` defines them.

    Parameters
    ----------
    A_log, dt_bias : torch.Tensor
        ``[HV]``, fp32, bf16 or fp16 each.
    a, b : torch.Tensor
        ``[B, T, HV]``, or ``[T, HV]`` where B is 1; fp32, bf16 or fp16 each, any strides.
    softplus_beta, softplus_threshold : float
        Sharpness of softplus, and where it becomes the identity.
    q, k, v, initial_state_source, initial_state_indices, scale, use_qk_l2norm_in_kernel, cu_seqlens, disable_state_update, \
intermediate_states_buffer, intermediate_state_indices, cache_steps, retrieve_parent_token, state_v_first
        As in `fused_recurrent_gated_delta_rule_update`.

    Returns
    -------
    torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.

    Raises
    ------
    ArgumentError
        A shape, stride, bound, slot or parent that is not allowed; nothing has been written then.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464); signature of SGLang.
    """
    one_token = is_one_token_batch(q, cu_seqlens)
    if one_token:
        q, k, v = map(tokens_first, (q, k, v))
        a, b = (tokens_first(x) if isinstance(x, torch.Tensor) and x.ndim == 3 else x for x in (a, b))
    if isinstance(a, torch.Tensor) and a.ndim == 2:
        a = a.unsqueeze(0)
    if isinstance(b, torch.Tensor) and b.ndim == 2:
        b = b.unsqueeze(0)
    o = direct.call.fused_sigmoid_gating_delta_rule_update(
        A_log,
        a,
        dt_bias,
        softplus_beta,
        softplus_threshold,
        q,
        k,
        v,
        b,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        disable_state_update,
        intermediate_states_buffer,
        intermediate_state_indices,
        cache_steps,
        retrieve_parent_token,
        state_v_first,
    )
    return tokens_first(o) if one_token else o
