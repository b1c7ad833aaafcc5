"""Token-recurrent gated delta rule: specifications and public functions of the operators that step token by token.

The maths stands in `ops/tir/recurrent.py`, once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops.rules import check_recurrent
from tvm_gdn.spec import INTS, Geometry, OpSpec, Output, Scalar, Tensor

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def _default_scale(axes: Mapping[str, int]) -> float:
    return float(axes["K"]) ** -0.5


def _cost(sizes: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor of a call: every state read and written once, every token's rows once; 3 multiply-adds per state element."""
    tokens, sequences = sizes["B"] * sizes["T"], sizes["N"]
    heads, H, K, V = sizes["HV"], sizes["H"], geometry.axis["K"], geometry.axis["V"]
    dtypes = geometry.dtype
    data = _ITEMSIZE[dtypes.get("q", dtypes.get("mixed_qkv", "float32"))]
    state_name = next((n for n in ("initial_state_source", "initial_state") if n in dtypes), None)
    state = 0
    if state_name:
        state = 2 * sequences * heads * K * V * _ITEMSIZE[dtypes[state_name]]
    elif geometry.attr.get("output_final_state"):
        state = sequences * heads * K * V * 4
    rows = tokens * (2 * H * K + 2 * heads * V) * data
    return state + rows, tokens * heads * K * V * 7


