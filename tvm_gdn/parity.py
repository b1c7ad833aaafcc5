"""Holds every operator on a target against the float64 reference, on the cases of its SPEC."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tvm_gdn import cases, dispatch, reference
from tvm_gdn.check import geometry_of
from tvm_gdn.spec import OpSpec, holds


@dataclass(frozen=True)
class Result:
    """Outcome of one case: the RMS error ratio of every output and mutated argument, and its limit."""

    op: str
    case: str
    served: str
    errors: dict[str, float]
    limits: dict[str, float]
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether compiled code ran and every error is within its limit."""
        return not self.failure and all(self.errors[name] <= limit for name, limit in self.limits.items())


def rms_ratio(out: torch.Tensor, ref: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; equal NaN positions count as equal, others as infinite error."""
    out, ref = out.detach().double().to(ref.device), ref.detach().double()
    finite = ref.isfinite()
    if not torch.equal(finite, out.isfinite()):
        return float("inf")
    out, ref = out[finite], ref[finite]
    if ref.numel() == 0:
        return 0.0
    error, norm = (out - ref).square().mean().sqrt().item(), ref.square().mean().sqrt().item()
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def expected(spec: OpSpec, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the float64 reference makes of arguments: outputs by name, then the mutated arguments.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    arguments : mapping
        As `cases.draw` gives them; not modified.

    Returns
    -------
    dict of torch.Tensor
        Mutated arguments are computed in float64 storage, so that their rounding counts as error of the kernel alone.
    """
    copy = cases.clone(arguments)
    names = [tensor.name for tensor in spec.tensors if tensor.mutated and copy[tensor.name] is not None]
    if not holds(copy, spec.storage_matters_with):
        for name in names:
            copy[name] = copy[name].double()
    result = getattr(reference, spec.name)(**spec.for_reference(copy), exact=True)
    values = result if isinstance(result, tuple) else (result,)
    outputs = {output.name: value for output, value in zip(spec.outputs, values, strict=True) if value is not None}
    return {**outputs, **{name: copy[name] for name in names}}


def run(spec: OpSpec, arguments: Mapping[str, Any], function: Callable[..., Any] | None = None) -> dict[str, torch.Tensor]:
    """Run the torch operator, or a function with its signature; outputs by name, then the mutated arguments (modified)."""
    # Outputs are allocated full of NaN, so that a kernel that skips elements cannot pass on what an earlier one left there.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = (function or getattr(torch.ops.tvm_gdn, spec.name))(*arguments.values())
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    values = result if isinstance(result, tuple) else (result,)
    names = [tensor.name for tensor in spec.tensors if tensor.mutated and arguments[tensor.name] is not None]
    outputs = {o.name: value for o, value in zip(spec.outputs, values, strict=True) if not o.when or arguments[o.when]}
    return {**outputs, **{name: arguments[name] for name in names}}


def limit(spec: OpSpec, name: str, dtype: torch.dtype) -> float:
    """Tolerance of an output or mutated argument, by its role and the dtype it is stored in; integers must be equal."""
    roles = {**{tensor.name: tensor.dtype_role for tensor in spec.tensors}, **{out.name: out.like for out in spec.outputs}}
    short = str(dtype).removeprefix("torch.")
    usual = spec.tolerance[short] if dtype.is_floating_point else spec.tolerance.get(short, 0.0)
    return spec.tolerance.get(f"{roles[name]}_{short}", usual)


def compare(
    spec: OpSpec, got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """RMS error ratio of every output and mutated argument, and its limit."""
    return (
        {name: rms_ratio(got[name], want[name]) for name in want},
        {name: limit(spec, name, got[name].dtype) for name in want},
    )


def check_case(spec: OpSpec, case: Mapping[str, Any], seed: int = 0, device: str = "cpu") -> Result:
    """Run one case and compare.

    Parameters
    ----------
    spec, case, seed, device
        As in `cases.draw`.

    Returns
    -------
    Result
    """
    arguments = cases.draw(spec, case, seed)
    return check_arguments(spec, case, arguments, expected(spec, arguments), device)


def check_arguments(
    spec: OpSpec, case: Mapping[str, Any], arguments: Mapping[str, Any], want: Mapping[str, torch.Tensor], device: str = "cpu"
) -> Result:
    """Run one case whose arguments are drawn, and compare with what `expected` made of them."""
    geometry = geometry_of(spec, arguments)
    got = run(spec, {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()})
    served = dispatch.served_by(spec.name, geometry, device)
    errors, limits = compare(spec, got, want)
    failure = "" if served.startswith("compiled") else served
    return Result(spec.name, cases.label(case), served, errors, limits, failure)


def tokens(case: Mapping[str, Any]) -> int:
    """Tokens of a case, which its time in an emulation grows with."""
    return int(sum(case.get("lengths", (case.get("B", 1) * case.get("T", 1),))))


def sample(spec: OpSpec, count: int = 2, longest: int = 200) -> list[dict[str, Any]]:
    """A few short cases of an operator that differ from each other as much as its cases do.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    count : int
        How many.
    longest : int
        Tokens that a case may have.

    Returns
    -------
    list of dict
        The first short case, then always the one with the most keys that differ from those of the chosen ones.
    """
    short = [dict(case) for case in spec.cases if tokens(case) <= longest]

    def distance(case: dict[str, Any], other: dict[str, Any]) -> int:
        return sum(case.get(key) != other.get(key) for key in {*case, *other})

    chosen = short[:1]
    while len(chosen) < min(count, len(short)):
        rest = [case for case in short if case not in chosen]
        chosen.append(max(rest, key=lambda case: min(distance(case, other) for other in chosen)))
    return chosen


def selected(spec: OpSpec, selection: str) -> list[dict[str, Any]]:
    """Cases of an operator: ``"all"``, or ``"small"``, those of `sample`."""
    return sample(spec) if selection == "small" else [dict(case) for case in spec.cases]


def share(error: float, limit: float) -> float:
    """Error as a share of its limit; integers have the limit 0 and are right or not."""
    return error / limit if limit else (0.0 if error == 0 else math.inf)
