"""The delta rules in ONNX: `LinearAttention` of opset 27 or of onnxruntime, a Scan over tokens, chunks of matrix products.

All take q, k ``[B, T, HV, K]`` (normalized, scaled, repeated to the value heads), v ``[B, T, HV, V]``, g ``[B, T, HV, 1 or K]``
or None, beta ``[B, T, HV]`` and the state ``[B, HV, K, V]``, in fp32, and give the outputs ``[B, T, HV, V]`` and the final state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import ExportError, Request
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_tree import inverse, transposed, verification


@dataclass(frozen=True)
class Sizes:
    """What a delta rule's graph fixes."""

    HV: int
    K: int
    V: int
    channel_gate: bool
    chunk: int
    tokens: int


Tensors = tuple[str, str, str, "str | None", str, str]


def delta_rule(
    graph: Graph, request: Request, tensors: Tensors, H: int, tree: tuple[str, str | None] | None = None
) -> tuple[str, str]:
    """The rule of a profile, with what stands around it: normalization, scale, q and k repeated for grouped value heads.

    q and k are ``[B, T, H, K]``, v ``[B, T, HV, V]``, g ``[B, T, HV]``, ``[B, T, HV, K]`` or None, beta ``[B, T, HV]``, the
    state ``[B, HV, K, V]``; gives o and the final state, or with a `tree` (`onnx_tree.py`) the states after every step.
    """
    q, k, v, g, beta, state = tensors
    axis, HV = request.geometry.axis, request.sizes["HV"]
    if HV % H:
        raise ExportError(f"HV = {HV} value heads for H = {H}: HV must be a multiple of H")
    channel = bool(request.geometry.attr.get("channel_gate"))
    sizes = Sizes(HV, axis["K"], axis["V"], channel, request.chunk, request.tokens)
    if request.l2norm:
        q, k = parts.l2norm(graph, q), parts.l2norm(graph, k)
    q = graph.Mul(q, graph.constant(float(sizes.K) ** -0.5 if request.scale is None else request.scale))
    if HV != H:
        q, k = (parts.repeated(graph, x, H, HV, sizes.K) for x in (q, k))
    if g is not None and not channel:
        g = graph.Unsqueeze(g, graph.ints(-1))
    rules: dict[str, Callable[..., tuple[str, str]]] = {"decomposed": recurrence, "chunked": chunked}
    ready = (q, k, v, g, beta, state)
    if tree is not None:
        assert g is not None
        return verification(graph, (q, k, v, g, beta, state), tree, (HV, sizes.K, sizes.V, sizes.tokens))
    if request.profile in rules:
        return rules[request.profile](graph, ready, sizes)
    return linear_attention(graph, ready, sizes, parts.DOMAIN[request.profile])


def linear_attention(graph: Graph, tensors: Tensors, sizes: Sizes, domain: str = "") -> tuple[str, str]:
    """One `LinearAttention` node; heads are packed into the last axis around it."""
    q, k, v, g, beta, state = tensors

    def packed(x: str, width: int) -> str:
        return str(graph.Reshape(x, graph.ints(0, 0, sizes.HV * width)))

    decay = "" if g is None else packed(g, sizes.K if sizes.channel_gate else 1)
    attributes: dict[str, Any] = {
        "q_num_heads": sizes.HV, "kv_num_heads": sizes.HV, "scale": 1.0, "update_rule": "delta" if g is None else "gated_delta",
    }  # fmt: skip
    inputs = (packed(q, sizes.K), packed(k, sizes.K), packed(v, sizes.V), state, decay, beta)
    o, final = graph.node("LinearAttention", inputs, outputs=2, domain=domain, **attributes)
    return graph.Reshape(o, graph.ints(0, 0, sizes.HV, sizes.V)), final


def recurrence(graph: Graph, tensors: Tensors, sizes: Sizes) -> tuple[str, str]:
    """A Scan over tokens, as the contract states the step."""
    q, k, v, g, beta, state = tensors
    body = Graph(graph)
    shapes = {"q": (sizes.K,), "k": (sizes.K,), "v": (sizes.V,), "g": (sizes.K if sizes.channel_gate else 1,), "beta": ()}
    scanned = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    present = [name for name in scanned if scanned[name] is not None]
    S = body.add_input(body.fresh("S"), "float32", ("batch", sizes.HV, sizes.K, sizes.V))
    at = {name: body.add_input(body.fresh(name), "float32", ("batch", sizes.HV, *shapes[name])) for name in present}
    last, before = body.ints(-1), body.ints(-2)
    if g is not None:
        S = body.Mul(S, body.Unsqueeze(body.Exp(at["g"]), last))
    key = body.Unsqueeze(at["k"], last)
    memory = body.ReduceSum(body.Mul(S, key), before, keepdims=0)
    u = body.Mul(body.Sub(at["v"], memory), body.Unsqueeze(at["beta"], last))
    S = body.Add(S, body.Mul(key, body.Unsqueeze(u, before)))
    o = body.ReduceSum(body.Mul(S, body.Unsqueeze(at["q"], last)), before, keepdims=0)
    body.add_output(body.fresh("next"), S, "float32", ("batch", sizes.HV, sizes.K, sizes.V))
    body.add_output(body.fresh("o"), o, "float32", ("batch", sizes.HV, sizes.V))
    # Time goes first: other scan axes are legal, but onnx's own evaluator and others do not take them.
    order = {"beta": [1, 0, 2]}
    moved = [graph.Transpose(scanned[name], perm=order.get(name, [1, 0, 2, 3])) for name in present]
    final, outputs = graph.Scan(state, *moved, outputs=2, body=body.proto("token"), num_scan_inputs=len(present))
    return graph.Transpose(outputs, perm=[1, 0, 2, 3]), final


