"""Draws inputs for a SPEC's cases: one source for parity, benchmarks, tuning, tests and the fuzzer.

A case is a mapping: symbolic and static axis sizes (``B``, ``T``, ``H``...), or ``lengths`` for packed sequences instead of B and
T; ``with``, the optional tensors that are passed; ``dtype`` and ``state_dtype``, ``dtypes`` for single tensors, ``index_dtype``;
``padding`` (some slots are -1); and any scalar of the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.check import TORCH_DTYPES
from tvm_gdn.spec import OpSpec, Tensor

#: What required scalars get where a case does not say.
_SCALARS = {"softplus_beta": 1.0, "softplus_threshold": 20.0}


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
    sizes = {name: value for name, value in case.items() if name.isupper() and isinstance(value, int)}
    if "lengths" in case:
        sizes |= {"B": 1, "T": sum(case["lengths"]), "N": len(case["lengths"])}
    sizes.setdefault("B", 1)
    sizes.setdefault("T", 1)
    sizes.setdefault("N", sizes["B"])
    sizes.setdefault("S", sizes["N"])
    longest = max(case.get("lengths", (sizes["T"],)), default=1)
    sizes |= {"C": sizes["N"] + 1, "P": max(longest, 1) + 1, "P2": max(longest, 1)}
    if any("R" in tensor.axes.split() for tensor in spec.tensors):
        sizes["R"] = 2 * sizes["H"] * sizes["K"] + sizes["HV"] * sizes["V"]
    return sizes


def _draw(
    tensor: Tensor, shape: tuple[int, ...], case: Mapping[str, Any], sizes: Mapping[str, int], rng: torch.Generator
) -> torch.Tensor:
    kind = tensor.values
    if kind == "cu_seqlens":
        return torch.tensor([0, *case["lengths"]]).cumsum(0)
    if kind == "slots":
        pool = sizes["S"] if tensor.name == "initial_state_indices" else sizes["C"]
        slots = torch.randperm(pool, generator=rng)[: sizes["N"]]
        if case.get("padding") and sizes["N"] > 1:
            slots[torch.randperm(sizes["N"], generator=rng)[: (sizes["N"] + 1) // 3]] = -1
        return slots
    if kind == "parents":
        parents = torch.full(shape, -1)
        for t in range(1, shape[1]):
            parents[:, t] = torch.randint(-1, t, (shape[0],), generator=rng)
        return parents
    if kind == "log_decay":
        return -torch.rand(shape, generator=rng)
    if kind == "beta":
        return torch.rand(shape, generator=rng)
    if kind == "A_log":
        return torch.log(1 + 15 * torch.rand(shape, generator=rng))
    if kind == "empty":
        return torch.full(shape, float("nan"))
    values = torch.randn(shape, generator=rng)
    if kind == "unit":
        values = torch.nn.functional.normalize(values, dim=-1)
    return values


def _dtype(tensor: Tensor, case: Mapping[str, Any]) -> torch.dtype:
    if tensor.name in case.get("dtypes", {}):
        return TORCH_DTYPES[case["dtypes"][tensor.name]]
    if "int64" in tensor.dtypes:
        return TORCH_DTYPES[case.get("index_dtype", "int64")]
    data = case.get("dtype", "float32")
    # Models keep the log-decay and A_log in fp32 and everything else in the dtype of the activations.
    by_role = {"state": case.get("state_dtype", "float32"), "g": "float32", "A_log": "float32"}
    return TORCH_DTYPES[by_role.get(tensor.dtype_role, data)]


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
    sizes = sizes_of(spec, case)
    attrs = {scalar.name: case.get(scalar.name, _SCALARS.get(scalar.name, scalar.default)) for scalar in spec.scalars}
    arguments: dict[str, Any] = {}
    for arg in spec.inputs:
        if not isinstance(arg, Tensor):
            arguments[arg.name] = attrs[arg.name]
            continue
        if arg.optional and arg.name not in case.get("with", ()):
            arguments[arg.name] = None
            continue
        shape = tuple(_size(name, sizes) for name in arg.axis_names(attrs))
        arguments[arg.name] = _draw(arg, shape, case, sizes, rng).to(_dtype(arg, case)).to(device)
    return arguments


def _size(name: str, sizes: Mapping[str, int]) -> int:
    if name.isdigit():
        return int(name)
    base, _, offset = name.partition("+")
    return sizes[base] + int(offset or 0)


def clone(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of arguments whose tensors share no memory with the originals."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def label(case: Mapping[str, Any]) -> str:
    """Short text of a case for test ids and tables."""
    parts = []
    for name, value in case.items():
        if name == "with":
            continue
        if isinstance(value, bool):
            parts.append(name if value else "")
        elif name in {"dtype", "state_dtype", "index_dtype"}:
            short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64"}[value]
            parts.append(f"{'state-' if name == 'state_dtype' else ''}{short}")
        elif isinstance(value, Mapping):
            parts.append("+".join(f"{key}-{item}" for key, item in value.items()))
        elif isinstance(value, tuple):
            parts.append(f"{name}-{'-'.join(map(str, value))}")
        else:
            parts.append(f"{name}{value}")
    if "retrieve_parent_token" in case.get("with", ()):
        parts.append("tree")
    elif "intermediate_states_buffer" in case.get("with", ()):
        parts.append("buffer")
    return " ".join(part for part in parts if part)
