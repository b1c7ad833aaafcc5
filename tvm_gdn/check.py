"""Explains a refused call: finds the first argument that breaks the SPEC and says what is allowed.

A call's hot path checks next to nothing in Python: the compiled kernel checks dtypes, shapes, strides and, on CPUs, slots and
sequence bounds before it writes anything. When it refuses, this module turns the refusal into an error that names the argument.
That memory is read-only a kernel cannot see: `refuse_or_learn` looks, once per address.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops.rules import has_overlap
from tvm_gdn.spec import Axis, Geometry, OpSpec, Scalar, Tensor, holds

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64", "int8", "uint8", "bool")
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: Addresses of tensors that were found writable.
WRITABLE: set[int] = set()
_MADV_POPULATE_WRITE = 23


def validate(spec: OpSpec, args: Mapping[str, Any]) -> dict[str, int]:
    """Check every rule of an operator's arguments.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    args : mapping
        Arguments by name, as given to the torch operator.

    Returns
    -------
    dict
        Axis sizes by name.

    Raises
    ------
    ArgumentTypeError
        Not a tensor, wrong dtype, wrong device.
    ArgumentError
        Wrong rank, size, stride or value.
    """
    sizes: dict[str, int] = {}
    first: dict[str, tuple[str, Any]] = {}
    one_device(spec, args)
    # q, k and v say what sizes a call has; what disagrees with them is at fault, wherever it stands in the signature.
    for tensor in sorted(spec.tensors, key=lambda tensor: tensor.role != "data"):
        value = args.get(tensor.name)
        if value is None:
            if not tensor.optional:
                raise ArgumentTypeError(
                    f"{spec.name}: {tensor.name} is None; pass a tensor [{', '.join(tensor.axis_names(args))}]"
                )
            continue
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(f"{spec.name}: {tensor.name} is a {type(value).__name__}; pass a torch.Tensor")
        _check_dtype(spec, tensor, value, first)
        _check_shape(spec, tensor, value, args, sizes)
        _check_memory(spec, tensor, value)
    for axis, order in spec.derived:
        if axis not in sizes and order[-1] in sizes:
            sizes[axis] = sizes[order[-1]]
    for scalar in spec.scalars:
        _check_scalar(spec, scalar, args.get(scalar.name))
    if spec.check is not None:
        try:
            spec.check(args, sizes)
        except ArgumentError as error:
            raise ArgumentError(f"{spec.name}: {error}") from None
    return sizes


def one_device(spec: OpSpec, args: Mapping[str, Any]) -> None:
    """Check that all tensors are on the first one's device.

    Raises
    ------
    ArgumentTypeError
        Names the first that is elsewhere.
    """
    first: tuple[str, torch.device] | None = None
    for tensor in spec.tensors:
        value = args.get(tensor.name)
        if not isinstance(value, torch.Tensor):
            continue
        if first is None:
            first = (tensor.name, value.device)
        elif value.device != first[1]:
            raise ArgumentTypeError(
                f"{spec.name}: {tensor.name} is on {value.device}, {first[0]} on {first[1]}; move it with .to({first[1]!s})"
            )


def refuse_or_learn(tensor: torch.Tensor) -> None:
    """Remember the address of a tensor in writable memory.

    Raises
    ------
    ValueError
        The memory is read-only; `validate` says which argument's.
    """
    if not _is_writable(tensor):
        raise ValueError("a tensor in read-only memory")
    if len(WRITABLE) > 4096:  # pools live long; addresses that come and go must not pile up
        WRITABLE.clear()
    WRITABLE.add(tensor.data_ptr())


@functools.cache
def _populates() -> Any:
    """madvise, where it can fault a page in for writing (Linux 5.14 and later); else None."""
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    own = mmap.mmap(-1, mmap.PAGESIZE)
    known = function(ctypes.addressof(ctypes.c_char.from_buffer(own)), mmap.PAGESIZE, _MADV_POPULATE_WRITE) == 0
    return function if known else None


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether the first page of a tensor in main memory may be written to; nothing is written to find out."""
    populate = _populates()
    if populate is None or tensor.device.type != "cpu" or not tensor.numel():
        return True
    page = tensor.data_ptr() & -mmap.PAGESIZE
    return populate(page, mmap.PAGESIZE, _MADV_POPULATE_WRITE) == 0 or ctypes.get_errno() not in {errno.EFAULT, errno.EINVAL}


