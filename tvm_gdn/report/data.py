"""Reads what ``tvm_gdn bench --json`` and ``tvm_gdn parity --json`` write, and refuses everything else by name.

Nothing here knows the name of an operator, target or peer: contenders and targets come from the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tvm_gdn.errors import ArgumentError
from tvm_gdn.parity import share
from tvm_gdn.target import EMULATED

#: The ``"format"`` that this version reads.
FORMAT = 1
#: Contenders that are this package: its public function, and the bare kernel below it.
OURS, KERNEL = "tvm_gdn", "kernel"
#: What of ``hardware`` may differ between two runs on one machine.
_INCIDENTAL = frozenset({"system", "memory_gb", "torch_threads"})
_MADE_BY = {
    "bench": "tvm_gdn bench --json FILE",
    "parity": "tvm_gdn parity --json FILE",
    "matrix": "tvm_gdn parity --target all --json FILE",
}
#: How an outcome of a parity run may have come about.
RAN = ("device", "emulated", "built", "none")


@dataclass(frozen=True)
class Run:
    """What every recorded run carries."""

    path: Path
    sha256: str
    date: datetime
    target: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def machine(self) -> str:
        """Text that is equal for two runs on equal hardware."""
        return ", ".join(f"{name} {value}" for name, value in sorted(self.hardware.items()) if name not in _INCIDENTAL)


@dataclass(frozen=True)
class Times:
    """Microseconds per call: median and quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class BenchCase:
    """One shape of a benchmark: errors and limits by tensor, times by contender, and what it was compared with."""

    op: str
    case: str
    passed: bool
    served_by: str
    errors: Mapping[str, float]
    limits: Mapping[str, float]
    us: Mapping[str, Times]
    faster: Mapping[str, float]
    shares: Mapping[str, float]
    rates: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Operator and shape."""
        return self.op, self.case

    @property
    def peers(self) -> list[str]:
        """Contenders that compute the same."""
        return [name for name in self.us if name in self.faster]

    @property
    def floors(self) -> list[str]:
        """Contenders that only move the bytes or do the flops (a plain copy)."""
        return [name for name in self.us if name not in self.faster and name not in {OURS, KERNEL}]

    def relative(self, name: str) -> float:
        """Our time over a contender's in the same run; the recorded ratio, in which drift between rounds cancels."""
        recorded = self.faster.get(name) or self.shares.get(name)
        return 1 / recorded if recorded else self.us[OURS].median / self.us[name].median


@dataclass(frozen=True)
class Bench(Run):
    """A benchmark run."""

    threads: int
    cases: tuple[BenchCase, ...]
    calls: tuple[Mapping[str, Any], ...]
    first_call: Mapping[str, Any] | None

    def find(self, key: tuple[str, str]) -> BenchCase | None:
        """The case of an operator and shape, if this run has it."""
        return next((case for case in self.cases if case.key == key), None)


@dataclass(frozen=True)
class ParityCase:
    """One case against the float64 reference."""

    op: str
    case: str
    passed: bool
    served_by: str
    errors: Mapping[str, float]
    limits: Mapping[str, float]
    failure: str


@dataclass(frozen=True)
class Parity(Run):
    """A parity run; `kernels` by operator, `cases` empty where it only compiled, `counts` how many there were by operator.

    A matrix has no rows of cases that passed (`commands.parity_record`): the one that came nearest to its limit stands for them.

    `ran` says by operator how its outcome came about: ``device`` (on the target itself), ``emulated`` (device code on a CPU),
    ``built`` (compiled, not run) or ``none``; `notes` what else is told of it, such as machine code that was built and not run.
    """

    compile_only: bool
    kernels: Mapping[str, int]
    cases: tuple[ParityCase, ...]
    ran: Mapping[str, str]
    notes: Mapping[str, str]
    counts: Mapping[str, int]

    @property
    def shown(self) -> str:
        """The target, and that it was emulated where it was."""
        return f"{self.target} (emulated)" if "emulated" in self.ran.values() else self.target


