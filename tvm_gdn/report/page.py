"""Fills the template: everything that the page says is computed here, the template only lays it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

import tvm_gdn
from tvm_gdn.commands.text import split_common
from tvm_gdn.ops import OPS
from tvm_gdn.report import charts, matrix
from tvm_gdn.report.compare import Change, compare, percent, same_series
from tvm_gdn.report.data import KERNEL, OURS, Bench, BenchCase, Parity, Run, nearest
from tvm_gdn.target import target_names

_TEMPLATE = "page.html.j2"


def render(bench: Bench, parities: Sequence[Parity], others: Sequence[Bench], threshold: float) -> str:
    """HTML text of the page, self-contained.

    Parameters
    ----------
    bench : Bench
        The run that the page is about.
    parities : sequence of Parity
        At least one; of several runs of one operator and target the newest counts.
    others : sequence of Bench
        Further benchmark runs, for the history.
    threshold : float
        Change above which a case is marked: 0.1 for 10 %.

    Returns
    -------
    str
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"us": microseconds, "percent": percent, "short": short_error}
    template = environment.from_string(files("tvm_gdn.report").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    changes = compare(bench, others)
    runs = sorted([*others, bench], key=lambda run: run.date)
    operators = list(_operators(bench, runs, changes, threshold))
    for operator in operators:
        operator["chart"] = Markup(operator["chart"])  # noqa: S704 - matplotlib escaped the labels
        operator["history_chart"] = Markup(operator["history_chart"])  # noqa: S704
    return template.render(
        version=tvm_gdn.__version__,
        written=datetime.now(timezone.utc),
        bench=bench,
        ours=OURS,
        kernel=KERNEL,
        threshold=threshold,
        history=bool(others),
        facts=_facts(bench, parities, changes, threshold, bool(others)),
        regressions=[change for change in changes.values() if change.regressed(threshold)],
        improvements=[change for change in changes.values() if change.improved(threshold)],
        unmatched=[case for case in bench.cases if case.key not in changes] if others else [],
        unjudged=[change for change in changes.values() if change.factor is None and not change.broken],
        vanished=_vanished(bench, others),
        later=[run.path.name for run in others if run.date >= bench.date],
        elsewhere=[run.path.name for run in others if not same_series(run, bench)],
        matrix=_matrix(parities),
        failures=[(run.shown, row) for run in parities for row in run.cases if not row.passed],
        heatmaps=_heatmaps(parities),
        operators=operators,
        inputs=_inputs(bench, parities, others),
    )


def microseconds(value: float) -> str:
    """A time with three significant digits or all before the point: ``0.52``, ``12.3``, ``1,234``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def short_error(value: float) -> str:
    """An error or limit, two digits at most: ``2.1e-3``, ``5e-3``."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if math.isfinite(value) else str(value)


def _facts(
    bench: Bench, parities: Sequence[Parity], changes: Mapping[tuple[str, str], Change], threshold: float, history: bool
) -> list[dict[str, Any]]:
    """The head of the page: what was checked, what was timed, what regressed; each with whether it is good."""
    rows = [row for run in parities for row in run.cases]
    passed = sum(row.passed for row in rows)
    targets = ", ".join(dict.fromkeys(run.shown for run in parities if run.cases)) or "no target (compiled only)"
    right = sum(case.passed for case in bench.cases)
    found = [
        {
            "title": "parity",
            "value": f"{passed} of {len(rows)}",
            "text": f"cases within tolerance on {targets}",
            "good": passed == len(rows),
        },
        {
            "title": "bench",
            "value": f"{right} of {len(bench.cases)}",
            "text": f"shapes right and compiled on {bench.target}, {bench.threads} threads",
            "good": right == len(bench.cases),
        },
    ]  # fmt: skip
    slower = sum(change.regressed(threshold) for change in changes.values())
    judged = sum(change.factor is not None or change.broken for change in changes.values())
    compared = f"of {judged} compared shapes worse by more than {100 * threshold:g}\N{NO-BREAK SPACE}%"
    text = compared if history else "no earlier run was given"
    good = slower == 0 if history else None
    found.append({"title": "regressions", "value": slower if history else "–", "text": text, "good": good})
    return found


def _vanished(bench: Bench, others: Sequence[Bench]) -> list[tuple[str, str]]:
    """Operators and shapes of the newest earlier run of this series that this run did not measure."""
    earlier = [run for run in others if run.date < bench.date and same_series(run, bench)]
    newest = max(earlier, key=lambda run: run.date, default=None)
    return [case.key for case in newest.cases if bench.find(case.key) is None] if newest else []


def _matrix(parities: Sequence[Parity]) -> dict[str, Any]:
    found = matrix.cells(parities)
    targets = sorted({target for _, target in found})
    ops = list(dict.fromkeys([*OPS, *(op for op, _ in found)]))
    rows = [
        {
            "op": op,
            "summary": OPS[op].summary if op in OPS else "",
            "cells": [found.get((op, target), matrix.PLANNED) for target in targets],
        }
        for op in ops
    ]
    return {"targets": targets, "rows": rows, "others": [name for name in target_names() if name not in targets]}


def _heatmaps(parities: Sequence[Parity]) -> list[dict[str, Any]]:
    found = []
    for target in dict.fromkeys(run.target for run in parities):
        columns, rows = matrix.heatmap(parities, target)
        if rows:
            shown = next(run.shown for run in parities if run.target == target and run.cases)
            found.append({"target": shown, "columns": columns, "rows": rows})
    return found


def _operators(
    bench: Bench, runs: Sequence[Bench], changes: Mapping[tuple[str, str], Change], threshold: float
) -> Iterator[dict[str, Any]]:
    for op in dict.fromkeys(case.op for case in bench.cases):
        cases = [case for case in bench.cases if case.op == op]
        common, labels = split_common([case.case for case in cases])
        found = [changes.get(case.key) for case in cases]
        panels = {label: _points(case.key, runs, bench, threshold) for label, case in zip(labels, cases, strict=True)}
        panels = {label: points for label, points in panels.items() if len(points) > 1}
        yield {
            "name": op,
            "common": common,
            "floors": list(dict.fromkeys(name for case in cases for name in case.floors)),
            "peers": list(dict.fromkeys(name for case in cases for name in case.peers)),
            "rows": [
                {"label": label, "case": case, "change": change, "worst": _worst(case)}
                for label, case, change in zip(labels, cases, found, strict=True)
            ],
            "regressed": sum(change is not None and change.regressed(threshold) for change in found),
            "calls": [call for call in bench.calls if call.get("op") == op],
            "chart": charts.latency(op, cases, labels),
            "history_chart": charts.history(f"{op} history", panels) if panels else "",
            "served_by": list(dict.fromkeys(case.served_by for case in cases)),
        }


def _worst(case: BenchCase) -> tuple[float, float, str] | None:
    """Error, limit and name of the tensor that comes nearest to its limit."""
    name = nearest(case.errors, case.limits)
    return None if name is None else (case.errors[name], case.limits[name], name)


def _points(key: tuple[str, str], runs: Sequence[Bench], bench: Bench, threshold: float) -> list[charts.Point]:
    points = []
    for run in runs:
        case = run.find(key)
        if case is None or not same_series(run, bench):
            continue
        change = compare(run, runs).get(key)
        times = case.us[OURS]
        points.append(
            charts.Point(
                run.date, run.machine, times.median, times.q1, times.q3,
                change.factor if change else None, change.regressed(threshold) if change else False,
            )
        )  # fmt: skip
    return points


def _inputs(bench: Bench, parities: Sequence[Parity], others: Sequence[Bench]) -> list[dict[str, Any]]:
    """Every input with what it was measured on; versions that differ from those of the page's benchmark are marked."""

    def entry(run: Run, role: str) -> dict[str, Any]:
        versions = [(name, value, value != bench.versions.get(name)) for name, value in run.versions.items()]
        return {"run": run, "role": role, "versions": versions, "same_machine": run.machine == bench.machine}

    # A matrix has a run per operator: those of one target, machine and set of versions are one input.
    distinct = {
        (run.path, run.target, run.shown, run.compile_only, run.machine, tuple(run.versions.items())): run for run in parities
    }
    return [
        entry(bench, "benchmark"),
        *(entry(run, "parity, compiled only" if run.compile_only else f"parity of {run.shown}") for run in distinct.values()),
        *(entry(run, "history") for run in sorted(others, key=lambda run: run.date, reverse=True)),
    ]
