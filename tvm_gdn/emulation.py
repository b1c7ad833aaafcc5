"""Device kernels on CPU tensors: an emulated target's kernels see host memory as a device's.

The kernel's host part checks that its tensors are on the device that it was compiled for, which is part of what parity must run.
So tensors are handed over under that device's number; `device_emulation.h` is the driver that then runs the device code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import tvm_ffi

_CUDA = 2  # DLPack's number of the device type that TVM's CUDA code generator checks for
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def on_cpu_tensors(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same kernel for CPU tensors, which it takes for tensors on its device."""

    def call(*args: Any) -> None:
        kernel(*(_as_device(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))

    return call


def _as_device(tensor: torch.Tensor) -> Any:
    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    # DLManagedTensor begins with DLTensor: void* data, then int32 device type.
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = _CUDA
    return tvm_ffi.from_dlpack(capsule)
