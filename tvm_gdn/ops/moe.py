"""Routing of a mixture of experts: choosing experts, sorting by expert, load statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.errors import ArgumentError
from tvm_gdn.spec import INTS, ITEMSIZE, Draw, Geometry, OpSpec, Output, Scalar, Tensor, named_sizes


def draw_logits(draw: Draw) -> torch.Tensor:
    """Normal logits; with ``note`` "ties" from five values only, with "odd" also -inf and signed zeros."""
    values = torch.randn(draw.shape, generator=draw.rng)
    if draw.case.get("note") in {"ties", "odd"}:
        values = values.round().clamp(-2, 2)
    if draw.case.get("note") == "odd":
        values = values.where(values != 1, -float("inf")).where(values != -1, -0.0)
    return values


def draw_ids(draw: Draw) -> torch.Tensor:
    """Distinct experts per token; with ``padding`` some -1 and some beyond the last."""
    tokens, k, experts = draw.sizes["T"], draw.sizes["k"], draw.sizes["E"]
    ids = torch.rand(tokens, experts, generator=draw.rng).argsort(-1)[:, :k].contiguous()
    if draw.case.get("padding"):
        odd = torch.rand(ids.shape, generator=draw.rng)
        ids = ids.where(odd > 0.2, -1).where(odd < 0.9, experts)
    if draw.case.get("note") == "one expert":
        ids[:] = experts - 1
    return ids


def sizes(case: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes of a case: its capital keys, and k."""
    return named_sizes(case) | {"k": case.get("k", 1)}


def _check_route(args: Mapping[str, Any], found: Mapping[str, int]) -> None:
    experts, top_k, groups, kept = found["E"], args["top_k"], args["num_expert_group"], args["topk_group"]
    if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2):
        raise ArgumentError(
            f"num_expert_group is {groups}; it must divide the {experts} experts into groups of at least two, or be 1"
        )
    if not 1 <= kept <= groups:
        raise ArgumentError(f"topk_group is {kept}; allowed: 1 to num_expert_group = {groups}")
    available = experts // groups * kept
    if not 1 <= top_k <= available:
        raise ArgumentError(f"top_k is {top_k}; allowed: 1 to {available}, the experts that may be chosen from")


def _check_experts(args: Mapping[str, Any], found: Mapping[str, int]) -> None:
    del found
    if args["num_experts"] < 1:
        raise ArgumentError(f"num_experts is {args['num_experts']}; it must be at least 1")


