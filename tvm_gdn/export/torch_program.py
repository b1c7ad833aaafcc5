"""Format ``torch``: an operator as a saved `torch.export` program, one node; and the way of such programs to ONNX.

A model that calls tvm_gdn's functions exports with ``torch.export.export`` as it stands; the operators stay single nodes. For
ONNX those nodes are replaced first by `decompositions`: `LinearAttention` (torch's public ``torch.onnx.ops.symbolic_multi_out``)
and torch's own operators around it::

    program = torch.export.export(model, inputs, dynamic_shapes=...)
    to_onnx(program).save("model.onnx")
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export import onnx_run
from tvm_gdn.export.artifact import Check, ExportError, Request, compared, draw
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Axis, OpSpec

#: Opset that torch's own operators are written in.
_OPSET = 18
#: Profile of `to_onnx` -> domain of `LinearAttention`, and the version that torch takes for it.
DOMAINS = {"ort": (parts.MICROSOFT, 1), "standard": ("", _OPSET)}
_NORM_EPS = 1e-6
_SIZES = {"B": 3, "T": 5, "M": 5, "S": 6}


def build(request: Request) -> dict[str, bytes]:
    """The program ``<op>.pt2``, symbolic in every axis but K, V and heads; loading it needs ``import tvm_gdn``."""
    arguments, _ = draw(request, **_SIZES, **_heads(request))
    given = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    shapes = {name: _dynamic(request, name) for name in given}
    tensors = {name: arguments[name] for name in given}
    program = torch.export.export(
        _Call(request.spec, arguments), (tensors,), dynamic_shapes=({name: shapes[name] for name in given},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return {f"{request.spec.name}.pt2": buffer.getvalue()}


def verify(request: Request, folder: Path) -> list[Check]:
    """Load the program and run it at other sizes; translate it to ONNX and run that, where the operator has a translation."""
    path = folder / f"{request.spec.name}.pt2"
    program = torch.export.load(path)
    by = f"torch {torch.__version__}"
    nodes = [node.target for node in program.graph.nodes if "tvm_gdn" in str(node.target)]
    checks = [Check("one node", by, nodes == [_overload(request.spec)], ", ".join(map(str, nodes)))]
    arguments, want = draw(request, seed=1, **{**_SIZES, "B": 2, "T": 21, "M": 21}, **_heads(request))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    values = program.module()(tensors)
    got = dict(zip([o.name for o in request.spec.outputs if not o.when or arguments[o.when]], values, strict=True))
    got |= {name: tensors[name] for name in want if name in tensors}
    checks.append(compared(request.spec, "numbers against float64 reference", by, got, want))
    what = "translated to ONNX, numbers against float64 reference"
    if request.spec.algorithm not in {"chunk", "recurrent"} or not _has_translation(request):
        return [*checks, Check(what, "onnxruntime", None, "the operator updates a pool, or takes arguments that ONNX has not")]
    model = folder / "translated.onnx"
    feeds = {f"tensors_{name}": value for name, value in tensors.items()}
    try:
        to_onnx(torch.export.load(path)).save(str(model))
        results = onnx_run.run_onnxruntime(model, feeds, None)
    except ImportError as error:
        return [*checks, Check(what, "onnxruntime", None, str(error))]
    finally:
        model.unlink(missing_ok=True)
    return [*checks, compared(request.spec, what, "onnxruntime", dict(zip(want, results, strict=True)), want)]


def to_onnx(program: torch.export.ExportedProgram, profile: str = "ort") -> Any:
    """Translate an exported program that calls tvm_gdn's operators to ONNX.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Of any model; operators on pools, and with cu_seqlens, have no translation.
    profile : {"ort", "standard"}
        onnxruntime's `com.microsoft.LinearAttention`, or that of opset 27.

    Returns
    -------
    torch.onnx.ONNXProgram
        Call its ``save(path)``.

    Raises
    ------
    ExportError
        An operator of the program has no translation.
    ImportError
        onnx or onnxscript is not installed.
    """
    table = decompositions(profile)
    left = [n.target for n in program.graph.nodes if "tvm_gdn" in str(n.target) and n.target not in table]
    if left:
        raise ExportError(f"{', '.join(map(str, left))}: no translation to ONNX; translated are {', '.join(map(str, table))}")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated: Any = torch.onnx.export(
            program.run_decompositions(table), (), dynamo=True, verbose=False, opset_version=_OPSET
        )
    if profile == "standard":
        # torch writes no opset that has LinearAttention; what it writes for 18 must mean the same there: check the model.
        translated.model.opset_imports[""] = parts.OPSET["standard"]
    return translated


def decompositions(profile: str = "ort") -> dict[Any, Callable[..., Any]]:
    """Torch operator -> its statement in `LinearAttention` and torch's own operators, for ``run_decompositions``."""
    if profile not in DOMAINS:
        raise ExportError(f"profile {profile!r}; allowed: {', '.join(DOMAINS)}")
    table: dict[Any, Callable[..., Any]] = {}
    for spec in OPS.values():
        if any(tensor.name == "initial_state" for tensor in spec.tensors):
            table[_overload(spec)] = _rule(spec, *DOMAINS[profile])
    return table


