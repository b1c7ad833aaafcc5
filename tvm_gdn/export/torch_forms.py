"""The operators as torch functions that torch's ONNX exporter can write: ATen, and `LinearAttention` and its like by name.

A form has the arguments of the torch operator and does what it does, updates in place included. `forms` is the translation table
of `torch_program.to_onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tvm_gdn.errors import ArgumentError
from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import ExportError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import OpSpec

#: Opset that torch's own operators are written in.
OPSET = 18
#: Version that torch takes for the operators of a domain.
_VERSION = {"": OPSET, parts.MICROSOFT: 1}
Form = Callable[..., Any]


def forms(profile: str) -> dict[Any, Form]:
    """Torch operator -> its form.

    Parameters
    ----------
    profile : {"ort", "standard"}
        Domain of the fused operators.

    Raises
    ------
    ArgumentError
        Another profile.
    """
    if profile not in parts.DOMAIN:
        raise ArgumentError(f"profile {profile!r}; allowed: {', '.join(sorted(parts.DOMAIN))}")
    by_algorithm: dict[str, Callable[..., Any]] = {
        "chunk": _rule, "recurrent": _rule, "fused_decode": _rule, "conv": _conv, "gating": _gating, "norm": _norm,
        "moe_route": _route, "moe_experts": _experts,
    }  # fmt: skip
    # Operators on packed weights have none.
    refused = {"w13_scale", "scheme"}
    return {
        overload(spec): _bound(spec, partial(by_algorithm[spec.algorithm], spec, parts.DOMAIN[profile]))
        for spec in OPS.values()
        if spec.algorithm in by_algorithm and not refused & {arg.name for arg in spec.inputs}
    }


def overload(spec: OpSpec) -> Any:
    """The operator's torch overload."""
    return getattr(torch.ops.tvm_gdn, spec.name).default


def _bound(spec: OpSpec, form: Form) -> Form:
    """The form with the torch operator's arguments: by position or name, defaults left out."""
    names = [arg.name for arg in spec.inputs]
    defaults = {scalar.name: scalar.default for scalar in spec.scalars}

    def call(*args: Any, **kwargs: Any) -> Any:
        return form({**dict.fromkeys(names), **defaults, **dict(zip(names, args, strict=False)), **kwargs})

    return call