def _route_cost(found: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: logits read once; one comparison per expert and choice."""
    elements = found["T"] * found["E"]
    return elements * ITEMSIZE[geometry.dtype["logits"]], elements * 12


def _sort_cost(found: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: ids read once, the order written once."""
    pairs = found["T"] * found["k"]
    return pairs * (ITEMSIZE[geometry.dtype["topk_ids"]] + 4), pairs


_QWEN3 = {"E": 128, "top_k": 8}
_DEEPSEEK = {"E": 256, "top_k": 8, "scoring": "sigmoid", "num_expert_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
_BIAS = {"with": ("correction_bias",), "dtypes": {"correction_bias": "float32"}}

MOE_ROUTE = OpSpec(
    name="moe_route",
    summary="choice of experts: softmax or sigmoid scores, groups, bias, weights",
    algorithm="moe_route",
    inputs=(
        Tensor("logits", "T E", values=draw_logits),
        Scalar("top_k", "int", passed=False, drawn=2),
        Scalar("scoring", "str", "softmax", static=True, choices=(("softmax", "softmax"), ("sigmoid", "sigmoid"))),
        Scalar("renormalize", "bool", True),
        Scalar("num_expert_group", "int", 1, static=True),
        Scalar("topk_group", "int", 1, static=True),
        Tensor("correction_bias", "E", optional=True, strides="dense"),
        Scalar("routed_scaling_factor", "float", 1.0),
    ),
    outputs=(Output("weights", "T top_k", like="float32"), Output("ids", "T top_k", like="int32")),
    static_axes=("E",),
    cases=(
        {"T": 65, **_QWEN3, "dtype": "float32"},
        {"T": 63, **_QWEN3, "dtype": "bfloat16", "renormalize": False},
        {"T": 500, "E": 512, "top_k": 10, "dtype": "float16"},
        {"T": 65, "E": 37, "top_k": 37, "dtype": "float32", "note": "ties"},
        {"T": 65, "E": 37, "top_k": 5, "dtype": "float32", "scoring": "sigmoid", "note": "odd"},
        {"T": 65, **_DEEPSEEK, "dtype": "float32", **_BIAS},
        {"T": 63, **_DEEPSEEK, "dtype": "float32", "note": "ties"},
        {"T": 1, "E": 1, "top_k": 1, "dtype": "float32"},
    ),
    bench=({"T": 1024, **_QWEN3, "dtype": "bfloat16"}, {"T": 1024, **_DEEPSEEK, "dtype": "float32", **_BIAS}),
    sizes=sizes,
    smallest={"E": 4},
    check=_check_route,
    cost=_route_cost,
    tolerance={"float32": 1e-5},
)

IDS = Tensor("topk_ids", "T k", dtypes=INTS, strides="any", values=draw_ids)
_NUM_EXPERTS = Scalar("num_experts", "int", passed=False, drawn=8)
_ID_CASES = (
    {"T": 65, "k": 3, "num_experts": 7, "E": 7, "padding": True},
    {"T": 500, "k": 8, "num_experts": 128, "E": 128, "index_dtype": "int32"},
    {"T": 63, "k": 4, "num_experts": 9, "E": 9, "note": "one expert"},
)

MOE_SORT = OpSpec(
    name="moe_sort",
    summary="routed tokens sorted by expert: counts, offsets, order",
    algorithm="moe_sort",
    inputs=(IDS, _NUM_EXPERTS),
    outputs=(
        Output("counts", "num_experts", like="int32"),
        Output("offsets", "num_experts+1", like="int32"),
        Output("order", "T k", like="int32"),
    ),
    static_axes=(),
    cases=_ID_CASES,
    sizes=sizes,
    bench=({"T": 1024, "k": 8, "num_experts": 128, "E": 128},),
    check=_check_experts,
    cost=_sort_cost,
)

EXPERT_STATS = OpSpec(
    name="expert_stats",
    summary="tokens per expert, load imbalance, entropy",
    algorithm="moe_stats",
    inputs=(IDS, _NUM_EXPERTS),
    outputs=(
        Output("counts", "num_experts", like="int32"),
        Output("imbalance", "", like="float32"),
        Output("entropy", "", like="float32"),
    ),
    static_axes=(),
    cases=_ID_CASES,
    sizes=sizes,
    bench=({"T": 1024, "k": 8, "num_experts": 128, "E": 128},),
    check=_check_experts,
    cost=_sort_cost,
    tolerance={"float32": 1e-5},
)

SPECS = (MOE_ROUTE, MOE_SORT, EXPERT_STATS)


def moe_route(
    logits: torch.Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of every token, and their weights.

    Parameters
    ----------
    logits : torch.Tensor
        ``[T, E]``, fp32, bf16 or fp16; computed with in fp32.
    top_k : int
        Experts per token.
    scoring : {"softmax", "sigmoid"}
        What makes a score of a logit.
    renormalize : bool
        Divide the weights of a token by their sum (plus 1e-20).
    num_expert_group, topk_group : int, optional
        DeepSeek-V3 grouping: only the experts of the `topk_group` groups with the largest sums of their two largest (biased)
        scores may be chosen. Default: one group.
    correction_bias : torch.Tensor, optional
        ``[E]``, added to the scores for choosing; weights are unbiased.
    routed_scaling_factor : float
        Factor on all weights.

    Returns
    -------
    weights : torch.Tensor
        fp32 ``[T, top_k]``: the scores of the chosen experts, scaled, in order of choice (largest first).
    ids : torch.Tensor
        int32 ``[T, top_k]``, distinct.

    Raises
    ------
    ArgumentError
        Sizes or a `scoring` that do not fit; `top_k` beyond the experts that may be chosen.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    Ties go to the lower id, also between groups. Without a bias experts are compared by their logits, so that scores which round
    to one number are no ties. NaN counts as the largest number, as in ``torch.topk``, and reaches the weights; every token gets
    `top_k` distinct valid ids whatever the logits are. Source: DeepSeek-V3 (arXiv:2412.19437), Qwen3-MoE.
    """
    groups = 1 if num_expert_group is None else num_expert_group
    kept = groups if topk_group is None else topk_group
    return direct.call.moe_route(logits, top_k, scoring, renormalize, groups, kept, correction_bias, routed_scaling_factor)


def moe_sort(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs (token, choice) by expert; stable, so the result does not depend on threads.

    Parameters
    ----------
    topk_ids : torch.Tensor
        ``[T, k]``, int32 or int64; ids outside [0, `num_experts`) are padding.
    num_experts : int
        E.

    Returns
    -------
    counts : torch.Tensor
        int32 ``[E]``, tokens per expert.
    offsets : torch.Tensor
        int32 ``[E + 1]``, cumulated counts.
    order : torch.Tensor
        int32 ``[T, k]``; flattened, the pairs ``t * k + j`` of expert e stand at ``offsets[e]:offsets[e + 1]``, ascending; the
        places beyond ``offsets[E]`` hold -1.

    Raises
    ------
    ArgumentError
        `topk_ids` is not ``[T, k]``, or `num_experts` is less than one.
    ArgumentTypeError
        A dtype that is not allowed.

    Notes
    -----
    A counting sort, stable within an expert. Source of the layout: MegaBlocks (arXiv:2211.15841).
    """
    return direct.call.moe_sort(topk_ids, num_experts)


def expert_stats(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load of the experts in a run.

    Parameters
    ----------
    topk_ids : torch.Tensor
        ``[T, k]``, int32 or int64; ids outside [0, `num_experts`) do not count.
    num_experts : int
        E.

    Returns
    -------
    counts : torch.Tensor
        int32 ``[E]``, tokens per expert.
    imbalance : torch.Tensor
        fp32 number: the largest count over the mean; 1 is even, E is one expert for all.
    entropy : torch.Tensor
        fp32 number: of the tokens' distribution over experts, in nats; ``log(E)`` is even.

    Raises
    ------
    ArgumentError
        `topk_ids` is not ``[T, k]``, or `num_experts` is less than one.
    ArgumentTypeError
        A dtype that is not allowed.

    Notes
    -----
    Why balance matters: Switch Transformers (arXiv:2101.03961).
    """
    return direct.call.expert_stats(topk_ids, num_experts)
