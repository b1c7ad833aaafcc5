"""What works on which target, and how near each operator comes to its tolerance, from parity runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tvm_gdn.parity import share
from tvm_gdn.report.data import RAN, Parity, ParityCase, nearest, severity

#: Words of a case's label that name a storage dtype (``bf16``, ``state-fp32``); index dtypes (``i64``) are none.
_DTYPE = re.compile(r"([a-z0-9]+-)?(fp|bf|int|uint)\d+\w*")


@dataclass(frozen=True)
class Cell:
    """One operator on one target, and the text for it.

    ``works`` (on the target itself), ``emulated`` (its device code on a CPU), ``fallback``, ``fails``, ``compiles``, ``planned``.
    """

    status: str
    text: str
    detail: str = ""


PLANNED = Cell("planned", "planned", "nothing recorded")


@dataclass(frozen=True)
class Heat:
    """The output of an operator that comes nearest to its limit among the cases of one dtype and `storage` of the rest."""

    error: float
    limit: float
    tensor: str
    case: str
    cases: int
    storage: str = ""

    @property
    def of_limit(self) -> float:
        """Error as a share of the limit."""
        return share(self.error, self.limit)


def newest(runs: Sequence[Parity]) -> dict[tuple[str, str], Parity]:
    """For each operator and target the run that speaks for it.

    One on the target itself wins over an emulated one, that over a compilation, and then the newest.
    """
    found: dict[tuple[str, str], Parity] = {}
    for run in sorted(runs, key=lambda run: run.date):
        for op in run.kernels:
            other = found.get((op, run.target))
            if other is None or RAN.index(run.ran[op]) <= RAN.index(other.ran[op]):
                found[op, run.target] = run
    return found


def cells(runs: Sequence[Parity]) -> dict[tuple[str, str], Cell]:
    """Cells of the table of operators and targets, by operator and target; what nothing was recorded for is left out."""
    return {key: _cell(key[0], run) for key, run in newest(runs).items()}


def _cell(op: str, run: Parity) -> Cell:
    rows = [row for row in run.cases if row.op == op]
    count = run.counts[op]
    if run.ran[op] == "built" and not rows:
        return Cell("compiles", "compiles", f"{run.kernels[op]} kernels compiled, nothing run")
    if not rows:
        return PLANNED
    failed = [row for row in rows if not row.passed]
    if not failed:
        worst = max((heat for heat in map(_heat, rows) if heat), key=lambda heat: heat.of_limit, default=None)
        status = "emulated" if run.ran[op] == "emulated" else "works"
        note = run.notes.get(op, "")
        if worst is None:
            return Cell(status, f"{status} ({count} cases)", note)
        detail = f"nearest to its limit: {worst.tensor} {worst.error:.1e} of {worst.limit:.0e} at {worst.case}"
        return Cell(status, f"{status} ({count} cases, {worst.error:.0e})", f"{detail}; {note}" if note else detail)
    if all(_fell_back(row) for row in failed):
        return Cell("fallback", f"fallback ({len(failed)} of {count} cases)", failed[0].served_by)
    return Cell("fails", f"{len(failed)} of {count} cases fail", f"{failed[0].case}: {failed[0].failure or 'error above limit'}")


def _fell_back(row: ParityCase) -> bool:
    """Whether the torch reference served the case, and rightly."""
    return row.served_by.startswith("fallback") and all(row.errors[name] <= limit for name, limit in row.limits.items())


def _heat(row: ParityCase, cases: int = 1, storage: str = "") -> Heat | None:
    name = nearest(row.errors, row.limits)
    if name is None:
        return None
    return Heat(row.errors[name], row.limits[name], name, row.case, cases, storage)


def dtypes_of(case: str) -> str:
    """The storage dtypes in a case's label: ``bf16, state-fp32``; fp32 is what a case has that names none."""
    return ", ".join(word for word in case.split() if _DTYPE.fullmatch(word)) or "fp32"


def columns_of(dtypes: str) -> tuple[str, str]:
    """The dtype of the data among those of `dtypes_of`, and the others: ``bf16`` and ``state-fp32``."""
    words = dtypes.split(", ")
    data = next((word for word in words if "-" not in word), "fp32")
    return data, ", ".join(word for word in words if word != data)


def heatmap(runs: Sequence[Parity], target: str) -> tuple[list[str], dict[str, dict[str, list[Heat]]]]:
    """Errors against limits of one target.

    Parameters
    ----------
    runs : sequence of Parity
        Of any targets.
    target : str
        The target.

    Returns
    -------
    dtypes : list of str
        Columns: dtypes of the data.
    rows : dict
        By operator, then dtype: the output nearest to its limit, or furthest above it, for each storage of states and weights.
    """
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, list[Heat]]] = {}
    for (op, name), run in newest(runs).items():
        if name != target:
            continue
        groups: dict[str, list[ParityCase]] = {}
        for row in run.cases:
            if row.op == op:
                groups.setdefault(dtypes_of(row.case), []).append(row)
        for dtypes, members in groups.items():
            data, storage = columns_of(dtypes)
            heats = [heat for heat in (_heat(row, len(members), storage) for row in members) if heat]
            if heats:
                columns[data] = None
                worst = max(heats, key=lambda heat: severity(heat.of_limit))
                rows.setdefault(op, {}).setdefault(data, []).append(worst)
    return sorted(columns), rows
