"""What a number was measured on: hardware, versions, date. Every report carries them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from tvm_gdn.digest import version_of
from tvm_gdn.target import host_cpu

Result = TypeVar("Result")
#: Of glibc's mallopt: larger blocks are mapped one by one.
_MMAP_THRESHOLD = -3
#: Distributions that decide what runs here, and what each is needed for.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "apache-tvm-ffi": "loading kernels",
    "apache-tvm": "compiling kernels; packs run without it",
    "optuna": "`tvm_gdn tune`",
    "transformers": "`tvm_gdn demo`, `tvm_gdn bench --peers`",
    "onnx": "`tvm_gdn export --format onnx`",
}


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of everything in `PACKAGES`; ``"none"`` where not installed."""
    import tvm_gdn

    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), "tvm_gdn": tvm_gdn.__version__, **found}


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """CPU model, cores, threads that torch uses, memory in GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": host_cpu(),
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(memory, 1),
    }


def stamp() -> dict[str, Any]:
    """Date (UTC), hardware and versions, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }


def line() -> str:
    """The same as one line for the head of a table."""
    facts, found = hardware(), versions()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} torch threads; torch {found['torch']}, "
        f"tvm {found['apache-tvm']}, tvm_ffi {found['apache-tvm-ffi']}"
    )


def peak_memory(call: Callable[[], Result]) -> tuple[Result, int]:
    """Result of a call, and how many bytes were resident at most meanwhile beyond those before it.

    From the first time on, the process's C library gives large blocks back at once: what it kept would hide what a call takes.

    Raises
    ------
    OSError
        The system does not tell.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 17)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again
    result = call()
    return result, _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(found[1]) << 10


def openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; empty where /proc does not exist."""
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    paths = {parts[5] for parts in (line.split(maxsplit=5) for line in text.splitlines()) if len(parts) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
