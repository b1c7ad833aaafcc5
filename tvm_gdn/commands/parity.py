"""``tvm_gdn parity``: every operator of a target, or of all of them, against the float64 reference, as one table."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_gdn import kernel_cache, parity
from tvm_gdn.bench import machine
from tvm_gdn.cases import label
from tvm_gdn.commands import aot, arguments, parity_images, parity_matrix, parity_record
from tvm_gdn.commands.text import checked_destination, deliver, table
from tvm_gdn.errors import ArgumentError, BuildError, TargetError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec, resolve

_log = logging.getLogger("tvm_gdn")
#: Cases by operator.
Chosen = Mapping[str, list[dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(
        parser,
        f"; {parity_matrix.ALL}, or several names between commas, make a matrix: run here, emulated, compiled. With --json FILE "
        "its outcomes are written one by one, and those that FILE has already, made of the sources that are here, are kept: run "
        "the same command again to go on. A FILE with a matrix takes the outcomes of a single target in, too",
    )
    arguments.add_op(parser, "check this operator only; may be repeated")
    parser.add_argument(
        "--cases", choices=("all", "small"),
        help="small: two short cases per operator, as different as its cases get; default: all, but small for the matrix",
    )  # fmt: skip
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="only compile every case's kernel: for targets that this machine lacks",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the outcome to FILE as JSON; - prints it instead of the table")
    parser.add_argument(
        "--merge",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="put the outcomes of another such file into the matrix (made on another machine, say); may be repeated",
    )
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="operators at once in a matrix; default: one per core")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; exit status 1 if a case fails."""
    checked_destination(args.json)
    if args.jobs < 0:
        raise ArgumentError(f"--jobs {args.jobs}: give a number of operators, or 0 for one per core")
    if _is_matrix(args.target, args.json):
        targets, ops = parity_matrix.targets_of(args.target), args.op or list(OPS)
        return parity_matrix.main(
            targets, ops, args.cases or "small", args.json, args.merge, args.jobs, compile_only=args.compile_only
        )
    if args.merge or args.jobs:
        raise ArgumentError("--merge, --jobs: are for a matrix; give --target all, or several targets between commas")
    selection = args.cases or "all"
    target = resolve(args.target) if args.compile_only else arguments.use_target(args.target)
    chosen = {op: parity.selected(OPS[op], selection) for op in args.op or OPS}
    report = report_of(target, chosen, compile_only=args.compile_only) | {"selection": selection}
    for op, found in report["ops"].items():
        found["made_of"] = parity_record.made_of(OPS[op], target, selection)
    deliver(report, _text(report), args.json)
    return 0 if all(row["passed"] for row in report["cases"]) else 1


def _is_matrix(target: str, destination: str | None) -> bool:
    """Whether several targets are asked for, or one whose outcomes belong into a matrix that is there."""
    if target == parity_matrix.ALL or ("," in target and not target.startswith("{")):
        return True
    return destination not in {None, "-"} and parity_record.is_matrix(Path(str(destination)))


def report_of(target: TargetSpec, chosen: Chosen, *, compile_only: bool = False) -> dict[str, Any]:
    """Compile and run cases of operators.

    Parameters
    ----------
    target : TargetSpec
        The target; what calls of this process use, unless nothing is run.
    chosen : mapping
        Cases by operator.
    compile_only : bool
        Run nothing.

    Returns
    -------
    dict
        The report; per operator ``ran`` says how its numbers came about: ``device`` (on the target itself), ``emulated`` (its
        device code on this CPU), ``built`` (compiled, not run) or ``none``, with the reason. ``unsupported`` are cases that
        need a dtype which the target has not, with the reason: no outcomes, and nothing that failed. ``cases`` has a row per case
        that ran; where nothing is run, one per case whose kernel could not be compiled.
    """
    ran = "built" if compile_only else "emulated" if target.emulated else "device"
    chosen, unsupported = _supported(chosen, target)
    lacking = {op: next(iter(told.values())) for op, told in unsupported.items() if not chosen[op]}
    wanted = {op: cases for op, cases in chosen.items() if op not in lacking}
    refused, bare = _precompile(wanted, target, compile_only=compile_only)
    lacking |= bare
    wanted = {op: cases for op, cases in wanted.items() if op not in lacking}
    rows = list(_run(wanted, target, refused, compile_only=compile_only))
    ops = {op: {**summary(cases, op, [row for row in rows if row["op"] == op]), "ran": ran} for op, cases in chosen.items()}
    for op, reason in lacking.items():
        ops[op] |= {"kernels": 0, "ran": "none", "reason": reason}
    for op, told in unsupported.items():
        ops[op]["unsupported"] = told
    if compile_only and target.image != "elf-so":
        for op, image in parity_images.of_operators(wanted, target).items():
            ops[op]["image"] = image
    return {
        "format": 1, **machine.stamp(), "target": target.name, "ran": ran, "compile_only": compile_only, "ops": ops,
        "cases": rows,
    }  # fmt: skip


