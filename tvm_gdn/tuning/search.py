"""One search: the knobs of one operator and tuning key on one target, from the first trial to the record."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tvm_gdn import build, cases, records, schedule
from tvm_gdn.bench import machine
from tvm_gdn.errors import TuneError
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, host_cpu
from tvm_gdn.tuning import measure
from tvm_gdn.tuning.study import Knobs, Study, Trial
from tvm_gdn.tuning.worker import START_TIMEOUT, TrialError, Worker

#: Timing per candidate and benchmark case: in a trial, and when the best meet the default again at the end.
TRIAL_TIMING = {"seconds": 0.15, "rounds": 5}
FINAL_TIMING = {"seconds": 0.6, "rounds": 15}
#: How many of the best meet the default again.
FINALISTS = 3
#: A candidate replaces the default when it is faster by this factor; less is within the noise.
MIN_GAIN = 1.01

_log = logging.getLogger("tvm_gdn")


@dataclass(frozen=True)
class Options:
    """How to search.

    Parameters
    ----------
    trials : int
        Points per tuning key, those of earlier runs and of other processes on the same storage included.
    trial_timeout : float
        Seconds for compiling and checking a candidate, and again for timing it.
    jobs : int
        Candidates that are compiled and checked at once; timing is always done alone.
    seed : int
        Seed of the sampler.
    """

    trials: int = 64
    trial_timeout: float = 60.0
    jobs: int = 1
    seed: int = 0


@dataclass
class Result:
    """Outcome of a search; microseconds are geometric means over the benchmark cases, of the final comparison."""

    op: str
    key: str
    default_us: float | None = None
    best_us: float | None = None
    knobs: Knobs | None = None
    ok: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    record: dict[str, Any] | None = None

    @property
    def geometry(self) -> str:
        """The tuning key for people."""
        return str(Geometry.from_json(json.loads(self.key)))

    def problem(self) -> str:
        """Why there is no record: the reasons, counted."""
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.failures.most_common(5))
        return f"{self.op} [{self.geometry}]: {reasons or 'no time was left for it'}"


class Crew:
    """Workers of a run; a context manager.

    Parameters
    ----------
    jobs : int
        Their number.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._stack = ExitStack()

    def __enter__(self) -> Crew:
        self._built = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tvm_gdn-tune-built-")))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._jobs))
        # Entered after the pool and so left before it: threads that wait for a worker end when it is killed.
        self.workers = [self._stack.enter_context(Worker()) for _ in range(self._jobs)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(self, spec: OpSpec, key: str, target: TargetSpec, threads: int) -> None:
        """Say what all workers measure from now on."""

        def open_one(worker: Worker) -> None:
            worker.open(spec.name, key, target.name, threads, self._built, self._jobs)

        list(self._pool.map(open_one, self.workers))

    def prepare(self, candidates: Sequence[Knobs], timeout: float) -> list[Future[Any]]:
        """Compile and check one candidate per worker, all at once; returns when all are done."""
        futures = [
            self._pool.submit(worker.request, {"do": "prepare", "knobs": knobs}, timeout)
            for worker, knobs in zip(self.workers, candidates, strict=False)
        ]
        wait(futures)
        return futures

    def check_everywhere(self, knobs: Knobs, timeout: float) -> None:
        """Hold a candidate against the reference on every geometry that a record would serve, a part per worker.

        Raises
        ------
        TrialError
            What is wrong with it.
        """
        message = {"do": "prepare", "knobs": knobs, "thorough": True}
        futures = [
            self._pool.submit(worker.request, {**message, "part": (number, len(self.workers))}, timeout)
            for number, worker in enumerate(self.workers)
        ]
        wait(futures)
        for future in futures:
            future.result()


class Search:
    """Search of one operator and tuning key.

    Parameters
    ----------
    spec, geometry, key
        The operator, a geometry of the tuning key, and the key.
    target : TargetSpec
        Where it is tuned for: this machine must be able to run it.
    options : Options
        How to search.
    """

    def __init__(self, spec: OpSpec, geometry: Geometry, key: str, target: TargetSpec, options: Options) -> None:
        self.spec, self.geometry, self.key, self.target, self.options = spec, geometry, key, target, options
        self.threads = torch.get_num_threads()
        self.timed = measure.select_cases(spec, key)[0]
        self.result = Result(spec.name, key)

    def run(self, storage: str, crew: Crew, deadline: float, remaining: int, stop: threading.Event) -> Result:
        """Measure until the trials, the space or the time are used up, then compare the best with the default.

        Parameters
        ----------
        storage : str
            Where the study is kept.
        crew : Crew
            The workers.
        deadline : float
            Value of ``time.monotonic()`` after which no trial starts.
        remaining : int
            Searches, with this one, that share the time until then evenly.
        stop : threading.Event
            No trial starts once it is set.

        Returns
        -------
        Result
        """
        try:
            space = schedule.knob_space(self.spec, self.geometry, self.target)
            study = self._study(space, storage)
            if time.monotonic() >= deadline and not study.measured():
                return self.result
            crew.open(self.spec, self.key, self.target, self.threads)
        except TuneError as error:
            self.result.failures[str(error)] += 1
            return self.result
        default = schedule.find_space(self.spec.algorithm, self.target)[0].default(self.geometry)
        current = schedule.choose(self.spec, self.geometry, self.target)
        first = [default, current.knobs] if current.origin == "tuned" and current.knobs != default else [default]
        for knobs in first:
            study.suggest(knobs)
        now = time.monotonic()
        deadline = now + (deadline - now) / remaining
        self._explore(study, crew, deadline, stop)
        measured = study.measured()
        self.result.ok, self.result.failures = len(measured), Counter(study.failures())
        known = [knobs for _, knobs in measured]
        finalists: list[Knobs] = []
        for knobs in [*first, *known[:FINALISTS]]:
            if knobs in known and knobs not in finalists:
                finalists.append(knobs)
        self._conclude(finalists, default, crew)
        return self.result

    def _study(self, space: dict[str, tuple[Any, ...]], storage: str) -> Study:
        facts = {
            "target": self.target.name, "source": build.kernel_digest(self.spec, self.target), "tvm": records.tvm_series(),
            "cpu": host_cpu(), "threads": self.threads,
        }  # fmt: skip
        # Times of other sources, machines or shapes cannot be compared with ours: they are another study.
        identity = [facts, self.target.digest(), self.timed, space, TRIAL_TIMING]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        lease = START_TIMEOUT + 2 * self.options.trial_timeout * self.options.jobs
        return Study(
            f"{self.spec.name} {self.key} {digest}", space, storage=storage, lease=lease, facts=facts, seed=self.options.seed
        )

    def _explore(self, study: Study, crew: Crew, deadline: float, stop: threading.Event) -> None:
        total = min(self.options.trials, study.size)
        name = f"{self.spec.name} [{self.result.geometry}]"
        tried = len(study.measured()) + len(study.failures())
        _log.info("tuning %s for %s: %d of %d points, %d tried earlier", name, self.target.name, total, study.size, tried)
        with tqdm(total=total, initial=min(total, tried), desc=name, unit="trial", disable=None, dynamic_ncols=True) as bar:
            while True:
                measured = study.measured()
                bar.n = min(total, len(measured) + len(study.failures()))
                if measured:
                    bar.set_postfix_str(f"best {measured[0][0]:.1f} us", refresh=False)
                bar.refresh()
                batch: list[Trial] = []
                while len(batch) < self.options.jobs and not stop.is_set() and time.monotonic() < deadline:
                    trial = study.propose(self.options.trials)
                    if trial is None:
                        break
                    batch.append(trial)
                if not batch:
                    return
                self._measure(batch, study, crew)

    def _measure(self, batch: list[Trial], study: Study, crew: Crew) -> None:
        timeout = self.options.trial_timeout
        prepared = crew.prepare([trial.knobs for trial in batch], timeout)
        for trial, worker, done in zip(batch, crew.workers, prepared, strict=False):
            try:
                done.result()
                us = worker.request({"do": "time", "candidates": [trial.knobs], **TRIAL_TIMING}, timeout)["us"][0]
            except TrialError as error:
                study.fail(trial, str(error))
                _log.warning("%s, trial %d, %s: %s", self.spec.name, trial.number, json.dumps(trial.knobs), error)
            else:
                study.complete(trial, statistics.geometric_mean(us), us=us)

    def _holds(self, knobs: Knobs, check: Callable[[], object]) -> bool:
        """Whether a candidate that was right before is right once more."""
        try:
            check()
        except TrialError as error:
            self.result.ok -= 1
            self.result.failures[str(error)] += 1
            _log.warning("%s, final check, %s: %s", self.spec.name, json.dumps(knobs), error)
            return False
        return True

    def _conclude(self, finalists: list[Knobs], default: Knobs, crew: Crew) -> None:
        """Time the best and the default in turns; what wins, and is right wherever a record would apply, becomes the record."""
        worker, patience = crew.workers[0], START_TIMEOUT
        prepare = [functools.partial(worker.request, {"do": "prepare", "knobs": knobs}, patience) for knobs in finalists]
        finalists = [knobs for knobs, check in zip(finalists, prepare, strict=True) if self._holds(knobs, check)]
        if not finalists:
            return
        timeout = self.options.trial_timeout * len(finalists)
        try:
            taken = worker.request({"do": "time", "candidates": finalists, **FINAL_TIMING}, timeout)
        except TrialError as error:
            self.result.failures[str(error)] += 1
            return
        us, ratio = ([statistics.geometric_mean(row) for row in taken[name]] for name in ("us", "ratio"))
        if finalists[0] == default:
            self.result.default_us = us[0]
        better = [index for index in range(1, len(us)) if ratio[index] * MIN_GAIN <= 1 and us[index] <= us[0]]
        for index in [*sorted(better, key=lambda index: ratio[index]), 0]:
            if self._holds(finalists[index], functools.partial(crew.check_everywhere, finalists[index], patience)):
                self.result.best_us, self.result.knobs = us[index], finalists[index]
                labels = [cases.label(case) for case in self.timed]
                self.result.record = self._record(dict(zip(labels, taken["us"][index], strict=True)))
                return

    def _record(self, case_us: dict[str, float]) -> dict[str, Any]:
        result = self.result
        return {
            "op": result.op, "key": result.key, "knobs": result.knobs,
            "source": records.algorithm_digest(self.spec, self.target), "tvm": records.tvm_series(),
            "measured": {
                "median_us": round(result.best_us or 0.0, 3),
                "default_us": None if result.default_us is None else round(result.default_us, 3),
                "cpu": host_cpu(), "threads": self.threads, "cases": case_us,
                "trials": {"ok": result.ok, "failed": sum(result.failures.values())}, "date": machine.stamp()["date"],
            },
        }  # fmt: skip
