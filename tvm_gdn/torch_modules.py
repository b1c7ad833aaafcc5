"""Device images loaded by torch's own module loader, for drivers of which torch brings its own copy.

A torch built for ROCm has the HIP runtime inside its wheel or in packages that only it knows the place of; a second copy, loaded
by name, would not share its contexts and streams. So the image goes through `torch.cuda._utils._cuda_load_module`, which is
hipModuleLoadData in such a build, and the launcher is given functions that ask it. Never run on AMD hardware: tested with a
stand-in for the loader.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch

_log = logging.getLogger("tvm_gdn")
_LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p)
_FAILED = 999  # "unknown error" of both driver interfaces
#: Modules by the number that stands for them, and what must outlive every kernel.
_modules: dict[int, Any] = {}
_kept: list[Any] = []


def available() -> str:
    """Empty, or why torch cannot load modules here."""
    if not hasattr(torch.cuda, "_utils") or not hasattr(torch.cuda._utils, "_cuda_load_module"):
        return f"torch {torch.__version__} has no module loader (torch.cuda._utils._cuda_load_module): 2.8 or later has"
    return "" if torch.version.hip else f"torch {torch.__version__} is not built for ROCm"


def library() -> str | None:
    """Path or name of the driver's library that torch uses; None where torch is built for none."""
    if available():
        return None
    return str(torch.cuda._utils._get_gpu_runtime_library()._name)


def functions(image: bytes) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """What the launcher calls in place of the driver's ModuleLoadData and ModuleGetFunction.

    Parameters
    ----------
    image : bytes
        The code object.

    Returns
    -------
    load, function : ctypes.c_void_p
        C functions; they take the interpreter's lock, which no caller of a kernel holds while it waits.
    """

    def load(out: Any, data: Any) -> int:
        del data  # the launcher's copy of `image`
        try:
            number = len(_modules) + 1
            _modules[number] = torch.cuda._utils._cuda_load_module(image)
            out[0] = number
        except Exception as error:
            # An exception must not pass through the launcher: it reports the status.
            _log.error("torch cannot load the device image: %s", error)
            return _FAILED
        return 0

    def function(out: Any, module: int, name: bytes) -> int:
        try:
            handle = getattr(_modules[module], name.decode()).func
            out[0] = handle.value if isinstance(handle, ctypes.c_void_p) else handle
        except Exception as error:
            _log.error("the device image has no kernel %s: %s", name.decode(), error)
            return _FAILED
        return 0

    made = _LOAD(load), _FUNCTION(function)
    _kept.extend(made)
    return ctypes.cast(made[0], ctypes.c_void_p), ctypes.cast(made[1], ctypes.c_void_p)