def _rule(spec: OpSpec, domain: str, version: int) -> Callable[..., Any]:
    names = [arg.name for arg in spec.inputs]
    defaults = {scalar.name: scalar.default for scalar in spec.scalars}

    def rule(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        a = {**dict.fromkeys(names), **defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if a["cu_seqlens"] is not None:
            raise ExportError(f"{spec.name}: cu_seqlens has no ONNX form")
        B, T, H, K = a["q"].shape
        HV, V = a["v"].shape[2:]
        q, k = a["q"].float(), a["k"].float()
        if a["use_qk_l2norm_in_kernel"]:
            q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + _NORM_EPS) for x in (q, k))
        q = q * (K**-0.5 if a["scale"] is None else a["scale"])
        q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
        state, v_first = a["initial_state"], a["state_v_first"]
        kind = torch.float32 if state is None else state.dtype
        start = q.new_zeros(B, HV, K, V) if state is None else (state.transpose(-1, -2) if v_first else state).float()
        g = a.get("g")
        inputs = [q.flatten(2), k.flatten(2), a["v"].float().flatten(2), start]
        inputs.append(None if g is None else g.float().flatten(2))
        inputs.append(a["beta"].float())
        o, final = torch.onnx.ops.symbolic_multi_out(
            f"{domain}::LinearAttention",
            inputs,
            {"q_num_heads": HV, "kv_num_heads": HV, "scale": 1.0, "update_rule": "delta" if g is None else "gated_delta"},
            dtypes=(torch.float32, torch.float32),
            shapes=((B, T, HV * V), (B, HV, K, V)),
            version=version,
        )
        final = final.transpose(-1, -2) if v_first else final
        return o.unflatten(2, (HV, V)).to(a["v"].dtype), final.to(kind) if a["output_final_state"] else final.new_empty(0)

    return rule


class _Call(torch.nn.Module):
    """One call of a torch operator: tensors come in, scalars are fixed."""

    def __init__(self, spec: OpSpec, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.fixed = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}

    def forward(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        result = _overload(self.spec)(*({**self.fixed, **tensors}[arg.name] for arg in self.spec.inputs))
        values = result if isinstance(result, tuple) else (result,)
        return [x for o, x in zip(self.spec.outputs, values, strict=True) if not o.when or self.fixed[o.when]]


def _overload(spec: OpSpec) -> Any:
    return getattr(torch.ops.tvm_gdn, spec.name).default


def _has_translation(request: Request) -> bool:
    return _overload(request.spec) in decompositions() and "cu_seqlens" not in request.geometry.dtype


def _dynamic(request: Request, name: str) -> dict[int, Any]:
    tensor = next(tensor for tensor in request.spec.tensors if tensor.name == name)
    given = {**request.geometry.attr, **dict.fromkeys(request.geometry.dtype, True)}
    axes = [Axis.parse(axis).name for axis in tensor.axis_names(given)]
    fixed = {*request.geometry.axis, "H", "HV", ""}
    return {i: torch.export.Dim.AUTO for i, axis in enumerate(axes) if axis not in fixed}


def _heads(request: Request) -> dict[str, int]:
    return {"H": 2, "HV": 4, **dict(request.heads)}
