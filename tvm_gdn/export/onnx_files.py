"""Format ``onnx``: an operator, or a whole layer, as one ONNX model; symbolic batch and time, states as inputs and outputs.

Profiles: ``standard`` (opset 27: `LinearAttention`, `CausalConvWithState`), ``decomposed`` (opset 17, a Scan over tokens,
a padded `Conv`), ``chunked`` (opset 17, chunks of plain matrix products; no loop at all with a fixed number of tokens), ``ort``
(onnxruntime's `com.microsoft` operators); for experts ``dense`` and ``loop`` (see `onnx_moe.py`). What stands around these are
standard operators. Everything is computed in fp32, like in the kernels. One entry of `BUILDERS` per algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvm_gdn.export import onnx_layer, onnx_moe, onnx_run
from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import Check, ExportError, Request, draw
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_rules import delta_rule
from tvm_gdn.ops import OPS
from tvm_gdn.spec import FLOATS, OpSpec

Numbers = dict[str, torch.Tensor]
#: Profiles of operators that are the same in all of them but for the opset.
_ANY = ("standard", "decomposed", "chunked", "ort")


@dataclass(frozen=True)
class Builder:
    """How an algorithm goes to ONNX.

    Parameters
    ----------
    make : callable
        ``make(graph, request)`` adds inputs, nodes and outputs.
    draw : callable
        ``draw(request, tokens)`` gives inputs of the model and what float64 makes of them.
    profiles : tuple of str
        The profiles that it has, the default first.
    """

    make: Callable[[Graph, Request], None]
    draw: Callable[[Request, int], tuple[Numbers, Numbers]]
    profiles: tuple[str, ...] = _ANY


def profiles(algorithm: str) -> tuple[str, ...]:
    """Profiles of an algorithm, the default first; of one that is not exported none."""
    return BUILDERS[algorithm].profiles if algorithm in BUILDERS else ()


def build(request: Request) -> dict[str, bytes]:
    """The model ``<op>.onnx``.

    Parameters
    ----------
    request : Request
        An operator that returns its states (not one on a pool), without `cu_seqlens`; gates, gated norm, convolution, routing,
        experts; or `onnx_layer.SPEC`.

    Returns
    -------
    dict

    Raises
    ------
    ExportError
        The operator, or an argument of it, cannot be expressed.
    """
    from onnx import helper

    spec, profile = request.spec, request.profile
    if profile not in profiles(spec.algorithm):
        allowed = profiles(spec.algorithm)
        what = f"allowed: --profile {', '.join(allowed)}" if allowed else f"operators that are: {', '.join(exported())}"
        raise ExportError(f"{spec.name}: not exported to ONNX{f' in the profile {profile}' if allowed else ''}; {what}")
    graph = Graph()
    BUILDERS[spec.algorithm].make(graph, request)
    opsets = [helper.make_opsetid("", parts.OPSET[profile])]
    if any(node.domain == parts.MICROSOFT for node in graph.nodes):
        opsets.append(helper.make_opsetid(parts.MICROSOFT, 1))
    model = helper.make_model(
        graph.proto(spec.name), opset_imports=opsets, ir_version=13 if profile == "standard" else 8,
        producer_name="tvm_gdn", doc_string=f"{spec.name}: {spec.summary}; {request.geometry}; {profile}",
    )  # fmt: skip
    return {f"{spec.name}.onnx": model.SerializeToString()}


def serves(spec: OpSpec) -> tuple[str, ...]:
    """Dtypes of an operator in ONNX."""
    return FLOATS if spec.name in exported() else ()


def exported() -> list[str]:
    """Names of the operators, and of the layer, that have a form in ONNX."""
    return [spec.name for spec in OPS.values() if spec.algorithm in BUILDERS and _refused(spec.tensors) is None] + [
        onnx_layer.SPEC.name
    ]


def _refused(tensors: Any) -> str | None:
    """A tensor that an operator cannot do without and that has no form in ONNX."""
    return next((t.name for t in tensors if not t.optional and t.name in {"initial_state_source", "mixed_qkv"}), None)


def rule(graph: Graph, request: Request) -> None:
    """A delta-rule operator."""
    dtypes, H = request.geometry.dtype, request.sizes["H"]
    K, V, HV = request.geometry.axis["K"], request.geometry.axis["V"], request.sizes["HV"]
    _only(request, {"q", "k", "v", "g", "beta", "initial_state"}, "take initial_state and return the final state")
    lead = ("batch", request.tokens or "time")
    v_first = bool(request.geometry.attr.get("state_v_first"))
    state_shape = ("batch", HV, V, K) if v_first else ("batch", HV, K, V)
    g_shape = (*lead, HV, K) if request.geometry.attr.get("channel_gate") else (*lead, HV)
    shapes = {
        "q": (*lead, H, K), "k": (*lead, H, K), "v": (*lead, HV, V), "g": g_shape, "beta": (*lead, HV),
        "initial_state": state_shape,
    }  # fmt: skip
    x = parts.inputs(graph, dtypes, shapes)
    if "initial_state" in x:
        state = graph.Transpose(x["initial_state"], perm=[0, 1, 3, 2]) if v_first else x["initial_state"]
    else:
        batch = graph.Slice(graph.Shape(x["q"]), graph.ints(0), graph.ints(1))
        state = graph.ConstantOfShape(graph.Concat(batch, graph.ints(HV, K, V), axis=0))
    o, final = delta_rule(graph, request, (x["q"], x["k"], x["v"], x.get("g"), x["beta"], state), H)
    graph.add_output("o", graph.cast(o, "float32", dtypes["v"]), dtypes["v"], (*lead, HV, V))
    if request.geometry.attr.get("output_final_state"):
        kind = dtypes.get("initial_state", "float32")
        final = graph.Transpose(final, perm=[0, 1, 3, 2]) if v_first else final
        graph.add_output("final_state", graph.cast(final, "float32", kind), kind, state_shape)


def conv(graph: Graph, request: Request) -> None:
    """`causal_conv1d_fn` and `causal_conv1d_update` with batch item n in state n."""
    dtypes, axis, D = request.geometry.dtype, request.geometry.axis, request.sizes["D"]
    update = bool(request.geometry.attr.get("update"))
    _only(request, {"x", "weight", "bias", "conv_states", "conv_state", "has_initial_state"}, "take one state per batch item")
    name, lead = "conv_state" if update else "conv_states", ("batch", D, request.tokens or "time")
    states = ("batch", D, axis["L"])
    x = parts.inputs(graph, dtypes, {"x": lead, "weight": (D, axis["W"]), "bias": (D,), name: states})
    past = x.get(name)
    if past is not None and not update:
        zero = graph.ConstantOfShape(graph.Shape(past))
        if "has_initial_state" in dtypes:
            flags = graph.Unsqueeze(graph.add_input("has_initial_state", "bool", ("batch",)), graph.ints(1, 2))
            past = graph.Where(flags, past, zero)
        else:
            past = zero
    o, new = parts.convolution(
        graph, request.profile, x["x"], x["weight"], x.get("bias"), past, W=axis["W"], L=axis["L"], channels=D,
        act=request.geometry.attr["activation"] == "silu",
    )  # fmt: skip
    graph.add_output("o", graph.cast(o, "float32", dtypes["x"]), dtypes["x"], lead)
    if new is not None:
        graph.add_output(onnx_run.next_name(name), graph.cast(new, "float32", dtypes[name]), dtypes[name], states)


def gating(graph: Graph, request: Request) -> None:
    """`fused_gdn_gating` with softplus_beta 1 and threshold 20."""
    dtypes, HV = request.geometry.dtype, request.sizes["HV"]
    x = parts.inputs(graph, dtypes, {"A_log": (HV,), "a": ("rows", HV), "b": ("rows", HV), "dt_bias": (HV,)})
    g, beta = parts.gates(graph, x["A_log"], x["a"], x["b"], x["dt_bias"])
    graph.add_output("g", g, "float32", ("rows", HV))
    graph.add_output("beta", graph.cast(beta, "float32", dtypes["b"]), dtypes["b"], ("rows", HV))


def norm(graph: Graph, request: Request) -> None:
    """`rms_norm_gated` with its default eps."""
    dtypes, attrs, rows = request.geometry.dtype, request.geometry.attr, ("rows", "groups", request.geometry.axis["D"])
    x = parts.inputs(graph, dtypes, {"x": rows, "weight": rows[-1:], "z": rows})
    before, activation = bool(attrs["norm_before_gate"]), attrs["activation"]
    o = parts.rms_norm(graph, request.profile, x["x"], x["weight"], x.get("z"), before=before, activation=activation)
    graph.add_output("o", graph.cast(o, "float32", dtypes["x"]), dtypes["x"], rows)


def _only(request: Request, known: set[str], allowed: str) -> None:
    for name in request.geometry.dtype:
        if name not in known:
            raise ExportError(
                f"{request.spec.name}: {name} has no ONNX form; allowed: calls that {allowed}, without pools of slots and "
                f"cu_seqlens. Operators with an ONNX form: {', '.join(exported())}"
            )


def _draw(request: Request, tokens: int) -> tuple[Numbers, Numbers]:
    arguments, want = draw(request, B=2, S=2, T=tokens, M=tokens, G=3, **request.sizes)
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}, want


#: Algorithm of a SPEC -> how it goes to ONNX.
BUILDERS = {
    "chunk": Builder(rule, _draw),
    "recurrent": Builder(rule, _draw),
    "conv": Builder(conv, _draw, ("standard", "decomposed", "ort")),
    "gating": Builder(gating, _draw),
    "norm": Builder(norm, _draw),
    "layer": Builder(onnx_layer.layer, onnx_layer.draw),
    "moe_route": Builder(onnx_moe.route, _draw),
    "moe_experts": Builder(onnx_moe.experts, onnx_moe.draw, ("dense", "loop", "ort")),
}


def verify(request: Request, folder: Path) -> list[Check]:
    """Check the model, and run it in onnx's reference evaluator and in onnxruntime, at two numbers of tokens."""
    import onnx

    path = folder / f"{request.spec.name}.onnx"
    checks = [onnx_run.checked(path)]
    if not checks[0].passed:
        return checks
    fused = any(op.domain == parts.MICROSOFT for op in onnx.load(str(path), load_external_data=False).opset_import)
    # The reference of a pack quantizes activations, its ONNX form does not: what holds for dense weights holds for it.
    spec = OPS["fused_experts"] if request.pack is not None else request.spec
    # Two lengths, so that a size frozen by mistake shows: a decode step, and a prompt.
    for tokens in (request.tokens,) if request.tokens else (1, 65):
        feeds, want = BUILDERS[request.spec.algorithm].draw(request, tokens)
        what = f"numbers against float64 reference, {tokens} tokens"
        if fused:
            checks.append(Check(what, "onnx.reference", None, f"has no {parts.MICROSOFT}"))
        else:
            by = f"onnx.reference {onnx.__version__}"
            checks.append(onnx_run.attempt(spec, what, by, onnx_run.run_reference, path, feeds, want))
        checks.append(onnx_run.attempt(spec, what, "onnxruntime", onnx_run.run_onnxruntime, path, feeds, want))
    return checks