def nearest(errors: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    """Name of the tensor that comes nearest to its limit, or furthest above it; None without tensors."""
    shares = {name: share(errors[name], limits[name]) for name in limits}
    return max(shares, key=lambda name: severity(shares[name]), default=None)


def severity(share: float) -> tuple[bool, float]:
    """Sort key of an error's share of its limit: NaN compares false with everything and is the worst."""
    return math.isnan(share), share


class _Object:
    """A JSON object whose fields are asked for by name and type; errors say where in which file."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ArgumentError(f"{where}: expected an object, got {type(value).__name__}")
        self.value, self.where = value, where

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        if name not in self.value and default is not ...:
            return default
        value = self.value.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            got = type(value).__name__ if name in self.value else "nothing"
            raise ArgumentError(f"{self.where}: {name!r}: expected {wanted}, got {got}")
        return value

    def objects(self, name: str) -> list[_Object]:
        return [_Object(value, f"{self.where}: {name}[{i}]") for i, value in enumerate(self.get(name, list))]

    def numbers(self, name: str) -> dict[str, float]:
        inner = _Object(self.get(name, dict), f"{self.where}: {name}")
        return {key: float(inner.get(key, (int, float))) for key in inner.value}

    def texts(self, name: str) -> dict[str, str]:
        return {str(key): str(value) for key, value in self.get(name, dict, {}).items()}


def load_runs(path: Path) -> list[Bench] | list[Parity]:
    """Read what one command recorded.

    Parameters
    ----------
    path : Path
        A file that ``tvm_gdn bench --json`` or ``tvm_gdn parity --json`` wrote.

    Returns
    -------
    list of Bench or list of Parity
        One run, or those of every target that ``tvm_gdn parity --target all`` went through.

    Raises
    ------
    ArgumentError
        The file cannot be read, is not JSON, is no such report, or a field is missing or malformed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror or error})") from error
    made_by = " or ".join(f"`{command}`" for command in _MADE_BY.values())
    try:
        top = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path}: not JSON ({error}); give files that {made_by} wrote") from error
    kind = kind_of(top)
    if kind is None:
        raise ArgumentError(f"{path}: neither a benchmark nor a parity report; give files that {made_by} wrote")
    root = _Object(top, str(path))
    if root.get("format", int) != FORMAT:
        raise ArgumentError(f"{path}: format {top['format']}; this version reads format {FORMAT}: run `{_MADE_BY[kind]}` again")
    digest = hashlib.sha256(data).hexdigest()
    if kind == "matrix":
        return [_parity(run, _common(run, path, digest)) for run in root.objects("runs")]
    common = _common(root, path, digest)
    return [_bench(root, common)] if kind == "bench" else [_parity(root, common)]


def _common(root: _Object, path: Path, digest: str) -> dict[str, Any]:
    return {
        "path": path,
        "sha256": digest,
        "date": _date(root),
        "target": root.get("target", str),
        "hardware": root.get("hardware", dict),
        "versions": root.texts("versions"),
    }


def kind_of(top: Any) -> str | None:
    """``"bench"``, ``"parity"``, ``"matrix"`` (parity of several targets), or None for anything else."""
    if isinstance(top, dict) and "runs" in top:
        return "matrix"
    if isinstance(top, dict) and "cases" in top:
        if "compile_only" in top:
            return "parity"
        if "threads" in top:
            return "bench"
    return None


def _date(root: _Object) -> datetime:
    text = root.get("date", str)
    try:
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise ArgumentError(f"{root.where}: 'date': expected an ISO date, got {text!r}") from error
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def _bench(root: _Object, common: dict[str, Any]) -> Bench:
    cases = tuple(_bench_case(row) for row in root.objects("cases"))
    if not cases:
        raise ArgumentError(f"{root.where}: a benchmark without cases")
    first = root.get("first_call", (dict, type(None)), None)
    calls = tuple(row.value for row in root.objects("calls")) if "calls" in root.value else ()
    return Bench(**common, threads=root.get("threads", int), cases=cases, calls=calls, first_call=first)


