"""The functions of flash-linear-attention (fla-core 0.6) with its exact signatures: change the import and nothing else.

``from fla.ops.gated_delta_rule import chunk_gated_delta_rule`` becomes
``from tvm_gdn.integrations.fla import chunk_gated_delta_rule``; the same for the recurrent form, for ``fla.ops.kda`` and for
``fla.ops.delta_rule``. Argument order, defaults, the returned pair and its dtypes are fla's: the final state is fp32, and no
argument is written to. What only concerns fla's own kernels is accepted and has no effect (`chunk_size`, `cu_seqlens_cpu`,
`chunk_indices`, `safe_gate`, `disable_recompute`, `use_graph`, `max_num_seqs`); what changes the result and is not built here
is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import sequence
from tvm_gdn.ops.arguments import full_strength

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]

#: Keywords of fla's functions that say how its kernels work and not what they compute.
_TUNING = ("chunk_size", "disable_recompute", "head_first")


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.chunk_gated_delta_rule` as ``fla.ops.gated_delta_rule.chunk_gated_delta_rule``.

    Parameters
    ----------
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
        As in `tvm_gdn.chunk_gated_delta_rule`; `initial_state` is ``[N, HV, K, V]`` and never written to.
    use_beta_sigmoid_in_kernel, allow_neg_eigval : bool
        `beta` holds logits: ``sigmoid(beta)``, or ``2 * sigmoid(beta)``.
    cu_seqlens_cpu, chunk_indices
        No effect.
    cp_context
        Must be None: context parallelism is not built here.
    **kwargs
        ``use_gate_in_kernel``, ``A_log``, ``dt_bias``: `g` is ``-exp(A_log) * softplus(g + dt_bias)``;
        ``transpose_state_layout``, the former name of `state_v_first`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, fp32.
    """
    del cu_seqlens_cpu, chunk_indices
    _refuse(cp_context=cp_context)
    state_v_first = _layout(state_v_first, kwargs)
    if kwargs.pop("use_gate_in_kernel", False):
        g = _log_decay(g, kwargs.pop("A_log", None), kwargs.pop("dt_bias", None))
    _no_more(kwargs, "A_log", "dt_bias")
    beta = _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _call(
        sequence.chunk_gated_delta_rule, (q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, state_v_first,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.fused_recurrent_gated_delta_rule` as ``fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule``.

    Parameters
    ----------
    q, k, v, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
        As in `chunk_gated_delta_rule`; `g` None is no decay.
    gk : torch.Tensor, optional
        ``[B, T, HV, K]``, log-decay per channel of the keys, beside `g`.
    gv : None
        Decay per channel of the values is not built here.
    beta : torch.Tensor, optional
        ``[B, T, HV]``; default ones.
    use_gate_in_kernel, A_log, dt_bias
        `g` is ``-exp(A_log) * softplus(g + dt_bias)``.
    use_beta_sigmoid_in_kernel, allow_neg_eigval, **kwargs
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o, final_state
        As in `chunk_gated_delta_rule`.
    """
    _refuse(gv=gv)
    state_v_first = _layout(state_v_first, kwargs)
    _no_more(kwargs)
    if use_gate_in_kernel:
        g = _log_decay(g, A_log, dt_bias)
    beta = _write_strength(full_strength(beta, v), use_beta_sigmoid_in_kernel, allow_neg_eigval)
    function: Callable[..., Any] = sequence.fused_recurrent_gated_delta_rule
    if gk is not None:
        function, g = sequence.fused_recurrent_kda, gk if g is None else gk.float() + g.float().unsqueeze(-1)
    tensors: tuple[torch.Tensor, ...]
    if g is None:
        function, tensors = sequence.fused_recurrent_delta_rule, (q, k, v, beta)
    else:
        tensors = (q, k, v, g, beta)
    return _call(function, tensors, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first)


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: Any | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.chunk_kda` as ``fla.ops.kda.chunk_kda``.

    Parameters
    ----------
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
        As in `tvm_gdn.chunk_kda`; `g` is ``[B, T, HV, K]``.
    use_gate_in_kernel, lower_bound
        `g` is ``-exp(A_log) * softplus(g + dt_bias)``; with `lower_bound` ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))``.
        ``A_log`` ``[HV]`` and ``dt_bias`` ``[HV * K]`` come as keywords.
    use_beta_sigmoid_in_kernel, allow_neg_eigval
        As in `chunk_gated_delta_rule`.
    safe_gate, disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs
        No effect.
    return_intermediate_states, cp_context
        Must be False and None: not built here.
    **kwargs
        ``A_log``, ``dt_bias``; ``transpose_state_layout``, the former name of `state_v_first`.

    Returns
    -------
    o, final_state
        As in `chunk_gated_delta_rule`.
    """
    del safe_gate, disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs
    _refuse(cp_context=cp_context, return_intermediate_states=return_intermediate_states or None)
    state_v_first = _layout(state_v_first, kwargs)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    _no_more(kwargs)
    if use_gate_in_kernel:
        g = _channel_log_decay(g, A_log, dt_bias, lower_bound)
    beta = _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _call(
        sequence.chunk_kda, (q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, state_v_first,
    )  # fmt: skip


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.fused_recurrent_kda` as ``fla.ops.kda.fused_recurrent_kda``; arguments and results as in `chunk_kda`."""
    state_v_first = _layout(state_v_first, kwargs)
    _no_more(kwargs)
    if use_gate_in_kernel:
        g = _channel_log_decay(g, A_log, dt_bias, lower_bound)
    beta = _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _call(
        sequence.fused_recurrent_kda, (q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, state_v_first,
    )  # fmt: skip


def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.chunk_delta_rule` as ``fla.ops.delta_rule.chunk_delta_rule``; arguments as in `chunk_gated_delta_rule`."""
    del cu_seqlens_cpu
    _no_more(kwargs)
    return _call(
        sequence.chunk_delta_rule, (q, k, v, beta), scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, False,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tvm_gdn.fused_recurrent_delta_rule` as ``fla.ops.delta_rule.fused_recurrent_delta_rule``; `beta` defaults to ones."""
    return _call(
        sequence.fused_recurrent_delta_rule, (q, k, v, full_strength(beta, v)), scale, initial_state, output_final_state,
        cu_seqlens, use_qk_l2norm_in_kernel, False,
    )  # fmt: skip


def _call(
    function: Callable[..., Any],
    tensors: tuple[Any, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    l2norm: bool,
    state_v_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fla's conventions around ours: B is 1 with cu_seqlens, the final state is fp32 whatever the initial one is."""
    if cu_seqlens is not None and tensors[0].shape[0] != 1:
        raise ArgumentError(f"q has batch size {tensors[0].shape[0]}; with cu_seqlens it is 1: pack the sequences into one")
    o, final = function(*tensors, scale, initial_state, output_final_state, cu_seqlens, l2norm, state_v_first=state_v_first)
    return o, None if final is None else final.float()


def _log_decay(g: torch.Tensor | None, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None) -> torch.Tensor:
    if A_log is None or g is None:
        raise ArgumentError("use_gate_in_kernel=True needs A_log [HV] and the raw g [B, T, HV]")
    x = g.float() if dt_bias is None else g.float() + dt_bias.float()
    return -A_log.float().exp() * F.softplus(x)


def _channel_log_decay(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    heads, dim = g.shape[-2:]
    x = g.float() if dt_bias is None else g.float() + dt_bias.float().view(heads, dim)
    if A_log is None and lower_bound is None:
        raise ArgumentError("use_gate_in_kernel=True needs A_log [HV], or lower_bound")
    rate = 1.0 if A_log is None else A_log.float().exp().view(heads, 1)
    return -rate * F.softplus(x) if lower_bound is None else lower_bound * (rate * x).sigmoid()


def _write_strength(beta: torch.Tensor, sigmoid: bool, allow_neg_eigval: bool) -> torch.Tensor:
    if allow_neg_eigval and not sigmoid:
        raise ArgumentError("allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    return beta if not sigmoid else beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)


def _layout(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ArgumentError("transpose_state_layout is the former name of state_v_first: pass one of them")
    warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
    return bool(kwargs.pop("transpose_state_layout"))


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(f"{name} is not supported by tvm_gdn; leave it out, or use fla for this call")


def _no_more(kwargs: dict[str, Any], *allowed: str) -> None:
    """Refuse a keyword that would change the result; fla ignores unknown ones silently, which hides mistakes."""
    if kwargs.get("head_first"):
        raise ArgumentError("head_first=True: pass tensors as [B, T, H, ...]")
    for name in kwargs:
        if name not in _TUNING and name not in allowed:
            raise ArgumentError(f"unknown argument {name}")
