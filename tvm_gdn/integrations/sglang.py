"""The gated-delta-rule functions of SGLang (0.5.23) with its exact signatures: change the import and nothing else.

``sglang.kernels.ops.attention`` holds them in several modules (``fla.chunk``, ``fla.fused_recurrent``,
``linear.fused_gdn_gating``, ``linear.fused_sigmoid_gating_recurrent``); here they stand in one. States are V-first,
``[slots, HV, V, K]``, as in SGLang since March 2026; `sglang_k_first` has
the functions from before, and those of its CPU kernels.

In-place rules are SGLang's: `chunk_gated_delta_rule` writes the final states into the pool unless ``inplace_update=False``, the
``..._update`` functions unless ``disable_state_update=True``; slot -1 reads zeros and is not written.
"""

from __future__ import annotations

from typing import Any

import torch

import tvm_gdn
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import sequence
from tvm_gdn.ops.arguments import full_strength

__all__ = [
    "chunk_gated_delta_rule",
    "fused_gdn_gating",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "fused_recurrent_gated_delta_rule_update",
    "fused_recurrent_gdn",
    "fused_sigmoid_gating_delta_rule_update",
]


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tvm_gdn.fused_gdn_gating` as SGLang's.

    Parameters
    ----------
    A_log, dt_bias : torch.Tensor
        ``[HV]``.
    a, b : torch.Tensor
        ``[batch, HV]``.
    beta, threshold : float
        Of softplus.

    Returns
    -------
    g, beta_output : torch.Tensor
        ``[1, batch, HV]``, both fp32.
    """
    # beta is asked for in fp32, so it must not pass through the dtype of b.
    g, write = tvm_gdn.fused_gdn_gating(A_log, a.float(), b.float(), dt_bias, beta, threshold)
    return g.unsqueeze(0), write.unsqueeze(0)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, None]:
    """`tvm_gdn.chunk_gated_delta_rule` on a state pool, as SGLang's.

    Parameters
    ----------
    q, k, v, g, beta, scale, cu_seqlens, use_qk_l2norm_in_kernel
        As in `tvm_gdn.chunk_gated_delta_rule`.
    initial_state : torch.Tensor
        Pool ``[slots, HV, V, K]``.
    initial_state_indices : torch.Tensor
        ``[N]`` slots; -1 reads zeros and is not written. Without them sequence n is slot n.
    head_first : bool
        Must be False.
    inplace_update : bool
        Write the final states into the pool.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`.
    None, None
        SGLang's second result is always None; its third, the states at chunk boundaries, is None here as with its CPU kernels.
    """
    _row_first(head_first)
    _one_batch(q, cu_seqlens)
    if initial_state is None or not inplace_update:
        initial = None if initial_state is None else gather(initial_state, initial_state_indices)
        o, _ = sequence.chunk_gated_delta_rule(
            q, k, v, g, beta, scale, initial, False, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first=True
        )
        return o, None, None
    o, _ = sequence.chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, False, cu_seqlens, use_qk_l2norm_in_kernel,
        initial_state_indices=every_slot(initial_state_indices, q, cu_seqlens), state_v_first=True,
    )  # fmt: skip
    return o, None, None


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.fused_recurrent_gated_delta_rule` as SGLang's: states ``[N, HV, V, K]``, `beta` ones by default.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, V, K]``, fp32.
    """
    _one_batch(q, cu_seqlens)
    o, final = sequence.fused_recurrent_gated_delta_rule(
        q, k, v, g, full_strength(beta, v), scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel,
        state_v_first=True,
    )  # fmt: skip
    return o, None if final is None else final.float()


