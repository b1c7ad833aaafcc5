"""What a gated-delta-net layer is made of, in ONNX: convolution, gates, normalization, gated norm; values in, values out, fp32.

The two conventions of ONNX's own operators: ``CausalConvWithState`` (opset 27, and onnxruntime's) holds exactly the last W - 1
inputs; a `Softplus` has no threshold.
"""

from __future__ import annotations

from typing import Any

from tvm_gdn.export.onnx_graph import Graph

#: Profile -> opset of the standard operators; the profile's own rules stand in `onnx_rules.py`.
OPSET = {"standard": 27, "decomposed": 17, "chunked": 17, "ort": 17, "dense": 17, "loop": 17}
MICROSOFT = "com.microsoft"
#: Profile -> domain of the fused operators; the others have none.
DOMAIN = {"standard": "", "ort": MICROSOFT}
NORM_EPS = 1e-6
_END = 2**63 - 1


def silu(graph: Graph, x: str) -> str:
    """``x * sigmoid(x)``."""
    return str(graph.Mul(x, graph.Sigmoid(x)))


def convolution(
    graph: Graph,
    profile: str,
    x: str,
    weight: str,
    bias: str | None,
    past: str | None,
    *,
    W: int,
    L: int,
    channels: int,
    act: bool,
) -> tuple[str, str | None]:
    """Causal depthwise convolution: x ``[B, D, T]``, weight ``[D, W]``, past ``[B, D, L]`` or None (zeros) -> o, next state.

    `CausalConvWithState` where the profile has it, else padding or concatenation, and a grouped `Conv`.
    """
    kernel = graph.Unsqueeze(weight, graph.ints(1))
    if profile in DOMAIN:
        recent = past if past is None or L == W - 1 else _last(graph, past, W - 1)
        inputs = (x, kernel, bias or "", recent or "")
        o, new = graph.node(
            "CausalConvWithState", inputs, outputs=2, domain=DOMAIN[profile], activation="silu" if act else "none"
        )
        if past is None:
            return o, None
        return o, new if L == W - 1 else _last(graph, graph.Concat(past, x, axis=2), L)
    if past is None:
        padded = graph.Pad(x, graph.ints(0, 0, W - 1, 0, 0, 0), graph.constant(0.0))
    else:
        padded = graph.Concat(past, x, axis=2)
    recent = padded if past is None or L == W - 1 else graph.Slice(padded, graph.ints(L - W + 1), graph.ints(_END), graph.ints(2))
    o = graph.Conv(recent, kernel, *([bias] if bias else []), group=channels)
    return silu(graph, o) if act else o, None if past is None else _last(graph, padded, L)


def _last(graph: Graph, x: str, count: int) -> str:
    return str(graph.Slice(x, graph.ints(-count), graph.ints(_END), graph.ints(2)))


def gates(graph: Graph, A_log: str, a: str, b: str, dt_bias: str) -> tuple[str, str]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``.

    Softplus of standard ONNX has no threshold; above 20 it is the identity to the last place anyway.
    """
    g = graph.Neg(graph.Mul(graph.Exp(A_log), graph.Softplus(graph.Add(a, dt_bias))))
    return g, graph.Sigmoid(b)


def rms_norm(graph: Graph, profile: str, x: str, weight: str, z: str | None, *, before: bool, activation: str) -> str:
    """``norm(x) * act(z)``, or ``norm(x * act(z))``, over the last axis."""
    gate = None
    if z is not None:
        gate = silu(graph, z) if activation == "silu" else graph.Sigmoid(z)
    if gate is not None and not before:
        x, gate = graph.Mul(x, gate), None
    square = graph.Mul(x, x)
    # The axes became an input in opset 18.
    mean = graph.ReduceMean(square, axes=[-1], keepdims=1) if OPSET[profile] < 18 else (
        graph.ReduceMean(square, graph.ints(-1), keepdims=1)
    )  # fmt: skip
    x = graph.Mul(graph.Div(x, graph.Sqrt(graph.Add(mean, graph.constant(NORM_EPS)))), weight)
    return str(x if gate is None else graph.Mul(x, gate))


def l2norm(graph: Graph, x: str) -> str:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis."""
    square = graph.ReduceSum(graph.Mul(x, x), graph.ints(-1), keepdims=1)
    return str(graph.Div(x, graph.Sqrt(graph.Add(square, graph.constant(NORM_EPS)))))


def repeated(graph: Graph, x: str, H: int, HV: int, K: int) -> str:
    """[B, T, H, K] -> [B, T, HV, K]: value head hv reads head hv // (HV // H)."""
    wide = graph.Expand(graph.Unsqueeze(x, graph.ints(3)), graph.ints(1, 1, 1, HV // H, 1))
    return str(graph.Reshape(wide, graph.ints(0, 0, HV, K)))


def inputs(graph: Graph, dtypes: Any, shapes: Any) -> dict[str, str]:
    """Declare inputs and give them in fp32, in the order of `shapes`, those that `dtypes` has."""
    return {
        name: graph.cast(graph.add_input(name, dtypes[name], shape), dtypes[name], "float32")
        for name, shape in shapes.items()
        if name in dtypes
    }