_Q = Tensor("q", "B T H K", role="data", values="unit")
_K = Tensor("k", "B T H K", role="data", values="unit")
_V = Tensor("v", "B T HV V", role="data")
_G = Tensor("g", "B T HV", strides="any", values="log_decay")
_BETA = Tensor("beta", "B T HV", strides="any", values="beta")
_A_LOG = Tensor("A_log", "HV", strides="dense", values="A_log")
_DT_BIAS = Tensor("dt_bias", "HV", strides="dense", values="dt_bias")
_A = Tensor("a", "B T HV", strides="any")
_B = Tensor("b", "B T HV", strides="any")
_SCALE = Scalar("scale", "float", None, resolve=_default_scale)
_SOFTPLUS = (Scalar("softplus_beta", "float"), Scalar("softplus_threshold", "float"))
_POOL = Tensor(
    "initial_state_source",
    "S HV K V",
    axes_v_first="S HV V K",
    role="state",
    optional=True,
    mutated=True,
    strides="outer",
    values="state",
)
_SLOTS = Tensor("initial_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values="slots")
_CU = Tensor("cu_seqlens", "N+1", dtypes=INTS, optional=True, strides="dense", values="cu_seqlens")
_L2NORM = Scalar("use_qk_l2norm_in_kernel", "bool", False)
_V_FIRST = Scalar("state_v_first", "bool", False, static=True, passed=False)
_VERIFY = (
    Scalar("disable_state_update", "bool", False),
    Tensor(
        "intermediate_states_buffer",
        "C P HV K V",
        axes_v_first="C P HV V K",
        role="state",
        optional=True,
        mutated=True,
        strides="outer2",
        values="empty",
    ),
    Tensor("intermediate_state_indices", "N", dtypes=INTS, optional=True, strides="dense", values="slots"),
    Scalar("cache_steps", "int", None, passed=False),
    Tensor("retrieve_parent_token", "N P2", dtypes=INTS, optional=True, strides="dense", values="parents"),
)
_O = Output("o", "B T HV V", like="data")

_DECODE = {"T": 1, "H": 16, "HV": 32, "K": 128, "V": 128, "state_dtype": "float32"}
_POOLED = ("initial_state_source", "initial_state_indices")
_DECODE_BENCH = tuple(
    {"B": batch, "S": batch, **_DECODE, "dtype": dtype, "with": _POOLED, "use_qk_l2norm_in_kernel": True}
    for dtype in ("bfloat16", "float32")
    for batch in (1, 8, 32)
)


def _pooled_cases() -> tuple[Mapping[str, Any], ...]:
    """Shapes and options on which the pool operators are held against the reference."""
    verify = (*_POOLED, "intermediate_states_buffer", "intermediate_state_indices")
    cases: list[dict[str, Any]] = [
        {"B": 3, "T": 1, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 5, "with": _POOLED, "use_qk_l2norm_in_kernel": True},
        {"B": 2, "T": 65, "H": 2, "HV": 2, "K": 64, "V": 32, "S": 4, "with": _POOLED},
        {"B": 4, "T": 1, "H": 1, "HV": 3, "K": 8, "V": 8, "S": 4, "with": _POOLED, "padding": True},
        {
            "lengths": (5, 0, 63, 1),
            "H": 2,
            "HV": 4,
            "K": 32,
            "V": 64,
            "S": 9,
            "with": (*_POOLED, "cu_seqlens"),
            "padding": True,
            "index_dtype": "int32",
        },
        {"B": 2, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 3, "with": verify, "disable_state_update": True},
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
        },
        {
            "lengths": (3, 4),
            "H": 2,
            "HV": 2,
            "K": 20,
            "V": 12,
            "S": 2,
            "with": (*_POOLED, "cu_seqlens", "intermediate_states_buffer"),
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
    inputs=(_Q, _K, _V, _G, _BETA, _SCALE, _POOL, _SLOTS, _CU, _L2NORM, *_VERIFY, _V_FIRST),
    outputs=(_O,),
    static_axes=("K", "V"),
    cases=_pooled_cases(),
    bench=_DECODE_BENCH,
    check=check_recurrent,
    cost=_cost,
)

FUSED_SIGMOID_GATING_UPDATE = OpSpec(
    name="fused_sigmoid_gating_delta_rule_update",
    summary="the same with the gates computed from A_log, a, dt_bias and b inside",
    algorithm="recurrent",
    inputs=(
        _A_LOG,
        _A,
        _DT_BIAS,
        *_SOFTPLUS,
        _Q,
        _K,
        _V,
        _B,
        _POOL,
        _SLOTS,
        _SCALE,
        _L2NORM,
        _CU,
        *_VERIFY,
        _V_FIRST,
    ),
    outputs=(_O,),
    static_axes=("K", "V"),
    cases=_pooled_cases(),
    bench=_DECODE_BENCH,
    check=check_recurrent,
    cost=_cost,
)

FUSED_RECURRENT = OpSpec(
    name="fused_recurrent_gated_delta_rule",
    summary="token-recurrent gated delta rule with separate initial and final states",
    algorithm="recurrent",
    inputs=(
        _Q,
        _K,
        _V,
        _G,
        _BETA,
        _SCALE,
        Tensor(
            "initial_state", "N HV K V", axes_v_first="N HV V K", role="state", optional=True, strides="outer", values="state"
        ),
        Scalar("output_final_state", "bool", False, static=True, passed=False),
        _CU,
        _L2NORM,
        _V_FIRST,
    ),
    outputs=(
        _O,
        Output("final_state", "N HV K V", axes_v_first="N HV V K", like="state", when="output_final_state"),
    ),
    static_axes=("K", "V"),
    cases=tuple(
        {**case, "dtype": dtype, "state_dtype": state, "state_v_first": v_first}
        for case in (
            {"B": 2, "T": 65, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True},
            {
                "B": 1,
                "T": 500,
                "H": 1,
                "HV": 2,
                "K": 128,
                "V": 32,
                "with": (),
                "output_final_state": True,
                "use_qk_l2norm_in_kernel": True,
            },
            {"B": 2, "T": 4, "H": 2, "HV": 2, "K": 8, "V": 8, "with": ("initial_state",)},
            {
                "lengths": (63, 0, 1, 7),
                "H": 2,
                "HV": 2,
                "K": 32,
                "V": 256,
                "with": ("initial_state", "cu_seqlens"),
                "output_final_state": True,
            },
        )
        for dtype, state in (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"))
        for v_first in (False, True)
    ),
    bench=(
        {
            "B": 1,
            "T": 512,
            "H": 16,
            "HV": 32,
            "K": 128,
            "V": 128,
            "dtype": "bfloat16",
            "with": ("initial_state",),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        },
    ),
    check=check_recurrent,
    cost=_cost,
)

PACKED_DECODE = OpSpec(
    name="packed_decode_gated_delta_rule",
    summary="one decode step from the packed qkv projection, gates computed inside",
    algorithm="recurrent",
    inputs=(
        Tensor("mixed_qkv", "B R", role="data", values="packed"),
        Tensor("a", "B HV", strides="any"),
        Tensor("b", "B HV", strides="any"),
        _A_LOG,
        _DT_BIAS,
        Tensor(
            "initial_state_source",
            "S HV K V",
            axes_v_first="S HV V K",
            role="state",
            mutated=True,
            strides="outer",
            values="state",
        ),
        _SLOTS,
        _SCALE,
        Scalar("use_qk_l2norm_in_kernel", "bool", True),
        Scalar("softplus_beta", "float", 1.0),
        Scalar("softplus_threshold", "float", 20.0),
        _V_FIRST,
    ),
    outputs=(Output("o", "B 1 HV V", like="data"),),
    static_axes=("K", "V"),
    cases=tuple(
        {**case, "dtype": dtype, "state_dtype": state, "state_v_first": v_first}
        for case in (
            {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": _POOLED, "padding": True},
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
    bench=tuple({k: v for k, v in case.items() if k != "T"} for case in _DECODE_BENCH),
    check=check_recurrent,
    cost=_cost,
)

SPECS = (FUSED_RECURRENT, FUSED_RECURRENT_UPDATE, FUSED_SIGMOID_GATING_UPDATE, PACKED_DECODE)


def _tokens_first(tensor: Any) -> Any:
    """[N, 1, ...] seen as [1, N, ...]: one-token sequences as one packed batch, without a copy."""
    return tensor.transpose(0, 1) if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 else tensor


def _is_one_token_batch(q: Any, cu_seqlens: torch.Tensor | None) -> bool:
    return cu_seqlens is not None and isinstance(q, torch.Tensor) and q.ndim == 4 and q.shape[0] > 1 and q.shape[1] == 1


def fused_recurrent_gated_delta_rule(
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
    """Gated delta rule, token by token.

    Per token, in fp32: ``S *= exp(g); u = (v - S^T k) * beta; S += k u^T; o = S^T q`` with q scaled, and q, k l2-normalized
    first if asked.

    Parameters
    ----------
    q, k : torch.Tensor
        ``[B, T, H, K]``, fp32, bf16 or fp16; the last axis contiguous, other axes may be strided. With `cu_seqlens` B is 1, or
        ``[N, 1, H, K]`` for N one-token sequences.
    v : torch.Tensor
        ``[B, T, HV, V]``, dtype of `q`; HV a multiple of H, value head hv reads q/k head ``hv // (HV // H)``.
    g : torch.Tensor
        ``[B, T, HV]``, log-decay (natural logarithm), fp32, bf16 or fp16, any strides.
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
    Source: Gated Delta Networks (arXiv:2412.06464); signature of flash-linear-attention.
    """
    if _is_one_token_batch(q, cu_seqlens):
        q, k, v, g, beta = map(_tokens_first, (q, k, v, g, beta))
        o, final = fused_recurrent_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            scale,
            initial_state,
            output_final_state,
            cu_seqlens,
            use_qk_l2norm_in_kernel,
            initial_state_indices=initial_state_indices,
            state_v_first=state_v_first,
        )
        return _tokens_first(o), final
    if initial_state_indices is not None:
        final = None
        if output_final_state:
            raise ArgumentError(
                "fused_recurrent_gated_delta_rule: output_final_state with initial_state_indices; the pool is updated in place: "
                "read the final states from initial_state[initial_state_indices]"
            )
        o = torch.ops.tvm_gdn.fused_recurrent_gated_delta_rule_update(
            q,
            k,
            v,
            g,
            beta,
            scale,
            initial_state,
            initial_state_indices,
            cu_seqlens,
            use_qk_l2norm_in_kernel,
            state_v_first=state_v_first,
        )
        return o, final
    o, final = torch.ops.tvm_gdn.fused_recurrent_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first
    )
    return o, final if output_final_state else None


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
) -> torch.Tensor:
    """Gated delta rule on a state pool, token by token: decode, and verification of speculated tokens.

    Parameters
    ----------
    q, k, v, g, beta, scale, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first
        As in `fused_recurrent_gated_delta_rule`.
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
    )
    if _is_one_token_batch(q, cu_seqlens):
        return _tokens_first(
            torch.ops.tvm_gdn.fused_recurrent_gated_delta_rule_update(*map(_tokens_first, (q, k, v, g, beta)), *args)
        )
    return torch.ops.tvm_gdn.fused_recurrent_gated_delta_rule_update(q, k, v, g, beta, *args)


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
    one_token = _is_one_token_batch(q, cu_seqlens)
    if one_token:
        q, k, v = map(_tokens_first, (q, k, v))
        a, b = (_tokens_first(x) if isinstance(x, torch.Tensor) and x.ndim == 3 else x for x in (a, b))
    if isinstance(a, torch.Tensor) and a.ndim == 2:
        a = a.unsqueeze(0)
    if isinstance(b, torch.Tensor) and b.ndim == 2:
        b = b.unsqueeze(0)
    o = torch.ops.tvm_gdn.fused_sigmoid_gating_delta_rule_update(
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
    return _tokens_first(o) if one_token else o


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
    return torch.ops.tvm_gdn.packed_decode_gated_delta_rule(
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
