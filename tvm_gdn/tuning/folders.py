"""Folders for what a tuning run compiles: in the cache folder, where the next run finds those of runs that were killed."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tvm_gdn import env


@contextmanager
def run_folder() -> Iterator[Path]:
    """An empty folder for one run, which is gone afterwards; what killed runs left is removed first."""
    parent = env.cache_dir() / "tuning"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    own = _lock(folder)
    # Without this nobody could tell a lock that was just made, and is not yet held, from one that was left behind.
    with FileLock(parent / "lock"):
        for other in parent.iterdir():
            if other.is_dir():
                _remove_abandoned(other)
        own.acquire()
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(own.lock_file).unlink(missing_ok=True)
        own.release()


def _lock(folder: Path) -> FileLock:
    """The lock that a run holds as long as it lives; the kernel frees it when the run is killed."""
    return FileLock(f"{folder}.lock", thread_local=False)


def _remove_abandoned(folder: Path) -> None:
    lock = _lock(folder)
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        pass  # Its run is alive.
