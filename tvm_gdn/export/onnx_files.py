"""Format ``onnx``: an operator as one ONNX model, with symbolic batch and time, states as inputs and outputs.

Profiles: ``standard`` (opset 27, `LinearAttention`), ``decomposed`` (opset 17, a Scan over tokens), ``chunked`` (opset 17, chunks
of plain matrix products; no loop at all with a fixed number of tokens), ``ort`` (onnxruntime's `com.microsoft.LinearAttention`).
Gates, normalization, scale and the repetition of q and k for grouped value heads are standard operators around the rule.
Everything is computed in fp32, like in the kernels. One exporter per algorithm: `BUILDERS`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_gdn.export import onnx_rules
from tvm_gdn.export.artifact import Check, ExportError, Request, compared, draw
from tvm_gdn.export.onnx_graph import ELEMENT, Graph

OPSET = {"standard": 27, "decomposed": 17, "chunked": 17, "ort": 17}
MICROSOFT = "com.microsoft"
_NORM_EPS = 1e-6


def build(request: Request) -> dict[str, bytes]:
    """The model ``<op>.onnx``.

    Parameters
    ----------
    request : Request
        An operator that returns its states (not one on a pool), without `cu_seqlens`; or `fused_gdn_gating`.

    Returns
    -------
    dict

    Raises
    ------
    ExportError
        The operator, or an argument of it, cannot be expressed.
    """
    from onnx import helper

    graph, make = Graph(), BUILDERS.get(request.spec.algorithm)
    if make is None:
        raise ExportError(f"{request.spec.name}: not exported to ONNX yet; algorithms that are: {', '.join(BUILDERS)}")
    make(graph, request)
    opsets = [helper.make_opsetid("", OPSET[request.profile])]
    if any(node.domain == MICROSOFT for node in graph.nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    model = helper.make_model(
        graph.proto(request.spec.name), opset_imports=opsets, ir_version=13 if request.profile == "standard" else 8,
        producer_name="tvm_gdn", doc_string=f"{request.spec.name}: {request.spec.summary}; {request.geometry}; {request.profile}",
    )  # fmt: skip
    return {f"{request.spec.name}.onnx": model.SerializeToString()}


def delta_rule(graph: Graph, request: Request) -> None:
    """Inputs and outputs of a delta-rule operator, and what stands around the rule."""
    dtypes, sizes = request.geometry.dtype, _sizes(request)
    H, K, V, HV = _heads(request)["H"], sizes.K, sizes.V, sizes.HV
    for name in dtypes:
        if name not in {"q", "k", "v", "g", "beta", "initial_state"}:
            raise ExportError(
                f"{request.spec.name}: {name} has no ONNX form; allowed: operators that take initial_state and return the final "
                "state, without cu_seqlens, for example chunk_gated_delta_rule with --dims with=initial_state"
            )
    time: int | str = request.tokens or "time"
    lead = ("batch", time)
    shapes = {"q": (*lead, H, K), "k": (*lead, H, K), "v": (*lead, HV, V), "beta": (*lead, HV)}
    shapes |= {"g": (*lead, HV, K) if sizes.channel_gate else (*lead, HV)}
    v_first = bool(request.geometry.attr.get("state_v_first"))
    state_shape = ("batch", HV, V, K) if v_first else ("batch", HV, K, V)
    given = {
        tensor.name: graph.cast(
            graph.add_input(tensor.name, dtypes[tensor.name], shapes.get(tensor.name, state_shape)),
            dtypes[tensor.name],
            "float32",
        )
        for tensor in request.spec.tensors
        if tensor.name in dtypes
    }
    q, k = _normalized(graph, given["q"], request), _normalized(graph, given["k"], request)
    scale = float(K) ** -0.5 if request.scale is None else request.scale
    q = graph.Mul(q, graph.constant(scale))
    if HV != H:
        q, k = (_repeated(graph, x, H, HV, K) for x in (q, k))
    if "initial_state" in given:
        state = graph.Transpose(given["initial_state"], perm=[0, 1, 3, 2]) if v_first else given["initial_state"]
    else:
        batch = graph.Slice(graph.Shape(q), graph.ints(0), graph.ints(1))
        state = graph.ConstantOfShape(graph.Concat(batch, graph.ints(HV, K, V), axis=0))
    g = given.get("g")
    if g is not None and not sizes.channel_gate:
        g = graph.Unsqueeze(g, graph.ints(-1))
    tensors = (q, k, given["v"], g, given["beta"], state)
    rules: dict[str, Callable[[], tuple[str, str]]] = {
        "standard": lambda: onnx_rules.linear_attention(graph, tensors, sizes),
        "ort": lambda: onnx_rules.linear_attention(graph, tensors, sizes, MICROSOFT),
        "decomposed": lambda: onnx_rules.recurrence(graph, tensors, sizes),
        "chunked": lambda: onnx_rules.chunked(graph, tensors, sizes),
    }
    o, final = rules[request.profile]()
    graph.add_output("o", graph.cast(o, "float32", dtypes["v"]), dtypes["v"], (*lead, HV, V))
    if request.geometry.attr.get("output_final_state"):
        kind = dtypes.get("initial_state", "float32")
        final = graph.Transpose(final, perm=[0, 1, 3, 2]) if v_first else final
        graph.add_output("final_state", graph.cast(final, "float32", kind), kind, state_shape)


def gating(graph: Graph, request: Request) -> None:
    """`fused_gdn_gating` with softplus_beta 1 and threshold 20."""
    dtypes, HV = request.geometry.dtype, _heads(request)["HV"]
    shapes = {"A_log": (HV,), "dt_bias": (HV,), "a": ("rows", HV), "b": ("rows", HV)}
    x = {n: graph.cast(graph.add_input(n, dtypes[n], shapes[n]), dtypes[n], "float32") for n in ("A_log", "a", "b", "dt_bias")}
    biased = graph.Add(x["a"], x["dt_bias"])
    # Softplus of standard ONNX has no threshold; above 20 it is the identity to the last place anyway.
    g = graph.Neg(graph.Mul(graph.Exp(x["A_log"]), graph.Softplus(biased)))
    graph.add_output("g", g, "float32", ("rows", HV))
    graph.add_output("beta", graph.cast(graph.Sigmoid(x["b"]), "float32", dtypes["b"]), dtypes["b"], ("rows", HV))


def norm(graph: Graph, request: Request) -> None:
    """`rms_norm_gated` with its default eps: ``norm(x) * act(z)`` or ``norm(x * act(z))``."""
    dtypes, attrs, rows = request.geometry.dtype, request.geometry.attr, ("rows", "groups", request.geometry.axis["D"])
    shapes = {"x": rows, "z": rows, "weight": rows[-1:]}
    given = {
        n: graph.cast(graph.add_input(n, dtypes[n], shapes[n]), dtypes[n], "float32") for n in ("x", "weight", "z") if n in dtypes
    }
    x, gate = given["x"], None
    if "z" in given:
        gate = graph.Sigmoid(given["z"])
        gate = graph.Mul(gate, given["z"]) if attrs["activation"] == "silu" else gate
    if gate is not None and not attrs["norm_before_gate"]:
        x, gate = graph.Mul(x, gate), None
    mean = graph.ReduceMean(graph.Mul(x, x), axes=[-1], keepdims=1) if OPSET[request.profile] < 18 else (
        graph.ReduceMean(graph.Mul(x, x), graph.ints(-1), keepdims=1)
    )  # fmt: skip
    x = graph.Mul(graph.Div(x, graph.Sqrt(graph.Add(mean, graph.constant(_NORM_EPS)))), given["weight"])
    x = x if gate is None else graph.Mul(x, gate)
    graph.add_output("o", graph.cast(x, "float32", dtypes["x"]), dtypes["x"], rows)


#: Algorithm of a SPEC -> what makes its graph.
BUILDERS: dict[str, Callable[[Graph, Request], None]] = {
    "chunk": delta_rule, "recurrent": delta_rule, "gating": gating, "norm": norm,
}  # fmt: skip


def verify(request: Request, folder: Path) -> list[Check]:
    """Check the model, and run it in onnx's reference evaluator and in onnxruntime, at two numbers of tokens."""
    import onnx

    path = folder / f"{request.spec.name}.onnx"
    checks = [_checked(path)]
    if not checks[0].passed:
        return checks
    # Two lengths, so that a size frozen by mistake shows.
    lengths = (request.tokens,) if request.tokens else (19, 65)
    for tokens in lengths:
        arguments, want = draw(request, B=2, T=tokens, M=tokens, G=3, **_heads(request))
        feeds = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        what = f"numbers against float64 reference, {tokens} tokens"
        if request.profile == "ort":
            checks.append(Check(what, "onnx.reference", None, f"has no {MICROSOFT}"))
        else:
            checks.append(_attempt(request, what, f"onnx.reference {onnx.__version__}", _run_reference, path, feeds, want))
        checks.append(_attempt(request, what, "onnxruntime", run_onnxruntime, path, feeds, want))
    return checks


