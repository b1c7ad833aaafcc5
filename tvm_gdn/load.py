"""Loads compiled kernels through tvm_ffi; needs no compiler and no apache-tvm."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm_ffi

from tvm_gdn.errors import PackError
from tvm_gdn.pack import Pack

_log = logging.getLogger("tvm_gdn")
_lock = threading.Lock()
_launcher: ctypes.CDLL | None = None
_forked = False
#: Libraries stay loaded as long as the process: torch may still hold functions from them.
_modules: list[Any] = []
_RUNTIME_SYMBOLS = {
    "__TVMBackendParallelLaunch": "tvm_gdn_parallel_launch",
    "__TVMBackendAllocWorkspace": "tvm_gdn_alloc_workspace",
    "__TVMBackendFreeWorkspace": "tvm_gdn_free_workspace",
}


def load_launcher(path: Path) -> ctypes.CDLL:
    """Load the thread launcher, once per process, and let it find torch's OpenMP runtime.

    Parameters
    ----------
    path : Path
        The launcher's library; ignored when one is loaded already.

    Returns
    -------
    ctypes.CDLL
    """
    global _launcher
    with _lock:
        if _launcher is None:
            library = ctypes.CDLL(str(path))
            library.tvm_gdn_launcher_init.restype = ctypes.c_char_p
            library.tvm_gdn_launcher_init()
            if _forked:
                # The child of a process whose OpenMP threads ran would wait for them for ever, and nobody can tell if they did.
                library.tvm_gdn_launcher_forked()
                _log.info("kernels run on one thread in a forked process; start it with spawn to use more")
            _launcher = library
        return _launcher


def openmp_library() -> str | None:
    """Path of the OpenMP runtime that kernels run on; ``""`` if none was found, None before any kernel was loaded."""
    return None if _launcher is None else _launcher.tvm_gdn_launcher_init().decode()


def load_kernel(pack: Pack, entry: dict[str, Any]) -> Callable[..., Any]:
    """Load one kernel of a pack.

    Parameters
    ----------
    pack : Pack
        The pack.
    entry : dict
        The kernel's entry in its manifest.

    Returns
    -------
    callable
        Takes torch tensors and scalars in SPEC order.

    Raises
    ------
    PackError
        A file is missing, changed, or not loadable.
    """
    path = pack.file(entry["file"], entry["sha256"])
    launcher = pack.manifest.get("launcher")
    try:
        module = tvm_ffi.load_module(str(path))
        function = module[entry["symbol"]]
        if launcher is not None:
            library = ctypes.CDLL(str(path))
            runtime = load_launcher(pack.file(launcher["file"], launcher["sha256"]))
            for symbol, ours in _RUNTIME_SYMBOLS.items():
                # A library only has the symbols that its code uses. Setting them here, and not in tvm_ffi's process-wide
                # registry, keeps them ours even where apache-tvm is imported and registers its own pool.
                if hasattr(library, symbol):
                    address = ctypes.cast(getattr(runtime, ours), ctypes.c_void_p).value
                    ctypes.c_void_p.in_dll(library, symbol).value = address
    except (OSError, RuntimeError, AttributeError, KeyError) as error:
        raise PackError(f"pack {pack.folder}: {entry['file']} cannot be loaded: {error}") from error
    _modules.append(module)
    return function


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
