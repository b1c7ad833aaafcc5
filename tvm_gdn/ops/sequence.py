"""Delta rules over whole sequences, chunked or token by token, with one gate per head, per channel, or none.

Six functions of one signature; each has two torch operators: functional (initial state in, final state out) and, named
``..._update``, on a state pool that is updated in place. The maths stands in `ops/tir/delta_rule.py` (token by token) and
`ops/tir/chunk.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.autograd import forward_only
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import draws
from tvm_gdn.ops.arguments import (
    BETA,
    CU_SEQLENS,
    FAMILY,
    FINAL,
    GATE,
    INITIAL,
    KEY,
    L2NORM,
    OUT,
    OUTPUT_FINAL,
    POOL,
    QUERY,
    SCALE,
    SLOTS,
    V_FIRST,
    VALUE,
    is_one_token_batch,
    tokens_first,
)
from tvm_gdn.spec import OpSpec, Tensor

CHANNEL_GATE = Tensor("g", "B T HV K", strides="inner", usual="float32", values=draws.log_decay)
_GATES: dict[str, tuple[Tensor, ...]] = {"gated_delta_rule": (GATE,), "kda": (CHANNEL_GATE,), "delta_rule": ()}
_TEXT = {"gated_delta_rule": "gated delta rule", "kda": "Kimi delta attention (gate per channel)", "delta_rule": "delta rule"}


def _cases(pool: bool) -> tuple[Mapping[str, Any], ...]:
    state = ("initial_state_source", "initial_state_indices") if pool else ("initial_state",)
    more: dict[str, Any] = {} if pool else {"output_final_state": True}
    cases: tuple[dict[str, Any], ...] = (
        {"B": 2, "T": 65, "H": 2, "HV": 4, "K": 64, "V": 128, "S": 3, "with": state, **more},
        {"B": 1, "T": 500, "H": 1, "HV": 2, "K": 128, "V": 32, "with": (), "use_qk_l2norm_in_kernel": True, **more},
        {"B": 2, "T": 4, "H": 2, "HV": 2, "K": 8, "V": 8, "with": state, "S": 2},
        {"lengths": (63, 0, 1, 7, 129), "H": 2, "HV": 2, "K": 32, "V": 256, "S": 6, "with": (*state, "cu_seqlens"), **more},
    )
    variants = [
        {"dtype": dtype, "state_dtype": state_dtype, "state_v_first": v_first}
        for v_first in (False, True)
        for dtype, state_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"))
    ]
    # Two variants per shape, another two for the next shape: all six occur, at a third of the kernels to compile.
    return tuple({**case, **variants[(2 * i + n) % len(variants)]} for i, case in enumerate(cases) for n in (0, 1))


def _bench(lengths: tuple[int, ...]) -> tuple[Mapping[str, Any], ...]:
    model = {"B": 1, "K": 128, "V": 128, "with": ("initial_state",), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return tuple(
        {"T": tokens, "H": 16, "HV": heads, **model, "dtype": dtype}
        for dtype in ("bfloat16", "float32")
        for tokens in lengths
        for heads in (32, 16)
    )


def _bench_pool(form: str) -> tuple[Mapping[str, Any], ...]:
    size = {"B": 1, "T": 512, "S": 1} if form == "chunk" else {"B": 8, "T": 1, "S": 8}
    model = {"H": 16, "HV": 32, "K": 128, "V": 128, "with": ("initial_state_source", "initial_state_indices")}
    return tuple({**size, **model, "use_qk_l2norm_in_kernel": True, "dtype": dtype} for dtype in ("bfloat16", "float32"))


def _spec(form: str, rule: str, pool: bool) -> OpSpec:
    states = (POOL, SLOTS) if pool else (INITIAL, OUTPUT_FINAL)
    return OpSpec(
        name=f"{form}_{rule}{'_update' if pool else ''}",
        summary=f"{_TEXT[rule]}, {'chunked' if form == 'chunk' else 'token by token'}, {'state pool' if pool else 'states'}",
        algorithm="chunk" if form == "chunk" else "recurrent",
        inputs=(QUERY, KEY, VALUE, *_GATES[rule], BETA, SCALE, *states, CU_SEQLENS, L2NORM, V_FIRST),
        outputs=(OUT,) if pool else (OUT, FINAL),
        static_axes=("K", "V"),
        traits=(("channel_gate", True),) if rule == "kda" else (),
        cases=_cases(pool),
        bench=_bench_pool(form) if pool else _bench((512, 4096) if form == "chunk" else (64,)),
        **FAMILY,
    )


#: `fused_recurrent_gated_delta_rule_update` has verification arguments too and stands in `recurrent.py`.
SPECS = tuple(
    _spec(form, rule, pool)
    for rule in _GATES
    for form in ("chunk", "fused_recurrent")
    for pool in (False, True)
    if (form, rule, pool) != ("fused_recurrent", "gated_delta_rule", True)
)


def _call(
    name: str,
    tensors: tuple[Any, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    l2norm: bool,
    indices: torch.Tensor | None,
    state_v_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    one_token = is_one_token_batch(tensors[0], cu_seqlens)
    if one_token:
        tensors = tuple(map(tokens_first, tensors))
    final = None
    if indices is None:
        operator = getattr(torch.ops.tvm_gdn, name)
        o, final = operator(*tensors, scale, initial_state, output_final_state, cu_seqlens, l2norm, state_v_first)
    else:
        if output_final_state:
            raise ArgumentError(
                f"{name}: output_final_state with initial_state_indices; the pool is updated in place: read the final states "
                "from initial_state[initial_state_indices]"
            )
        operator = getattr(torch.ops.tvm_gdn, f"{name}_update")
        o = operator(*tensors, scale, initial_state, indices, cu_seqlens, l2norm, state_v_first=state_v_first)
    return tokens_first(o) if one_token else o, final if output_final_state else None


@forward_only
def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule over whole sequences, in chunks: prefill.

    Parameters
    ----------
    q, k : torch.Tensor
        ``[B, T, H, K]``, fp32, bf16 or fp16; the last axis contiguous, other axes may be strided. With `cu_seqlens` B is 1, or
        ``[N, 1, H, K]`` for N one-token sequences.
    v : torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`; HV a multiple of H, value head hv reads q/k head ``hv // (HV // H)``.
    g : torch.Tensor or None
        ``[B, T, HV]``, log-decay (natural logarithm), fp32, bf16 or fp16, any strides; None: no decay.
    beta : torch.Tensor
        ``[B, T, HV]``, write strength, fp32, bf16 or fp16, any strides.
    scale : float, optional
        Factor on q; default ``K ** -0.5``.
    initial_state : torch.Tensor, optional
        ``[N, HV, K, V]``, fp32, bf16 or fp16, read only; with `initial_state_indices` a pool ``[slots, HV, K, V]`` that is
        updated in place. Default: zeros.
    output_final_state : bool
        Whether to return the final states.
    cu_seqlens : torch.Tensor, optional
        ``[N + 1]``, int32 or int64, bounds of packed sequences: first 0, last T, never decreasing.
    use_qk_l2norm_in_kernel : bool
        Normalize q and k per token and head: ``x / sqrt(sum(x^2) + 1e-6)``.
    initial_state_indices : torch.Tensor, optional
        ``[N]``, int32 or int64: pool slot of each sequence; -1 is padding (zero state read, nothing written).
    state_v_first : bool
        States are ``[..., HV, V, K]``.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Per token, in fp32: ``S *= exp(g); u = (v - S^T k) * beta; S += k u^T; o = S^T q``; chunks of tokens are computed with
    matrix products. Source: Gated Delta Networks (arXiv:2412.06464); signature of flash-linear-attention.
    """
    return _call(
        "chunk_gated_delta_rule" if g is not None else "chunk_delta_rule",
        (q, k, v, g, beta) if g is not None else (q, k, v, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )


@forward_only
def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gated_delta_rule`, token by token: for a few tokens per sequence.

    Parameters
    ----------
    q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, \
state_v_first
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Gated Delta Networks (arXiv:2412.06464); signature of flash-linear-attention.
    """
    return _call(
        "fused_recurrent_gated_delta_rule" if g is not None else "fused_recurrent_delta_rule",
        (q, k, v, g, beta) if g is not None else (q, k, v, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )


@forward_only
def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi delta attention over whole sequences, in chunks: a gate per key channel.

    Parameters
    ----------
    g : torch.Tensor
        ``[B, T, HV, K]``, log-decay per channel of the key, fp32, bf16 or fp16; the last axis contiguous.
    q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, \
state_v_first
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Kimi Linear (arXiv:2510.26692); signature of flash-linear-attention.
    """
    return _call(
        "chunk_kda",
        (q, k, v, g, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )


@forward_only
def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda`, token by token: for a few tokens per sequence.

    Parameters
    ----------
    g : torch.Tensor
        ``[B, T, HV, K]``, log-decay per channel of the key, fp32, bf16 or fp16; the last axis contiguous.
    q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, \
state_v_first
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Kimi Linear (arXiv:2510.26692); signature of flash-linear-attention.
    """
    return _call(
        "fused_recurrent_kda",
        (q, k, v, g, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )


@forward_only
def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Delta rule without decay over whole sequences, in chunks.

    Parameters
    ----------
    q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, \
state_v_first
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484); signature of flash-linear-attention.
    """
    return _call(
        "chunk_delta_rule",
        (q, k, v, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )


@forward_only
def fused_recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_delta_rule`, token by token: for a few tokens per sequence.

    Parameters
    ----------
    q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, \
state_v_first
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : torch.Tensor
        ``[B, T, HV, V]``, dtype of `v`.
    final_state : torch.Tensor or None
        ``[N, HV, K, V]``, dtype of `initial_state`, fp32 without one.

    Raises
    ------
    ArgumentError
        A shape, stride, bound or slot that is not allowed.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Source: Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484); signature of flash-linear-attention.
    """
    return _call(
        "fused_recurrent_delta_rule",
        (q, k, v, beta),
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        initial_state_indices,
        state_v_first,
    )
