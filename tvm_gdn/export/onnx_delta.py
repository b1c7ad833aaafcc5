"""Delta-rule operators in ONNX: plain, with their gates inside, from a packed projection, or with the convolution before it.

The rule itself stands in `onnx_rules.py`. States come in and go out: `initial_state` and `final_state`, or a pool
(`onnx_pools.py`).
"""

from __future__ import annotations

import numpy as np

from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import ExportError, Request
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_packed import Packed
from tvm_gdn.export.onnx_pools import Buffer, Pool
from tvm_gdn.export.onnx_rules import Tensors, delta_rule
from tvm_gdn.export.onnx_tree import ancestors
from tvm_gdn.spec import Axis

#: Inputs that are declared where they are used: states, bounds, and what verification takes.
_OWN = (
    "initial_state_source", "initial_state_indices", "conv_state", "conv_state_indices", "cu_seqlens",
    "intermediate_states_buffer", "intermediate_state_indices", "retrieve_parent_token", "final_state",
)  # fmt: skip


def refuse(request: Request) -> None:
    """Refuse combinations of arguments that have no form.

    Raises
    ------
    ExportError
        Names the arguments.
    """
    dtypes, op = request.geometry.dtype, request.spec.name
    if "intermediate_states_buffer" not in dtypes:
        return
    if "cu_seqlens" in dtypes:
        raise ExportError(
            f"{op}: cu_seqlens together with intermediate_states_buffer has no ONNX form; allowed: cu_seqlens without it, or "
            "the steps of all sequences as a batch (--dims with=... names the optional tensors)"
        )
    if "retrieve_parent_token" in dtypes and dtypes["intermediate_states_buffer"] != "float32":
        raise ExportError(
            f"{op}: a step follows its parent's state as stored, and ONNX forms round none: retrieve_parent_token with a "
            f"{dtypes['intermediate_states_buffer']} buffer has none; allowed: intermediate_states_buffer=float32"
        )
    if not request.tokens:
        raise ExportError(f"{op}: intermediate_states_buffer needs a fixed number of steps in ONNX: give --tokens N")


def rule(graph: Graph, request: Request) -> None:
    """A delta-rule operator, or `fused_conv_gated_delta_rule_update`."""
    refuse(request)
    dtypes, axis, HV = request.geometry.dtype, request.geometry.axis, request.sizes["HV"]
    K, V, H, attrs = axis["K"], axis["V"], request.sizes["H"], request.geometry.attr
    x = parts.inputs(graph, {n: kind for n, kind in dtypes.items() if n not in _OWN}, _shapes(request))
    rows = x["mixed_qkv"] if "mixed_qkv" in x else x["q"]
    packed = Packed(graph, ("cu_seqlens", dtypes["cu_seqlens"]), rows, 1, request.tokens) if "cu_seqlens" in dtypes else None
    sequences = packed.lengths if packed else rows
    v_first = bool(attrs.get("state_v_first"))
    row = (HV, V, K) if v_first else (HV, K, V)
    pool = None
    if "initial_state_source" in dtypes:
        kind = dtypes["initial_state_source"]
        count = "sequences" if packed else "batch"
        pool = Pool(graph, "initial_state_source", kind, row, _slots(request, "initial_state"), sequences, count)
        state = pool.read()
    elif "initial_state" in x:
        state = x["initial_state"]
    else:
        batch = graph.Slice(graph.Shape(sequences), graph.ints(0), graph.ints(1))
        state = graph.ConstantOfShape(graph.Concat(batch, graph.ints(HV, K, V), axis=0))
    if v_first and ("initial_state" in x or pool):
        state = graph.Transpose(state, perm=[0, 1, 3, 2])
    if "mixed_qkv" in x:
        q, k, v = _unpacked(graph, request, x)
    else:
        q, k, v = x["q"], x["k"], x["v"]
    if "A_log" in x:
        a, b = (graph.Unsqueeze(x[n], graph.ints(1)) if "mixed_qkv" in x else x[n] for n in ("a", "b"))
        gates: tuple[str | None, str] = parts.gates(graph, x["A_log"], a, b, x["dt_bias"])
    else:
        gates = (x.get("g"), x["beta"])
    if packed:
        g, beta = gates
        gate = (HV, K) if attrs.get("channel_gate") else (HV,)
        q, k, v = packed.spread(q, (H, K)), packed.spread(k, (H, K)), packed.spread(v, (HV, V))
        gates = (None if g is None else packed.spread(g, gate), packed.spread(beta, (HV,)))
    if "intermediate_states_buffer" in dtypes:
        o, final = _verified(graph, request, (q, k, v, *gates, state), H)
    else:
        o, final = delta_rule(graph, request, (q, k, v, *gates, state), H)
    if packed:
        o = packed.back(o, (HV, V))
    kind = dtypes.get("v", dtypes.get("mixed_qkv", "float32"))
    lead = (1 if packed else "batch", 1 if "mixed_qkv" in x else request.tokens or "time")
    graph.add_output("o", graph.cast(o, "float32", kind), kind, (*lead, HV, V))
    final = graph.Transpose(final, perm=[0, 1, 3, 2]) if v_first else final
    if pool:
        pool.write(final)
    if attrs.get("output_final_state") or "final_state" in dtypes:
        kind = dtypes.get("final_state", dtypes.get("initial_state", "float32"))
        graph.add_output("final_state", graph.cast(final, "float32", kind), kind, ("sequences" if packed else "batch", *row))