def _checked(path: Path) -> Check:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return Check("model and shapes", f"onnx.checker {onnx.__version__}", False, str(error)[:300])
    return Check("model and shapes", f"onnx.checker {onnx.__version__}", True)


def _attempt(
    request: Request, what: str, by: str, run: Callable[..., list[torch.Tensor]], path: Path, feeds: dict[str, torch.Tensor],
    want: dict[str, torch.Tensor],
) -> Check:  # fmt: skip
    try:
        values = run(path, feeds, list(want))
    except ImportError as error:
        return Check(what, by, None, str(error))
    except Exception as error:
        return Check(what, by, False, str(error)[:300])
    return compared(request, what, by, dict(zip(want, values, strict=True)), want)


def _run_reference(path: Path, feeds: dict[str, torch.Tensor], names: list[str]) -> list[torch.Tensor]:
    from onnx.reference import ReferenceEvaluator

    return [_tensor(value) for value in ReferenceEvaluator(str(path)).run(names, {n: _array(x) for n, x in feeds.items()})]


def run_onnxruntime(path: Path, feeds: dict[str, torch.Tensor], names: list[str] | None) -> list[torch.Tensor]:
    """Outputs of a model, in onnxruntime on the CPU; all of them where no names are given."""
    # onnxruntime refuses opsets after its last released one unless told otherwise.
    os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(_bits(x), ELEMENT[str(x.dtype).removeprefix("torch.")])
        for name, x in feeds.items()
    }
    names = names or [output.name for output in session.get_outputs()]
    return [_of_ort(value) for value in session.run_with_ort_values(names, values)]