def chunked(graph: Graph, tensors: Tensors, sizes: Sizes) -> tuple[str, str]:
    """Chunks of plain matrix products; a Scan over the chunks, or unrolled where the number of tokens is fixed.

    Tokens are padded to whole chunks; a padded token has no decay and writes nothing.
    """
    q, k, v, g, beta, state = tensors
    C, whole = sizes.chunk, graph.ints(sizes.chunk)
    if sizes.tokens:
        extra = graph.ints(-sizes.tokens % C)
    else:
        tokens = graph.Slice(graph.Shape(q), graph.ints(1), graph.ints(2))
        extra = graph.Mod(graph.Neg(tokens), whole)
    named = {"q": q, "k": k, "v": v, "g": g, "beta": graph.Unsqueeze(beta, graph.ints(-1))}
    pieces = {}
    for name, x in named.items():
        if x is None:
            continue
        pads = graph.Concat(graph.ints(0, 0, 0, 0, 0), extra, graph.ints(0, 0), axis=0)
        padded = graph.Pad(x, pads, graph.constant(0.0))
        # [B, T, HV, D] -> [B, NC, C, HV, D] -> [NC, B, HV, C, D]
        split = graph.Reshape(
            padded, graph.ints(0, sizes.tokens // C + bool(sizes.tokens % C) or -1, C, sizes.HV, _width(name, sizes))
        )
        pieces[name] = graph.Transpose(split, perm=[1, 0, 3, 2, 4])
    if sizes.tokens:
        outputs = []
        for i in range(-(-sizes.tokens // C)):
            at = {name: graph.Gather(x, graph.constant(i, np.int64), axis=0) for name, x in pieces.items()}
            state, o = _chunk(graph, state, at, sizes)
            outputs.append(graph.Unsqueeze(o, graph.ints(0)))
        joined = graph.Concat(*outputs, axis=0)
    else:
        body = Graph(graph)
        S = body.add_input(body.fresh("S"), "float32", ("batch", sizes.HV, sizes.K, sizes.V))
        at = {n: body.add_input(body.fresh(n), "float32", ("batch", sizes.HV, C, _width(n, sizes))) for n in pieces}
        after, o = _chunk(body, S, at, sizes)
        body.add_output(body.fresh("next"), after, "float32", ("batch", sizes.HV, sizes.K, sizes.V))
        body.add_output(body.fresh("o"), o, "float32", ("batch", sizes.HV, C, sizes.V))
        state, joined = graph.Scan(state, *pieces.values(), outputs=2, body=body.proto("chunk"), num_scan_inputs=len(pieces))
    flat = graph.Reshape(graph.Transpose(joined, perm=[1, 0, 3, 2, 4]), graph.ints(0, -1, sizes.HV, sizes.V))
    end = graph.ints(sizes.tokens) if sizes.tokens else tokens
    return graph.Slice(flat, graph.ints(0), end, graph.ints(1)), state


def _width(name: str, sizes: Sizes) -> int:
    return {"q": sizes.K, "k": sizes.K, "v": sizes.V, "g": sizes.K if sizes.channel_gate else 1, "beta": 1}[name]


def _chunk(graph: Graph, S: str, at: dict[str, str], sizes: Sizes) -> tuple[str, str]:
    """State and outputs after one chunk: the formulas of `ops/tir/chunk.py` in matrix products."""
    q, k, v, beta = at["q"], at["k"], at["v"], at["beta"]
    C = sizes.chunk
    lower = graph.constant(np.tri(C, dtype=bool), bool)
    strict = graph.constant(np.tri(C, k=-1))
    kq, kk = graph.MatMul(q, transposed(graph, k)), graph.MatMul(k, transposed(graph, k))
    G = None
    if "g" in at:
        G = graph.CumSum(at["g"], graph.constant(2, np.int64))
        if sizes.channel_gate:
            # exp(G_i - G_j) does not factor without overflow, so the products over channels are summed one by one.
            i, j = graph.Unsqueeze(G, graph.ints(3)), graph.Unsqueeze(G, graph.ints(2))
            shown = graph.constant(np.tri(C, dtype=bool)[:, :, None], bool)
            E = graph.Exp(graph.Where(shown, graph.Sub(i, j), graph.constant(-1e30)))
            right = graph.Mul(E, graph.Unsqueeze(k, graph.ints(2)))
            kk, kq = (
                graph.ReduceSum(graph.Mul(right, graph.Unsqueeze(x, graph.ints(3))), graph.ints(4), keepdims=0) for x in (k, q)
            )
        else:
            D = graph.Exp(graph.Where(lower, graph.Sub(G, transposed(graph, G)), graph.constant(-1e30)))
            kk, kq = graph.Mul(kk, D), graph.Mul(kq, D)
    A = graph.Mul(graph.Mul(kk, beta), strict)
    P = graph.Mul(kq, graph.constant(np.tri(C)))
    start = graph.Exp(G) if G is not None else None
    k0, q0 = (k, q) if start is None else (graph.Mul(k, start), graph.Mul(q, start))
    R = graph.Mul(graph.Sub(v, graph.MatMul(k0, S)), beta)
    U = graph.MatMul(inverse(graph, A, C), R)
    o = graph.Add(graph.MatMul(q0, S), graph.MatMul(P, U))
    if G is not None:
        end = graph.Slice(G, graph.ints(C - 1), graph.ints(C), graph.ints(2))
        k = graph.Mul(k, graph.Exp(graph.Sub(end, G)))
        S = graph.Mul(S, graph.Exp(transposed(graph, end)))
    return graph.Add(S, graph.MatMul(transposed(graph, k), U)), o
