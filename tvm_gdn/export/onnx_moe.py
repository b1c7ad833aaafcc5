"""Mixtures of experts in ONNX: routing, and the experts in three forms; values in fp32.

ONNX has no operator for them. ``dense``: every expert computes every token, and what the routing did not choose is multiplied
with zero: two batched matrix products, no dynamic shape, E / k times the needed work; for few experts. ``loop``: a Loop over
the experts, each gathers its own tokens: the needed work only, dynamic shapes inside. ``ort``: onnxruntime's
`com.microsoft.MoE`, or `QMoE` for int8 and int4 packs, whose weights are laid out anew by `qmoe_weights`.

Both fused operators choose experts themselves, from logits. They are given what makes them choose ours: `MoE` the logarithms of
our weights (its softmax gives the weights over their sum, which is multiplied on afterwards: weights must not be negative),
`QMoE` our weights, directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tvm_gdn import reference
from tvm_gdn.check import TORCH_DTYPES
from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import ExportError, Request
from tvm_gdn.export.artifact import draw as draw_case
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.packed_experts import ZERO, PackedExperts, unpack

#: Logit of an expert that was not chosen: its softmax is zero beside any that was.
_NOT_CHOSEN = -1e4
#: Largest model that one file of ONNX's format holds.
_LARGEST = 2**31 - 2**20


def route(graph: Graph, request: Request) -> None:
    """`moe_route`: scores, groups, the k best, their weights."""
    dtypes, attrs = request.geometry.dtype, request.geometry.attr
    E, k, groups, kept = request.geometry.axis["E"], request.top_k, attrs["num_expert_group"], attrs["topk_group"]
    x = parts.inputs(graph, dtypes, {"logits": ("rows", E), "correction_bias": (E,)})
    scores = graph.Softmax(x["logits"], axis=-1) if attrs["scoring"] == "softmax" else graph.Sigmoid(x["logits"])
    # Without a bias the logits order the experts, as in the kernel: scores may round to one number.
    biased = graph.Add(scores, x["correction_bias"]) if "correction_bias" in x else scores
    order = biased if "correction_bias" in x else x["logits"]
    if groups > 1:
        # Two axes: onnx's own evaluator sorts no more than that.
        best, _ = graph.TopK(graph.Reshape(biased, graph.ints(-1, E // groups)), graph.ints(2), axis=-1, outputs=2)
        sums = graph.Reshape(graph.ReduceSum(best, graph.ints(-1), keepdims=0), graph.ints(-1, groups))
        _, chosen = graph.TopK(sums, graph.ints(kept), axis=-1, outputs=2)
        hit = graph.Equal(graph.Unsqueeze(chosen, graph.ints(-1)), graph.constant(np.arange(groups), np.int64))
        allowed = graph.Greater(graph.ReduceSum(graph.Cast(hit, to=1), graph.ints(1), keepdims=1), graph.constant(0.0))
        spread = graph.Expand(graph.Transpose(allowed, perm=[0, 2, 1]), graph.ints(1, groups, E // groups))
        order = graph.Where(graph.Reshape(spread, graph.ints(0, E)), order, graph.constant(-np.inf))
    _, ids = graph.TopK(order, graph.ints(k), axis=-1, outputs=2)
    weights = graph.GatherND(scores, graph.Unsqueeze(ids, graph.ints(-1)), batch_dims=1)
    if request.renormalize:
        total = graph.ReduceSum(weights, graph.ints(-1), keepdims=1)
        weights = graph.Div(weights, graph.Add(total, graph.constant(1e-20)))
    if request.scale is not None:
        weights = graph.Mul(weights, graph.constant(request.scale))
    graph.add_output("weights", weights, "float32", ("rows", k))
    graph.add_output("ids", graph.cast(ids, "int64", "int32"), "int32", ("rows", k))


def experts(graph: Graph, request: Request) -> None:
    """`fused_experts` on raw weights, which are inputs, or on those of a pack, which the model holds."""
    dtypes, axis, sizes = request.geometry.dtype, request.geometry.axis, request.sizes
    pack = request.pack
    if request.spec.name != "fused_experts" and pack is None:
        raise ExportError(f"{request.spec.name}: give the weights that the model is to hold: --weights PACK.safetensors")
    E, k, D = pack.experts if pack else sizes["E"], request.top_k, axis["D"]
    inner = pack.intermediate if pack else axis["I"]
    x = parts.inputs(graph, dtypes, {"x": ("rows", D), "topk_weights": ("rows", k)})
    ids = graph.cast(graph.add_input("topk_ids", dtypes["topk_ids"], ("rows", k)), dtypes["topk_ids"], "int64")
    tensors = (x["x"], x["topk_weights"], ids)
    if pack and pack.w13_scale is not None and request.profile == "ort":
        out = _qmoe(graph, tensors, pack, k)
    else:
        if pack:
            w13, w2 = (graph.constant(w.numpy()) for w in _fits(request, pack.unpack()))
        else:
            both = parts.inputs(graph, dtypes, {"w13": (E, 2 * inner, D), "w2": (E, D, inner)})
            w13, w2 = both["w13"], both["w2"]
        forms: dict[str, Callable[..., str]] = {"dense": _dense, "loop": _loop, "ort": _moe}
        out = forms[request.profile](graph, tensors, w13, w2, E=E, k=k, D=D, inner=inner)
    graph.add_output("out", graph.cast(out, "float32", dtypes["x"]), dtypes["x"], ("rows", D))


def _fits(request: Request, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    size = sum(w.nbytes for w in weights)
    if size > _LARGEST:
        raise ExportError(
            f"{request.spec.name}: {size / 2**30:.1f} GiB of weights in the {request.profile} profile; one ONNX file holds "
            "2 GiB: allowed: fewer experts, or a pack of int8 or int4 with --profile ort"
        )
    return weights


def _combination(graph: Graph, weights: str, ids: str, E: int) -> str:
    """[rows, E]: what every expert contributes to every row; ids outside of 0 to E - 1 nothing."""
    hit = graph.Equal(graph.Unsqueeze(ids, graph.ints(-1)), graph.constant(np.arange(E), np.int64))
    each = graph.Where(hit, graph.Unsqueeze(weights, graph.ints(-1)), graph.constant(0.0))
    return str(graph.ReduceSum(each, graph.ints(1), keepdims=0))


def _mlp(graph: Graph, x: str, w13: str, w2: str, inner: int, perm: list[int]) -> str:
    both = graph.MatMul(x, graph.Transpose(w13, perm=perm))
    gate, up = graph.Split(both, graph.ints(inner, inner), axis=-1, outputs=2)
    return str(graph.MatMul(graph.Mul(parts.silu(graph, gate), up), graph.Transpose(w2, perm=perm)))


def _dense(graph: Graph, tensors: tuple[str, str, str], w13: str, w2: str, *, E: int, inner: int, **_: int) -> str:
    x, weights, ids = tensors
    every = _mlp(graph, graph.Unsqueeze(x, graph.ints(0)), w13, w2, inner, [0, 2, 1])
    share = graph.Unsqueeze(graph.Transpose(_combination(graph, weights, ids, E), perm=[1, 0]), graph.ints(-1))
    # An expert that was not chosen adds nothing, even where it overflows.
    kept = graph.Where(graph.Equal(share, graph.constant(0.0)), graph.constant(0.0), graph.Mul(every, share))
    return str(graph.ReduceSum(kept, graph.ints(0), keepdims=0))


def _loop(graph: Graph, tensors: tuple[str, str, str], w13: str, w2: str, *, E: int, D: int, inner: int, **_: int) -> str:
    x, weights, ids = tensors
    body = Graph(graph)
    expert = body.add_input(body.fresh("expert"), "int64", ())
    going = body.add_input(body.fresh("going"), "bool", ())
    total = body.add_input(body.fresh("total"), "float32", ("rows", D))
    hit = body.Equal(ids, expert)
    chosen = body.Greater(body.ReduceSum(body.Cast(hit, to=1), body.ints(1), keepdims=0), body.constant(0.0))
    rows = body.Reshape(body.NonZero(chosen), body.ints(-1))
    share = body.ReduceSum(body.Where(hit, weights, body.constant(0.0)), body.ints(1), keepdims=1)
    one13, one2 = (body.Gather(w, expert, axis=0) for w in (w13, w2))
    part = body.Mul(_mlp(body, body.Gather(x, rows, axis=0), one13, one2, inner, [1, 0]), body.Gather(share, rows, axis=0))
    added = body.Add(body.Gather(total, rows, axis=0), part)
    body.add_output(body.fresh("go_on"), going, "bool", ())
    body.add_output(body.fresh("sum"), body.ScatterND(total, body.Unsqueeze(rows, body.ints(1)), added), "float32", ("rows", D))
    start = graph.Mul(graph.ConstantOfShape(graph.Shape(x)), graph.constant(0.0))
    trips, true = graph.constant(E, np.int64), graph.constant(True, bool)
    return str(graph.Loop(trips, true, start, body=body.proto("expert")))


def _moe(graph: Graph, tensors: tuple[str, str, str], w13: str, w2: str, *, E: int, k: int, D: int, inner: int) -> str:
    x, weights, ids = tensors
    share = _combination(graph, weights, ids, E)
    chosen = graph.Greater(share, graph.constant(0.0))
    logits = graph.Where(chosen, graph.Log(graph.Where(chosen, share, graph.constant(1.0))), graph.constant(_NOT_CHOSEN))
    # onnxruntime on CPUs takes rows of gate and up in turn.
    turn = graph.Transpose(graph.Reshape(w13, graph.ints(E, 2, inner, D)), perm=[0, 2, 1, 3])
    out = graph.node(
        "MoE", (x, logits, graph.Reshape(turn, graph.ints(E, 2 * inner, D)), "", w2), domain=parts.MICROSOFT, k=min(k, E),
        normalize_routing_weights=1, **_SWIGLU,
    )  # fmt: skip
    return str(graph.Mul(out, graph.ReduceSum(share, graph.ints(1), keepdims=1)))


#: gate * sigmoid(gate) * up, of rows in turn.
_SWIGLU: dict[str, Any] = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


def _qmoe(graph: Graph, tensors: tuple[str, str, str], pack: PackedExperts, k: int) -> str:
    x, weights, ids = tensors
    share = _combination(graph, weights, ids, pack.experts)
    # A weight of zero is chosen before those that were not: -1.
    hit = graph.Equal(graph.Unsqueeze(ids, graph.ints(-1)), graph.constant(np.arange(pack.experts), np.int64))
    chosen = graph.ReduceSum(graph.Cast(hit, to=1), graph.ints(1), keepdims=0)
    ranks = graph.Where(graph.Greater(chosen, graph.constant(0.0)), graph.constant(1.0), graph.constant(-1.0))
    laid = {
        name: graph.constant(value, np.uint8 if name.endswith("weights") else np.float32)
        for name, value in qmoe_weights(pack).items()
    }
    inputs = (
        x, ranks, laid["fc1_experts_weights"], laid["fc1_scales"], "", laid["fc2_experts_weights"], laid["fc2_scales"],
        *[""] * 7, share,
    )  # fmt: skip
    block = {"block_size": pack.group} if pack.group else {}
    return str(
        graph.node(
            "QMoE", inputs, domain=parts.MICROSOFT, k=min(k, pack.experts), expert_weight_bits=4 if ZERO[pack.scheme] == 8 else 8,
            normalize_routing_weights=0, **_SWIGLU, **block,
        )
    )  # fmt: skip


def qmoe_weights(pack: PackedExperts) -> dict[str, Any]:
    """The weights of an int8 or int4 pack in the layout of onnxruntime's `QMoE`, as numpy arrays; no number changes.

    Parameters
    ----------
    pack : PackedExperts
        int8, int4 (a scale per output channel) or int4_kgroup (a scale per `group` elements).

    Returns
    -------
    dict
        ``fc1_experts_weights`` uint8 ``[E, 2I, D * bits / 8]`` with rows of gate and up in turn, ``fc2_experts_weights``
        ``[E, D, I * bits / 8]`` (two int4 in a byte, the first in the low half), ``fc1_scales`` and ``fc2_scales`` fp32
        ``[E, rows]`` or ``[E, rows, blocks]``. Zero points are QMoE's defaults, 128 and 8.

    Raises
    ------
    ExportError
        The pack is not quantized, or D or I is no multiple of what `QMoE` takes.
    """
    if pack.w13_scale is None or pack.w2_scale is None:
        raise ExportError(f"QMoE: the pack is {pack.scheme}; allowed: {', '.join(ZERO)}")
    step = pack.group or (2 if ZERO[pack.scheme] == 8 else 1)
    for name, size in (("D", pack.hidden), ("I", pack.intermediate)):
        if size % step:
            raise ExportError(f"QMoE: {name} = {size}; allowed with {pack.scheme}: multiples of {step}")
    D, inner, found = pack.hidden, pack.intermediate, {}
    for name, words, scale, columns, depth in (
        ("fc1", pack.w13, pack.w13_scale, 2 * inner, D), ("fc2", pack.w2, pack.w2_scale, D, inner),
    ):  # fmt: skip
        E, groups = words.shape[:2]
        # `unpack` without scales gives the stored integers, padded to whole groups of 32 columns.
        codes = unpack(words, None, pack.scheme)[..., :depth].to(torch.uint8)
        factors = scale.float().transpose(2, 3).reshape(E, groups * 32, -1)[..., : depth // pack.group if pack.group else 1]
        codes, factors = (_in_turn(part, inner) if name == "fc1" else part[:, :columns] for part in (codes, factors))
        if ZERO[pack.scheme] == 8:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        found[f"{name}_experts_weights"] = codes.contiguous().numpy()
        found[f"{name}_scales"] = (factors if pack.group else factors[..., 0]).contiguous().numpy()
    return found


def _in_turn(rows: torch.Tensor, inner: int) -> torch.Tensor:
    """Rows of groups of 16 gate and 16 up columns -> gate and up in turn, without padding."""
    experts, _, depth = rows.shape
    split = rows.view(experts, -1, 2, 16, depth).transpose(2, 3).reshape(experts, -1, 2, depth)
    return split[:, :inner].reshape(experts, 2 * inner, depth)


def draw(request: Request, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of the experts' model, and what the float64 reference makes of them on the weights that the model multiplies with.

    A pack's activations are not rounded in ONNX, so the reference is that of dense weights.
    """
    sizes = {**request.sizes, "k": request.top_k, "padding": request.spec.name == "fused_experts"}
    if request.pack is None:
        arguments, want = draw_case(request, T=tokens, **sizes)
        return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}, want
    pack, rng, dtypes = request.pack, torch.Generator().manual_seed(tokens), request.geometry.dtype
    rows = torch.randn(tokens, pack.hidden, generator=rng).to(TORCH_DTYPES[dtypes["x"]])
    ids = torch.rand(tokens, pack.experts, generator=rng).argsort(-1)[:, : request.top_k]
    ids = ids.where(torch.rand(ids.shape, generator=rng) > 0.1, -1).to(TORCH_DTYPES[dtypes["topk_ids"]])
    weights = torch.rand(ids.shape, generator=rng).to(TORCH_DTYPES[dtypes["topk_weights"]])
    want = {"out": reference.fused_experts(rows, *pack.unpack(), weights, ids, exact=True)}
    return {"x": rows, "topk_weights": weights, "topk_ids": ids}, want
