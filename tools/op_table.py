"""Prints the README's table of operators and targets, as Markdown.

    tvm_gdn parity --target x86-avx512 --json parity-x86-avx512.json
    python tools/op_table.py parity-*.json

Rows and columns come from the registry, the cells from the recorded outcomes: *works* (every case within its limits on
that target), *compiles* (every kernel compiled, nothing run: ``parity --compile-only``), *planned* (nothing recorded).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tvm_gdn.ops import OPS
from tvm_gdn.target import target_names


def cell(outcome: dict[str, Any] | None, *, compile_only: bool) -> str:
    """Word for one operator on one target."""
    if outcome is None:
        return "planned"
    if compile_only:
        return "compiles"
    if outcome["passed"] < outcome["cases"]:
        return f"{outcome['cases'] - outcome['passed']} of {outcome['cases']} cases fail"
    return f"works ({outcome['cases']} cases, {outcome['worst']['error']:.0e})"


def markdown(reports: list[dict[str, Any]]) -> str:
    """The table.

    Parameters
    ----------
    reports : list of dict
        What ``tvm_gdn parity --json`` wrote; of several for one target a run wins over a mere compilation, then the
        newest.

    Returns
    -------
    str
        Markdown, one line per operator.
    """
    found: dict[tuple[str, str], str] = {}
    for report in sorted(reports, key=lambda report: (not report["compile_only"], report["date"])):
        for op, outcome in report["ops"].items():
            found[op, report["target"]] = cell(outcome, compile_only=report["compile_only"])
    targets = target_names()
    lines = [f"| operator | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    for op, spec in OPS.items():
        cells = [found.get((op, target), cell(None, compile_only=False)) for target in targets]
        lines.append(f"| `{op}`: {spec.summary} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Print the table of operators and targets as Markdown.")
    parser.add_argument("parity", nargs="+", type=Path, help="JSON files of `tvm_gdn parity --json`")
    args = parser.parse_args()
    reports = []
    for path in args.parity:
        try:
            reports.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            print(f"{path}: not a parity report: {error}", file=sys.stderr)
            return 2
    print(markdown(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