def _of_ort(value: Any) -> torch.Tensor:
    """A result as a tensor; onnxruntime gives no numpy array of bfloat16, but its memory."""
    if value.element_type() != ELEMENT["bfloat16"]:
        return torch.from_numpy(np.array(value.numpy()))
    raw = bytearray(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()))
    return torch.frombuffer(raw, dtype=torch.bfloat16).reshape(tuple(value.shape()))


def _bits(x: torch.Tensor) -> Any:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).contiguous().numpy()


def _array(x: torch.Tensor) -> Any:
    if x.dtype != torch.bfloat16:
        return x.numpy()
    import ml_dtypes

    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _tensor(value: Any) -> torch.Tensor:
    array = np.asarray(value)
    return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16) if array.dtype.name == "bfloat16" else (
        torch.from_numpy(array.copy())
    )  # fmt: skip


def _heads(request: Request) -> dict[str, int]:
    """H and HV: asked for, or those of the operator's first benchmark shape."""
    bench = request.spec.bench[0] if request.spec.bench else {}
    heads = {name: int(bench.get(name, 1)) for name in ("H", "HV")} | dict(request.heads)
    if heads["HV"] % heads["H"] and "q" in request.geometry.dtype:
        raise ExportError(f"HV = {heads['HV']} value heads for H = {heads['H']}: HV must be a multiple of H")
    return heads


def _sizes(request: Request) -> onnx_rules.Sizes:
    axis = request.geometry.axis
    channel = bool(request.geometry.attr.get("channel_gate"))
    return onnx_rules.Sizes(_heads(request)["HV"], axis["K"], axis["V"], channel, request.chunk, request.tokens)


def _normalized(graph: Graph, x: str, request: Request) -> str:
    if not request.l2norm:
        return x
    square = graph.ReduceSum(graph.Mul(x, x), graph.ints(-1), keepdims=1)
    return str(graph.Div(x, graph.Sqrt(graph.Add(square, graph.constant(_NORM_EPS)))))


def _repeated(graph: Graph, x: str, H: int, HV: int, K: int) -> str:
    """[B, T, H, K] -> [B, T, HV, K]: value head hv reads head hv // (HV // H)."""
    wide = graph.Expand(graph.Unsqueeze(x, graph.ints(3)), graph.ints(1, 1, 1, HV // H, 1))
    return str(graph.Reshape(wide, graph.ints(0, 0, HV, K)))
