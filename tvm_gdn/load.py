"""Loads compiled kernels through tvm_ffi; needs no compiler and no apache-tvm."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import tvm_ffi

from tvm_gdn.errors import PackError
from tvm_gdn.manifest import Entry, File
from tvm_gdn.pack import Pack

_log = logging.getLogger("tvm_gdn")
_lock = threading.Lock()
#: Thread launchers by sha256: packs made by different versions may hold different ones, and each kernel gets its own pack's.
_launchers: dict[str, ctypes.CDLL] = {}
_forked = False
#: Libraries stay loaded as long as the process: torch may still hold functions from them.
_modules: list[Any] = []
_RUNTIME_SYMBOLS = {
    "__TVMBackendParallelLaunch": "tvm_gdn_parallel_launch",
    "__TVMBackendAllocWorkspace": "tvm_gdn_alloc_workspace",
    "__TVMBackendFreeWorkspace": "tvm_gdn_free_workspace",
}


def _load_launcher(pack: Pack, stored: File) -> ctypes.CDLL:
    """A pack's thread launcher, loaded once per content, with torch's OpenMP runtime found."""
    with _lock:
        if stored.sha256 not in _launchers:
            library = ctypes.CDLL(str(pack.file(stored)))
            library.tvm_gdn_launcher_init.restype = ctypes.c_char_p
            library.tvm_gdn_launcher_init()
            if _forked:
                # The child of a process whose OpenMP threads ran would wait for them for ever, and nobody can tell if they did.
                library.tvm_gdn_launcher_forked()
                _log.info("kernels run on one thread in a forked process; start it with spawn to use more")
            _launchers[stored.sha256] = library
        return _launchers[stored.sha256]


def openmp_library() -> str | None:
    """Path of the OpenMP runtime that kernels run on; ``""`` if none was found, None before any kernel was loaded."""
    launcher = next(iter(_launchers.values()), None)
    return None if launcher is None else launcher.tvm_gdn_launcher_init().decode()


def load_kernel(pack: Pack, entry: Entry) -> Callable[..., Any]:
    """Load one kernel of a pack.

    Parameters
    ----------
    pack : Pack
        The pack.
    entry : Entry
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
    path = pack.file(entry)
    launcher = pack.manifest.launcher
    try:
        module = tvm_ffi.load_module(str(path))
        function = module[entry.symbol]
        if launcher is not None:
            library = ctypes.CDLL(str(path))
            runtime = _load_launcher(pack, launcher)
            for symbol, ours in _RUNTIME_SYMBOLS.items():
                # A library only has the symbols that its code uses. Setting them here, and not in tvm_ffi's process-wide
                # registry, keeps them ours even where apache-tvm is imported and registers its own pool.
                if hasattr(library, symbol):
                    address = ctypes.cast(getattr(runtime, ours), ctypes.c_void_p).value
                    ctypes.c_void_p.in_dll(library, symbol).value = address
    except (OSError, RuntimeError, AttributeError, KeyError) as error:
        raise PackError(f"pack {pack.folder}: {entry.file} cannot be loaded: {error}") from error
    _modules.append(module)
    return function


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
