"""SGLang's gated-delta-rule functions of 2025 (states K-first, ``[slots, HV, K, V]``), and those of its CPU kernels.

Differences from `sglang`: `chunk_gated_delta_rule` takes one state per sequence and returns the final states;
`fused_sigmoid_gating_delta_rule_update` had no verification arguments; before October 2025 the gating function took no `b` and
returned `g` alone: import `fused_gdn_gating_g` as ``fused_gdn_gating``. The functions whose names end in ``_cpu`` stand for
``torch.ops.sgl_kernel.<name>``.
"""

from __future__ import annotations

import torch

import tvm_gdn
from tvm_gdn.errors import ArgumentError
from tvm_gdn.integrations.sglang import fused_gdn_gating, refuse, update
from tvm_gdn.ops import sequence

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_cpu",
    "fused_gdn_gating",
    "fused_gdn_gating_cpu",
    "fused_gdn_gating_g",
    "fused_recurrent_gated_delta_rule_update",
    "fused_sigmoid_gating_delta_rule_update",
    "fused_sigmoid_gating_delta_rule_update_cpu",
]

_NORM_EPS = 1e-6


def fused_gdn_gating_g(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> torch.Tensor:
    """The log-decay alone: ``[batch, HV]``, fp32, of `a` ``[batch, HV]``."""
    return tvm_gdn.fused_gdn_gating(A_log, a, a, dt_bias, beta, threshold)[0]


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.chunk_gated_delta_rule` as SGLang's of 2025.

    Parameters
    ----------
    head_first : bool
        Must be False.
    q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
        As in `tvm_gdn.chunk_gated_delta_rule`; `initial_state` ``[N, HV, K, V]`` is not written to.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, fp32.
    """
    refuse(head_first=head_first)
    o, final = sequence.chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
    )
    return o, None if final is None else final.float()


def fused_recurrent_gated_delta_rule_update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state_source: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    disable_state_update: bool = False,
    disable_output_calculation: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sglang.fused_recurrent_gated_delta_rule_update` on a K-first pool; sequence n stores its steps in slot `indices[n]`.

    The buffer of 2025 had a row per slot of the pool, and so no indices of its own.
    """
    slots = initial_state_indices if intermediate_states_buffer is not None else None
    return update(
        q, k, v, g, beta, scale, initial_state_source, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel,
        disable_state_update, disable_output_calculation, intermediate_states_buffer, slots, cache_steps,
        retrieve_parent_token, state_v_first=False,
    )  # fmt: skip


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
) -> torch.Tensor:
    """`tvm_gdn.fused_sigmoid_gating_delta_rule_update` as SGLang's of 2025, on a K-first pool updated in place."""
    return tvm_gdn.fused_sigmoid_gating_delta_rule_update(
        A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices, scale,
        use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip


def fused_gdn_gating_cpu(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates ``[1, batch, HV]``: g in fp32, beta in the dtype of `b`."""
    g, beta = tvm_gdn.fused_gdn_gating(A_log, a, b, dt_bias)
    return g.unsqueeze(0), beta.unsqueeze(0)


def chunk_gated_delta_rule_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    output_final_state: bool,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: torch.Tensor | None = None,
    eps: float = _NORM_EPS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gated_delta_rule` with the argument names of SGLang's CPU kernel.

    With `initial_state_indices`, `initial_state` is a pool ``[slots, HV, K, V]`` that is updated in place, and is returned.
    `eps` of the normalization is 1e-6 and no other.
    """
    refuse(head_first=head_first)
    if use_qk_l2norm_in_kernel and eps != _NORM_EPS:
        raise ArgumentError(f"eps = {eps}; allowed: {_NORM_EPS}, the one that is compiled into the kernels")
    if initial_state_indices is None:
        return chunk_gated_delta_rule(
            query, key, value, g, beta, None, initial_state, output_final_state, cu_seqlens, False, use_qk_l2norm_in_kernel
        )
    o, _ = sequence.chunk_gated_delta_rule(
        query, key, value, g, beta, None, initial_state, False, cu_seqlens, use_qk_l2norm_in_kernel,
        initial_state_indices=initial_state_indices,
    )  # fmt: skip
    return o, initial_state if output_final_state else None


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> torch.Tensor:
    """`fused_sigmoid_gating_delta_rule_update` with the argument order and output of SGLang's CPU kernel.

    q, k, v are ``[1, N, ...]`` for N one-token sequences; the output is ``[N, 1, HV, V]``.
    """
    o = fused_sigmoid_gating_delta_rule_update(
        A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices, None,
        use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip
    return o.transpose(0, 1)
