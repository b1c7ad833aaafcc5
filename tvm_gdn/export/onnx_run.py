"""Who verifies an ONNX model: onnx's checker, onnx's reference evaluator, onnxruntime on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_gdn.export.artifact import Check, compared
from tvm_gdn.export.onnx_graph import ELEMENT
from tvm_gdn.spec import OpSpec

Tensors = Mapping[str, torch.Tensor]


def checked(path: Path) -> Check:
    """The checker's verdict on a model, shapes inferred."""
    import onnx

    by = f"onnx.checker {onnx.__version__}"
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return Check("model and shapes", by, False, str(error)[:300])
    return Check("model and shapes", by, True)


def attempt(
    spec: OpSpec, what: str, by: str, run: Callable[..., list[torch.Tensor]], path: Path, feeds: Tensors, want: Tensors
) -> Check:
    """Run a model and compare its outputs with those wanted, within the tolerances of `spec`.

    What an operator updates in place is an output ``next_<name>`` of its model.
    """
    outputs = {name: next_name(name) if name in feeds else name for name in want}
    try:
        values = run(path, feeds, list(outputs.values()))
    except ImportError as error:
        return Check(what, by, None, str(error))
    except Exception as error:
        return Check(what, by, False, str(error)[:300])
    return compared(spec, what, by, dict(zip(outputs, values, strict=True)), want)


def next_name(name: str) -> str:
    """Output that holds what an operator makes of an argument that it updates in place."""
    return f"next_{name}"


def run_reference(path: Path, feeds: Tensors, names: list[str]) -> list[torch.Tensor]:
    """Outputs of a model, in onnx's reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    return [_tensor(value) for value in ReferenceEvaluator(str(path)).run(names, {n: _array(x) for n, x in feeds.items()})]


def run_onnxruntime(path: Path, feeds: Tensors, names: list[str] | None) -> list[torch.Tensor]:
    """Outputs of a model, in onnxruntime on the CPU; all of them where no names are given."""
    # onnxruntime refuses opsets after its last released one unless told otherwise.
    os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
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