def _verified(graph: Graph, request: Request, tensors: Tensors, H: int) -> tuple[str, str]:
    """Outputs and the last state of a chain or tree of steps; ``next_intermediate_states_buffer`` gets the state after each."""
    name, dtypes, steps = "intermediate_states_buffer", request.geometry.dtype, request.tokens
    axis, HV = request.geometry.axis, request.sizes["HV"]
    v_first = bool(request.geometry.attr.get("state_v_first"))
    row = (axis["V"], axis["K"]) if v_first else (axis["K"], axis["V"])
    buffer = Buffer(graph, name, dtypes[name], (HV, *row), _slots(request, "intermediate_state"), tensors[0])
    parents = None
    if "retrieve_parent_token" in dtypes:
        kind = dtypes["retrieve_parent_token"]
        given = graph.cast(graph.add_input("retrieve_parent_token", kind, ("batch", "parents")), kind, "int64")
        parents = graph.Slice(given, graph.ints(0), graph.ints(steps), graph.ints(1))
    o, states = delta_rule(graph, request, tensors, H, ancestors(graph, parents, buffer.real, steps))
    last = graph.Gather(states, graph.constant(steps - 1, np.int64), axis=1)
    buffer.write(graph.Transpose(states, perm=[0, 1, 2, 4, 3]) if v_first else states, steps)
    return o, last


def _slots(request: Request, state: str) -> tuple[str, str] | None:
    name = f"{state}_indices"
    return (name, request.geometry.dtype[name]) if name in request.geometry.dtype else None


def _shapes(request: Request) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs in the SPEC's order: numbers where the geometry or the format fixes them, else names."""
    geometry, sizes = request.geometry, request.sizes
    packed = 2 * sizes["H"] * geometry.axis["K"] + sizes["HV"] * geometry.axis["V"]
    batch, sequences = (1, "sequences") if "cu_seqlens" in geometry.dtype else ("batch", "batch")
    known = {**sizes, **geometry.axis, "B": batch, "N": sequences, "T": request.tokens or "time", "R": packed}
    given = {**geometry.attr, **dict.fromkeys(geometry.dtype, True)}
    return {
        tensor.name: tuple(known[Axis.parse(axis).name] for axis in tensor.axis_names(given))
        for tensor in request.spec.tensors
        if tensor.name in geometry.dtype and tensor.name not in _OWN
    }


def _unpacked(graph: Graph, request: Request, x: dict[str, str]) -> tuple[str, str, str]:
    """q, k, v ``[B, 1, heads, width]`` of the packed projection of one token, after the convolution where the operator has it."""
    axis, dtypes, attrs, (H, HV) = request.geometry.axis, request.geometry.dtype, request.geometry.attr, _heads(request)
    K, V, mixed = axis["K"], axis["V"], graph.Unsqueeze(x["mixed_qkv"], graph.ints(1))
    if "conv_state" in dtypes:
        channels, W, L = 2 * H * K + HV * V, axis["W"], axis["L"]
        pool = Pool(graph, "conv_state", dtypes["conv_state"], (channels, L), _slots(request, "conv_state"), x["mixed_qkv"])
        column, new = parts.convolution(
            graph, request.profile, graph.Transpose(mixed, perm=[0, 2, 1]), x["conv_weight"], x.get("conv_bias"), pool.read(),
            W=W, L=L, channels=channels, act=attrs["activation"] == "silu",
        )  # fmt: skip
        pool.write(new)
        mixed = graph.Transpose(column, perm=[0, 2, 1])
    q, k, v = graph.Split(mixed, graph.ints(H * K, H * K, HV * V), axis=2, outputs=3)
    q, k = (graph.Reshape(part, graph.ints(0, 0, H, K)) for part in (q, k))
    return q, k, graph.Reshape(v, graph.ints(0, 0, HV, V))


def _heads(request: Request) -> tuple[int, int]:
    return request.sizes["H"], request.sizes["HV"]
