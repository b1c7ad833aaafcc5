"""Torch-native reference of every operator: the oracle of the tests and the fallback of the dispatcher.

One function per operator, found by its name. Nothing here is shared with :mod:`tvm_gdn.ops`, so that an error in a
kernel's definition cannot hide in its own oracle. Arguments are not validated: that happens before dispatch.

Every function takes a last keyword ``exact``. ``exact=False`` computes in float32 and returns the storage dtypes.
``exact=True`` computes in float64 and returns float64 tensors; what is written in place (state pools and buffers)
keeps the dtype of its storage.

Letters in shapes: B batch, T tokens, N sequences, H query/key heads, HV value heads (value head ``hv`` reads
query/key head ``hv // (HV // H)``), K key dim, V value dim.

References
----------
.. [1] S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024.
   https://arxiv.org/abs/2412.06464
.. [2] flash-linear-attention, https://github.com/fla-org/flash-linear-attention (names and argument order).
.. [3] SGLang, https://github.com/sgl-project/sglang (state pools, verification buffers, packed decode).
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tvm_gdn.reference_layer import causal_conv1d_fn, causal_conv1d_update, compute_dtype, rms_norm_gated
from tvm_gdn.reference_moe import (
    expert_stats,
    fused_experts,
    fused_experts_packed,
    fused_experts_quantized,
    moe_route,
    moe_sort,
)

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "expert_stats",
    "fused_experts",
    "fused_experts_packed",
    "fused_experts_quantized",
    "fused_gdn_gating",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_update",
    "fused_sigmoid_gating_delta_rule_update",
    "moe_route",
    "moe_sort",
    "packed_decode_gated_delta_rule",
    "rms_norm_gated",
]

_L2NORM_EPS = 1e-6


class _Verify(NamedTuple):
    """Where each sequence stores its state after every step, and which stored step each step follows."""

    buffer: Tensor  # [slots, steps, HV, K, V]
    slots: Tensor  # [N], negative: nothing is stored
    parents: Tensor | None  # [N, T]

    def narrow(self, first: int, count: int) -> _Verify:
        rows = slice(first, first + count)
        return _Verify(self.buffer, self.slots[rows], None if self.parents is None else self.parents[rows])

    def start(self, step: int, initial: Tensor, previous: Tensor) -> Tensor:
        """State from which ``step`` starts, given the initial state and the state after the previous step."""
        if self.parents is None or step == 0:
            return previous
        parent = self.parents[:, step].long()
        follows = parent >= 0
        stored = _load(self.buffer, self.slots.where(follows, -1), initial.dtype, steps=parent)
        return torch.where(follows[:, None, None, None], stored, initial)


def _load(pool: Tensor, slots: Tensor, dtype: torch.dtype, steps: Tensor | None = None) -> Tensor:
    """``pool[slots]`` (or ``pool[slots, steps]``) in ``dtype``; a negative slot gives zeros and reads nothing."""
    used = slots >= 0
    index = (slots[used],) if steps is None else (slots[used], steps[used])
    states = pool[index].to(dtype)
    if states.shape[0] == slots.shape[0]:
        return states
    return states.new_zeros((slots.shape[0], *states.shape[1:])).index_put((used,), states)


def _store(pool: Tensor, slots: Tensor, states: Tensor) -> None:
    """``pool[slots] = states`` without the negative slots."""
    used = slots >= 0
    # Pools outlive a call: a graph of autograd must not grow in them from token to token.
    pool[slots[used]] = states[used].detach().to(pool.dtype)


def _recurrence(inputs: list[Tensor], initial: Tensor, verify: _Verify | None) -> tuple[Tensor, Tensor]:
    """Token loop over sequences of one length, all tensors of one dtype; the only place with the delta rule.

    inputs: q, k ``[N, T, HV, K]`` (normalized, scaled, repeated to the value heads), v ``[N, T, HV, V]``, g
    ``[N, T, HV, 1 or K]``, beta ``[N, T, HV]``; initial ``[N, HV, K, V]``. Returns o ``[N, T, HV, V]`` and the state after
    the last token.
    """
    q, k, v, g, beta = inputs
    # Products are written as multiply and sum: matmul and einsum obey global precision switches (TF32, bf16).
    state, decay, outputs = initial, g.exp(), []
    for t in range(q.shape[1]):
        q_t, k_t = q[:, t, :, :, None], k[:, t, :, :, None]
        if verify is not None:
            state = verify.start(t, initial, state)
        state = state * decay[:, t, :, :, None]
        u = (v[:, t] - (state * k_t).sum(-2)) * beta[:, t, :, None]
        state = torch.addcmul(state, k_t, u[:, :, None, :])
        outputs.append((state * q_t).sum(-2))
        if verify is not None:
            _store(verify.buffer[:, t], verify.slots, state)
    # Without tokens v is the empty output already, and torch.stack refuses an empty list.
    return torch.stack(outputs, 1) if outputs else v, state


def _runs(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int, int]]:
    """(first sequence, sequences, first token, length) of each run of consecutive sequences of one length."""
    if cu_seqlens is None:
        # An empty batch has no steps either: nothing has to be wide enough for them.
        return [(0, q.shape[0], 0, q.shape[1] if q.shape[0] else 0)]
    bounds = cu_seqlens.tolist()
    runs, first = [], 0
    for length, group in groupby(end - begin for begin, end in pairwise(bounds)):
        count = len(list(group))
        runs.append((first, count, bounds[first], length))
        first += count
    return runs or [(0, 0, 0, 0)]


def _l2norm(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + _L2NORM_EPS).sqrt()


def _gates(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, softplus_beta: float, softplus_threshold: float, exact: bool
) -> tuple[Tensor, Tensor]:
    A_log, a, b, dt_bias = (x.to(compute_dtype(exact)) for x in (A_log, a, b, dt_bias))
    return -A_log.exp() * F.softplus(a + dt_bias, softplus_beta, softplus_threshold), b.sigmoid()


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float | None,
    pool: Tensor | None,
    slots: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm: bool,
    *,
    write_pool: bool,
    want_final: bool,
    state_v_first: bool,
    exact: bool,
    buffer: Tensor | None = None,
    buffer_slots: Tensor | None = None,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reduce every public form to :func:`_recurrence`: layouts, slots, sequences, heads, dtypes."""
    q, k, v, g, beta = inputs
    dtype, out_shape = compute_dtype(exact), (*q.shape[:-2], *v.shape[-2:])
    runs = _runs(q, cu_seqlens)
    tokens, heads = q.shape[0] * q.shape[1], v.shape[-2]
    default_slots = torch.arange(sum(count for _, count, _, _ in runs), device=q.device)
    if state_v_first:
        pool, buffer = (None if x is None else x.transpose(-1, -2) for x in (pool, buffer))
    slots = default_slots if slots is None else slots.long()
    verify = None
    if buffer is not None:
        verify = _Verify(buffer, default_slots if buffer_slots is None else buffer_slots.long(), parents)

    qs, ks = (x.flatten(0, 1).to(dtype) for x in (q, k))
    if use_qk_l2norm:
        qs, ks = _l2norm(qs), _l2norm(ks)
    qs = qs * (q.shape[-1] ** -0.5 if scale is None else scale)
    qs, ks = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (qs, ks))
    gates = g.reshape(tokens, heads, k.shape[-1] if g.ndim == q.ndim and g.shape[-1] == k.shape[-1] else 1).to(dtype)
    flat = (qs, ks, v.flatten(0, 1).to(dtype), gates, beta.reshape(tokens, heads).to(dtype))

    outputs, finals = [], []
    for first, count, begin, length in runs:
        run_slots = slots[first : first + count]
        if pool is None:
            initial = torch.zeros((count, heads, k.shape[-1], v.shape[-1]), dtype=dtype, device=q.device)
        else:
            initial = _load(pool, run_slots, dtype)
        run = [x[begin : begin + count * length].reshape(count, length, *x.shape[1:]) for x in flat]
        o, final = _recurrence(run, initial, None if verify is None else verify.narrow(first, count))
        if pool is not None and write_pool and length:
            _store(pool, run_slots, final)
        outputs.append(o.flatten(0, 1))
        if want_final:
            finals.append(final.transpose(-1, -2) if state_v_first else final)

    out = torch.cat(outputs).reshape(out_shape).to(dtype if exact else v.dtype)
    if not want_final:
        return out, None
    final_dtype = dtype if exact or pool is None else pool.dtype
    return out, torch.cat(finals).to(final_dtype)


