"""``tvm_gdn report``: one self-contained HTML page from recorded benchmarks and parity runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tvm_gdn.commands.text import counted, emit
from tvm_gdn.errors import ArgumentError, TvmGdnError
from tvm_gdn.records import write_atomic
from tvm_gdn.report.compare import THRESHOLD, Change, compare, percent
from tvm_gdn.report.data import Bench, Parity, load_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("bench", metavar="BENCH", type=Path, help="the benchmark that the page is about (tvm_gdn bench --json)")
    parser.add_argument(
        "parity", metavar="PARITY", type=Path, help="a parity run, or the matrix of all targets (tvm_gdn parity --json)"
    )
    parser.add_argument(
        "more",
        metavar="MORE",
        type=Path,
        nargs="*",
        help="earlier benchmarks, which BENCH is compared with, and parity runs of other targets, in any order",
    )
    parser.add_argument("-o", "--output", metavar="PAGE", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--force", action="store_true", help="write over PAGE if it exists")
    parser.add_argument(
        "--fail-on-regression",
        metavar="N%",
        help="exit with status 1 if a shape of BENCH became slower by more than N percent, or wrong; the page is written all "
        f"the same. Without this, changes above {100 * THRESHOLD:g}%% are marked",
    )


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; exit status 1 if a shape regressed and --fail-on-regression is given."""
    threshold = THRESHOLD if args.fail_on_regression is None else _threshold(args.fail_on_regression)
    inputs = [args.bench, args.parity, *args.more]
    _check_paths(inputs, args.output, force=args.force)
    bench, parities, others = _load(inputs)
    try:
        from tvm_gdn.report.page import render

        page = render(bench, parities, others, threshold)
    except ImportError as error:
        raise TvmGdnError(f"the report needs jinja2 and matplotlib ({error}): pip install 'tvm_gdn[report]'") from error
    write_atomic(args.output, page)
    changes = compare(bench, others)
    regressed = [change for change in changes.values() if change.regressed(threshold)]
    parts = counted(len(bench.cases), "shape"), counted(len(parities), "parity run"), counted(len(others), "further benchmark")
    emit(f"wrote {args.output}: {', '.join(parts)}")
    emit(_verdict(changes, regressed, threshold))
    return 1 if regressed and args.fail_on_regression is not None else 0


def _threshold(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None:
        raise ArgumentError(f"--fail-on-regression {text}: give a percentage, such as 10%")
    return float(match[1]) / 100


def _check_paths(inputs: Sequence[Path], output: Path, *, force: bool) -> None:
    seen: dict[Path, Path] = {}
    for path in inputs:
        if seen.setdefault(path.resolve(), path) is not path:
            raise ArgumentError(f"{path}: given twice")
    if output.resolve() in seen:
        raise ArgumentError(f"--output {output}: is one of the inputs")
    if not output.resolve().parent.is_dir():
        raise ArgumentError(f"--output {output}: the folder {output.resolve().parent} does not exist")
    if output.is_dir():
        raise ArgumentError(f"--output {output}: is a folder; give the name of a file")
    if output.exists() and not force:
        raise ArgumentError(f"--output {output}: exists; --force writes over it")


def _load(paths: Sequence[Path]) -> tuple[Bench, list[Parity], list[Bench]]:
    order = "the order is BENCH PARITY [MORE ...]"
    benches, parities, *rest = map(load_runs, paths)
    bench = benches[0]
    if not isinstance(bench, Bench):
        raise ArgumentError(f"{paths[0]}: is a parity run, but BENCH must be a benchmark; {order}")
    if any(isinstance(run, Bench) for run in parities):
        raise ArgumentError(f"{paths[1]}: is a benchmark, but PARITY must be a parity run; {order}")
    more = [run for runs in (parities, *rest) for run in runs]
    return bench, [run for run in more if isinstance(run, Parity)], [run for run in more if isinstance(run, Bench)]


def _verdict(changes: dict[tuple[str, str], Change], regressed: Sequence[Change], threshold: float) -> str:
    if not changes:
        return "no earlier benchmark of this target and thread count has a shape of this one: nothing was compared"
    judged = sum(change.factor is not None or change.broken for change in changes.values())
    lines = [f"{len(regressed)} of {judged} compared shapes regressed by more than {100 * threshold:g} %"]
    for change in regressed:
        what = "is wrong or not compiled now" if change.broken else f"{percent(change.factor or 1)} ({change.compared})"
        lines.append(f"  {change.now.op} [{change.now.case}]: {what}, since {change.baseline.path.name}")
    return "\n".join(lines)
