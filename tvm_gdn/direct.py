"""Calls past torch's dispatcher, where it has nothing to do: eager calls on plain tensors that no gradient is asked of.

The dispatcher takes a call's arguments apart and puts them together again, which costs a decode step on a GPU a quarter of its
time. Whatever it is needed for goes through it: compilation, tracing, modes, transforms, the profiler, subclasses of tensors,
gradients, and arguments of other types than the schema's, which it converts or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from tvm_gdn.autograd import forward_only
from tvm_gdn.errors import ArgumentTypeError
from tvm_gdn.spec import OpSpec, Scalar, Tensor

#: Per operator the function to call, with the operator's own arguments.
call = SimpleNamespace()

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_SCALARS = {"float": (float,), "int": (int,), "bool": (bool,), "str": (str,)}
#: How torch refuses a value that it cannot convert to the schema's type.
_REFUSED = re.compile(r"Expected a value of type .* for argument '(\w+)' but instead found")


def _questions() -> dict[str, Callable[[], Any]]:
    """What is asked of torch before every call; nothing where this version of torch lacks one of them."""
    functorch = getattr(torch._C, "_functorch", None)
    found = {
        # Dynamo alone: whatever else compiles or exports does it in a mode. Half the time of `is_compiling`.
        "compiling": getattr(torch.compiler, "is_dynamo_compiling", None),
        "tracing": getattr(torch._C, "_is_tracing", None),
        "transforms": getattr(functorch, "peek_interpreter_stack", None),
        "modes": getattr(torch._C, "_len_torch_dispatch_stack", None),
        "functions": getattr(torch._C, "_is_torch_function_mode_enabled", None),
        "profiling": getattr(torch.autograd, "_profiler_enabled", None),
    }
    return {} if None in found.values() else found  # type: ignore[return-value]


def _plain(spec: OpSpec) -> str:
    """Condition that all arguments have the schema's own types."""
    parts = []
    for arg in spec.inputs:
        test = f"type({arg.name}) in {'tensor' if isinstance(arg, Tensor) else arg.type}s"
        optional = arg.optional if isinstance(arg, Tensor) else arg.default is None
        parts.append(f"({arg.name} is None or {test})" if optional else test)
    return " and ".join(parts)


def _by_device(tensor: str, devices: Collection[str]) -> str:
    """Expression of the implementation for a tensor's device, by torch's flags: a type's name costs ten times as much."""
    flags = [
        f"implementations['{device}'] if {tensor}.is_{device}" for device in devices if hasattr(torch.Tensor, f"is_{device}")
    ]
    return " else ".join([*flags, f"implementations.get({tensor}.device.type)"])


def _wanted(arg: Tensor | Scalar) -> str:
    if isinstance(arg, Tensor):
        return f"a torch.Tensor{' or None' if arg.optional else ''}"
    if arg.choices:
        return f"one of {', '.join(repr(given) for given, _ in arg.choices)}"
    return f"{'an int' if arg.type == 'int' else f'a {arg.type}'}{' or None' if arg.default is None else ''}"


def _converting(spec: OpSpec, operator: Callable[..., Any]) -> Callable[..., Any]:
    """Leave it to torch what it converts, and say in our words what it does not."""
    places = {arg.name: (position, arg) for position, arg in enumerate(spec.inputs)}

    def call(*values: Any) -> Any:
        try:
            return operator(*values)
        except RuntimeError as error:
            refused = _REFUSED.search(str(error))
            if refused is None or refused[1] not in places:
                raise
            position, arg = places[refused[1]]
            value = values[position]
            shown = repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
            raise ArgumentTypeError(f"{spec.name}: {arg.name} is {shown[:80]}; pass {_wanted(arg)}") from None

    return call


def register(spec: OpSpec, parameters: str, implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Write out an operator's function from its SPEC.

    Parameters
    ----------
    spec : OpSpec
        The operator, which torch knows already.
    parameters : str
        Its Python parameters with their defaults.
    implementations : mapping
        Functions of the operator's arguments by torch device type.
    """
    operator = forward_only(spec.name, getattr(torch.ops.tvm_gdn, spec.name))
    questions = _questions()
    if not questions:
        setattr(call, spec.name, operator)
        return
    names = ", ".join(arg.name for arg in spec.inputs)
    first = next(tensor.name for tensor in spec.tensors if not tensor.optional)
    gradients = " or ".join(
        f"({tensor.name} is not None and {tensor.name}.requires_grad)" if tensor.optional else f"{tensor.name}.requires_grad"
        for tensor in spec.tensors
    )
    source = (
        f"def direct({parameters}):\n"
        f"    if compiling() or modes() or functions() or profiling() or tracing() or transforms() is not None:\n"
        f"        return operator({names})\n"
        f"    if {_plain(spec)}:\n"
        f"        implementation = {_by_device(first, implementations)}\n"
        f"        if implementation is None or (grad_enabled() and ({gradients})):\n"
        f"            return operator({names})\n"
        f"        return implementation({names})\n"
        f"    return converting({names})\n"
    )
    namespace: dict[str, Any] = {
        **questions,
        "operator": operator,
        "converting": _converting(spec, operator),
        "implementations": dict(implementations),
        "tensors": _TENSORS,
        "grad_enabled": torch.is_grad_enabled,
        **{f"{name}s": kinds for name, kinds in _SCALARS.items()},
    }
    exec(compile(source, f"<tvm_gdn direct {spec.name}>", "exec"), namespace)  # noqa: S102 - written from SPEC above
    setattr(call, spec.name, namespace["direct"])
