"""Delta rules over whole sequences, chunked or token by token, with one gate per head, per channel, or none.

Six functions of one signature; each has two torch operators: functional (initial state in, final state out) and, named
``..._update``, on a state pool that is updated in place. The maths stands in `ops/tir/delta_rule.py` (token by token) and
`ops/tir/chunk.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from tvm_gdn import direct
from tvm_gdn.autograd import in_words_of
from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops import draws
from tvm_gdn.ops.arguments import (
    BETA,
    CU_SEQLENS,
    FAMILY,
    FINAL,
    FINAL_TOO,
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
from tvm_gdn.ops.recurrent import FUSED_RECURRENT_UPDATE
from tvm_gdn.spec import OpSpec, Tensor

CHANNEL_GATE = Tensor("g", "B T HV K", strides="inner", usual="float32", values=draws.log_decay)
_GATES: dict[str, tuple[Tensor, ...]] = {"gated_delta_rule": (GATE,), "kda": (CHANNEL_GATE,), "delta_rule": ()}
_TEXT = {"gated_delta_rule": "gated delta rule", "kda": "Kimi delta attention (gate per channel)", "delta_rule": "delta rule"}


def _cases(pool: bool) -> tuple[Mapping[str, Any], ...]:
    state = ("initial_state_source", "initial_state_indices") if pool else ("initial_state",)
    final = ("final_state",) if pool else ()
    more: dict[str, Any] = {} if pool else {"output_final_state": True}
    shapes: tuple[dict[str, Any], ...] = (
        {"B": 2, "T": 65, "H": 2, "HV": 4, "K": 64, "V": 128, "S": 3, "with": (*state, *final), **more},
        {"B": 2, "T": 5, "H": 2, "HV": 2, "K": 8, "V": 8, "with": state, "S": 2},
        {"lengths": (63, 0, 1, 7, 129), "H": 2, "HV": 2, "K": 32, "V": 256, "S": 6, "with": (*state, *final, "cu_seqlens"),
         "padding": pool, **more},
    )  # fmt: skip
    stateless = {"B": 1, "T": 500, "H": 1, "HV": 2, "K": 128, "V": 32, "with": (), "use_qk_l2norm_in_kernel": True, **more}
    storage = (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"))
    variants = [
        {"dtype": dtype, "state_dtype": state_dtype, "state_v_first": v_first}
        for dtype, state_dtype in storage
        for v_first in (False, True)
    ]
    # Three variants per shape, the next three for the next shape: all eight occur, at a third of the kernels to compile.
    drawn = [{**shape, **variants[(3 * i + n) % len(variants)]} for i, shape in enumerate(shapes) for n in range(3)]
    return (*drawn, {**stateless, **variants[2]})


def _bench(lengths: tuple[int, ...], packed: tuple[int, ...] = ()) -> tuple[Mapping[str, Any], ...]:
    heads = {"K": 128, "V": 128, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    dense, packs = {"B": 1, **heads, "with": ("initial_state",)}, {**heads, "with": ("initial_state", "cu_seqlens")}
    return tuple(
        case
        for dtype in ("bfloat16", "float32")
        for case in (
            *({"T": tokens, "H": 16, "HV": count, **dense, "dtype": dtype} for tokens in lengths for count in (32, 16)),
            *({"lengths": (length,) * 8, "H": 16, "HV": 32, **packs, "dtype": dtype} for length in packed),
        )
    )


def _bench_pool(form: str) -> tuple[Mapping[str, Any], ...]:
    size = {"B": 1, "T": 512, "S": 1} if form == "chunk" else {"B": 8, "T": 1, "S": 8}
    model = {"H": 16, "HV": 32, "K": 128, "V": 128, "with": ("initial_state_source", "initial_state_indices")}
    return tuple({**size, **model, "use_qk_l2norm_in_kernel": True, "dtype": dtype} for dtype in ("bfloat16", "float32"))


def _spec(form: str, rule: str, pool: bool, second: OpSpec | None = None) -> OpSpec:
    states = (POOL, SLOTS) if pool else (INITIAL, OUTPUT_FINAL)
    final = (FINAL_TOO,) if pool else ()
    return OpSpec(
        name=f"{form}_{rule}{'_update' if pool else ''}",
        summary=f"{_TEXT[rule]}, {'chunked' if form == 'chunk' else 'token by token'}, {'state pool' if pool else 'states'}",
        algorithm="chunk" if form == "chunk" else "recurrent",
        inputs=(QUERY, KEY, VALUE, *_GATES[rule], BETA, SCALE, *states, CU_SEQLENS, L2NORM, V_FIRST, *final),
        outputs=(OUT,) if pool else (OUT, FINAL),
        static_axes=("K", "V"),
        traits=(("channel_gate", True),) if rule == "kda" else (),
        cases=_cases(pool),
        bench=_bench_pool(form) if pool else _bench((512, 4096), (64,)) if form == "chunk" else _bench((64,)),
        second=second,
        **FAMILY,
    )


def _specs() -> Iterator[OpSpec]:
    """Chunked rules, each with its token recurrence as the second choice, and those recurrences."""
    for rule in _GATES:
        recurrences = [_spec("fused_recurrent", rule, pool) for pool in (False, True)]
        if rule == "gated_delta_rule":
            # It has verification arguments too and stands in `recurrent.py`.
            recurrences[1] = FUSED_RECURRENT_UPDATE
        yield from (_spec("chunk", rule, pool, recurrences[pool]) for pool in (False, True))
        yield from (spec for spec in recurrences if spec is not FUSED_RECURRENT_UPDATE)


SPECS = tuple(_specs())


def _empty_states(pool: Any, indices: Any) -> torch.Tensor | None:
    """Memory for one state per index; None where the operator will refuse the pool or the indices."""
    sound = isinstance(pool, torch.Tensor) and isinstance(indices, torch.Tensor) and pool.ndim == 4 and indices.ndim == 1
    return pool.new_empty((indices.shape[0], *pool.shape[1:])) if sound else None


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
        operator = getattr(direct.call, name)
        o, final = operator(*tensors, scale, initial_state, output_final_state, cu_seqlens, l2norm, state_v_first)
    else:
        final = _empty_states(initial_state, indices) if output_final_state else None
        operator = getattr(direct.call, f"{name}_update")
        options = scale, initial_state, indices, cu_seqlens, l2norm
        try:
            o = operator(*tensors, *options, state_v_first=state_v_first, final_state=final)
        except (ArgumentError, ArgumentTypeError) as error:
            # In the words of the function that was called.
            text = str(error).replace(f"{name}_update:", f"{name}:").replace("initial_state_source", "initial_state")
            raise type(error)(text) from None
        o = in_words_of(name, o)
    return tokens_first(o) if one_token else o, final if output_final_state else None


_PARAMETERS = """
Parameters
----------
q, k : torch.Tensor
    ``[B, T, H, K]``, fp32, bf16 or fp16; the last axis contiguous, other axes may be strided. With `cu_seqlens` B is 1, or
    ``[N, 1, H, K]`` for N one-token sequences.
