"""What a search has tried so far: an Optuna study that is durable, resumable, and shared by processes and machines.

Optuna's own states are used as follows. COMPLETE: measured. FAIL with the attribute ``reason``: tried and failed. FAIL without
it: never tried (another process had the same knobs, or the run was stopped). With ``refused`` too: the schedule has no such
point. RUNNING: being measured, as long as its process lives; what a killed process left behind is free again.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

Knobs = dict[str, Any]
#: How many times as many refused points as points to be measured a search may meet.
MOST_REFUSED = 16


@dataclass(frozen=True)
class Trial:
    """Knobs that this process has to measure."""

    number: int
    knobs: Knobs
    handle: Any


class Storage:
    """Where studies are.

    Parameters
    ----------
    handle
        Optuna's storage.
    lock
        Keeps other processes from changing it.
    """

    def __init__(self, handle: Any, lock: AbstractContextManager[Any]) -> None:
        self.handle, self._processes = handle, lock
        self._threads = threading.RLock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes meanwhile. Optuna takes a lock of its own before the file's: whoever writes needs this one first."""
        with self._threads, self._processes:
            yield


class Study:
    """Proposes knobs and keeps results.

    Parameters
    ----------
    name : str
        Everything that makes measurements comparable: a study is resumed where the name is the same.
    space : mapping
        Choices of every knob.
    storage : Storage
        From `open_storage`.
    lease : float
        Seconds after which a trial that another machine runs is taken for abandoned.
    facts : mapping
        Attributes of a new study, for people who read the storage.
    seed : int
        Seed of the search.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Sequence[Any]],
        *,
        storage: Storage,
        lease: float,
        facts: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._failed = optuna.trial.TrialState.FAIL
        self._complete = optuna.trial.TrialState.COMPLETE
        self._locked = storage.locked
        with self._locked():
            self._study = optuna.create_study(study_name=name, storage=storage.handle, load_if_exists=True)
        # As many asked at once as there are jobs: the sampler must not propose the same knobs for all of them.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._trials()), constant_liar=True)
        self._random = random.Random(f"{seed} {socket.gethostname()} {os.getpid()}")
        self._space = {knob: tuple(choices) for knob, choices in space.items()}
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            knob: optuna.distributions.CategoricalDistribution(choices) for knob, choices in self._space.items()
        }
        self._lease = lease
        with self._locked():
            for fact, value in facts.items():
                if self._study.user_attrs.get(fact) != value:
                    self._study.set_user_attr(fact, value)

    @property
    def size(self) -> int:
        """Number of points of the space."""
        return math.prod(map(len, self._space.values()))

    def measured(self) -> list[tuple[float, Knobs]]:
        """Objective and knobs of every measured point, best first."""
        found = {_text(trial.params): (trial.value, trial.params) for trial in self._trials() if trial.state == self._complete}
        return sorted(found.values(), key=lambda point: point[0])

    def failures(self) -> list[str]:
        """Why points failed."""
        return [trial.user_attrs["reason"] for trial in self._trials() if self._tried(trial) and trial.state == self._failed]

    def propose(self, limit: int, wishes: deque[Knobs] | None = None) -> Trial | None:
        """Take the next point.

        Parameters
        ----------
        limit : int
            Number of points, by all processes and earlier runs together, after which there is no next one. Points that the
            schedule refuses cost next to nothing and do not count, up to `MOST_REFUSED` times as many.
        wishes : deque of dict, optional
            Knobs to take first; those that were tried are passed over, and what is taken or passed over is removed.

        Returns
        -------
        Trial or None
            None too when every point was measured or is being measured by another process.
        """
        # Under the lock no other process takes the same point. A database has none: there both may, which costs a repetition.
        with self._locked():
            repeated = False
            while True:
                taken, refused = self._taken(), self._refused()
                if len(taken) >= self.size or len(taken - refused) >= limit or len(refused) >= MOST_REFUSED * limit:
                    return None
                while wishes and _text(wishes[0]) in taken:
                    wishes.popleft()
                if wishes:
                    self._study.enqueue_trial(wishes.popleft())
                elif (repeated or self.size <= limit) and not self._waiting():
                    # Where everything left will be measured, a sampler that prefers good points would only repeat them.
                    self._study.enqueue_trial(self._free_point(taken))
                trial = self._study.ask(self._distributions)
                trial.set_user_attr("owner", {**_process(), "until": time.time() + self._lease})
                if _text(trial.params) not in self._taken(besides=trial.number):
                    return Trial(trial.number, dict(trial.params), trial)
                self._study.tell(trial, state=self._failed)
                repeated = True

    def complete(self, trial: Trial, objective: float, **facts: Any) -> None:
        """Keep a measurement."""
        with self._locked():
            for name, value in facts.items():
                trial.handle.set_user_attr(name, value)
            self._study.tell(trial.handle, objective)

    def fail(self, trial: Trial, reason: str, *, refused: bool = False) -> None:
        """Keep that a point cannot be used, or is none of the schedule's."""
        with self._locked():
            trial.handle.set_user_attr("reason", reason)
            if refused:
                trial.handle.set_user_attr("refused", True)
            self._study.tell(trial.handle, state=self._failed)

    def _trials(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False))

    def _waiting(self) -> bool:
        return any(trial.state.name == "WAITING" for trial in self._trials())

    def _tried(self, trial: Any) -> bool:
        return trial.state == self._complete or (trial.state == self._failed and "reason" in trial.user_attrs)

    def _taken(self, besides: int = -1) -> set[str]:
        """Points that were tried and points that a living process is at, apart from the trial of one number."""
        return {_text(t.params) for t in self._trials() if t.number != besides and (self._tried(t) or _alive(t))}

    def _refused(self) -> set[str]:
        return {_text(trial.params) for trial in self._trials() if trial.user_attrs.get("refused")}

    def _free_point(self, taken: set[str]) -> Knobs:
        while True:
            knobs = {knob: self._random.choice(choices) for knob, choices in self._space.items()}
            if _text(knobs) not in taken:
                return knobs


def _text(knobs: Mapping[str, Any]) -> str:
    return json.dumps(knobs, sort_keys=True)


@functools.cache
def _process() -> dict[str, Any]:
    """Identity of this process; in containers every run may have the same process id."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}


def _alive(trial: Any) -> bool:
    """Whether a trial is running in a process that may still finish it."""
    owner, own = trial.user_attrs.get("owner"), _process()
    if owner is None or trial.state.name != "RUNNING" or time.time() > owner["until"]:
        return False
    if owner["run"] == own["run"] or owner["host"] != own["host"]:
        return True
    if owner["pid"] == own["pid"]:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def open_storage(storage: str) -> Storage:
    """Open a journal's file or an RDB URL."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in storage:
        return Storage(RDBStorage(storage), nullcontext())
    path = Path(storage).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The kernel frees this lock when its holder is killed; Optuna's own would stay and hold up the next run for half a minute.
    lock = FileLock(f"{path}.flock")
    with lock:
        _drop_partial_line(path)
    return Storage(JournalStorage(JournalFileBackend(str(path), lock_obj=cast("Any", lock))), lock)


def _drop_partial_line(path: Path) -> None:
    """Cut off what a writer left unfinished, which would make every later line unreadable."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
