"""``tvm_gdn parity --target all``: one table of operators and targets, and how each outcome came about.

Every operator of every target runs in a process of its own: where this machine can run the target, its code runs; a device that
is not there is emulated, and its machine code built where the compiler is; a CPU target that needs what this CPU lacks is only
compiled. An outcome is written when it is known, and a process that dies takes nothing else along. The same command goes on
where the last one ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_gdn import build, images, kernel_cache, parity
from tvm_gdn.bench import machine
from tvm_gdn.commands import parity_record
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.commands.parity_record import Key, Outcome, Record
from tvm_gdn.commands.text import emit
from tvm_gdn.errors import ArgumentError, BuildError
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED, TargetSpec, emulation_of, named, resolve, target_names

Wanted = tuple[str, TargetSpec, str]
_log = logging.getLogger("tvm_gdn")
#: What `--target` calls every target.
ALL = "all"
#: Seconds that one operator may take on one target.
_PATIENCE = 3600.0
#: Operators whose kernels are compiled by one process.
_TOGETHER = 4
#: Exit statuses of a process that was asked to end, as this one is too.
_INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT)
_LEGEND = (
    "N: cases within their limits, on the target itself. emulated N: the device code (generated C) run on this CPU. built N: "
    "kernels compiled for the target, not run. -: no schedule. (n not supported): further cases, with a dtype that the target "
    "has not. stale: made of other sources than those here."
)


def targets_of(text: str) -> list[TargetSpec]:
    """Targets that a matrix is asked for: every one, or those named between commas.

    Raises
    ------
    ArgumentError
        A name is a family, whose member no device says.
    TargetError
        A name is unknown.
    """
    names = target_names() if text == ALL else [name for name in text.split(",") if name]
    targets = [named(name) if text == ALL else resolve(name) for name in names]
    wrong = [target.name for target in targets if target.emulated or (text != ALL and not target.concrete)]
    if wrong:
        raise ArgumentError(f"--target {text}: {', '.join(wrong)}: a matrix takes names of files in targets/ of one device each")
    return [target for target in targets if target.concrete]


def ways(target: TargetSpec, *, compile_only: bool = False) -> list[str]:
    """How this machine can come to outcomes of a target: ``device``, ``emulated``, ``built``."""
    if not compile_only and not target.missing():
        return ["device"]
    buildable = target.device == "cpu" or target.image == "source" or images.tools(target) is not None
    emulated = target.device != "cpu" and not compile_only
    return [*(["emulated"] if emulated else []), *(["built"] if buildable else [])]


def main(
    targets: Sequence[TargetSpec], ops: Sequence[str], selection: str, destination: str | None,
    merge: Sequence[Path] = (), jobs: int = 0, *, compile_only: bool = False,
) -> int:  # fmt: skip
    """Make the matrix, or go on with it.

    Parameters
    ----------
    targets : sequence of TargetSpec
        Targets.
    ops : sequence of str
        Operators.
    selection : str
        Which of their cases: ``"small"`` or ``"all"``.
    destination : str or None
        Where JSON goes, as in ``--json``; fresh outcomes in a file that is there already are not made again.
    merge : sequence of Path
        Files whose outcomes are put in.
    jobs : int
        Operators at once; 0: one per core.
    compile_only : bool
        Run nothing.

    Returns
    -------
    int
        1 if a case of what was asked for failed, or its process.
    """
    record = Record(None if destination in {None, "-"} else Path(str(destination)))
    for path in merge:
        record.add(parity_record.load(path).values())
    asked = [(op, target, way) for target in targets for way in ways(target, compile_only=compile_only) for op in ops]
    todo = [(op, target, way) for op, target, way in asked if not _is_known(record, (op, target.name, way), selection)]
    jobs = jobs or machine.cores()
    threads = max(2, machine.cores() // jobs)  # one alone would not show what threads do to each other
    _log.info("%d of %d outcomes are known; %d operators at once", len(asked) - len(todo), len(asked), jobs)
    pool, stopped = ThreadPoolExecutor(jobs), threading.Event()
    bar = tqdm(total=len(todo), desc="outcomes", unit="op", disable=None)
    try:
        for done in as_completed([pool.submit(_make, record, part, selection, threads, stopped, bar) for part in _parts(todo)]):
            done.result()
    finally:
        # After Ctrl-C no further process starts; what is known already is in the file.
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    chosen = {
        key: record.outcomes[key] for key in sorted(record.outcomes) if key[0] in ops and key[1] in {t.name for t in targets}
    }
    emit(parity_record.text_of(record.outcomes) if destination == "-" else _text(chosen, selection))
    return int(not all(parity_record.passed(outcome) for outcome in chosen.values()))


def _is_known(record: Record, key: Key, selection: str) -> bool:
    """Whether an outcome need not be made: it is there or the device's own is, fresh, whole and without a failure."""
    op, target, way = key
    found = [record.outcomes[op, target, ran] for ran in {way, "device"} if (op, target, ran) in record.outcomes]
    return any(
        one["selection"] in {selection, "all"} and parity_record.passed(one) and parity_record.is_fresh(one) for one in found
    )


