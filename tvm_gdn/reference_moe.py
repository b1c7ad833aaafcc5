"""Torch-native reference of the mixture-of-experts operators; part of :mod:`tvm_gdn.reference`, whose rules hold here.

Letters in shapes: T tokens, E experts, k experts per token, D hidden dim, I intermediate dim of an expert.

References
----------
.. [1] DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024. https://arxiv.org/abs/2412.19437 (groups, bias, scaling)
.. [2] Qwen3-MoE and Qwen3-Next in Hugging Face transformers (softmax scores, shared expert with a sigmoid gate)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["expert_stats", "fused_experts", "fused_experts_packed", "fused_experts_quantized", "moe_route", "moe_sort"]


def _descending(values: Tensor) -> Tensor:
    """Positions by falling value: NaN first, the lower position of equals first."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def moe_route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_expert_group: int = 1,
    topk_group: int = 1,
    correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose top_k experts per row of logits [T, E]; returns weights [T, k] and int32 ids [T, k]."""
    tokens, experts = logits.shape
    x = logits.double() if exact else logits.float()
    scores = x.softmax(-1) if scoring == "softmax" else x.sigmoid()
    biased = scores if correction_bias is None else scores + correction_bias.to(x.dtype)
    # The logit orders experts as the score does, and still tells apart what the score rounds to one number.
    order = _descending(x if correction_bias is None else biased)
    if num_expert_group > 1:
        size = experts // num_expert_group
        best = biased.view(tokens, num_expert_group, size).sort(-1, descending=True).values[..., :2].sum(-1)
        kept = _descending(best)[:, :topk_group]
        allowed = torch.zeros(tokens, num_expert_group, dtype=torch.bool, device=x.device).scatter_(1, kept, True)
        allowed = allowed.repeat_interleave(size, 1)
        order = order.gather(1, _descending(allowed.gather(1, order).int()))
    ids = order[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.int()


def moe_sort(topk_ids: Tensor, num_experts: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens per expert [E], offsets [E + 1], and pairs t * k + j by expert [T, k] with -1 for padding at the end."""
    del exact
    flat = topk_ids.flatten().long()
    valid = (flat >= 0) & (flat < num_experts)
    counts = torch.bincount(flat[valid], minlength=num_experts).int()
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    pairs = valid.nonzero().flatten()
    order = torch.full_like(flat, -1)
    order[: len(pairs)] = pairs[flat[pairs].sort(stable=True).indices]
    return counts, offsets, order.view(topk_ids.shape).int()


def expert_stats(topk_ids: Tensor, num_experts: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens per expert [E], largest over mean, entropy in nats."""
    counts = moe_sort(topk_ids, num_experts)[0]
    load = counts.double() if exact else counts.float()
    total = load.sum()
    if total == 0:
        return counts, torch.ones_like(total), torch.zeros_like(total)
    share = load[load > 0] / total
    return counts, load.max() * num_experts / total, -(share * share.log()).sum()


def _as_they_are(x: Tensor) -> Tensor:
    return x


def fused_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str = "silu",
    *,
    exact: bool = False,
    rows: Callable[[Tensor], Tensor] = _as_they_are,
) -> Tensor:
    """Sum over the chosen experts of weight * down(silu(gate x) * up x); x [T, D], w13 [E, 2I, D], w2 [E, D, I].

    ``rows`` is applied to the rows of the left operand of either product.
    """
    del activation  # silu is the only one
    dtype = torch.float64 if exact else torch.float32
    inner = w2.shape[2]
    total = torch.zeros(x.shape[0], w2.shape[1], dtype=dtype, device=x.device)
    for expert in range(w13.shape[0]):
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        both = rows(x[token].to(dtype)) @ w13[expert].to(dtype).T
        down = rows(F.silu(both[:, :inner]) * both[:, inner:]) @ w2[expert].to(dtype).T
        total.index_add_(0, token, topk_weights[token, choice, None].to(dtype) * down)
    return total if exact else total.to(x.dtype)


def fused_experts_packed(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, activation: str = "silu", *, exact: bool = False
) -> Tensor:
    """`fused_experts` on the weights that a pack holds, unpacked; padded to whole steps."""
    grown = F.pad(x, (0, w13.shape[2] - x.shape[1]))
    out = fused_experts(grown, w13, w2, topk_weights, topk_ids, activation, exact=exact)
    return out[:, : x.shape[1]].contiguous()


def _in_127ths(x: Tensor) -> Tensor:
    """Rows in whole 127ths of their largest elements.

    The rule of every target: ``x * (127 / largest)``, both operations rounded to fp32, then the nearest integer, of two equally
    near the even one. fp32 belongs to the rule because bf16 elements often stand halfway between two integers (half the largest
    element always does), and rounding elsewhere would take the other one. Rows without an element above 1e-30 are zero.
    """
    rows = x.float()
    largest = rows.abs().amax(-1, keepdim=True)
    steps, zero = torch.full_like(largest, 127), largest <= 1e-30
    # A number divided by a tensor would be its reciprocal's multiple: two roundings.
    whole = (rows * (steps / largest).masked_fill(zero, 0)).round().clamp(-127, 127)
    return whole.to(x.dtype) * (largest / steps).masked_fill(zero, 0).to(x.dtype)


def fused_experts_quantized(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, activation: str = "silu", *, exact: bool = False
) -> Tensor:
    """`fused_experts_packed` with the left operands rounded to int8, each row by its own largest element."""
    grown = F.pad(x, (0, w13.shape[2] - x.shape[1]))
    out = fused_experts(grown, w13, w2, topk_weights, topk_ids, activation, exact=exact, rows=_in_127ths)
    return out[:, : x.shape[1]].contiguous()