def _bench_case(row: _Object) -> BenchCase:
    contenders = _Object(row.get("us", dict), f"{row.where}: us")
    us = {}
    for name in contenders.value:
        times = contenders.numbers(name)
        if not {"median", "q1", "q3"} <= set(times) or not all(0 < x < math.inf for x in times.values()):
            raise ArgumentError(
                f"{contenders.where}: {name!r}: expected positive median, q1 and q3, got {contenders.value[name]}"
            )
        us[name] = Times(times["median"], times["q1"], times["q3"])
    if OURS not in us:
        raise ArgumentError(f"{contenders.where}: {OURS!r} is missing")
    prefix = "share_of_"
    shares = {n.removeprefix(prefix): float(x) for n, x in row.value.items() if n.startswith(prefix) and _positive(x)}
    rates = {n: float(x) for n, x in row.value.items() if n.endswith("_per_s") and _positive(x)}
    return BenchCase(
        **_outcome(row), us=us, faster=row.numbers("times_faster"), shares=shares, rates=rates, notes=row.texts("peer_notes")
    )


def _parity(root: _Object, common: dict[str, Any]) -> Parity:
    ops = _Object(root.get("ops", dict), f"{root.where}: ops")
    kernels = {op: _Object(found, f"{ops.where}: {op}").get("kernels", int) for op, found in ops.value.items()}
    cases = [ParityCase(**_outcome(row), failure=row.get("failure", str, "")) for row in root.objects("cases")]
    compile_only = root.get("compile_only", bool)
    emulated = common["target"].startswith(EMULATED)
    usual = "built" if compile_only else "emulated" if emulated else "device"
    ran, notes, counts = {}, {}, {}
    rows = Counter(case.op for case in cases)
    for op, found in ops.value.items():
        entry = _Object(found, f"{ops.where}: {op}")
        counts[op] = max(rows[op], entry.get("cases", int, 0))
        if counts[op] and not rows[op]:
            cases.append(_nearest(op, entry))
        ran[op] = entry.get("ran", str, usual)
        if ran[op] not in RAN:
            raise ArgumentError(f"{entry.where}: 'ran': expected one of {', '.join(RAN)}, got {ran[op]!r}")
        image = _Object(entry.get("image", dict, {}), f"{entry.where}: image")
        notes[op] = image.get("text", str, entry.get("reason", str, ""))
    common["target"] = common["target"].removeprefix(EMULATED)
    return Parity(**common, compile_only=compile_only, kernels=kernels, cases=tuple(cases), ran=ran, notes=notes, counts=counts)


def _nearest(op: str, entry: _Object) -> ParityCase:
    """The case of an operator whose rows were dropped, all of them passed, that came nearest to its limit."""
    errors, limits, case = {}, {}, ""
    if found := entry.get("worst", (dict, type(None)), None):
        worst = _Object(found, f"{entry.where}: worst")
        tensor, case = worst.get("tensor", str), worst.get("case", str)
        errors[tensor], limits[tensor] = (float(worst.get(name, (int, float))) for name in ("error", "limit"))
    served = ", ".join(entry.get("served_by", list, []))
    return ParityCase(op, case, passed=True, served_by=served, errors=errors, limits=limits, failure="")


def _outcome(row: _Object) -> dict[str, Any]:
    """The fields that cases of both kinds have."""
    errors, limits = row.numbers("errors"), row.numbers("limits")
    if set(errors) != set(limits):
        raise ArgumentError(f"{row.where}: 'errors' and 'limits' name different tensors")
    if not all(limit >= 0 for limit in limits.values()):
        raise ArgumentError(f"{row.where}: 'limits': expected no negative numbers, got {limits}")
    texts = {name: row.get(name, str) for name in ("op", "case", "served_by")}
    return {**texts, "passed": row.get("passed", bool), "errors": errors, "limits": limits}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