def _parts(todo: Sequence[Wanted]) -> list[list[Wanted]]:
    """A few operators of one target and way each, whose kernels are compiled together: a compiling process starts for seconds."""
    groups: dict[tuple[str, str], list[Wanted]] = {}
    for one in todo:
        groups.setdefault((one[1].name, one[2]), []).append(one)
    return [group[first : first + _TOGETHER] for group in groups.values() for first in range(0, len(group), _TOGETHER)]


def _make(record: Record, part: list[Wanted], selection: str, threads: int, stopped: threading.Event, bar: Any) -> None:
    """Compile the kernels of some operators, come to each operator's outcome in a process of its own, and record it."""
    target, way = part[0][1], part[0][2]
    used = emulation_of(target) if way == "emulated" else target
    missing = {}
    for spec, case in ((OPS[op], case) for op, _, _ in part for case in parity.selected(OPS[op], selection)):
        geometry = geometry_of_case(spec, case)
        folder = kernel_cache.folder_of(spec, geometry, used)
        if not used.refuses(geometry.dtype) and not kernel_cache.is_whole(folder):
            missing[folder] = build.Request(spec, geometry)
    if missing:
        with contextlib.suppress(BuildError):  # the operator's own process tells what does not compile
            kernel_cache.compile_each(missing, used)
    for op, _, _ in part:
        if not stopped.is_set():
            record.add(_outcomes(op, target, way, selection, threads))
            bar.update()


def _outcomes(op: str, target: TargetSpec, way: str, selection: str, threads: int) -> list[Outcome]:
    """The outcome of an operator, in a process of its own; none where that was interrupted."""
    name = f"{EMULATED}{target.name}" if way == "emulated" else target.name
    command = [sys.executable, "-m", "tvm_gdn", "parity", "--target", name, "--op", op, "--cases", selection, "--json", "-"]
    command += ["--compile-only"] if way == "built" else []
    environment = {**build.builder_environment(), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        return [_failed(op, target, way, selection, f"took over {_PATIENCE:.0f} s")]
    if done.returncode in _INTERRUPTED:
        return []
    try:
        return parity_record.outcomes_of(json.loads(done.stdout))
    except ValueError:
        told = " ".join(done.stderr.strip().splitlines()[-3:])
        return [_failed(op, target, way, selection, f"exit status {done.returncode}, no report: {told}")]


def _failed(op: str, target: TargetSpec, way: str, selection: str, failure: str) -> Outcome:
    """The outcome where a process made no report."""
    _log.warning("%s on %s, %s: %s", op, target.name, way, failure)
    entry = {"kernels": 0, "cases": 0, "passed": 0, "ran": "none", "reason": failure}
    return {
        "format": parity_record.FORMAT, **machine.stamp(), "target": target.name, "ran": way, "compile_only": way == "built",
        "selection": selection, "ops": {op: entry}, "cases": [], "failure": failure,
    }  # fmt: skip


def _text(found: dict[Key, Outcome], selection: str) -> str:
    """The matrix turned: a row per target would be short of operators, a row per operator short of width."""
    lines = [f"{machine.line()}; cases: {selection}", _LEGEND]
    for target in sorted({target for _, target, _ in found}):
        cells: dict[str, list[str]] = {}
        for key, outcome in found.items():
            if key[1] == target:
                cells.setdefault(key[0], []).append(cell(outcome))
        groups: dict[str, list[str]] = {}
        for op, texts in cells.items():
            groups.setdefault(", ".join(texts), []).append(op)
        lines.append(f"\n{target}")
        lines += [f"  {text:32}  {', '.join(members)}" for text, members in groups.items()]
        lines += [f"  FAILED {line}" for key, outcome in found.items() if key[1] == target for line in failures(outcome)]
    return "\n".join(lines)


def failures(outcome: Outcome) -> list[str]:
    """A line for every case that did not pass, or for the process that died."""
    op, _, ran = parity_record.key_of(outcome)
    lines = [f"{op}, {ran}: {outcome['failure']}"] if outcome.get("failure") else []
    return lines + [
        f"{op}, {ran} [{row['case']}]: {row['failure'] or row['errors']}" for row in outcome["cases"] if not row["passed"]
    ]


def cell(outcome: Outcome) -> str:
    """An outcome in a few words: how it came about, how many cases passed, or kernels were built."""
    op, _, way = parity_record.key_of(outcome)
    found: dict[str, Any] = outcome["ops"][op]
    stale = "" if parity_record.is_fresh(outcome) else ", stale"
    if outcome.get("failure"):
        return f"{way} FAILED"
    if found["ran"] == "none":
        return f"-{stale}"
    others = f" ({len(found['unsupported'])} not supported)" if found.get("unsupported") else ""
    done, wanted = (found["kernels"], found["kernels"] + found["cases"]) if way == "built" else (found["passed"], found["cases"])
    count = f"{done}" if done == wanted else f"FAILED {done} of {wanted}"
    return {"device": "", "emulated": "emulated ", "built": "built "}[way] + count + others + stale
