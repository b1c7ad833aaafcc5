"""Prints the README's table of operators and targets, as Markdown.

    tvm_gdn parity --target x86-avx512 --json parity-x86-avx512.json
    python tools/op_table.py parity-*.json

Rows come from the registry, columns are the targets with a recorded run, cells the outcomes: *works* (every case within its
limits on that target), *emulated* (every case within its limits where this CPU ran the device code; never *works*), *fallback*
(right, but the torch reference served some), *compiles* (every kernel compiled, nothing run: ``parity --compile-only``),
*planned* (nothing recorded, or no schedule). The matrix of ``tvm_gdn parity --target all --json`` is one such file too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.report.data import Parity, load_runs
from tvm_gdn.report.matrix import PLANNED, cells
from tvm_gdn.target import target_names


def markdown(runs: Sequence[Parity]) -> str:
    """The table.

    Parameters
    ----------
    runs : sequence of Parity
        Of several for one target a run on it wins over an emulated one, that over a mere compilation, then the newest.

    Returns
    -------
    str
        Markdown, one line per operator.
    """
    found = cells(runs)
    targets = [name for name in target_names() if any(target == name for _, target in found)]
    lines = [f"| operator | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    for op, spec in OPS.items():
        texts = [found.get((op, target), PLANNED).text for target in targets]
        lines.append(f"| `{op}`: {spec.summary} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Print the table of operators and targets as Markdown.")
    parser.add_argument("parity", nargs="+", type=Path, help="JSON files of `tvm_gdn parity --json`")
    args = parser.parse_args()
    try:
        runs = [run for path in args.parity for run in load_runs(path)]
    except ArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown([run for run in runs if isinstance(run, Parity)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