fused_recurrent_gdn = fused_recurrent_gated_delta_rule


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
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """`tvm_gdn.fused_recurrent_gated_delta_rule_update` as SGLang's, on a V-first pool.

    Parameters
    ----------
    disable_output_calculation : bool
        Return one uninitialized element ``[1, 1, 1, 1]`` instead of the outputs.
    q, k, v, g, beta, scale, initial_state_source, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, \
disable_state_update, intermediate_states_buffer, intermediate_state_indices, cache_steps, retrieve_parent_token
        As in `tvm_gdn.fused_recurrent_gated_delta_rule_update`; `beta` ones by default.

    Returns
    -------
    torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`.
    """
    return update(
        q, k, v, g, beta, scale, initial_state_source, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel,
        disable_state_update, disable_output_calculation, intermediate_states_buffer, intermediate_state_indices, cache_steps,
        retrieve_parent_token, state_v_first=True,
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
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    cache_ring: bool = False,
    replayssm_rawv: torch.Tensor | None = None,
    replayssm_rawk: torch.Tensor | None = None,
    replayssm_g: torch.Tensor | None = None,
    replayssm_beta: torch.Tensor | None = None,
    match_cutedsl_decode: bool = False,
) -> torch.Tensor:
    """`tvm_gdn.fused_sigmoid_gating_delta_rule_update` as SGLang's, on a V-first pool.

    Parameters
    ----------
    is_kda, lower_bound, cache_ring, match_cutedsl_decode
        Must be off: KDA gates, replay rings and another kernel's rounding are not built here.
    replayssm_rawv, replayssm_rawk, replayssm_g, replayssm_beta
        No effect without `cache_ring`.
    cache_steps : int, optional
        No effect: the buffer's own shape and strides say how many steps it holds.
    A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices, scale, \
use_qk_l2norm_in_kernel, cu_seqlens, disable_state_update, intermediate_states_buffer, intermediate_state_indices, \
retrieve_parent_token
        As in `tvm_gdn.fused_sigmoid_gating_delta_rule_update`.

    Returns
    -------
    torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`.
    """
    del cache_steps, replayssm_rawv, replayssm_rawk, replayssm_g, replayssm_beta
    refuse(is_kda=is_kda, cache_ring=cache_ring, match_cutedsl_decode=match_cutedsl_decode, lower_bound=lower_bound is not None)
    return tvm_gdn.fused_sigmoid_gating_delta_rule_update(
        A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices, scale,
        use_qk_l2norm_in_kernel, cu_seqlens, disable_state_update, intermediate_states_buffer, intermediate_state_indices,
        None, retrieve_parent_token, state_v_first=True,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tvm_gdn.packed_decode_gated_delta_rule` as SGLang's: writes to `out` and to the V-first pool, and returns both.

    Parameters
    ----------
    mixed_qkv, a, b, A_log, dt_bias, scale, use_qk_l2norm_in_kernel
        As in `tvm_gdn.packed_decode_gated_delta_rule`.
    initial_state : torch.Tensor
        Pool ``[slots, HV, V, K]``, updated in place.
    out : torch.Tensor
        ``[B, 1, HV, V]``, written.
    ssm_state_indices : torch.Tensor
        ``[B]`` slots.

    Returns
    -------
    out, initial_state : torch.Tensor
        The arguments.
    """
    if not isinstance(initial_state, torch.Tensor) or initial_state.ndim != 4:
        raise ArgumentError("initial_state must be a pool [slots, HV, V, K]")
    shape = (mixed_qkv.shape[0], 1, *initial_state.shape[1:3])
    if tuple(out.shape) != shape:
        raise ArgumentError(f"out has shape {tuple(out.shape)}; allowed: {shape}")
    out.copy_(
        tvm_gdn.packed_decode_gated_delta_rule(
            mixed_qkv, a, b, A_log, dt_bias, initial_state, ssm_state_indices, scale, use_qk_l2norm_in_kernel, state_v_first=True
        )
    )
    return out, initial_state


def update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float | None,
    pool: torch.Tensor | None,
    slots: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    l2norm: bool,
    disable_state_update: bool,
    disable_output_calculation: bool,
    *verify: Any,
    state_v_first: bool,
) -> torch.Tensor:
    """The pool update of both eras."""
    _one_batch(q, cu_seqlens)
    if beta is not None and beta.ndim == v.ndim:
        raise ArgumentError("beta has a value per channel, [B, T, HV, V]; allowed: [B, T, HV]")
    o = tvm_gdn.fused_recurrent_gated_delta_rule_update(
        q, k, v, g, full_strength(beta, v), scale, pool, slots, cu_seqlens, l2norm, disable_state_update, *verify,
        state_v_first=state_v_first,
    )  # fmt: skip
    return q.new_empty(1, 1, 1, 1) if disable_output_calculation else o


def gather(pool: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """States of the slots, zeros for -1: what a call starts from that must not write to the pool."""
    if slots is None:
        return pool
    states = pool[slots.clamp(min=0).long()]
    return states.masked_fill((slots < 0).view(-1, 1, 1, 1), 0)


def every_slot(slots: torch.Tensor | None, q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The slots given, or sequence n in slot n."""
    if slots is not None:
        return slots
    return torch.arange(q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, device=q.device)


def refuse(**switches: bool) -> None:
    """Raise for a switch that is on and not built here."""
    for name, value in switches.items():
        if value:
            raise ArgumentError(f"{name} is not supported by tvm_gdn; leave it off, or use SGLang for this call")


def _one_batch(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ArgumentError(f"q has batch size {q.shape[0]}; with cu_seqlens it is 1: pack the sequences into one")


def _row_first(head_first: bool) -> None:
    if head_first:
        raise ArgumentError("head_first=True: pass tensors as [B, T, H, ...]")