def _fused(domain: str, name: str, inputs: list[Any], attributes: dict[str, Any], *shapes: Any) -> Any:
    """Outputs of an ONNX operator that torch does not know, fp32."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{domain}::{name}", inputs, attributes, dtypes=(torch.float32,) * len(shapes), shapes=shapes, version=_VERSION[domain]
    )


def _without(spec: OpSpec, a: dict[str, Any], *names: str) -> None:
    for name in names:
        if a.get(name) is not None:
            raise ExportError(
                f"{spec.name}: {name} is not translated in models; allowed: calls without it, or the operator alone "
                "(tvm_gdn export --format onnx)"
            )


def _rule(spec: OpSpec, domain: str, a: dict[str, Any]) -> Any:
    _without(spec, a, "cu_seqlens", "intermediate_states_buffer", "retrieve_parent_token", "final_state")
    a, v_first = _unpacked(spec, domain, a), a["state_v_first"]
    if "A_log" in a:
        a["g"], a["beta"] = _gating(spec, domain, a)
    B, T, H, K = a["q"].shape
    HV, V = a["v"].shape[2:]
    q, k = a["q"].float(), a["k"].float()
    if a["use_qk_l2norm_in_kernel"]:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + parts.NORM_EPS) for x in (q, k))
    q = q * (K**-0.5 if a["scale"] is None else a["scale"])
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    pool, state, g = a.get("initial_state_source"), a.get("initial_state"), a.get("g")
    if pool is not None:
        rows = _slots(pool, a["initial_state_indices"], B)
        state = _read(pool, rows)
    kind = torch.float32 if state is None else state.dtype
    start = q.new_zeros(B, HV, K, V) if state is None else (state.transpose(-1, -2) if v_first else state).float()
    inputs = [q.flatten(2), k.flatten(2), a["v"].float().flatten(2), start]
    inputs += [None if g is None else g.float().flatten(2), a["beta"].float()]
    attributes = {"q_num_heads": HV, "kv_num_heads": HV, "scale": 1.0, "update_rule": "delta" if g is None else "gated_delta"}
    o, final = _fused(domain, "LinearAttention", inputs, attributes, (B, T, HV * V), (B, HV, K, V))
    final = final.transpose(-1, -2) if v_first else final
    o = o.unflatten(2, (HV, V)).to(a["v"].dtype)
    if pool is not None and not a.get("disable_state_update"):
        _write(pool, rows, final)
    if "output_final_state" not in a:
        return o
    return o, final.to(kind) if a["output_final_state"] else final.new_empty(0)


def _unpacked(spec: OpSpec, domain: str, a: dict[str, Any]) -> dict[str, Any]:
    """The arguments with q, k, v, a, b ``[B, 1, heads, ...]`` of a packed projection, convolved where the operator does."""
    mixed = a.get("mixed_qkv")
    if mixed is None:
        return dict(a)
    _, HV, K, V = a["initial_state_source"].shape
    K, V = (V, K) if a["state_v_first"] else (K, V)
    H = (mixed.shape[1] - HV * V) // (2 * K)
    if "conv_state" in a:
        step = {"x": mixed.unsqueeze(2), "weight": a["conv_weight"], "bias": a["conv_bias"]}
        mixed = _conv(spec, domain, {**a, **step}).squeeze(2)
    q, k, v = mixed.unsqueeze(1).split([H * K, H * K, HV * V], -1)
    heads = {"q": q.unflatten(-1, (H, K)), "k": k.unflatten(-1, (H, K)), "v": v.unflatten(-1, (HV, V))}
    return {**a, **heads, "a": a["a"].unsqueeze(1), "b": a["b"].unsqueeze(1)}


def _slots(pool: torch.Tensor, ids: torch.Tensor | None, sequences: Any) -> torch.Tensor:
    """Rows of the pool with one more, which padding reads and writes."""
    if ids is None:
        return torch.arange(sequences)
    return torch.where(ids < 0, pool.shape[0], ids.long())


def _wide(pool: torch.Tensor) -> torch.Tensor:
    # fp32 first: onnxruntime makes no constants of half precision.
    return torch.cat([pool, torch.zeros(1, *pool.shape[1:]).to(pool.dtype)])


def _read(pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return _wide(pool)[rows]


def _write(pool: torch.Tensor, rows: torch.Tensor, states: torch.Tensor) -> None:
    pool.copy_(_wide(pool).index_put((rows,), states.to(pool.dtype))[:-1])


def _conv(spec: OpSpec, domain: str, a: dict[str, Any]) -> torch.Tensor:
    _without(spec, a, "query_start_loc")
    x, weight, bias = a["x"].float(), a["weight"].float(), a["bias"]
    states = a["conv_state"] if "conv_state" in a else a["conv_states"]
    width, act = weight.shape[1], a["activation"] in {"silu", "swish"}
    past = None
    if states is not None:
        rows = _slots(states, a.get("conv_state_indices", a.get("cache_indices")), x.shape[0])
        past = _read(states, rows).float()
        if "conv_state" not in a:
            flags = a["has_initial_state"]
            past = torch.zeros_like(past) if flags is None else past.where(flags[:, None, None], 0.0)
    recent = None if past is None else past[..., past.shape[2] - (width - 1) :]
    carried = (x.shape[0], x.shape[1], width - 1)
    o, _ = _fused(
        domain, "CausalConvWithState", [x, weight.unsqueeze(1), None if bias is None else bias.float(), recent],
        {"activation": "silu" if act else "none"}, x.shape, carried,
    )  # fmt: skip
    if past is not None:
        _write(states, rows, torch.cat([past, x], 2)[..., x.shape[2] :])
    return o.to(a["x"].dtype)


def _gating(spec: OpSpec, domain: str, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    del spec, domain
    x = a["a"].float() + a["dt_bias"].float()
    g = -a["A_log"].float().exp() * F.softplus(x, a["softplus_beta"], a["softplus_threshold"])
    return g, a["b"].float().sigmoid().to(a["b"].dtype)


def _norm(spec: OpSpec, domain: str, a: dict[str, Any]) -> torch.Tensor:
    del spec, domain
    x, gate = a["x"].float(), None
    if a["z"] is not None:
        z = a["z"].float()
        gate = z.sigmoid() if a["activation"] == "sigmoid" else z * z.sigmoid()
    if gate is not None and not a["norm_before_gate"]:
        x, gate = x * gate, None
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + a["eps"]) * a["weight"].float()
    return (x if gate is None else x * gate).to(a["x"].dtype)


def _route(spec: OpSpec, domain: str, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    del spec, domain
    x, bias, groups = a["logits"].float(), a["correction_bias"], a["num_expert_group"]
    scores = x.softmax(-1) if a["scoring"] == "softmax" else x.sigmoid()
    biased = scores if bias is None else scores + bias.float()
    order = x if bias is None else biased
    if groups > 1:
        size = x.shape[1] // groups
        kept = biased.unflatten(1, (groups, size)).topk(2).values.sum(-1).topk(a["topk_group"]).indices
        allowed = (kept[:, :, None] == torch.arange(groups)).any(1)
        order = order.where(allowed.repeat_interleave(size, 1), -torch.inf)
    ids = order.topk(a["top_k"]).indices
    weights = scores.gather(1, ids)
    if a["renormalize"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * a["routed_scaling_factor"], ids.int()


def _experts(spec: OpSpec, domain: str, a: dict[str, Any]) -> torch.Tensor:
    """Every expert on every token, as in the profile ``dense`` of the format ``onnx``."""
    del spec, domain
    x, w13, w2 = a["x"].float(), a["w13"].float(), a["w2"].float()
    hit = a["topk_ids"][..., None] == torch.arange(w13.shape[0])
    share = (hit * a["topk_weights"].float()[..., None]).sum(1)
    gate, up = (x @ w13.transpose(1, 2)).chunk(2, -1)
    every = (gate * gate.sigmoid() * up) @ w2.transpose(1, 2)
    return (every * share.t()[..., None]).sum(0).to(a["x"].dtype)
