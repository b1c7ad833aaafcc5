"""What the searches of a tuning run share: processes that compile and that measure, and the turns in which they may.

Candidates of all searches are compiled side by side. Only one is measured at a time, and on a CPU nothing else runs meanwhile;
compiling does not disturb a device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm_gdn.target import TargetSpec
from tvm_gdn.tuning.folders import run_folder
from tvm_gdn.tuning.worker import Worker


class Turns:
    """Who may run: one that measures, and others next to it only if it measures on a device.

    Parameters
    ----------
    shared : bool
        Whether what is measured runs on the cores that compile.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._changed = threading.Condition()
        self._busy = self._waiting = 0
        self._measuring = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A turn of any number of users of the CPU; those who wait for the CPU to be free come first."""
        if not self._shared:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._measuring and not self._waiting)
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The turn of one user of the device."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._measuring and not self._busy)
            self._waiting -= 1
            self._measuring = True
        try:
            yield
        finally:
            with self._changed:
                self._measuring = False
                self._changed.notify_all()


class Crew:
    """Workers of a run; a context manager.

    Parameters
    ----------
    target : TargetSpec
        What is compiled for and measured on.
    jobs : int
        Processes that compile at once.
    searches : int
        Searches at once, each with a process that measures.
    """

    def __init__(self, target: TargetSpec, jobs: int, searches: int) -> None:
        self.target, self._jobs, self.searches = target, jobs, searches
        #: Candidates of a search that are on their way at once: enough that compilers never wait for a measurement.
        self.ahead = 1 if jobs == 1 else -(-2 * jobs // searches)
        self.turns = Turns(shared=target.device == "cpu")
        # Last in, first out: no more processes are started than are needed.
        self._compilers: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._measurers: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._stack = ExitStack()

    def __enter__(self) -> Crew:
        with self._stack:
            folder = self._stack.enter_context(run_folder())
            self.built = folder / "built"
            self.built.mkdir()
            self._pool = ThreadPoolExecutor(self._jobs)
            self._stack.callback(self._pool.shutdown, cancel_futures=True)
            # Entered after the pool and so left before it: threads that wait for a worker end when it is killed.
            for number in range(self._jobs):
                self._compilers.put(self._stack.enter_context(Worker(folder / f"compiler{number}")))
            for number in range(self.searches):
                self._measurers.put(self._stack.enter_context(Worker(folder / f"measurer{number}")))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def compile(self, message: Mapping[str, Any], timeout: float) -> Future[dict[str, Any]]:
        """Have a candidate compiled by whatever process is free.

        Parameters
        ----------
        message : mapping
            Parameters of `measure.compile_candidate`.
        timeout : float
            Seconds after which it is given up.
        """
        return self._pool.submit(self._compile, {"do": "compile", "built": str(self.built), **message}, timeout)

    def _compile(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        worker = self._compilers.get()
        try:
            with self.turns.compiling():
                return worker.request(message, timeout)
        finally:
            self._compilers.put(worker)

    @contextmanager
    def measurer(self) -> Iterator[Worker]:
        """A process that measures for one search."""
        worker = self._measurers.get()
        try:
            yield worker
        finally:
            self._measurers.put(worker)
