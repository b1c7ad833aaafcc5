"""Which kernels `fuzz.py` calls, and what may vary between the calls of one: read from the SPEC of every operator.

A kernel is a case of the SPEC whose compiled-in sizes are drawn anew. What a call may choose is found by trying: whatever can
change in the case without asking for another kernel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm_gdn import cases, check
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec

#: The largest compiled-in size that is drawn.
_LARGEST = 72
#: Sizes under which a kernel must stay the same for a key to be free.
_PROBES = (2, 997)


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes
    ----------
    spec : OpSpec
        Its operator.
    case : mapping
        A case that it serves.
    free : tuple of str
        Keys of the case that are sizes, which it serves at any value.
    words : mapping
        Keys that decide what tensors hold, and their values in the SPEC's cases.
    """

    spec: OpSpec
    case: Mapping[str, Any]
    free: tuple[str, ...]
    words: Mapping[str, tuple[Any, ...]]

    @property
    def geometry(self) -> Geometry:
        """What it is compiled for."""
        return _geometry(self.spec, self.case)


def _geometry(spec: OpSpec, case: Mapping[str, Any]) -> Geometry:
    return check.geometry_of(spec, cases.meta(spec, case))


def _sizes(spec: OpSpec, case: Mapping[str, Any]) -> list[str]:
    """Keys that are sizes: those of the case, and those that the SPEC's hook fills in and that nothing else follows from."""
    scalars = {scalar.name for scalar in spec.scalars if scalar.type == "int" and scalar.default is ...}
    keys = [key for key, value in case.items() if isinstance(value, int) and (key.isupper() or key == "k" or key in scalars)]
    sizes = cases.sizes_of(spec, case)
    for key, size in sizes.items():
        if key not in case and cases.sizes_of(spec, {**case, key: size + 1}) == {**sizes, key: size + 1}:
            keys.append(key)
    return keys


def _is_valid(spec: OpSpec, case: Mapping[str, Any]) -> bool:
    try:
        check.validate(spec, cases.meta(spec, case))
    except ArgumentError:
        return False
    return True


def _resized(spec: OpSpec, case: Mapping[str, Any], static: list[str]) -> Mapping[str, Any]:
    """The case with other sizes compiled in: small and odd ones mostly; the same in every run."""
    pick = random.Random(f"{spec.name} {cases.label(case)}")
    for _ in range(100):
        drawn = {**case, **{key: pick.randint(1, min(_LARGEST, max(8, case[key]))) for key in static}}
        if _is_valid(spec, drawn):
            return drawn
    return case


def _words(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    known = {"with", "lengths", "dtypes", *(arg.name for arg in spec.inputs)}
    found: dict[str, list[Any]] = {}
    for other in spec.cases:
        for key, value in other.items():
            if key not in known and not key.isupper() and key != "k" and not key.endswith("dtype"):
                found.setdefault(key, []).append(value)
    return {
        key: tuple(dict.fromkeys(values))
        for key, values in found.items()
        if all(_geometry(spec, {**case, key: value}) == _geometry(spec, case) for value in values)
    }


def _features(spec: OpSpec, case: Mapping[str, Any]) -> set[tuple[str, Any]]:
    geometry = _geometry(spec, case)
    return {*((tensor.name, geometry.dtype.get(tensor.name)) for tensor in spec.tensors), *geometry.attrs}


def _chosen(spec: OpSpec, count: int) -> Iterator[Mapping[str, Any]]:
    """Cases that between them have the most dtypes, optional tensors and static attributes."""
    seen: set[tuple[str, Any]] = set()
    left = {index: _features(spec, case) for index, case in enumerate(spec.cases)}
    for _ in range(min(count, len(spec.cases))):
        best = max(left, key=lambda index: (len(left[index] - seen), -index))
        seen |= left.pop(best)
        yield spec.cases[best]


@cache
def kernels(count: int = 2, ops: tuple[str, ...] = ()) -> tuple[Kernel, ...]:
    """Every kernel of a run.

    Parameters
    ----------
    count : int
        Kernels per operator.
    ops : tuple of str
        Texts of which an operator's name has one; default: all operators.

    Returns
    -------
    tuple of Kernel
    """
    found = []
    for spec in (spec for name, spec in OPS.items() if not ops or any(text in name for text in ops)):
        for case in _chosen(spec, count):
            keys, geometry = _sizes(spec, case), _geometry(spec, case)
            free = tuple(key for key in keys if all(_geometry(spec, {**case, key: probe}) == geometry for probe in _PROBES))
            drawn = _resized(spec, case, [key for key in keys if key in case and key not in free])
            found.append(Kernel(spec, drawn, free, _words(spec, drawn)))
    return tuple(found)
