"""Format ``torch``: an operator as a saved `torch.export` program, one node; and the way of such programs to ONNX.

A model that calls tvm_gdn's functions exports with ``torch.export.export`` as it stands; the operators stay single nodes. For
ONNX those nodes are replaced first by their forms in `torch_forms.py`::

    program = torch.export.export(model, inputs, dynamic_shapes=...)
    to_onnx(program).save("model.onnx")
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from tvm_gdn.export import onnx_parts as parts
from tvm_gdn.export import onnx_run, torch_forms
from tvm_gdn.export.artifact import OPEN, Check, ExportError, Request, compared, draw
from tvm_gdn.ops import OPS
from tvm_gdn.spec import FLOATS, Axis, OpSpec

_SIZES = {"B": 3, "T": 5, "M": 5, "G": 2, "S": 6, "D": 24, "E": 8, "k": 2}


def build(request: Request) -> dict[str, bytes]:
    """The program ``<op>.pt2``, symbolic in every axis but K, V and heads; loading it needs ``import tvm_gdn``."""
    program = _program(request)
    program.example_inputs = None  # which would make up most of the file
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return {f"{request.spec.name}.pt2": buffer.getvalue()}


def _program(request: Request, *, functional: bool = False) -> torch.export.ExportedProgram:
    arguments, _ = draw(request, **{**_SIZES, **_heads(request)})
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    shapes = {name: _dynamic(request, name) for name in tensors}
    return torch.export.export(_Call(request.spec, arguments, functional), (tensors,), dynamic_shapes=(shapes,))


def serves(spec: OpSpec) -> tuple[str, ...]:
    """Dtypes of an operator as a torch program; a layer is none."""
    return FLOATS if spec.name in OPS else ()


def verify(request: Request, folder: Path) -> list[Check]:
    """Load the program and run it at other sizes; translate it to ONNX and run that, where the operator has a translation."""
    path = folder / f"{request.spec.name}.pt2"
    program = torch.export.load(path)
    by = f"torch {torch.__version__}"
    nodes = [node.target for node in program.graph.nodes if "tvm_gdn" in str(node.target)]
    checks = [Check("one node", by, nodes == [torch_forms.overload(request.spec)], ", ".join(map(str, nodes)))]
    arguments, want = draw(request, seed=1, **{**_SIZES, "B": 2, "T": 21, "M": 21, **_heads(request)})
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = [value.clone() for value in tensors.values()]
    values = program.module()(tensors)
    got = dict(zip([o.name for o in request.spec.outputs if not o.when or arguments[o.when]], values, strict=True))
    got |= {name: tensors[name] for name in want if name in tensors}
    checks.append(compared(request.spec, "numbers against float64 reference", by, got, want))
    what = "translated to ONNX, numbers against float64 reference"
    if not _has_translation(request):
        return [*checks, Check(what, "onnxruntime", None, "the operator, or an argument of it, is not translated")]
    model = folder / "translated.onnx"
    try:
        # ONNX has no updates in place: there the program returns what it would have updated.
        translated = to_onnx(_program(request, functional=True))
        translated.save(str(model))
        # torch.onnx writes names in lower case: the order tells what is what.
        feeds = {x.name: value for x, value in zip(translated.model.graph.inputs, before, strict=True)}
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
        Of any model. Operators on packed weights, `moe_sort`, `expert_stats`, and calls with cu_seqlens have no translation.
    profile : {"ort", "standard"}
        onnxruntime's `com.microsoft` operators, or those of opset 27.

    Returns
    -------
    torch.onnx.ONNXProgram
        Call its ``save(path)``.

    Raises
    ------
    ExportError
        An operator of the program has no translation, or the program updates an input or buffer in place.
    ImportError
        onnx or onnxscript is not installed.
    """
    table = torch_forms.forms(profile)
    nodes = [node for module in _modules(program) for node in module.graph.nodes if "tvm_gdn" in str(node.target)]
    left = [str(node.target) for node in nodes if node.target not in table]
    if left:
        raise ExportError(f"{', '.join(left)}: no translation to ONNX; translated are {', '.join(map(str, table))}")
    # A table of decompositions would not do: an operator that writes to an argument is wrapped before it is looked up.
    targets = [node.target for node in nodes]
    try:
        for node in nodes:
            node.target = table[node.target]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its tree specs
            translated = program.run_decompositions({})
    finally:
        for node, target in zip(nodes, targets, strict=True):
            node.target = target
    signature = translated.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise ExportError(
            f"the program updates {', '.join(written)} in place, which ONNX cannot: clone it in the model, and return the clone"
        )
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = torch.onnx.export(translated, (), dynamo=True, verbose=False, opset_version=torch_forms.OPSET)
    if profile == "standard":
        # torch writes no opset that has LinearAttention; what it writes for 18 must mean the same there: check the model.
        model.model.opset_imports[""] = parts.OPSET["standard"]
    return model


def _modules(program: torch.export.ExportedProgram) -> list[torch.fx.GraphModule]:
    """The program's graph, and those of its control flow."""
    return [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]


class _Call(torch.nn.Module):
    """One call of a torch operator: tensors come in, scalars are fixed; `functional`: updated copies come out too."""

    def __init__(self, spec: OpSpec, arguments: dict[str, Any], functional: bool) -> None:
        super().__init__()
        self.spec, self.functional = spec, functional
        self.fixed = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}

    def forward(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        written = [tensor.name for tensor in self.spec.tensors if self.functional and tensor.mutated and tensor.name in tensors]
        given = {**self.fixed, **tensors, **{name: tensors[name].clone() for name in written}}
        result = torch_forms.overload(self.spec)(*(given[arg.name] for arg in self.spec.inputs))
        values = result if isinstance(result, tuple) else (result,)
        outputs = [x for o, x in zip(self.spec.outputs, values, strict=True) if not o.when or self.fixed[o.when]]
        return [*outputs, *(given[name] for name in written)]


def _has_translation(request: Request) -> bool:
    without = {"cu_seqlens", "query_start_loc", "intermediate_states_buffer", "retrieve_parent_token", "final_state"}
    return torch_forms.overload(request.spec) in torch_forms.forms("ort") and not without & set(request.geometry.dtype)


def _dynamic(request: Request, name: str) -> dict[int, Any]:
    tensor = next(tensor for tensor in request.spec.tensors if tensor.name == name)
    given = {**request.geometry.attr, **dict.fromkeys(request.geometry.dtype, True)}
    axes = [Axis.parse(axis).name for axis in tensor.axis_names(given)]
    fixed = {*request.geometry.axis, *OPEN, "R", ""}  # R, the packed projection, follows from the heads
    return {i: torch.export.Dim.AUTO for i, axis in enumerate(axes) if axis not in fixed}


def _heads(request: Request) -> dict[str, int]:
    return {"H": 2, "HV": 4, **dict(request.heads)}
