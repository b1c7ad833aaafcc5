"""One search: the knobs of one operator and tuning key on one target, from the first trial to the record."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from tvm_gdn import build, cases, records, schedule
from tvm_gdn.bench import machine
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import TuneError
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, host_cpu
from tvm_gdn.tuning import measure
from tvm_gdn.tuning.crew import Crew
from tvm_gdn.tuning.study import Knobs, Storage, Study, Trial
from tvm_gdn.tuning.worker import START_TIMEOUT, RefusedError, TrialError, Worker

#: Timing per candidate and benchmark case: in a trial, and when the best meet the default again at the end. A captured graph on a
#: device varies by less than calls on cores that others use.
TRIAL_TIMING = {True: {"seconds": 0.15, "rounds": 5}, False: {"seconds": 0.02, "rounds": 5}}
FINAL_TIMING = {True: {"seconds": 0.6, "rounds": 15}, False: {"seconds": 0.1, "rounds": 9}}
#: Searches come in the order of their value, and many end before their time is up: each may take this many even shares.
GENEROSITY = 3
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
        Candidates that are compiled at once, of several searches; checking and timing are always done alone.
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

    def summary(self) -> str:
        """What was found, in one line."""
        gain = f"{self.default_us:.1f} -> {self.best_us:.1f} us" if self.default_us and self.best_us else "no default"
        return f"{self.op} [{self.geometry}]: {gain}, {json.dumps(self.knobs)}"

    def problem(self) -> str:
        """Why there is no record: the reasons, counted."""
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.failures.most_common(5))
        return f"{self.op} [{self.geometry}]: {reasons or 'no time was left for it'}"


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
    model : str, optional
        Model whose sizes the benchmark shapes have.

    Raises
    ------
    TuneError
        The target's schedule has nothing to choose from, or no plan for the geometry (the operator's second algorithm serves it).
    """

    def __init__(
        self, spec: OpSpec, geometry: Geometry, key: str, target: TargetSpec, options: Options, model: str | None = None
    ) -> None:
        self.spec, self.geometry, self.key, self.target, self.options = spec, geometry, key, target, options
        self.threads, self.model = torch.get_num_threads(), model
        self.timed, checked, self.others = measure.select_cases(spec, key, model)
        #: What a candidate is compiled for: the benchmark shapes of a key may be calls of several forms.
        self.forms = list(dict.fromkeys(geometry_of_case(spec, case) for case in (*self.timed, *checked)))
        self.space = schedule.knob_space(spec, geometry, target)
        self.current = schedule.choose(spec, geometry, target)
        if self.current.refusal and spec.second:
            told = f"{self.current.refusal}: {spec.second.name}'s algorithm serves, with that operator's records: tune it"
            raise TuneError(f"{spec.name} [{key}]: {told}")
        self.result = Result(spec.name, key)

    @property
    def trials(self) -> int:
        """How many points are measured at most."""
        return min(self.options.trials, math.prod(map(len, self.space.values())))

    def run(self, storage: Storage, crew: Crew, deadline: float, remaining: int, stop: threading.Event, bar: Any) -> Result:
        """Measure until the trials, the space or the time are used up, then compare the best with the default.

        Parameters
        ----------
        storage : Storage
            Where the study is kept.
        crew : Crew
            The workers.
        deadline : float
            Value of ``time.monotonic()`` after which no trial starts.
        remaining : int
            Searches, with this one, that begin one after the other until then and share the time.
        stop : threading.Event
            No trial starts once it is set.
        bar : tqdm.tqdm
            Progress of all searches together, in trials.

        Returns
        -------
        Result
        """
        with crew.measurer() as worker:
            try:
                study = self._study(storage)
                if stop.is_set() or (time.monotonic() >= deadline and not study.measured()):
                    return self.result
                with crew.turns.compiling():
                    worker.open(self.spec.name, self.key, self.target.name, self.threads, crew.built, self.model)
            except TuneError as error:
                self.result.failures[str(error)] += 1
                return self.result
            default = schedule.find_space(self.spec.algorithm, self.target)[0].default(self.geometry)
            current = self.current
            first = [default, current.knobs] if current.origin == "tuned" and current.knobs != default else [default]
            now = time.monotonic()
            share = (deadline - now) / remaining * min(remaining, GENEROSITY)
            self._explore(study, first, worker, crew, now + share, stop, bar)
            measured = study.measured()
            self.result.ok, self.result.failures = len(measured), Counter(study.failures())
            known = [knobs for _, knobs in measured]
            finalists: list[Knobs] = []
            for knobs in [*first, *known[:FINALISTS]]:
                if knobs in known and knobs not in finalists:
                    finalists.append(knobs)
            self._conclude(finalists, default, worker, crew)
        return self.result

    def _study(self, storage: Storage) -> Study:
        facts = {
            "target": self.target.name, "source": build.kernel_digest(self.spec, self.target), "tvm": records.tvm_series(),
            "cpu": host_cpu(), "threads": self.threads,
        }  # fmt: skip
        # Times of other sources, machines or shapes cannot be compared with ours: they are another study.
        identity = [facts, self.target.digest(), self.timed, self.space, self._timing(TRIAL_TIMING)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        lease = START_TIMEOUT + 2 * self.options.trial_timeout * self.options.jobs
        return Study(
            f"{self.spec.name} {self.key} {digest}", self.space, storage=storage, lease=lease, facts=facts, seed=self.options.seed
        )

    def _timing(self, kinds: Mapping[bool, dict[str, Any]]) -> dict[str, Any]:
        return kinds[self.target.device == "cpu"]

    def _explore(
        self, study: Study, first: list[Knobs], worker: Worker, crew: Crew, deadline: float, stop: threading.Event, bar: Any
    ) -> None:
        name = f"{self.spec.name} [{self.result.geometry}]"
        tried = len(study.measured()) + len(study.failures())
        _log.info("tuning %s for %s: %d of %d points, %d tried earlier", name, self.target.name, self.trials, study.size, tried)
        # One step away from where a person or an earlier search arrived; then those together that helped, and what the sampler
        # makes of it. Points far away are mostly bad, and there are too many of them for a sampler to start there.
        start, begun = first[-1], len(first)
        wishes = deque([*first, *steps(self.space, start)])
        limit = max(begun, self.options.trials - self.options.trials // 4)
        pending: dict[Future[Any], Trial] = {}
        while True:
            while len(pending) < crew.ahead and not stop.is_set() and time.monotonic() < deadline:
                trial = study.propose(limit, wishes) if wishes or limit == self.options.trials else None
                if trial is None:
                    break
                pending[self._compile(crew, trial.knobs, self.forms)] = trial
            if pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    trial = pending.pop(future)
                    if self._measure(trial, future, study, worker, crew) and turned(trial.knobs, start) == 1:
                        # Some knobs can only be turned together with another.
                        wishes.extend(steps(self.space, trial.knobs))
                    bar.update()
            elif limit < self.options.trials:
                wishes, limit = deque([best_steps(study.measured(), start)]), self.options.trials
            else:
                return

    def _compile(self, crew: Crew, knobs: Knobs, geometries: Sequence[Geometry]) -> Future[Any]:
        shapes = [geometry.to_json() for geometry in geometries]
        message = {"op": self.spec.name, "target": self.target.name, "knobs": knobs, "geometries": shapes}
        return crew.compile(message, self.options.trial_timeout * len(geometries))

    def _measure(self, trial: Trial, compiled: Future[Any], study: Study, worker: Worker, crew: Crew) -> bool:
        """Measure a trial and keep the result; returns whether the schedule refused it."""
        try:
            compiled.result()
            us = self._alone(worker, crew, [trial.knobs], self._timing(TRIAL_TIMING))["us"][0]
        except RefusedError as error:
            study.fail(trial, str(error), refused=True)
            return True
        except TrialError as error:
            study.fail(trial, str(error))
            _log.warning("%s, trial %d, %s: %s", self.spec.name, trial.number, json.dumps(trial.knobs), error)
        else:
            study.complete(trial, statistics.geometric_mean(us), us=us)
        return False

    def _alone(self, worker: Worker, crew: Crew, candidates: list[Knobs], how: Mapping[str, Any]) -> dict[str, Any]:
        """Check candidates and time them, while nobody else uses what they run on."""
        with crew.turns.compiling():
            worker.start()
        with crew.turns.measuring():
            worker.request({"do": "refer"}, START_TIMEOUT)
            for knobs in candidates:
                worker.request({"do": "prepare", "knobs": knobs}, self.options.trial_timeout)
            return worker.request({"do": "time", "candidates": candidates, **how}, self.options.trial_timeout * len(candidates))

    def _conclude(self, finalists: list[Knobs], default: Knobs, worker: Worker, crew: Crew) -> None:
        """Time the best and the default in turns; what wins, and is right wherever a record would apply, becomes the record."""
        finalists = [knobs for knobs in finalists if self._holds(knobs, functools.partial(self._check, knobs, worker, crew))]
        if not finalists:
            return
        try:
            taken = self._alone(worker, crew, finalists, self._timing(FINAL_TIMING))
        except TrialError as error:
            self.result.failures[str(error)] += 1
            return
        us, ratio = ([statistics.geometric_mean(row) for row in taken[name]] for name in ("us", "ratio"))
        if finalists[0] == default:
            self.result.default_us = us[0]
        better = [index for index in range(1, len(us)) if ratio[index] * MIN_GAIN <= 1 and us[index] <= us[0]]
        for index in [*sorted(better, key=lambda index: ratio[index]), 0]:
            if self._holds(finalists[index], functools.partial(self._check_others, finalists[index], worker, crew)):
                self.result.best_us, self.result.knobs = us[index], finalists[index]
                labels = [cases.label(case) for case in self.timed]
                self.result.record = self._record(dict(zip(labels, taken["us"][index], strict=True)))
                return

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

    def _check(self, knobs: Knobs, worker: Worker, crew: Crew) -> None:
        """Hold a candidate that may have been measured in an earlier run against the reference."""
        self._compile(crew, knobs, self.forms).result()
        with crew.turns.compiling():
            worker.start()
        with crew.turns.measuring():
            worker.request({"do": "refer"}, START_TIMEOUT)
            worker.request({"do": "prepare", "knobs": knobs}, self.options.trial_timeout)

    def _check_others(self, knobs: Knobs, worker: Worker, crew: Crew) -> None:
        """Hold a candidate against the reference on every other geometry that a record would serve."""
        geometries = [geometry_of_case(self.spec, case) for case in self.others]
        served = [
            place for place, geometry in enumerate(geometries)
            if schedule.fits(knobs, schedule.knob_space(self.spec, geometry, self.target))
        ]  # fmt: skip
        compiled = [self._compile(crew, knobs, [geometry]) for geometry in dict.fromkeys(geometries[place] for place in served)]
        for future in compiled:
            future.result()
        with crew.turns.compiling():
            worker.start()
        with crew.turns.measuring():
            worker.request({"do": "prepare_others", "knobs": knobs, "places": served}, START_TIMEOUT)

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


def steps(space: Mapping[str, Sequence[Any]], start: Knobs) -> list[Knobs]:
    """Points that differ from one in a single knob: the choices next to it first, of all knobs in turns."""
    ranked: list[tuple[int, int, Knobs]] = []
    for order, (name, choices) in enumerate(space.items()):
        if start.get(name) in choices:
            place = choices.index(start[name])
            ranked += [(abs(index - place), order, {**start, name: choice}) for index, choice in enumerate(choices)]
    return [knobs for distance, _, knobs in sorted(ranked, key=lambda entry: entry[:2]) if distance]


def best_steps(measured: Sequence[tuple[float, Knobs]], start: Knobs) -> Knobs:
    """All steps together that were each faster than the point where they start; of a knob's the fastest."""
    combined = dict(start)
    us = next((us for us, knobs in measured if knobs == start), 0.0)
    for taken, knobs in reversed(measured):
        if turned(knobs, start) == 1 and taken * MIN_GAIN <= us:
            combined |= {name: value for name, value in knobs.items() if value != start[name]}
    return combined


def turned(knobs: Knobs, start: Knobs) -> int:
    """How many knobs differ."""
    return sum(knobs[name] != value for name, value in start.items())