def fused_gdn_gating(
    A_log: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gates of the delta rule: ``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``.

    Parameters
    ----------
    A_log, dt_bias : Tensor
        ``[HV]``, fp32, bf16 or fp16.
    a, b : Tensor
        ``[..., HV]``, fp32, bf16 or fp16.
    softplus_beta, softplus_threshold : float
        ``softplus(x) = log(1 + exp(softplus_beta * x)) / softplus_beta``, and x itself where
        ``softplus_beta * x > softplus_threshold``.
    exact : bool
        Compute and return float64.

    Returns
    -------
    g : Tensor
        Log-decay, fp32, the shape of ``a``.
    beta : Tensor
        Update gate, the dtype and shape of ``b``.
    """
    g, beta = _gates(A_log, a, b, dt_bias, softplus_beta, softplus_threshold, exact)
    return g, beta if exact else beta.to(b.dtype)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: Tensor | None = None,
    state_v_first: bool = False,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule [1]_, token by token.

    Per token: ``S *= exp(g)``; ``u = (v - S^T k) * beta``; ``S += k u^T``; ``o = S^T (q * scale)``.

    Parameters
    ----------
    q, k : Tensor
        ``[B, T, H, K]``; with ``cu_seqlens`` ``[1, T, H, K]`` or ``[T, 1, H, K]``.
    v : Tensor
        ``[B, T, HV, V]``.
    g, beta : Tensor
        Log-decay and update gate, ``[B, T, HV]``.
    scale : float, optional
        Factor on q, default ``K ** -0.5``.
    initial_state : Tensor, optional
        ``[N, HV, K, V]``, never modified; with ``initial_state_indices`` a pool ``[slots, HV, K, V]`` that is updated
        in place. Default: zeros.
    output_final_state : bool
        Return the states after the last tokens.
    cu_seqlens : Tensor, optional
        ``[N + 1]`` bounds of the sequences along the tokens; zero-length sequences keep their state.
    use_qk_l2norm_in_kernel : bool
        Replace q and k by ``x / sqrt(sum(x^2) + 1e-6)``.
    initial_state_indices : Tensor, optional
        ``[N]`` slots of the pool; -1 reads a zero state and writes nothing.
    state_v_first : bool
        States are ``[..., V, K]``.
    exact : bool
        Compute and return float64.

    Returns
    -------
    o : Tensor
        ``[B, T, HV, V]``, the dtype of v.
    final_state : Tensor or None
        ``[N, HV, K, V]``, the dtype of ``initial_state``, fp32 if there was none.
    """
    return _run(
        (q, k, v, g, beta),
        scale,
        initial_state,
        initial_state_indices,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        write_pool=initial_state_indices is not None,
        want_final=output_final_state,
        state_v_first=state_v_first,
        exact=exact,
    )


def fused_recurrent_gated_delta_rule_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state_source: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cache_steps: int | None = None,  # noqa: ARG001 - a size that the buffer states itself
    retrieve_parent_token: Tensor | None = None,
    *,
    state_v_first: bool = False,
    final_state: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Gated delta rule on a pool of states updated in place, with the buffers of speculative verification.

    Parameters
    ----------
    q, k, v, g, beta, scale, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first, exact
        As in :func:`fused_recurrent_gated_delta_rule`.
    initial_state_source : Tensor, optional
        Pool ``[slots, HV, K, V]``, updated in place. None: zero initial states, nothing written.
    initial_state_indices : Tensor, optional
        ``[N]`` slots, default ``arange(N)``; -1 reads a zero state and writes nothing.
    disable_state_update : bool
        Leave the pool as it is.
    intermediate_states_buffer : Tensor, optional
        ``[slots, steps, HV, K, V]``, gets the state after every step.
    intermediate_state_indices : Tensor, optional
        ``[N]`` slots of the buffer, default ``arange(N)``; -1 stores nothing.
    cache_steps : int, optional
        The buffer's steps, for callers that pass them; no effect here.
    retrieve_parent_token : Tensor, optional
        ``[N, T]``: step t > 0 starts from the state stored in the buffer for its parent step (zeros if the sequence
        stores nothing), from the initial state if the parent is -1. Step 0 starts from the initial state.
    final_state : Tensor, optional
        ``[N, HV, K, V]``, gets the states after the last tokens, those of padding sequences included.

    Returns
    -------
    Tensor
        o ``[B, T, HV, V]``, the dtype of v.
    """
    o, finals = _run(
        (q, k, v, g, beta),
        scale,
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        write_pool=not disable_state_update,
        want_final=final_state is not None,
        state_v_first=state_v_first,
        exact=exact,
        buffer=intermediate_states_buffer,
        buffer_slots=intermediate_state_indices,
        parents=retrieve_parent_token,
    )
    if final_state is not None and finals is not None:
        final_state.copy_(finals)
    return o


def fused_sigmoid_gating_delta_rule_update(
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    initial_state_source: Tensor | None,
    initial_state_indices: Tensor | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Tensor | None = None,
    *,
    state_v_first: bool = False,
    exact: bool = False,
) -> Tensor:
    """:func:`fused_recurrent_gated_delta_rule_update` with the gates of :func:`fused_gdn_gating` computed inside.

    ``a`` and ``b`` are ``[B, T, HV]``, or ``[T, HV]`` where B is 1; both gates stay unrounded. The other arguments
    and the result are those of the two functions.
    """
    g, beta = _gates(A_log, a, b, dt_bias, softplus_beta, softplus_threshold, exact)
    return fused_recurrent_gated_delta_rule_update(
        q,
        k,
        v,
        g,
        beta,
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
        state_v_first=state_v_first,
        exact=exact,
    )


def packed_decode_gated_delta_rule(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    *,
    state_v_first: bool = False,
    exact: bool = False,
) -> Tensor:
    """One decode step of :func:`fused_sigmoid_gating_delta_rule_update` from packed projections.

    ``mixed_qkv`` is ``[B, 2*H*K + HV*V]``, each row ``[q heads | k heads | v heads]``; ``a`` and ``b`` are ``[B, HV]``.
    HV comes from ``A_log``, K and V from the pool, H from the row length. Returns o ``[B, 1, HV, V]``, the dtype of
    ``mixed_qkv``.
    """
    dim_k, dim_v = reversed(initial_state_source.shape[-2:]) if state_v_first else initial_state_source.shape[-2:]
    heads = A_log.shape[0]
    rows, width_v = mixed_qkv.shape[0], heads * dim_v
    width_k = (mixed_qkv.shape[1] - width_v) // 2
    q, k, v = torch.split(mixed_qkv, [width_k, width_k, width_v], dim=1)
    return fused_sigmoid_gating_delta_rule_update(
        A_log,
        a[:, None],
        dt_bias,
        softplus_beta,
        softplus_threshold,
        q.reshape(rows, 1, width_k // dim_k, dim_k),
        k.reshape(rows, 1, width_k // dim_k, dim_k),
        v.reshape(rows, 1, heads, dim_v),
        b[:, None],
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
        exact=exact,
    )


def fused_recurrent_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Delta rule without decay: `fused_recurrent_gated_delta_rule` with g = 0."""
    return fused_recurrent_gated_delta_rule(q, k, v, torch.zeros_like(beta, dtype=torch.float32), beta, *args, **kwargs)


def fused_recurrent_delta_rule_update(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Delta rule without decay on a pool: `fused_recurrent_gated_delta_rule_update` with g = 0."""
    return fused_recurrent_gated_delta_rule_update(q, k, v, torch.zeros_like(beta, dtype=torch.float32), beta, *args, **kwargs)


def fused_conv_gated_delta_rule_update(
    mixed_qkv: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state_source: Tensor,
    conv_bias: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    activation: str | None = "silu",
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    pad_slot_id: int = -1,
    *,
    state_v_first: bool = False,
    exact: bool = False,
) -> Tensor:
    """:func:`causal_conv1d_update` of the packed row, then :func:`packed_decode_gated_delta_rule`."""
    conv = (conv_state, conv_weight, conv_bias, activation, conv_state_indices, pad_slot_id)
    return packed_decode_gated_delta_rule(
        causal_conv1d_update(mixed_qkv, *conv, exact=exact),
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
        state_v_first=state_v_first,
        exact=exact,
    )


# Chunking is a way to compute, not another function; a gate per channel is told by the shape of g.
chunk_gated_delta_rule = chunk_kda = fused_recurrent_kda = fused_recurrent_gated_delta_rule
chunk_gated_delta_rule_update = chunk_kda_update = fused_recurrent_kda_update = fused_recurrent_gated_delta_rule_update
chunk_delta_rule, chunk_delta_rule_update = fused_recurrent_delta_rule, fused_recurrent_delta_rule_update
