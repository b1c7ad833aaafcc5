"""The torch shim, generic over SPEC: schema, CPU implementation, fake kernel.

For every operator two Python functions are written out from its SPEC as source text, as dataclasses and namedtuple do: generic
loops over arguments would cost more than the whole call is allowed to (8 us above the kernel). What they do, for one call:

1. build the dispatch key (static axes, dtypes, static attributes) and look up the loaded kernel;
2. allocate the outputs (the fake kernel runs the very same lines, so fake shapes are real shapes);
3. call the kernel with the tensors that are present, the scalars and the outputs, in SPEC order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from tvm_gdn import check, direct, dispatch, env, reference
from tvm_gdn.errors import ArgumentTypeError, KernelError, TvmGdnError
from tvm_gdn.spec import Axis, Geometry, OpSpec, Output, Scalar, Tensor
from tvm_gdn.target import dispatch_keys

_LIBRARY = torch.library.Library("tvm_gdn", "DEF")
_log = logging.getLogger("tvm_gdn")


def _parameters(spec: OpSpec) -> str:
    parts = []
    for arg in spec.inputs:
        if isinstance(arg, Tensor):
            parts.append(f"{arg.name}=None" if arg.optional else arg.name)
        else:
            parts.append(arg.name if arg.default is ... else f"{arg.name}={arg.default!r}")
    return ", ".join(parts)


def _by_layout(spec: OpSpec, text: Callable[[dict[str, Any]], str], geometry: Geometry | None = None) -> str:
    """Python expression of what `text` writes for each layout of an operator's arguments; the call's arguments choose.

    Where the geometry of the calls is known it has chosen already, as far as it can.
    """
    tensors = {tensor.name for tensor in spec.tensors}

    def choose(conditions: tuple[str, ...], args: dict[str, Any]) -> str:
        if not conditions:
            return text(args)
        first, *rest = conditions
        if geometry is not None and (first in tensors or first in geometry.attr):
            return choose(tuple(rest), {**args, first: first in geometry.dtype or bool(geometry.attr.get(first))})
        yes, no = (choose(tuple(rest), {**args, first: flag}) for flag in (True, False))
        return yes if yes == no else f"({yes} if {first}{' is not None' if first in tensors else ''} else {no})"

    return choose(spec.conditions, {})


def _axis_expression(spec: OpSpec, axis: str, args: dict[str, Any], geometry: Geometry | None = None) -> str:
    """Python expression for a size from the arguments of the generated function, in one layout."""
    size = Axis.parse(axis)
    if not size.name:
        return str(size.plus)
    if geometry is not None and size.name in geometry.axis:
        return str(size.size(geometry.axis))
    if size.name in {scalar.name for scalar in spec.scalars}:
        return size.expression(size.name)
    sources, order = spec.axis_sources(size.name, args), dict(spec.derived).get(size.name, ())
    if not sources and not order:
        raise KeyError(f"{spec.name}: no argument has the axis {size.name}")
    text = _axis_expression(spec, order[-1], args) if order else "0"
    for tensor, position in reversed(sources):
        found = Axis.parse(tensor.axis_names(args)[position]).named_expression(f"{tensor.name}.shape[{position}]")
        text = f"({found} if {tensor.name} is not None else {text})" if tensor.optional else found
    return size.expression(text)


def _dtype_expression(spec: OpSpec, output: Output, geometry: Geometry | None) -> str:
    if output.like in check.TORCH_DTYPES:
        return output.like
    source = next(tensor for tensor in spec.tensors if tensor.dtype_role == output.like)
    if geometry is not None:
        return geometry.dtype.get(source.name, output.fallback)
    if not source.optional:
        return f"{source.name}.dtype"
    return f"({output.fallback} if {source.name} is None else {source.name}.dtype)"


def _tuple(parts: list[str]) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"


def _allocation(spec: OpSpec, output: Output, geometry: Geometry | None) -> str:
    """Expression that allocates an output; sizes that are read get names, because strides are made of them."""
    first = next(t.name for t in spec.tensors if not t.optional)
    dtype = _dtype_expression(spec, output, geometry)
    if output.strides_of:
        like = next(tensor for tensor in spec.tensors if tensor.name == output.strides_of)
        # Naming a dtype costs a quarter of the call.
        return f"empty_like({like.name}{'' if like.dtype_role == output.like else f', dtype={dtype}'})"

    def text(shape: list[str], strides: list[str]) -> str:
        return f"empty({first}, {_tuple(shape)}, {_tuple(strides)}, {dtype})"

    def made(args: dict[str, Any]) -> str:
        texts = [_axis_expression(spec, axis, args, geometry) for axis in output.axis_names(args)]
        sizes = [text if text.isdigit() else f"n{position}" for position, text in enumerate(texts)]
        shape = [text if text == size else f"{size} := {text}" for text, size in zip(texts, sizes, strict=True)]
        inner = [[size for size in sizes[position:] if size != "1"] for position in range(1, len(sizes) + 1)]
        return text(shape, [" * ".join(factors) or "1" for factors in inner])

    given, none = _by_layout(spec, made, geometry), text(["0"], ["1"])
    if geometry is None:
        return f"{given} if {output.when} else {none}" if output.when else given
    return given if not output.when or geometry.attr[output.when] else none


def _allocations(spec: OpSpec, geometry: Geometry | None = None) -> list[str]:
    """Lines that allocate the outputs; where the geometry of the calls is known they read no more than its tensors' sizes."""
    return [f"{output.name} = {_allocation(spec, output, geometry)}" for output in spec.outputs]


