"""Outcomes of parity runs as they come together: one per operator, target and way in which it came about, in one file.

The file is JSON that is whole at any time: what is added is merged with what stands there by then, under a lock, and replaces it
at once. Every outcome says what it was made of, so that one of other sources is known as such. Of cases that passed it keeps how
many there were and the one that came nearest to its limit (`commands.parity.summary`); every case that failed has its row.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from tvm_gdn import parity, records
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import ArgumentError, TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import EMULATED, TargetSpec, emulation_of, named

#: Operator, target, and how the outcome came about: ``device``, ``emulated`` or ``built``.
Key = tuple[str, str, str]
#: A report of one operator on one target.
Outcome = dict[str, Any]
FORMAT = 1


def made_of(spec: OpSpec, target: TargetSpec, selection: str) -> str:
    """Digest of what an outcome depends on: the operator's TIR and schedules, target, tuned knobs, cases and tolerances.

    What all kernels share (builder, launchers, the emulation) is left out: a change there would make every outcome stale. So is
    an operator's second algorithm, which may serve some of the cases: the outcomes of the operator that it belongs to have it.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    target : TargetSpec
        The target that the kernels are compiled for; an emulated one where they are emulated.
    selection : str
        Which of the operator's cases, as in `parity.selected`.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    cases = parity.selected(spec, selection)
    tuned = [records.lookup(spec, geometry_of_case(spec, case), target) for case in cases]
    parts = [
        records.algorithm_digest(spec, target),
        cases,
        dict(spec.tolerance),
        [record and record["knobs"] for record in tuned],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def key_of(outcome: Outcome) -> Key:
    """What an outcome is of."""
    return next(iter(outcome["ops"])), outcome["target"], outcome["ran"]


def passed(outcome: Outcome) -> bool:
    """Whether nothing failed."""
    return not outcome.get("failure") and all(row["passed"] for row in outcome["cases"])


def is_fresh(outcome: Outcome) -> bool:
    """Whether an outcome was made of the sources that are here."""
    op, name, ran = key_of(outcome)
    try:
        target = emulation_of(named(name)) if ran == "emulated" else named(name)
        return op in OPS and outcome["ops"][op].get("made_of") == made_of(OPS[op], target, outcome["selection"])
    except TargetError:
        return False


def merged(old: Mapping[Key, Outcome], new: Iterable[Outcome]) -> dict[Key, Outcome]:
    """Outcomes, one per key: of two the fresh one, then the one of all cases, then the later one."""
    found = dict(old)
    for outcome in new:
        key = key_of(outcome)
        rivals = [found[key], outcome] if key in found else [outcome]
        # Of equals the last: what is added wins.
        found[key] = sorted(rivals, key=lambda one: (is_fresh(one), one["selection"] == "all", one["date"]))[-1]
    return found


def outcomes_of(report: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes in a matrix, or in the report of one target, without the rows of cases that passed."""
    if "runs" in report:
        return [outcome for run in report["runs"] for outcome in outcomes_of(run)]
    whole = {**report, "target": report["target"].removeprefix(EMULATED)}
    return [
        {**whole, "ops": {op: found}, "cases": [row for row in report["cases"] if row["op"] == op and not row["passed"]]}
        for op, found in report["ops"].items()
    ]


def load(path: Path) -> dict[Key, Outcome]:
    """Outcomes in a file.

    Raises
    ------
    ArgumentError
        It is none that ``tvm_gdn parity --json`` wrote, or one of an older version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise ValueError(f"format {report['format']}, this version reads {FORMAT}")
        return merged({}, outcomes_of(report))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{path}: no outcomes of `tvm_gdn parity --json` ({error!r}); give another file") from error


def is_matrix(path: Path) -> bool:
    """Whether a file holds outcomes of a matrix."""
    try:
        return "runs" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def text_of(found: Mapping[Key, Outcome]) -> str:
    """The file's text: a line per outcome."""
    lines = ",\n".join(json.dumps(found[key]) for key in sorted(found))
    return f'{{"format": {FORMAT}, "target": "all", "runs": [\n{lines}\n]}}\n'


class Record:
    """Outcomes in memory, and in a file if one is given; threads and processes may add to it at the same time."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock = path, threading.Lock()
        self.outcomes = load(path) if path and path.exists() else {}

    def add(self, new: Iterable[Outcome]) -> None:
        """Merge outcomes with those that are there by now."""
        with self._lock:
            if self.path is None:
                self.outcomes = merged(self.outcomes, new)
                return
            with FileLock(f"{self.path}.lock"):
                self.outcomes = merged(load(self.path) if self.path.exists() else {}, new)
                records.write_atomic(self.path, text_of(self.outcomes))
