"""Draws inputs for a SPEC's cases: one source for parity, benchmarks, tuning, tests and the fuzzer.

A case is a mapping: symbolic and static axis sizes (``B``, ``T``, ``H``...); ``with``, the optional tensors that are passed;
``dtype``, ``<role>_dtype`` for the tensors of a role (``state_dtype``), ``dtypes`` for single tensors, ``index_dtype``;
``note``, a word for its label; any scalar of the operator; and what its own hooks (`OpSpec.sizes`, `Tensor.values`) read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.check import TORCH_DTYPES
from tvm_gdn.spec import INTS, Axis, Draw, OpSpec, Tensor, named_sizes


def sizes_of(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes of a case, derived ones included.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    case : mapping
        The case.

    Returns
    -------
    dict
        Sizes by axis name.
    """
    return named_sizes(case) if spec.sizes is None else spec.sizes(case)


def _dtype(tensor: Tensor, case: Mapping[str, Any]) -> torch.dtype:
    name = case.get("dtypes", {}).get(tensor.name) or case.get(f"{tensor.dtype_role}_dtype")
    if name is None and set(tensor.dtypes) <= set(INTS):
        name = case.get("index_dtype", "int64")
    name = name or tensor.usual or case.get("dtype", "float32")
    return TORCH_DTYPES[name if name in tensor.dtypes else tensor.dtypes[0]]


def _attributes(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, Any]:
    return {scalar.name: case.get(scalar.name, scalar.usual) for scalar in spec.scalars}


def _given(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars of a case, and True for every tensor that it passes: what the layouts of tensors depend on."""
    passed = {tensor.name: True for tensor in spec.tensors if not tensor.optional or tensor.name in case.get("with", ())}
    return {**_attributes(spec, case), **passed}


def shapes_of(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a case passes."""
    sizes, given = sizes_of(spec, case), _given(spec, case)
    return {
        tensor.name: (tuple(Axis.parse(axis).size(sizes) for axis in tensor.axis_names(given)), _dtype(tensor, case))
        for tensor in spec.tensors
        if given.get(tensor.name)
    }


def meta(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a case whose tensors have shapes and dtypes but no memory; as `draw` otherwise."""
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes_of(spec, case).items()}
    given = {**_attributes(spec, case), **tensors}
    return {arg.name: given.get(arg.name) for arg in spec.inputs}


def draw(spec: OpSpec, case: Mapping[str, Any], seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Arguments of a call of the torch operator.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    case : mapping
        The case.
    seed : int
        Seed of the values; the same seed gives the same values on every device.
    device : str
        Where the tensors are put.

    Returns
    -------
    dict
        Every argument by name, in SPEC order; optional ones that the case leaves out are None.
    """
    rng = torch.Generator().manual_seed(seed)
    sizes, shapes, attributes = sizes_of(spec, case), shapes_of(spec, case), _attributes(spec, case)
    arguments: dict[str, Any] = {}
    for arg in spec.inputs:
        if not isinstance(arg, Tensor):
            arguments[arg.name] = attributes[arg.name]
        elif arg.name not in shapes:
            arguments[arg.name] = None
        else:
            shape, dtype = shapes[arg.name]
            context = Draw(shape, sizes, case, rng, arguments)
            values = torch.randn(shape, generator=rng) if arg.values is None else arg.values(context)
            arguments[arg.name] = values.to(dtype).to(device)
    return arguments


def clone(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of arguments whose tensors share no memory with the originals."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def label(case: Mapping[str, Any]) -> str:
    """Short text of a case for test ids and tables."""
    parts = []
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64"}
    for name, value in case.items():
        if name == "with":
            continue
        if isinstance(value, bool):
            parts.append(name if value else "")
        elif name in {"dtype", "index_dtype", "note"}:
            parts.append(short.get(value, value))
        elif name.endswith("_dtype"):
            parts.append(f"{name.removesuffix('_dtype')}-{short.get(value, value)}")
        elif isinstance(value, str):
            parts.append(f"{name}-{value}")
        elif isinstance(value, Mapping):
            parts.append("+".join(f"{key}-{item}" for key, item in value.items()))
        elif isinstance(value, tuple):
            parts.append(f"{name}-{'-'.join(map(str, value))}")
        else:
            parts.append(f"{name}{value}")
    return " ".join(part for part in parts if part)
