"""Runs an exported OpenCL source on the OpenCL runtime of this machine, launched by its description alone.

The runtime may be a CPU's: the wheel ``pyopencl[pocl]`` brings one (PoCL), which compiles the text with clang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvm_gdn.export import gpu_launch
from tvm_gdn.export.artifact import ExportError

_AXES = ("x", "y", "z")


def runtime() -> tuple[Any, str] | None:
    """A context of the first device, and its name for tables; None where there is none, or no pyopencl."""
    try:
        import pyopencl as cl

        device = next(device for platform in cl.get_platforms() for device in platform.get_devices())
    except (ImportError, StopIteration):
        return None
    except cl.Error:  # no platform
        return None
    # "OpenCL 3.0 PoCL 3.0-rc2  Linux, ..."
    return cl.Context([device]), " ".join(device.platform.version.split()[2:4]).rstrip(",") or device.platform.name


def launcher(context: Any, text: str, found: Mapping[str, Any]) -> Callable[..., None]:
    """A function of the operator's arguments, in their order, that runs the source's kernels as a description says.

    Parameters
    ----------
    context : pyopencl.Context
    text : str
        The source.
    found : mapping
        Its description.

    Raises
    ------
    ExportError
        The compiler refused the text, or the device a launch.
    """
    import numpy as np
    import pyopencl as cl

    types = {"int64": np.int64, "int32": np.int32, "uint32": np.uint32, "float32": np.float32}
    queue = cl.CommandQueue(context)
    try:
        program = cl.Program(context, text).build()
    except cl.RuntimeError as error:
        raise ExportError(f"OpenCL compiler: {str(error)[:600]}") from error

    def run(kernel: Mapping[str, Any], names: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
        sizes = {tag: gpu_launch.number(value, names) for tag, value in kernel["launch"].items()}
        threads = [sizes.get(f"threadIdx.{axis}", 1) for axis in _AXES]
        grid = [sizes.get(f"blockIdx.{axis}", 1) * count for axis, count in zip(_AXES, threads, strict=True)]
        if not math.prod(grid):
            return
        values = [
            memory[one["value"]] if one["type"].startswith("handle")
            else types[one["type"]](gpu_launch.number(one["value"], names))
            for one in kernel["arguments"]
        ]  # fmt: skip
        try:
            getattr(program, kernel["name"])(queue, grid, threads, *values)
            queue.finish()
        except cl.Error as error:
            raise ExportError(f"{kernel['name']}: {error}") from error

    def call(*args: Any) -> None:
        given, names = gpu_launch.named(found, args)
        flags, memory, tensors = cl.mem_flags, {}, {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = _memory(value).view(torch.uint8).numpy()
                content = tensors[name] if tensors[name].size else np.zeros(16, np.uint8)
                memory[name] = cl.Buffer(context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=content)
        for name, one in found["workspaces"].items():
            scratch = np.full(gpu_launch.number(one["elements"], names) * 8 + 64, 0xFF, np.uint8)
            memory[name] = cl.Buffer(context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=scratch)
        for kernel in found["kernels"]:
            run(kernel, names, memory)
        for name, content in tensors.items():
            if content.size:
                cl.enqueue_copy(queue, content, memory[name])

    return call


def _memory(x: torch.Tensor) -> torch.Tensor:
    """All elements between the first and the last of a tensor, whatever its strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,))
