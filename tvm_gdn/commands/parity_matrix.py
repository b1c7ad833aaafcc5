"""``tvm_gdn parity --target all``: one table of operators and targets, and how each outcome came about.

Every target runs in a process of its own: where this machine can run it, its code runs; a device that is not there is emulated;
a CPU target that needs what this CPU lacks is only compiled. A process that dies takes the outcomes of its target along, and
nothing else.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from typing import Any

from tvm_gdn import build
from tvm_gdn.bench import machine
from tvm_gdn.commands.text import deliver
from tvm_gdn.target import EMULATED, TargetSpec, named, target_names

_log = logging.getLogger("tvm_gdn")
#: What `--target` calls every target.
ALL = "all"
#: Seconds that one target may take.
_PATIENCE = 3600.0
_LEGEND = (
    "N: cases within their limits, on the target itself. emulated N: the device code (generated C) run on this CPU; "
    "+ image: machine code for the device was built too, and not run. built N: compiled, not run. -: no schedule. "
    "(n not supported): further cases, with a dtype that the target has not."
)


def main(ops: list[str], selection: str, destination: str | None) -> int:
    """Make the matrix.

    Parameters
    ----------
    ops : list of str
        Operators.
    selection : str
        Which of their cases: ``"small"`` or ``"all"``.
    destination : str or None
        Where JSON goes, as in ``--json``.

    Returns
    -------
    int
        1 if a case failed, or a target's process.
    """
    runs = []
    for target in (named(name) for name in target_names()):
        if target.concrete:
            start = time.perf_counter()
            runs.append(_run_one(target, ops, selection))
            _log.info("%s: %.0f s", target.name, time.perf_counter() - start)
    report = {"format": 1, **machine.stamp(), "target": ALL, "selection": selection, "runs": runs}
    deliver(report, _text(report, ops), destination)
    return int(any(run.get("failure") or not all(row["passed"] for row in run["cases"]) for run in runs))


def way(target: TargetSpec) -> list[str]:
    """Arguments of the command that checks a target on this machine."""
    if not target.missing():
        return ["--target", target.name]
    return ["--target", target.name, "--compile-only"] if target.device == "cpu" else ["--target", f"{EMULATED}{target.name}"]


def _run_one(target: TargetSpec, ops: list[str], selection: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tvm_gdn", "parity", *way(target), "--cases", selection, "--json", "-"]
    command += [word for op in ops for word in ("--op", op)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, timeout=_PATIENCE, env=build.builder_environment()
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired) as error:
        status = f"exit status {done.returncode}" if isinstance(error, ValueError) else "too slow"
        failure = f"{' '.join(command[2:6])}: {status}, no report"
        _log.warning("%s", failure)
        report = {"format": 1, **machine.stamp(), "ran": "none", "compile_only": True, "cases": [], "failure": failure}
        report["ops"] = {op: {"kernels": 0, "cases": 0, "passed": 0, "ran": "none", "reason": failure} for op in ops}
    # The column is the target's, whatever ran its code: `ran` says that.
    return {**report, "target": target.name}


def _text(report: dict[str, Any], ops: list[str]) -> str:
    """The matrix turned: a row per target would be short of operators, a row per operator short of width."""
    lines = [f"{machine.line()}; {report['date']}; cases: {report['selection']}", _LEGEND]
    for run in report["runs"]:
        groups: dict[str, list[str]] = {}
        for op in ops:
            groups.setdefault(_cell(run["ops"][op]), []).append(op)
        lines.append(f"\n{run['target']}{': FAILED: ' + run['failure'] if run.get('failure') else ''}")
        lines += [f"  {text:32}  {', '.join(members)}" for text, members in groups.items()]
        lines += [
            f"  FAILED {row['op']} [{row['case']}]: {row['failure'] or row['errors']}"
            for row in run["cases"]
            if not row["passed"]
        ]
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    if found["ran"] == "none":
        return "-"
    others = f" ({len(found['unsupported'])} not supported)" if found.get("unsupported") else ""
    if found["ran"] == "built":
        return f"built {found['kernels']}{others}"
    count = f"{found['passed']}" if found["passed"] == found["cases"] else f"FAILED {found['passed']} of {found['cases']}"
    image = found.get("image", {})
    built = f" + {image['format']}" if image.get("built") else ""
    return ("emulated " if found["ran"] == "emulated" else "") + count + built + others
