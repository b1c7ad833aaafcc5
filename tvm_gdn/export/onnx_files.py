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

import numpy as np
import torch

from tvm_gdn.export import onnx_delta, onnx_layer, onnx_moe, onnx_run
from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import Check, ExportError, Request, draw
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_packed import Packed
from tvm_gdn.export.onnx_pools import Pool
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
        A delta rule or convolution, with states or pools; gates, gated norm, routing, experts; or `onnx_layer.SPEC`.

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
    return [*(spec.name for spec in OPS.values() if spec.algorithm in BUILDERS), onnx_layer.SPEC.name]


def conv(graph: Graph, request: Request) -> None:
    """`causal_conv1d_fn` and `causal_conv1d_update`: batch item, or packed sequence, n in state n, or in the slot given."""
    dtypes, axis, D = request.geometry.dtype, request.geometry.axis, request.sizes["D"]
    update = bool(request.geometry.attr.get("update"))
    name, slots = ("conv_state", "conv_state_indices") if update else ("conv_states", "cache_indices")
    time, bounds = request.tokens or "time", "query_start_loc"
    lead = (D, time) if bounds in dtypes else ("batch", D, time)
    x = parts.inputs(graph, dtypes, {"x": lead, "weight": (D, axis["W"]), "bias": (D,)})
    packed, columns = None, x["x"]
    if bounds in dtypes:
        rows = graph.Unsqueeze(graph.Transpose(columns, perm=[1, 0]), graph.ints(0))
        packed = Packed(graph, (bounds, dtypes[bounds]), rows, 1, request.tokens)
        columns = graph.Transpose(packed.spread(rows, (D,)), perm=[0, 2, 1])
    pool, past = None, None
    if name in dtypes:
        ids = (slots, dtypes[slots]) if slots in dtypes else None
        count = "sequences" if packed else "batch"
        pool = Pool(graph, name, dtypes[name], (D, axis["L"]), ids, columns, count)
        past = pool.read()
        if not update:
            zero = graph.ConstantOfShape(graph.Shape(past))
            if "has_initial_state" in dtypes:
                flags = graph.Unsqueeze(graph.add_input("has_initial_state", "bool", (count,)), graph.ints(1, 2))
                past = graph.Where(flags, past, zero)
            else:
                past = zero
    o, new = parts.convolution(
        graph, request.profile, columns, x["weight"], x.get("bias"), past, W=axis["W"], L=axis["L"], channels=D,
        act=request.geometry.attr["activation"] == "silu",
    )  # fmt: skip
    filled = None
    if packed is not None:
        rows = packed.back(graph.Transpose(o, perm=[0, 2, 1]), (D,))
        o = graph.Transpose(graph.Squeeze(rows, graph.ints(0)), perm=[1, 0])
        if past is not None:
            # The state ends where the sequence does; one without tokens keeps its own.
            history = graph.Transpose(graph.Concat(past, columns, axis=2), perm=[0, 2, 1])
            new = graph.Transpose(packed.last(history, axis["L"]), perm=[0, 2, 1])
            filled = graph.Greater(packed.lengths, graph.constant(0, np.int64))
    graph.add_output("o", graph.cast(o, "float32", dtypes["x"]), dtypes["x"], lead)
    if pool is not None:
        pool.write(new, filled)


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


def _draw(request: Request, tokens: int) -> tuple[Numbers, Numbers]:
    """Inputs at a number of tokens (of sequences, for operators of one token each), padding among the slots, and outputs."""
    axes = {name for tensor in request.spec.tensors for name in tensor.axes.split()}
    batch = 3 if "T" in axes else tokens
    # Packed sequences have T, 0 and 1 tokens (`artifact.case_of`).
    single = request.tokens and not {"cu_seqlens", "query_start_loc"}.isdisjoint(request.geometry.dtype)
    sizes = {"B": batch, "S": batch + 2, "T": tokens - 1 if single else tokens, "M": tokens, "G": 3, "padding": True}
    arguments, want = draw(request, **{**sizes, **request.sizes})
    # A `final_state` is memory for a result: no input of a model.
    given = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and name != "final_state"}
    return given, want


#: Algorithm of a SPEC -> how it goes to ONNX.
BUILDERS = {
    "chunk": Builder(onnx_delta.rule, _draw),
    "recurrent": Builder(onnx_delta.rule, _draw),
    "fused_decode": Builder(onnx_delta.rule, _draw),
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