v : torch.Tensor
    ``[B, T, HV, V]``, dtype of `q`; HV a multiple of H, value head hv reads q/k head ``hv // (HV // H)``.{gate}
beta : torch.Tensor
    ``[B, T, HV]``, write strength, fp32, bf16 or fp16, any strides.
scale : float, optional
    Factor on q; default ``K ** -0.5``.
initial_state : torch.Tensor, optional
    ``[N, HV, K, V]``, fp32, bf16 or fp16, read only; with `initial_state_indices` a pool ``[slots, HV, K, V]`` that is
    updated in place. Default: zeros.
output_final_state : bool
    Whether to return the final states, from a pool as well.
cu_seqlens : torch.Tensor, optional
    ``[N + 1]``, int32 or int64, bounds of packed sequences: first 0, last T, never decreasing.
use_qk_l2norm_in_kernel : bool
    Normalize q and k per token and head: ``x / sqrt(sum(x^2) + 1e-6)``.
initial_state_indices : torch.Tensor, optional
    ``[N]``, int32 or int64: pool slot of each sequence, each used once; -1 is padding (zero state read, nothing written; output
    and final state are computed).
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
    A shape, stride, bound or slot that is not allowed; nothing has been written then.
ArgumentTypeError
    A dtype or device that is not allowed.

Notes
-----
Per token, in fp32: ``{decay}u = (v - S^T k) * beta; S += k u^T; o = S^T q``{chunked}.
Source: {source}; signature of flash-linear-attention.
"""
_GATE_TEXT = {
    "gated_delta_rule": """
g : torch.Tensor or None
    ``[B, T, HV]``, log-decay (natural logarithm), fp32, bf16 or fp16, any strides; None: no decay.""",
    "kda": """
g : torch.Tensor
    ``[B, T, HV, K]``, log-decay per channel of the key, fp32, bf16 or fp16; the last axis contiguous.""",
    "delta_rule": "",
}
_CHUNKED = """; chunks of tokens are computed with matrix products.
Where a device has no room for a chunk of these K, V and dtypes, it goes token by token, with a warning.
A NaN or an infinity of a token reaches the tokens before it in its chunk too, never another sequence or head"""
_SOURCES = {
    "gated_delta_rule": "Gated Delta Networks (arXiv:2412.06464)",
    "kda": "Kimi Linear (arXiv:2510.26692)",
    "delta_rule": "Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484)",
}

F = TypeVar("F", bound=Callable[..., Any])


def _documented(function: F) -> F:
    """Append to a function's docstring what the six share: one text for all of them, complete in each."""
    form, rule = next(
        (form, rule) for form in ("chunk", "fused_recurrent") for rule in _GATES if function.__name__ == f"{form}_{rule}"
    )
    text = _PARAMETERS.format(
        gate=_GATE_TEXT[rule],
        decay="" if rule == "delta_rule" else "S *= exp(g); ",
        chunked=_CHUNKED if form == "chunk" else "",
        source=_SOURCES[rule],
    )
    function.__doc__ = f"{function.__doc__}\n{text}"
    return function


@_documented
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
    """Gated delta rule over whole sequences, in chunks: prefill."""
    name, gates = ("chunk_gated_delta_rule", (g, beta)) if g is not None else ("chunk_delta_rule", (beta,))
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call(name, (q, k, v, *gates), *options)


@_documented
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
    """`chunk_gated_delta_rule`, token by token: for a few tokens per sequence."""
    name, gates = ("fused_recurrent_gated_delta_rule", (g, beta)) if g is not None else ("fused_recurrent_delta_rule", (beta,))
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call(name, (q, k, v, *gates), *options)


@_documented
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
    """Kimi delta attention over whole sequences, in chunks: a gate per key channel."""
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call("chunk_kda", (q, k, v, g, beta), *options)


@_documented
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
    """`chunk_kda`, token by token: for a few tokens per sequence."""
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call("fused_recurrent_kda", (q, k, v, g, beta), *options)


@_documented
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
    """Delta rule without decay over whole sequences, in chunks."""
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call("chunk_delta_rule", (q, k, v, beta), *options)


@_documented
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
    """`chunk_delta_rule`, token by token: for a few tokens per sequence."""
    options = scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices, state_v_first
    return _call("fused_recurrent_delta_rule", (q, k, v, beta), *options)
