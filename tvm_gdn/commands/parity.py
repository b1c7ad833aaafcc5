"""``tvm_gdn parity``: every operator of a target against the float64 reference, as one table."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from tvm_gdn import parity
from tvm_gdn.bench import machine
from tvm_gdn.cases import label
from tvm_gdn.commands import aot, arguments
from tvm_gdn.commands.text import checked_destination, deliver, table
from tvm_gdn.errors import TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec, resolve

_log = logging.getLogger("tvm_gdn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(parser)
    arguments.add_op(parser, "check this operator only; may be repeated")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="only compile every case's kernel: for targets that this machine lacks",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the outcome to FILE as JSON; - prints it instead of the table")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; exit status 1 if a case fails."""
    checked_destination(args.json)
    target = resolve(args.target) if args.compile_only else arguments.use_target(args.target)
    ops = args.op or list(OPS)
    _precompile(ops, target)
    rows = [] if args.compile_only else list(_run(ops, target.device))
    report = {
        "format": 1, **machine.stamp(), "target": target.name, "compile_only": args.compile_only,
        "ops": {op: _summary(op, [row for row in rows if row["op"] == op]) for op in ops}, "cases": rows,
    }  # fmt: skip
    deliver(report, _text(report), args.json)
    return 0 if all(row["passed"] for row in rows) else 1


def _precompile(ops: list[str], target: TargetSpec) -> None:
    wanted = [(OPS[op], arguments.geometry_of_case(OPS[op], case)) for op in ops for case in OPS[op].cases]
    unique = len({(spec.name, geometry.key) for spec, geometry in wanted})
    start = time.perf_counter()
    _log.info("%d kernels for %d cases on %s; compiling those that the cache lacks", unique, len(wanted), target.name)
    aot.compile_all(wanted, target)
    _log.info("kernels are ready after %.1f s", time.perf_counter() - start)


def _run(ops: list[str], device: str) -> Iterator[dict[str, Any]]:
    bar = tqdm(total=sum(len(OPS[op].cases) for op in ops), desc="comparing", unit="case", disable=None)
    with bar:
        for op in ops:
            for case in OPS[op].cases:
                try:
                    result = parity.check_case(OPS[op], case, device=device)
                except TvmGdnError as error:
                    result = parity.Result(op, label(case), "none", {}, {}, failure=str(error))
                bar.update()
                yield {
                    "op": op, "case": result.case, "passed": result.passed, "served_by": result.served,
                    "errors": result.errors, "limits": result.limits, "failure": result.failure,
                }  # fmt: skip


def _summary(op: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of an operator and the output that came nearest to its limit, or furthest above it."""
    outputs = [
        {
            "case": row["case"],
            "tensor": name,
            "error": row["errors"][name],
            "limit": limit,
            "of_limit": parity.share(row["errors"][name], limit),
        }
        for row in rows
        for name, limit in row["limits"].items()
    ]
    return {
        "kernels": len({arguments.geometry_of_case(OPS[op], case).key for case in OPS[op].cases}),
        "cases": len(rows),
        "passed": sum(row["passed"] for row in rows),
        "worst": max(outputs, key=lambda output: output["of_limit"], default=None),
        "served_by": sorted({row["served_by"] for row in rows}),
    }


def _text(report: dict[str, Any]) -> str:
    lines = []
    for op, found in report["ops"].items():
        worst = found["worst"]
        error = "-" if worst is None else f"{worst['error']:.1e} / {worst['limit']:.0e} ({worst['tensor']})"
        if report["compile_only"]:
            verdict = "compiled, not run"
        else:
            failed = found["cases"] - found["passed"]
            verdict = f"{failed} FAILED" if failed else "passed"
        lines.append([op, str(found["kernels"]), str(found["cases"]), error, verdict, "; ".join(found["served_by"])])
    head = f"target {report['target']}; {machine.line()}; {report['date']}\n"
    body = table(("operator", "kernels", "cases", "worst error / limit", "outcome", "served by"), lines, right=(1, 2))
    failures = [
        f"FAILED {row['op']} [{row['case']}]: {row['failure'] or _exceeded(row)}" for row in report["cases"] if not row["passed"]
    ]
    return "\n".join([head, body, *([""] if failures else []), *failures])


def _exceeded(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} has error {row['errors'][name]:.1e}, limit {limit:.0e}"
        for name, limit in row["limits"].items()
        if not row["errors"][name] <= limit
    )
