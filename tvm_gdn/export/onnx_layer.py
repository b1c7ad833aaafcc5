"""A whole gated-delta-net layer between its projections, as one ONNX model: convolution, split, gates, rule, gated norm.

It is what `Qwen3-Next`_ computes between ``in_proj`` and ``out_proj``. The layer is no operator of the package: its SPEC stands
here, and serves only to draw inputs and to compare.

.. _Qwen3-Next: https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import cases, reference
from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import Request, case_of
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_rules import delta_rule
from tvm_gdn.export.onnx_run import next_name
from tvm_gdn.spec import OpSpec, Output, Tensor, named_sizes


def _sizes(case: Mapping[str, Any]) -> dict[str, int]:
    s = {"B": 1, "T": 1, "H": 1, "HV": 1, **named_sizes(case)}
    return s | {"L": s["W"] - 1, "C": 2 * s["H"] * s["K"] + s["HV"] * s["V"]}


SPEC = OpSpec(
    name="gated_delta_net",
    summary="a gated-delta-net layer between its projections: convolution, gates, delta rule, gated norm",
    algorithm="layer",
    inputs=(
        Tensor("mixed_qkv", "B T C", role="data"),
        Tensor("z", "B T HV V", role="data"),
        Tensor("a", "B T HV", role="data"),
        Tensor("b", "B T HV", role="data"),
        Tensor("conv_weight", "C W", role="data"),
        Tensor("A_log", "HV", usual="float32"),
        Tensor("dt_bias", "HV", usual="float32"),
        Tensor("norm_weight", "V", usual="float32"),
        Tensor("conv_state", "B C L", role="data", mutated=True),
        Tensor("state", "B HV K V", role="state", mutated=True, usual="float32"),
    ),
    outputs=(Output("o", "B T HV V", like="data"),),
    static_axes=("K", "V", "W"),
    bench=({"H": 16, "HV": 32, "K": 128, "V": 128, "W": 4, "dtype": "bfloat16"},),
    sizes=_sizes,
)


def layer(graph: Graph, request: Request) -> None:
    """Inputs, outputs and nodes of the layer; states are inputs and outputs."""
    dtypes, axis, sizes = request.geometry.dtype, request.geometry.axis, request.sizes
    K, V, W, H, HV = axis["K"], axis["V"], axis["W"], sizes["H"], sizes["HV"]
    C, lead = 2 * H * K + HV * V, ("batch", request.tokens or "time")
    shapes = {
        "mixed_qkv": (*lead, C), "z": (*lead, HV, V), "a": (*lead, HV), "b": (*lead, HV), "conv_weight": (C, W), "A_log": (HV,),
        "dt_bias": (HV,), "norm_weight": (V,), "conv_state": ("batch", C, W - 1), "state": ("batch", HV, K, V),
    }  # fmt: skip
    x = parts.inputs(graph, dtypes, shapes)
    columns = graph.Transpose(x["mixed_qkv"], perm=[0, 2, 1])
    mixed, conv_state = parts.convolution(
        graph, request.profile, columns, x["conv_weight"], None, x["conv_state"], W=W, L=W - 1, channels=C, act=True
    )
    rows = graph.Transpose(mixed, perm=[0, 2, 1])
    q, k, v = graph.Split(rows, graph.ints(H * K, H * K, HV * V), axis=2, outputs=3)
    q, k = (graph.Reshape(part, graph.ints(0, 0, H, K)) for part in (q, k))
    v = graph.Reshape(v, graph.ints(0, 0, HV, V))
    g, beta = parts.gates(graph, x["A_log"], x["a"], x["b"], x["dt_bias"])
    o, state = delta_rule(graph, request, (q, k, v, g, beta, x["state"]), H=H)
    o = parts.rms_norm(graph, request.profile, o, x["norm_weight"], x["z"], before=True, activation="silu")
    graph.add_output("o", graph.cast(o, "float32", dtypes["z"]), dtypes["z"], shapes["z"])
    for name, value in (("conv_state", conv_state), ("state", state)):
        graph.add_output(next_name(name), graph.cast(str(value), "float32", dtypes[name]), dtypes[name], shapes[name])


def draw(request: Request, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of the layer, and what the float64 references of its operators make of them."""
    x = cases.draw(SPEC, case_of(SPEC, request.geometry, B=2, T=tokens, **request.sizes), tokens)
    K, V = request.geometry.axis["K"], request.geometry.axis["V"]
    conv_state = x["conv_state"].double()
    mixed = reference.causal_conv1d_update(x["mixed_qkv"].transpose(1, 2), conv_state, x["conv_weight"], None, "silu", exact=True)
    heads = request.sizes
    q, k, v = mixed.transpose(1, 2).split([heads["H"] * K, heads["H"] * K, heads["HV"] * V], -1)
    g, beta = reference.fused_gdn_gating(x["A_log"], x["a"], x["b"], x["dt_bias"], exact=True)
    o, state = reference.fused_recurrent_gated_delta_rule(
        q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V)), g, beta, request.scale,
        x["state"].double(), True, None, request.l2norm, exact=True,
    )  # fmt: skip
    o = reference.rms_norm_gated(o, x["norm_weight"], x["z"], exact=True)
    return x, {"o": o, "conv_state": conv_state, "state": state}
