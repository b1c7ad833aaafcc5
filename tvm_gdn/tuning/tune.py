"""``tvm_gdn tune``: searches the knobs of schedules for the fastest right candidate, and records it.

Every operator and tuning key of the benchmark shapes is a search of its own (`search.py`). What was measured is kept after every
trial (`study.py`), so that a run which was interrupted or killed resumes; candidates run in
a process apart (`worker.py`, `measure.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tvm_gdn import dispatch, env, models, records
from tvm_gdn.commands import arguments
from tvm_gdn.commands import text as report_text
from tvm_gdn.errors import ArgumentError, TargetError, TuneError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, resolve, runnable
from tvm_gdn.tuning import study
from tvm_gdn.tuning.crew import Crew
from tvm_gdn.tuning.search import Options, Result, Search

_log = logging.getLogger("tvm_gdn")
#: Operators by what models spend their time in; others come last.
_FIRST = (
    "packed_decode_gated_delta_rule", "fused_sigmoid_gating_delta_rule_update", "fused_recurrent_gated_delta_rule_update",
    "chunk_gated_delta_rule", "chunk_gated_delta_rule_update", "fused_experts", "fused_experts_quantized", "fused_experts_packed",
    "causal_conv1d_update", "causal_conv1d_fn", "rms_norm_gated", "fused_conv_gated_delta_rule_update", "chunk_kda",
    "chunk_kda_update", "fused_recurrent_kda_update", "fused_gdn_gating",
)  # fmt: skip


@dataclass
class Report:
    """Outcome of a tuning run."""

    target: str
    file: Path
    results: list[Result]
    interrupted: bool = False

    def table(self) -> str:
        """One line per operator and tuning key."""

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.1f}"

        rows = []
        for result in self.results:
            gain = f"{result.default_us / result.best_us:.2f}x" if result.default_us and result.best_us else "-"
            knobs = " ".join(f"{name}={value}" for name, value in (result.knobs or {}).items()) or "-"
            trials = f"{result.ok} ok, {sum(result.failures.values())} failed"
            rows.append([result.op, result.geometry, number(result.default_us), number(result.best_us), gain, knobs, trials])
        return report_text.table(
            ["operator", "tuning key", "default us", "best us", "gain", "knobs", "trials"], rows, right=(2, 3, 4)
        )


def tune(
    target: str = "auto",
    op: Sequence[str] | str | None = None,
    model: Sequence[str] | str | None = None,
    *,
    timeout: float | None = None,
    storage: str | None = None,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Report:
    """Search for faster schedules on this machine and record them.

    Parameters
    ----------
    target : str
        Name of a target that this machine can run, or ``auto``.
    op : str or sequence of str, optional
        Operators; default all.
    model : str or sequence of str, optional
        Only benchmark shapes of these models, with their sizes of experts.
    timeout : float, optional
        Seconds after which no further trial starts; the last comparisons come on top. A search may take three times its share
        of what is left.
    storage : str, optional
        Journal file or RDB URL of the studies, which several processes and machines may share. Default: in the cache folder.
    output : str or Path, optional
        File of records. Default: this user's own, in the cache folder.
    options : Options
        How to search.

    Returns
    -------
    Report
        Records have been written for every result that has one. After Ctrl-C it has what was found so far.

    Raises
    ------
    TuneError
        Nothing could be measured, or there is nothing to tune.
    ArgumentError, TargetError
        An unknown operator, model or target, or one that this machine cannot run.
    """
    chosen = _target(target)
    names: list[str | None] = [*(_listed(model) or ())] or [None]
    found = {task[0].name + task[2]: (*task, name) for name in names for task in _tasks(chosen, _listed(op), name)}
    tasks = sorted(found.values(), key=lambda task: _rank(*task[:2]))
    file = Path(output) if output is not None else records.user_file(chosen.name)
    place = storage or str(env.cache_dir() / "studies" / f"{chosen.name}.journal")
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    report = Report(chosen.name, file, [])
    searches, idle = [], []
    for spec, geometry, key, name in tasks:
        try:
            searches.append(Search(spec, geometry, key, chosen, options, name))
        except TuneError as error:
            idle.append(str(error))
    if not searches:
        raise TuneError("; ".join(dict.fromkeys(idle)))
    for told in dict.fromkeys(idle):
        _log.info("not tuned: %s", told)
    studies = study.open_storage(place)
    at_once = min(len(searches), max(1, options.jobs // 2))
    total = sum(search.trials for search in searches)
    with (
        ThreadPoolExecutor(at_once) as pool,
        Crew(chosen, options.jobs, at_once) as crew,
        _graceful_interrupt() as stop,
        logging_redirect_tqdm([_log]),
        tqdm(total=total, desc="tuning", unit="trial", disable=None, dynamic_ncols=True) as bar,
    ):
        running = {}
        for position, search in enumerate(searches):
            turns = math.ceil((len(searches) - position) / at_once)
            running[pool.submit(search.run, studies, crew, deadline, turns, stop, bar)] = search
        try:
            for future in as_completed(running):
                result = future.result()
                if result.record is not None:
                    records.store(file, chosen.name, [result.record])
                    _log.info("%s", result.summary())
        except BaseException:
            stop.set()  # The searches that have not begun do not begin; the others lose their workers.
            raise
        results = [future.result() for future in running]
        report.results = [result for result in results if result.ok or result.failures or not stop.is_set()]
        report.interrupted = stop.is_set()
    dispatch.reset()
    if not report.interrupted and not any(result.record for result in report.results):
        problems = "\n".join(f"  {result.problem()}" for result in report.results)
        raise TuneError(f"nothing was measured for {chosen.name}, no record was written:\n{problems}")
    return report


def _listed(value: Sequence[str] | str | None) -> Sequence[str] | None:
    return [value] if isinstance(value, str) else value


def _target(text: str) -> TargetSpec:
    lacking = [name for name in ("optuna", "tvm") if importlib.util.find_spec(name) is None]
    if lacking:
        raise TuneError(f"tuning needs {' and '.join(lacking)}: pip install 'tvm_gdn[tune]'")
    target = runnable(resolve(text))
    if text.startswith("{"):
        raise TargetError("a target given as JSON has no name to record under: make it a file of targets/ first")
    return target


def _tasks(target: TargetSpec, ops: Sequence[str] | None, model: str | None) -> list[tuple[OpSpec, Geometry, str]]:
    """Operators, with a geometry of every tuning key that occurs in their benchmark shapes."""
    unknown = sorted(set(ops or ()) - set(OPS))
    if unknown:
        raise ArgumentError(f"op {', '.join(unknown)} is not known; allowed: {', '.join(OPS)}")
    facts = None if model is None else models.model(model)
    found: dict[tuple[str, str], tuple[OpSpec, Geometry, str]] = {}
    for spec in (OPS[name] for name in ops or OPS):
        for case in models.bench(spec, model):
            if facts is None or facts.has(case):
                geometry = arguments.geometry_of_case(spec, case)
                key = records.tuning_key(spec, geometry)
                found.setdefault((spec.name, key), (spec, geometry, key))
    if not found:
        raise TuneError(f"no benchmark shape of {', '.join(ops or OPS)} belongs to {model}: nothing to tune for {target.name}")
    return list(found.values())


def _rank(spec: OpSpec, geometry: Geometry) -> tuple[bool, int]:
    """What a run does first: what models spend their time in, in their own dtype."""
    fp32 = "bfloat16" not in geometry.dtype.values()
    return fp32, _FIRST.index(spec.name) if spec.name in _FIRST else len(_FIRST)


@contextmanager
def _graceful_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets: the current trial is finished and the best is written. A second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        _log.warning("interrupted: the current trial is finished and the best is written; Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(parser)
    arguments.add_op(parser, "tune this operator (may be repeated; default: all)")
    parser.add_argument(
        "--model", action="append", metavar="NAME",
        help=f"only the shapes of this model (may be repeated); one of: {', '.join(models.MODELS)}",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, default=Options.trials, metavar="N",
        help="candidates per operator and tuning key, earlier runs and other processes included (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, metavar="S", help="start no further trial after this many seconds")
    parser.add_argument(
        "--trial-timeout", type=float, default=Options.trial_timeout, metavar="S",
        help="seconds for compiling and checking one candidate, and again for timing it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="PATH",
        help="journal file, or RDB URL of Optuna, that keeps the trials; several processes and machines may share one",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="where records go (default: this user's own, in the cache folder); schedules/TARGET.json ships with the package",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=Options.jobs, metavar="N",
        help="candidates compiled and checked at once; timing is always done alone (default: %(default)s)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns
    -------
    int
        0; 1 if some operator has no record; 130 after Ctrl-C.
    """
    for name in ("trials", "trial_timeout", "jobs"):
        if getattr(args, name) <= 0:
            raise ArgumentError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    report = tune(
        args.target, args.op, args.model, timeout=args.timeout, storage=args.storage, output=args.output,
        options=Options(args.trials, args.trial_timeout, args.jobs),
    )  # fmt: skip
    report_text.emit(report.table())
    written = sum(result.record is not None for result in report.results)
    stored = f"{report_text.counted(written, 'record')} for {report.target} in {report.file}"
    report_text.emit(f"\n{stored if written else 'no record was written'}")
    if report.interrupted:
        return 130
    for result in report.results:
        if result.record is None:
            _log.error("no record of %s", result.problem())
    return 0 if written == len(report.results) else 1
