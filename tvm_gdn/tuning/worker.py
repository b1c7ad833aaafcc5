"""The parent's end of a process that compiles or measures (`measure.py`): requests with a time limit, a new process after death.

A candidate that crashes the compiler, aborts, or hangs takes its process along, and so costs one trial and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm_gdn import build
from tvm_gdn.errors import TuneError

#: How a worker is started.
COMMAND: tuple[str, ...] = (sys.executable, "-m", "tvm_gdn.tuning.measure")
#: Seconds for importing tvm or drawing every case, and for running the reference on all of them.
START_TIMEOUT = 600.0


class TrialError(TuneError):
    """A candidate could not be compiled, crashed, hung, or gave wrong numbers."""


class RefusedError(TrialError):
    """The schedule has no such point: nothing was compiled."""


class ClosedError(TuneError):
    """The run has ended: its workers are gone, and what they were at says nothing about a candidate."""


class Worker:
    """A process of `measure.py`, started when it is needed and started anew after it died; a context manager.

    Parameters
    ----------
    folder : Path
        Where it may write.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._log = folder, folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None
        self._job: dict[str, Any] = {"do": "load"}
        self._answers = b""
        #: Held while a thread talks to the process.
        self._talking = threading.Lock()
        self._closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        process = self._process
        if process is not None:
            _kill(process)  # A thread that waits for an answer ends by it.
        with self._talking:
            self._stop()

    def open(self, op: str, key: str, target: str, threads: int, built: Path, model: str | None) -> None:
        """Say what the following requests measure; without it this process compiles.

        Parameters
        ----------
        op, key : str
            Operator and tuning key.
        target : str
            Name of the target.
        threads : int
            Threads that kernels run on.
        built : Path
            Folder of compiled candidates.
        model : str, optional
            Model whose sizes the benchmark shapes have.

        Raises
        ------
        TrialError
            The worker cannot start.
        """
        with self._talking:
            what = {"op": op, "key": key, "target": target, "model": model}
            self._job = {"do": "open", **what, "threads": threads, "built": str(built)}
            if self._process is None:
                self._start()
            else:
                self._exchange(self._job, START_TIMEOUT)

    def start(self) -> None:
        """Start the process, unless it is running."""
        with self._talking:
            self._start()

    def _start(self) -> None:
        if self._closed:
            raise ClosedError("the run has ended")
        if self._process is not None:
            return
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is for the parent alone, and a kill takes compilers along.
            self._process = subprocess.Popen(
                [*COMMAND, str(self._folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True, env=build.builder_environment(),
            )  # fmt: skip
        self._answers = b""
        try:
            self._exchange(self._job, START_TIMEOUT)
        except TrialError:
            self._stop()
            raise

    def request(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Parameters
        ----------
        message : mapping
            ``{"do": name, ...}`` with the parameters of that method of `measure.Bench`, or of `measure.compile_candidate`.
        timeout : float
            Seconds after which the worker is killed.

        Returns
        -------
        dict

        Raises
        ------
        TrialError
            Why there is no answer.
        ClosedError
            The worker's context was left meanwhile.
        """
        with self._talking:
            self._start()
            return self._exchange(message, timeout)

    def _exchange(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        seen = self._log.stat().st_size
        try:
            process.stdin.write(json.dumps({**message, "timeout": timeout}).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._read_line(timeout))
        except TimeoutError:
            self._stop()
            raise TrialError(f"no answer within {timeout:g} s: killed") from None
        except (BrokenPipeError, EOFError):
            if self._closed:
                raise ClosedError("the run has ended") from None
            # It may still be writing its core: only its own exit status says what it died of.
            self._stop(grace=10.0)
            raise TrialError(_cause_of_death(process.returncode, self._log.read_bytes()[seen:])) from None
        if answer.get("broken"):
            self._stop()
        if "error" in answer:
            raise (RefusedError if answer.get("refused") else TrialError)(answer["error"])
        return dict(answer)

    def _read_line(self, timeout: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._answers:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(pipe, 1 << 16)
            if not part:
                raise EOFError
            self._answers += part
        line, _, self._answers = self._answers.partition(b"\n")
        return line

    def _stop(self, grace: float = 0.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and the compilers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cause_of_death(status: int, log: bytes) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    how = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    return f"worker {how}: {said[:300]}" if said else f"worker {how}"