def _new_empty(like: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on another's device, as torch says it; `strides` are those of `shape`."""
    del strides
    return like.new_empty(shape, dtype=dtype)


def _allocator(device: str) -> Callable[..., torch.Tensor]:
    """What allocates outputs on a device type: the function of torch's own generated code, in half of `_new_empty`'s time."""
    made = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), f"_empty_strided_{device}", None)
    deterministic = getattr(torch._C, "_get_deterministic_algorithms", None)
    if made is None or deterministic is None:
        return _new_empty

    def empty(like: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # In deterministic mode torch fills new memory with NaN, that function does not; parity relies on it. Without elements its
        # strides are others than those of sizes.
        if deterministic() or 0 in shape:
            return _new_empty(like, shape, strides, dtype)
        output = made(shape, strides, dtype)
        # It allocates on the current device, which need not be the tensors'.
        return output if output.get_device() == like.get_device() else _new_empty(like, shape, strides, dtype)

    return empty


def _returned(spec: OpSpec) -> str:
    names = ", ".join(output.name for output in spec.outputs)
    return names if len(spec.outputs) == 1 else f"({names})"


def _key_expression(spec: OpSpec) -> str:
    parts = [_by_layout(spec, lambda args: _axis_expression(spec, axis, args)) for axis in spec.static_axes]  # noqa: B023
    for tensor in spec.tensors:
        parts.append(f"None if {tensor.name} is None else {tensor.name}.dtype" if tensor.optional else f"{tensor.name}.dtype")
    parts.extend(spec.static_attrs)
    return _tuple(parts)


def _define(source: str, name: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    namespace = {**check.TORCH_DTYPES, "empty_like": torch.empty_like, **namespace}
    exec(compile(source, f"<tvm_gdn {name}>", "exec"), namespace)  # noqa: S102 - source is written from SPEC above
    return namespace[name]


def fake_function(spec: OpSpec) -> Callable[..., Any]:
    """Shape function of an operator: allocates its outputs, after refusing what no kernel could serve."""
    tensors = ", ".join(f"{tensor.name}={tensor.name}" for tensor in spec.tensors)
    # torch takes the meta device's implementation, this one, as soon as one of the tensors is there.
    body = "\n    ".join([f"one_device(spec, dict({tensors}))", *_allocations(spec), f"return {_returned(spec)}"])
    namespace = {"one_device": check.one_device, "spec": spec, "empty": _new_empty}
    return _define(f"def fake({_parameters(spec)}):\n    {body}\n", "fake", namespace)


def allocation_function(spec: OpSpec, device: str) -> Callable[..., Any]:
    """Function of the operator's arguments, on a device type, that allocates outputs as a call does, and no more."""
    body = "\n    ".join([*_allocations(spec), f"return {_returned(spec)}"])
    return _define(f"def allocate({_parameters(spec)}):\n    {body}\n", "allocate", {"empty": _allocator(device)})


def call_function(spec: OpSpec, geometry: Geometry, kernel: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Function of the operator's arguments, on a device type, that allocates outputs and runs a geometry's loaded kernel."""
    present = geometry.dtype.keys() | {name for name, value in geometry.attrs if value}
    names, constants = [], {}
    for arg in spec.inputs:
        if isinstance(arg, Scalar):
            if arg.passed and not arg.static:
                names.append(arg.name)
                if arg.resolve is not None:
                    constants[f"default_{arg.name}"] = arg.resolve(geometry.axis)
                    names[-1] = f"default_{arg.name} if {arg.name} is None else {arg.name}"
        elif arg.name in present:
            names.append(arg.name)
    names += [o.name for o in spec.outputs if not o.when or o.when in present]
    # A kernel cannot see that memory is read-only; main memory may be.
    guards = [
        f"if {tensor.name}.data_ptr() not in writable: refuse_or_learn({tensor.name})"
        for tensor in spec.tensors
        if tensor.mutated and tensor.name in present and device == "cpu"
    ]
    body = "\n    ".join([*guards, *_allocations(spec, geometry), f"kernel({', '.join(names)})", f"return {_returned(spec)}"])
    namespace = {"kernel": kernel, "empty": _allocator(device), **constants}
    namespace |= {"writable": check.WRITABLE, "refuse_or_learn": check.refuse_or_learn}
    return _define(f"def call({_parameters(spec)}):\n    {body}\n", "call", namespace)


def reference_function(spec: OpSpec) -> Callable[..., Any]:
    """Function of the operator's arguments that checks them, as a kernel would, and runs the torch reference."""
    names = [arg.name for arg in spec.inputs]
    defaults = {arg.name: None if isinstance(arg, Tensor) else arg.default for arg in spec.inputs}
    fake = fake_function(spec)

    def call(*values: Any) -> Any:
        args = {**defaults, **dict(zip(names, values, strict=False))}
        check.validate(spec, args)
        result = getattr(reference, spec.name)(**spec.for_reference(args))
        if len(spec.outputs) == 1:
            return result
        # A torch operator cannot return None: an output that was not asked for is empty, as in the compiled path.
        return tuple(given if value is None else value for value, given in zip(result, fake(*values), strict=True))

    return call


def _implementation(spec: OpSpec, device: str) -> Callable[..., Any]:
    names = [arg.name for arg in spec.inputs]

    def resolve(key: tuple[Any, ...], values: tuple[Any, ...]) -> Callable[..., Any]:
        args = dict(zip(names, values, strict=True))
        check.validate(spec, args)
        geometry = check.geometry_of(spec, args)
        served = dispatch.lookup(spec, geometry, device)
        function = reference_function(spec) if served.kernel is None else call_function(spec, geometry, served.kernel, device)
        table[key] = function
        return function

    told: set[str] = set()

    def explain(error: Exception, values: tuple[Any, ...]) -> Any:
        # Who catches that memory ran out must see torch's own class.
        if isinstance(error, (TvmGdnError, torch.OutOfMemoryError)):
            raise error
        check.validate(spec, dict(zip(names, values, strict=True)))
        if any(isinstance(value, torch.Tensor) and not value.numel() for value in values):
            # Kernels take no tensor whose strides are other than its sizes say; torch gives such to tensors without elements.
            if spec.name not in told:
                told.add(spec.name)
                _log.warning("%s runs on the torch reference where a tensor has no elements", spec.name)
            return reference_function(spec)(*values)
        raise KernelError(f"{spec.name}: the kernel refused the call: {error}") from error

    def checked(values: tuple[Any, ...]) -> None:
        check.validate(spec, dict(zip(names, values, strict=True)))

    arguments = ", ".join(names)
    # A kernel cannot see that a pool requires grad; the host part of a CPU kernel sees everything else.
    suspicious = [f"{t.name} is not None and {t.name}.requires_grad" for t in spec.tensors if t.mutated]
    suspicious += [] if device == "cpu" else ["checks"]
    before = f"        if {' or '.join(suspicious)}: checked(({arguments},))\n" if suspicious else ""
    source = (
        f"def implementation({_parameters(spec)}):\n"
        f"    try:\n"
        f"{before}        key = {_key_expression(spec)}\n"
        f"        function = table.get(key) or resolve(key, ({arguments},))\n"
        f"        return function({arguments})\n"
        f"    except Exception as error:\n"
        f"        return explain(error, ({arguments},))\n"
    )
    table: dict[tuple[Any, ...], Callable[..., Any]] = {}
    # Reading the environment costs as much as allocating an output, so what it says holds until the next reset.
    checks: list[bool] = []

    def reset() -> None:
        table.clear()
        checks[:] = [True] if env.checks_enabled() else []

    reset()
    dispatch.on_reset(reset)
    namespace = {"table": table, "resolve": resolve, "explain": explain, "checked": checked, "checks": checks}
    return _define(source, "implementation", namespace)


def _refusing(spec: OpSpec) -> Callable[..., Any]:
    """What runs where no implementation does: without any tensor, and on devices of no target."""

    def refuse(*values: Any) -> Any:
        args = dict(zip((arg.name for arg in spec.inputs), values, strict=False))
        check.validate(spec, args)
        name, device = next((n, x.device) for n, x in args.items() if isinstance(x, torch.Tensor))
        raise ArgumentTypeError(f"{spec.name}: {name} is on {device}; allowed: {', '.join(dispatch_keys())}")

    return refuse


def register(spec: OpSpec) -> None:
    """Define ``torch.ops.tvm_gdn.<name>`` with its fake kernel and one implementation per device type."""
    _LIBRARY.define(spec.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    implementations = {device: _implementation(spec, device) for device in dispatch_keys()}
    for device, key in dispatch_keys().items():
        _LIBRARY.impl(spec.name, implementations[device], key)
    _LIBRARY.impl(spec.name, _refusing(spec), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tvm_gdn::{spec.name}", fake_function(spec), lib=_LIBRARY)
    direct.register(spec, _parameters(spec), implementations)
