"""Delta-rule operators in ONNX: plain, with their gates inside, from a packed projection, or with the convolution before it.

The rule itself stands in `onnx_rules.py`. States come in and go out: `initial_state` and `final_state`, or a pool
(`onnx_pools.py`).
"""

from __future__ import annotations

from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export.artifact import ExportError, Request
from tvm_gdn.export.onnx_graph import Graph
from tvm_gdn.export.onnx_pools import Pool
from tvm_gdn.export.onnx_rules import delta_rule
from tvm_gdn.spec import Axis

#: Arguments without a form in ONNX.
REFUSED = (
    "cu_seqlens", "intermediate_states_buffer", "intermediate_state_indices", "retrieve_parent_token", "final_state",
    "query_start_loc",
)  # fmt: skip
#: Inputs that `Pool` declares, or that the rule declares as a state.
_STATES = ("initial_state_source", "initial_state_indices", "conv_state", "conv_state_indices")


def refuse(request: Request) -> None:
    """Refuse arguments that have no form.

    Raises
    ------
    ExportError
        Names the argument.
    """
    for name in request.geometry.dtype:
        if name in REFUSED:
            raise ExportError(
                f"{request.spec.name}: {name} has no ONNX form; allowed: sequences of one length as a batch, with a state each "
                "or a pool of slots (--dims with=... names the optional tensors)"
            )


def rule(graph: Graph, request: Request) -> None:
    """A delta-rule operator, or `fused_conv_gated_delta_rule_update`."""
    refuse(request)
    dtypes, axis, HV = request.geometry.dtype, request.geometry.axis, request.sizes["HV"]
    K, V, H, attrs = axis["K"], axis["V"], request.sizes["H"], request.geometry.attr
    x = parts.inputs(graph, {n: kind for n, kind in dtypes.items() if n not in _STATES}, _shapes(request))
    rows = x["mixed_qkv"] if "mixed_qkv" in x else x["q"]
    v_first = bool(attrs.get("state_v_first"))
    pool = None
    if "initial_state_source" in dtypes:
        row = (HV, V, K) if v_first else (HV, K, V)
        pool = Pool(graph, "initial_state_source", dtypes["initial_state_source"], row, _slots(request, "initial_state"), rows)
        state = pool.read()
    elif "initial_state" in x:
        state = x["initial_state"]
    else:
        batch = graph.Slice(graph.Shape(rows), graph.ints(0), graph.ints(1))
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
    o, final = delta_rule(graph, request, (q, k, v, *gates, state), H)
    kind = dtypes.get("v", dtypes.get("mixed_qkv", "float32"))
    lead = ("batch", 1 if "mixed_qkv" in x else request.tokens or "time")
    graph.add_output("o", graph.cast(o, "float32", kind), kind, (*lead, HV, V))
    final = graph.Transpose(final, perm=[0, 1, 3, 2]) if v_first else final
    if pool:
        pool.write(final)
    if attrs.get("output_final_state"):
        kind = dtypes.get("initial_state", "float32")
        shape = ("batch", HV, V, K) if v_first else ("batch", HV, K, V)
        graph.add_output("final_state", graph.cast(final, "float32", kind), kind, shape)


def _slots(request: Request, state: str) -> tuple[str, str] | None:
    name = f"{state}_indices"
    return (name, request.geometry.dtype[name]) if name in request.geometry.dtype else None


def _shapes(request: Request) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs in the SPEC's order: numbers where the geometry or the format fixes them, else names."""
    geometry, sizes = request.geometry, request.sizes
    packed = 2 * sizes["H"] * geometry.axis["K"] + sizes["HV"] * geometry.axis["V"]
    known = {**sizes, **geometry.axis, "B": "batch", "N": "batch", "T": request.tokens or "time", "R": packed}
    given = {**geometry.attr, **dict.fromkeys(geometry.dtype, True)}
    return {
        tensor.name: tuple(known[Axis.parse(axis).name] for axis in tensor.axis_names(given))
        for tensor in request.spec.tensors
        if tensor.name in geometry.dtype and tensor.name not in _STATES
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
