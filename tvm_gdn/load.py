"""Loads compiled kernels through tvm_ffi; needs no compiler and no apache-tvm."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import tvm_ffi

from tvm_gdn import device_memory, torch_modules
from tvm_gdn.errors import PackError
from tvm_gdn.manifest import Entry, File, Image
from tvm_gdn.pack import Pack

_log = logging.getLogger("tvm_gdn")
_lock = threading.Lock()
#: Launchers by sha256: packs made by different versions may hold different ones, and each kernel gets its own pack's.
_launchers: dict[str, ctypes.CDLL] = {}
_forked = False
#: Libraries stay loaded as long as the process: torch may still hold functions from them.
_modules: list[Any] = []
#: Function pointers of a kernel library that a launcher fills, and what with.
_THREADS = {
    "__TVMBackendParallelLaunch": "tvm_gdn_parallel_launch",
    "__TVMBackendAllocWorkspace": "tvm_gdn_alloc_workspace",
    "__TVMBackendFreeWorkspace": "tvm_gdn_free_workspace",
    "tvm_gdn_threads": "tvm_gdn_num_threads",
}
_DEVICE = {
    "__TVMFFIEnvModLookupFromImports": "tvm_gdn_device_lookup",
    "__TVMFFIFunctionCall": "TVMFFIFunctionCall",
    "__TVMFFIHandleInitOnce": "TVMFFIHandleInitOnce",
    "__TVMBackendAllocWorkspace": "tvm_gdn_device_allocate",
    "__TVMBackendFreeWorkspace": "tvm_gdn_device_give_back",
}


def _load_launcher(pack: Pack, stored: File) -> ctypes.CDLL:
    """A pack's launcher, loaded once per content."""
    with _lock:
        if stored.sha256 not in _launchers:
            library = ctypes.CDLL(str(pack.file(stored)))
            if hasattr(library, "tvm_gdn_launcher_init"):
                _find_threads(library)
            _launchers[stored.sha256] = library
        return _launchers[stored.sha256]


def _find_threads(library: ctypes.CDLL) -> None:
    """Let a thread launcher find torch's OpenMP runtime."""
    library.tvm_gdn_launcher_init.restype = ctypes.c_char_p
    library.tvm_gdn_launcher_init()
    if _forked:
        # The child of a process whose OpenMP threads ran would wait for them for ever, and nobody can tell if they did.
        library.tvm_gdn_launcher_forked()
        _log.info("kernels run on one thread in a forked process; start it with spawn to use more")


def openmp_library() -> str | None:
    """Path of the OpenMP runtime that kernels run on; ``""`` if none was found, None before any kernel was loaded."""
    launcher = next((found for found in _launchers.values() if hasattr(found, "tvm_gdn_launcher_init")), None)
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
        function: Callable[..., Any] = module[entry.symbol]
        if launcher is not None:
            library, runtime = ctypes.CDLL(str(path)), _load_launcher(pack, launcher)
            if entry.image is not None:
                _open_image(pack, entry.image, library, runtime)
            for symbol, ours in (_DEVICE if entry.image is not None else _THREADS).items():
                # A library only has the symbols that its code uses. Setting them here, and not in tvm_ffi's process-wide
                # registry, keeps them ours even where apache-tvm is imported and registers its own pool.
                if hasattr(library, symbol):
                    # tvm_ffi's own functions are visible to all libraries; nobody but TVM's runtime would set them here.
                    owner = runtime if hasattr(runtime, ours) else ctypes.CDLL(None)
                    address = ctypes.cast(getattr(owner, ours), ctypes.c_void_p).value
                    ctypes.c_void_p.in_dll(library, symbol).value = address
            if entry.image is not None:
                for symbol, function_ in device_memory.functions(pack.manifest.device).items():
                    if hasattr(library, symbol):
                        ctypes.c_void_p.in_dll(library, symbol).value = ctypes.cast(function_, ctypes.c_void_p).value
    except (OSError, RuntimeError, AttributeError, KeyError) as error:
        raise PackError(f"pack {pack.folder}: {entry.file} cannot be loaded: {error}") from error
    _modules.append(module)
    if pack.manifest.image == "emulation":
        from tvm_gdn.emulation import on_cpu_tensors

        return on_cpu_tensors(function)
    return function


def _open_image(pack: Pack, image: Image, library: ctypes.CDLL, launcher: ctypes.CDLL) -> None:
    """Tell a device launcher which image a library's kernels are in, and which driver runs it."""
    path = pack.file(image)
    data, driver = path.read_bytes(), dict(pack.manifest.driver)
    own: tuple[Any, Any] = (None, None)
    if driver.get("loader") == "torch":
        driver["library"] = torch_modules.library() or driver["library"]
        own = torch_modules.functions(data)
    texts = [driver[name].format(image=path).encode() for name in ("library", "prefix", "launch", "error")]
    launcher.tvm_gdn_device_open.restype = ctypes.c_char_p
    launcher.tvm_gdn_device_open.argtypes = (
        ctypes.c_void_p, *(ctypes.c_char_p,) * 5, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p,
    )  # fmt: skip
    context = ctypes.c_void_p.in_dll(library, "__tvm_ffi__library_ctx").value
    wrong = launcher.tvm_gdn_device_open(context, *texts, data, len(data), "\n".join(image.kernels).encode(), *own)
    if wrong:
        raise RuntimeError(wrong.decode())


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