def without_schedule(ops: list[str], target: TargetSpec) -> dict[str, str]:
    """Operators that the target has no schedule for, and what says so; calls of them run on the torch reference."""
    if target.image == "elf-so":
        return {}
    from tvm_gdn import schedule

    lacking = {}
    for op in ops:
        try:
            schedule.find_space(OPS[op].algorithm, target)
        except TargetError as error:
            lacking[op] = str(error)
    return lacking


def _supported(chosen: Chosen, target: TargetSpec) -> tuple[Chosen, dict[str, dict[str, str]]]:
    """Cases whose dtypes the target has; by operator the others, and why not."""
    refusals = {
        op: [target.refuses(arguments.geometry_of_case(OPS[op], case).dtype) for case in cases] for op, cases in chosen.items()
    }
    kept = {op: [case for case, told in zip(cases, refusals[op], strict=True) if not told] for op, cases in chosen.items()}
    others = {op: {label(case): told for case, told in zip(chosen[op], refusals[op], strict=True) if told} for op in chosen}
    return kept, {op: told for op, told in others.items() if told}


def _precompile(chosen: Chosen, target: TargetSpec, *, compile_only: bool) -> tuple[str, dict[str, str]]:
    """Compile what the cache lacks; what could not be compiled and why, and which operators have no schedule at all.

    Only where nothing at all could be compiled for a target of this machine is that the end.
    """
    wanted = [(OPS[op], arguments.geometry_of_case(OPS[op], case)) for op, cases in chosen.items() for case in cases]
    if not wanted:
        return "", {}
    unique = len({(spec.name, geometry.key) for spec, geometry in wanted})
    start = time.perf_counter()
    _log.info("%d kernels for %d cases on %s; compiling those that the cache lacks", unique, len(wanted), target.name)
    refused, lacking = "", {}
    try:
        aot.compile_all(wanted, target)
    except BuildError as error:
        some = {spec.name for spec, geometry in wanted if kernel_cache.is_whole(kernel_cache.folder_of(spec, geometry, target))}
        lacking = without_schedule([op for op in chosen if op not in some], target)
        if not (compile_only or target.emulated or some or len(lacking) == len(chosen)):
            raise
        refused = str(error)
    _log.info("kernels are ready after %.1f s", time.perf_counter() - start)
    return refused, lacking


def _run(chosen: Chosen, target: TargetSpec, refused: str, *, compile_only: bool) -> Iterator[dict[str, Any]]:
    bar = tqdm(total=sum(map(len, chosen.values())), desc="comparing", unit="case", disable=True if compile_only else None)
    with bar:
        for op, cases in chosen.items():
            for case in cases:
                geometry = arguments.geometry_of_case(OPS[op], case)
                try:
                    if refused and not kernel_cache.is_whole(kernel_cache.folder_of(OPS[op], geometry, target)):
                        own = refused.partition(f"{op} [{geometry}]: ")[2].splitlines()
                        raise BuildError(next((line for line in own if "Error: " in line), "could not be compiled"))
                    if compile_only:
                        continue
                    result = parity.check_case(OPS[op], case, device=target.device)
                except TvmGdnError as error:
                    result = parity.Result(op, label(case), "none", {}, {}, failure=str(error))
                bar.update()
                yield {
                    "op": op, "case": result.case, "passed": result.passed, "served_by": result.served,
                    "errors": result.errors, "limits": result.limits, "failure": result.failure,
                }  # fmt: skip


def summary(cases: list[dict[str, Any]], op: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
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
    refused = {row["case"] for row in rows if row["served_by"] == "none"}
    return {
        "kernels": len({arguments.geometry_of_case(OPS[op], case).key for case in cases if label(case) not in refused}),
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
        notes = [*found["served_by"], *([found["image"]["text"]] if "image" in found else [])]
        if "unsupported" in found:
            notes.append(f"{len(found['unsupported'])} more not supported: {next(iter(found['unsupported'].values()))}")
        told = found.get("reason") or "; ".join(notes)
        lines.append([op, str(found["kernels"]), str(found["cases"]), error, verdict(found), told])
    head = f"target {report['target']}; {machine.line()}; {report['date']}\n"
    body = table(("operator", "kernels", "cases", "worst error / limit", "outcome", "served by"), lines, right=(1, 2))
    failures = failures_of(report)
    return "\n".join([head, body, *([""] if failures else []), *failures])


def verdict(found: Mapping[str, Any]) -> str:
    """Outcome of an operator in words: passed, emulated, compiled, failed."""
    failed = found["cases"] - found["passed"]
    if failed:
        return f"{failed} FAILED"
    return {"device": "passed", "emulated": "passed, emulated", "built": "compiled, not run", "none": "no schedule"}[found["ran"]]


def failures_of(report: Mapping[str, Any]) -> list[str]:
    """A line for every case that did not pass."""
    return [
        f"FAILED {row['op']} [{row['case']}]: {row['failure'] or _exceeded(row)}" for row in report["cases"] if not row["passed"]
    ]


def _exceeded(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} has error {row['errors'][name]:.1e}, limit {limit:.0e}"
        for name, limit in row["limits"].items()
        if not row["errors"][name] <= limit
    )
