"""Scratch memory of device kernels: torch's own allocations, so that streams and captured graphs are torch's business.

The launcher asks torch for it through tvm_ffi (`device_launcher.c`). What is here serves where it cannot: emulated devices, whose
memory is the CPU's, and versions of torch without DLPack's C interface. A buffer then costs a call into Python.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from typing import Any

import torch

_log = logging.getLogger("tvm_gdn")
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_FREE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_held: dict[int, torch.Tensor] = {}
_lock = threading.Lock()


@functools.cache
def functions(device: str) -> dict[str, Any]:
    """What the function pointers of a kernel library point to, by their names.

    Parameters
    ----------
    device : str
        Torch device type of the kernels' tensors; ``"cpu"`` for emulated devices.

    Returns
    -------
    dict
        C functions that allocate on the current stream and give back in its order, which live as long as the process; none
        where the launcher's own serve.
    """
    if device != "cpu" and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return {}

    def allocate(_type: int, number: int, size: int, _code: int, _bits: int) -> int | None:
        try:
            data = torch.empty(max(size, 1), dtype=torch.uint8, device=device if device == "cpu" else f"{device}:{number}")
        except RuntimeError as error:  # out of memory: the kernel's host part raises for a null pointer
            _log.error("%d bytes of scratch memory: %s", size, error)
            return None
        with _lock:
            _held[data.data_ptr()] = data
        return data.data_ptr()

    def free(_type: int, _number: int, address: int) -> int:
        with _lock:
            _held.pop(address, None)
        return 0

    return {"__TVMBackendAllocWorkspace": _ALLOCATE(allocate), "__TVMBackendFreeWorkspace": _FREE(free)}
