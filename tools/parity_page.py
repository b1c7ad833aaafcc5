"""Prints the parity matrix as Markdown: docs/parity.md.

    tvm_gdn parity --target all --json parity.json [--merge ANOTHER_MACHINE.json]
    python tools/parity_page.py parity.json > docs/parity.md

A table per family of targets, then what AMD code objects state about themselves. Nothing is run; outcomes made of other sources
than those here are marked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm_gdn.commands.parity_matrix import failures
from tvm_gdn.commands.parity_record import Key, Outcome, is_fresh, load, passed
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, target_names

_HEAD = """# Parity matrix

Every operator on every target against the float64 reference, as far as it was run: all cases or two short ones, as different
as the operator's cases get. Made by `tools/parity_page.py` from [parity.json](parity.json), which
`tvm_gdn parity --target all --json docs/parity.json` goes on with.
Earlier whole runs stand in the [README](../README.md). `-`: not run.

- **2 of 2**: cases within their limits on the target itself, and the error that comes nearest to its limit, with the limit.
- *emulated* 2 of 2: the device's code (generated C) ran on a CPU, not on the device. `x86-amx-emulated` ran on a CPU, too: the
  schedules of `x86-amx` with the matrix unit in loops. Of `musa-mp31` all but one ran on an NVIDIA device: the `.mu` source,
  compiled by nvcc through a shim header (`tools/run_musa_on_cuda.py`).
- *built* 2: kernels compiled for the target; that they run is not said.
- stale: made of other TIR or schedules than those of this tree. +n: further cases, with a dtype that the target has not.
"""
#: What a code object states of its worst kernel.
_FACTS = ("registers", "spills", "scratch", "lds")
_STATED = (
    f"{' / '.join(_FACTS)} (bytes of scratch per thread; bytes of local memory without the dynamic): the most of the kernels."
)


def page(found: Mapping[Key, Outcome]) -> str:
    """The document.

    Parameters
    ----------
    found : mapping
        Outcomes by operator, target and way.

    Returns
    -------
    str
        Markdown.
    """
    families: dict[str, list[str]] = {}
    for name in target_names():
        if any(key[1] == name for key in found):
            families.setdefault("CPU" if named(name).device == "cpu" else named(name).lineage[-1], []).append(name)
    parts = [_HEAD, _origins(found)]
    for family, targets in families.items():
        rows = [[f"`{op}`", *(_cell(found, op, target) for target in targets)] for op in OPS]
        parts.append(f"## {family}\n\n{_table(['operator', *targets], rows)}\n")
    if images := _images(found):
        parts.append(images)
    failed = [f"- {key[1]}: {line}" for key, outcome in sorted(found.items()) for line in failures(outcome)]
    parts += ["## Failures\n", *failed, ""] if failed else []
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _origins(found: Mapping[Key, Outcome]) -> str:
    """How many outcomes came about in which way, where and when."""
    lines = []
    for way in ("device", "emulated", "built"):
        own = [outcome for key, outcome in found.items() if key[2] == way]
        told = [outcome["ops"][key[0]] for key, outcome in found.items() if key[2] == way]
        done = (
            f"{sum(one['passed'] for one in told)} of {sum(one['cases'] for one in told)} cases"
            if way != "built"
            else f"{sum(map(passed, own))} of {len(own)} without a refusal"
        )
        where = ", ".join(sorted({f"{one['hardware']['cpu']}, {one['hardware']['cores']} cores" for one in own}))
        dates = sorted({one["date"][:10] for one in own})
        if own:
            lines.append(f"- {way}: {len(own)} outcomes, {done}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {where}")
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[Key, Outcome], op: str, target: str) -> str:
    """The outcomes of an operator on a target: on it, or emulated and built."""
    ways = ("device",) if (op, target, "device") in found else ("emulated", "built")
    return "; ".join(_text(found[op, target, way], op, way) for way in ways if (op, target, way) in found) or "-"


def _text(outcome: Outcome, op: str, way: str) -> str:
    told: dict[str, Any] = outcome["ops"][op]
    after = "" if is_fresh(outcome) else ", stale"
    after += f", +{len(told['unsupported'])}" if told.get("unsupported") else ""
    if outcome.get("failure"):
        return f"*{way}* **FAILED**{after}"
    if told["ran"] == "none":
        return f"no schedule{after}"
    if way == "built":
        return f"*built* {told['kernels']}{' of ' + str(told['kernels'] + told['cases']) if told['cases'] else ''}{after}"
    worst = told["worst"]
    error = f", {worst['error']:.1e} of {worst['limit']:.0e}" if worst else ""
    count = f"{told['passed']} of {told['cases']}"
    return {"device": f"**{count}**", "emulated": f"*emulated* {count}"}[way] + error + after


def _images(found: Mapping[Key, Outcome]) -> str:
    """What code objects state: the most of an operator's kernels."""
    facts = {key[:2]: outcome["ops"][key[0]]["image"]["facts"] for key, outcome in found.items() if _has_facts(key, outcome)}
    targets = [name for name in target_names() if any(key[1] == name for key in facts)]
    rows = [
        [
            f"`{op}`",
            *(" / ".join(str(facts[op, name][fact]) for fact in _FACTS) if (op, name) in facts else "-" for name in targets),
        ]
        for op in OPS
    ]
    return f"## Code objects\n\n{_STATED}\n\n{_table(['operator', *targets], rows)}\n" if targets else ""


def _has_facts(key: Key, outcome: Outcome) -> bool:
    return bool(outcome["ops"][key[0]].get("image", {}).get("facts"))


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Print the parity matrix as Markdown.")
    parser.add_argument("matrix", type=Path, help="JSON of `tvm_gdn parity --target all --json`")
    args = parser.parse_args()
    try:
        print(page(load(args.matrix)))
    except ArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