def _check_scalar(spec: OpSpec, scalar: Scalar, value: Any) -> None:
    if scalar.type == "int" and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ArgumentError(f"{spec.name}: {scalar.name} is {value}; it must fit in 64 bits")
    allowed = [given for given, _ in scalar.choices]
    if allowed and value not in allowed:
        raise ArgumentError(f"{spec.name}: {scalar.name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _check_dtype(spec: OpSpec, tensor: Tensor, value: torch.Tensor, first: dict[str, tuple[str, Any]]) -> None:
    if value.layout != torch.strided:
        raise ArgumentTypeError(f"{spec.name}: {tensor.name} has layout {value.layout}; pass {tensor.name}.to_dense()")
    allowed = [TORCH_DTYPES[name] for name in tensor.dtypes]
    if value.dtype not in allowed:
        raise ArgumentTypeError(f"{spec.name}: {tensor.name} has dtype {value.dtype}; allowed: {', '.join(map(str, allowed))}")
    name, dtype = first.setdefault(tensor.dtype_role, (tensor.name, value.dtype))
    if value.dtype != dtype:
        raise ArgumentTypeError(f"{spec.name}: {tensor.name} has dtype {value.dtype}, {name} has {dtype}; they must be the same")


def _other_layout(tensor: Tensor, args: Mapping[str, Any], rank: int) -> str:
    """What would allow a rank that the layout of a call does not have."""
    if tensor.axes_if is None:
        return ""
    condition, _ = tensor.axes_if
    given = holds(args, condition)
    names = tensor.axis_names({**args, condition: None if given else True})
    return f"; or [{', '.join(names)}] with{'out' if given else ''} {condition}" if len(names) == rank else ""


def _check_shape(spec: OpSpec, tensor: Tensor, value: torch.Tensor, args: Mapping[str, Any], sizes: dict[str, int]) -> None:
    names = tensor.axis_names(args)
    if value.ndim != len(names):
        raise ArgumentError(
            f"{spec.name}: {tensor.name} has {value.ndim} axes {tuple(value.shape)}; allowed: {len(names)}, [{', '.join(names)}]"
            + _other_layout(tensor, args, value.ndim)
        )
    layout = f"{tensor.name} is [{', '.join(names)}]"
    for position, (name, size) in enumerate(zip(names, value.shape, strict=True)):
        axis = Axis.parse(name)
        named = axis.named(size)
        if named is None:
            raise ArgumentError(f"{spec.name}: {tensor.name} has {size} on axis {position} ({name}); {layout}")
        expected = sizes.setdefault(axis.name, named) if axis.name else None
        if size != axis.size(sizes):
            others = "" if expected is None else f", other arguments have {axis.name} = {expected}"
            raise ArgumentError(f"{spec.name}: {tensor.name} has {size} on axis {position} ({name}){others}; {layout}")


def _check_memory(spec: OpSpec, tensor: Tensor, value: torch.Tensor) -> None:
    if value.numel() == 0:
        return
    free = {"any": value.ndim, "inner": value.ndim - 1, "outer": 1, "outer2": 2, "dense": 0}[tensor.strides]
    expected = 1
    for axis in reversed(range(free, value.ndim)):
        if value.shape[axis] != 1 and value.stride(axis) != expected:
            last = "axis" if free == value.ndim - 1 else f"{value.ndim - free} axes"
            raise ArgumentError(
                f"{spec.name}: {tensor.name} has strides {value.stride()}; its last {last} must be contiguous: pass "
                f"{tensor.name}.contiguous()"
                + (" (a copy: for a pool allocate it contiguously instead)" if tensor.mutated else "")
            )
        expected *= value.shape[axis]
    if tensor.mutated and has_overlap(value):
        raise ArgumentError(
            f"{spec.name}: {tensor.name} has overlapping elements (strides {value.stride()}); it is written to, so every "
            "element needs memory of its own: pass a real allocation, not an expanded view"
        )
    if tensor.mutated and value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{spec.name}: {tensor.name} requires grad but is updated in place; pass {tensor.name}.detach()")
    if tensor.mutated and not _is_writable(value):
        raise ArgumentError(
            f"{spec.name}: {tensor.name} lies in read-only memory (a file mapped for reading?); it is written to: pass "
            f"{tensor.name}.clone()"
        )


def geometry_of(spec: OpSpec, args: Mapping[str, Any]) -> Geometry:
    """Geometry of a call; `validate` must have passed or be about to explain a failure.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    args : mapping
        Arguments by name.

    Returns
    -------
    Geometry
    """
    axes = []
    for axis in spec.static_axes:
        sources = [(t, position) for t, position in spec.axis_sources(axis, args) if args.get(t.name) is not None]
        # An axis that only absent tensors have (the groups of unquantized weights) has size 0.
        size = 0
        if sources:
            tensor, position = sources[0]
            size = Axis.parse(tensor.axis_names(args)[position]).named(int(args[tensor.name].shape[position])) or 0
        axes.append((axis, size))
    dtypes = [(t.name, DTYPE_NAMES[args[t.name].dtype]) for t in spec.tensors if args.get(t.name) is not None]
    attrs = [(s.name, s.meaning(args[s.name])) for s in spec.scalars if s.static]
    return Geometry(axes=tuple(axes), dtypes=tuple(dtypes), attrs=(*attrs, *spec.traits))


def scalar_value(scalar: Scalar, value: Any, axes: Mapping[str, int]) -> Any:
    """Value that the kernel gets for a scalar argument."""
    return scalar.resolve(axes) if value is None and scalar.resolve is not None else value
