"""What an operator is, stated once: names, axes, dtypes, attributes, cases and tolerances.

Everything else reads this: the torch schema and the fake kernel, the argument checks, the geometry that a compiled kernel
is keyed on, the inputs of parity tests, benchmarks and tuning, the command line's listing.

An axis is *static* (compiled into the kernel: ``K``, ``V``) or *symbolic* (any size at run time: batch, tokens, heads, slots).
A :class:`Geometry` is what one compiled kernel serves: the static axes, the dtype of every tensor that is present, and the
static attributes. Two calls of one geometry share a kernel whatever their batch, tokens, heads and pool size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "int64")


@dataclass(frozen=True)
class Tensor:
    """One tensor argument.

    Parameters
    ----------
    name : str
        Name in the public signature.
    axes : str
        Axis names, outermost first.
    role : str, optional
        Tensors of one role share one dtype. Default: the tensor's own name.
    dtypes : tuple of str
        Allowed storage dtypes.
    optional : bool
        Whether ``None`` is allowed.
    mutated : bool
        Whether the operator writes to it.
    strides : {"inner", "any", "outer", "dense"}
        Which strides the kernel takes: the last axis contiguous, any, all but the first axis contiguous, all contiguous.
    values : str
        What it holds, so that cases can draw it (see `cases.py`).
    axes_v_first : str, optional
        Axis names when the attribute ``state_v_first`` is true.
    """

    name: str
    axes: str
    role: str = ""
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False
    mutated: bool = False
    strides: str = "inner"
    values: str = "normal"
    axes_v_first: str = ""

    @property
    def dtype_role(self) -> str:
        """Name under which tensors share a dtype."""
        return self.role or self.name

    def axis_names(self, attrs: Mapping[str, Any]) -> tuple[str, ...]:
        """Axis names under the attributes of a call."""
        swapped = bool(self.axes_v_first) and bool(attrs.get("state_v_first"))
        return tuple((self.axes_v_first if swapped else self.axes).split())


@dataclass(frozen=True)
class Scalar:
    """One scalar argument.

    Parameters
    ----------
    name : str
        Name in the public signature.
    type : {"float", "int", "bool"}
        Its torch schema type.
    default : float, int, bool, None or ...
        ``...`` means required.
    static : bool
        Compiled into the kernel instead of passed to it.
    passed : bool
        Whether the kernel takes it (a scalar that only the shim or the outputs need is not passed).
    resolve : callable, optional
        ``resolve(static_axes)`` gives the value that stands for ``None``.
    """

    name: str
    type: str
    default: Any = ...
    static: bool = False
    passed: bool = True
    resolve: Callable[[Mapping[str, int]], float] | None = None


@dataclass(frozen=True)
class Output:
    """One tensor that the operator allocates and returns.

    Parameters
    ----------
    name, axes, axes_v_first : str
        As in `Tensor`.
    like : str
        Role whose dtype it has; ``"float32"`` and such name a dtype directly.
    fallback : str
        The dtype where no tensor of the role `like` is present.
    when : str, optional
        Name of a bool scalar; where that is false the output is an empty tensor.
    """

    name: str
    axes: str
    like: str
    fallback: str = "float32"
    when: str = ""
    axes_v_first: str = ""

    def axis_names(self, state_v_first: bool) -> list[str]:
        """Axis names in either state layout."""
        return (self.axes_v_first if state_v_first and self.axes_v_first else self.axes).split()


@dataclass(frozen=True)
class Geometry:
    """What one compiled kernel serves: static axes, dtypes of the tensors present, static attributes."""

    axes: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, str], ...]
    attrs: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def axis(self) -> dict[str, int]:
        """Static axis sizes by name."""
        return dict(self.axes)

    @cached_property
    def dtype(self) -> dict[str, str]:
        """Dtypes of the tensors that are present, by argument name."""
        return dict(self.dtypes)

    @cached_property
    def attr(self) -> dict[str, Any]:
        """Static attributes by name."""
        return dict(self.attrs)

    @cached_property
    def key(self) -> str:
        """Canonical text: the same geometry has the same key in every process and version of Python."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain data for manifests and records."""
        return {"axes": dict(self.axes), "dtypes": dict(self.dtypes), "attrs": dict(self.attrs)}

    @staticmethod
    def from_json(data: Mapping[str, Mapping[str, Any]]) -> Geometry:
        """Inverse of `to_json`."""
        return Geometry(
            axes=tuple((name, int(size)) for name, size in data["axes"].items()),
            dtypes=tuple(data["dtypes"].items()),
            attrs=tuple(data["attrs"].items()),
        )

    def __str__(self) -> str:
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64"}
        axes = " ".join(f"{name}={size}" for name, size in self.axes)
        dtypes = " ".join(f"{name}:{short.get(dtype, dtype)}" for name, dtype in self.dtypes)
        attrs = " ".join(name for name, value in self.attrs if value)
        return " ".join(part for part in (axes, dtypes, attrs) if part)


@dataclass(frozen=True)
class OpSpec:
    """An operator.

    Parameters
    ----------
    name : str
        Public name; ``torch.ops.tvm_gdn.<name>``.
    summary : str
        One line for listings.
    algorithm : str
        The TIR builder that makes its kernels, as ``"module:function"``; schedules are registered for it.
    inputs : tuple of Tensor or Scalar
        Arguments in the order of the torch schema.
    outputs : tuple of Output
        Returned tensors in order.
    static_axes : tuple of str
        Axes compiled into a kernel.
    traits : tuple of (str, value)
        Static attributes that every geometry of the operator has: what tells it from others of the same algorithm.
    cases : tuple of mapping
        Shapes, dtypes and options on which parity runs (see `cases.py`).
    bench : tuple of mapping
        Shapes that `tvm_gdn bench` and `tvm_gdn tune` measure.
    check : callable, optional
        ``check(args, sizes)`` raises `ArgumentError` for rules that shapes and dtypes cannot state.
    cost : callable, optional
        ``cost(sizes, geometry)`` gives ``(bytes, flops)``: the least a call must move and compute.
    tolerance : mapping
        RMS error ratio against the float64 reference, by storage dtype.
    """

    name: str
    summary: str
    algorithm: str
    inputs: tuple[Tensor | Scalar, ...]
    outputs: tuple[Output, ...]
    static_axes: tuple[str, ...]
    traits: tuple[tuple[str, Any], ...] = ()
    cases: tuple[Mapping[str, Any], ...] = ()
    bench: tuple[Mapping[str, Any], ...] = ()
    check: Callable[[Mapping[str, Any], Mapping[str, int]], None] | None = None
    cost: Callable[[Mapping[str, int], Geometry], tuple[int, int]] | None = None
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1e-5, "float16": 2e-3, "bfloat16": 5e-3, "state_bfloat16": 2e-3}
    )

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor arguments, in order."""
        return tuple(arg for arg in self.inputs if isinstance(arg, Tensor))

    @cached_property
    def scalars(self) -> tuple[Scalar, ...]:
        """The scalar arguments, in order."""
        return tuple(arg for arg in self.inputs if isinstance(arg, Scalar))

    @cached_property
    def static_attrs(self) -> tuple[str, ...]:
        """Names of the scalars that are compiled into a kernel."""
        return tuple(arg.name for arg in self.scalars if arg.static)

    def axis_source(self, axis: str, attrs: Mapping[str, Any], present: frozenset[str] | None = None) -> tuple[str, int]:
        """Name of an argument that has the axis, and the position there; required arguments first."""
        for required in (True, False):
            for arg in self.tensors:
                if arg.optional == required or (present is not None and arg.name not in present):
                    continue
                names = arg.axis_names(attrs)
                if axis in names:
                    return arg.name, names.index(axis)
        raise KeyError(f"{self.name}: no argument has the axis {axis}")

    def schema(self) -> str:
        """The torch schema of the operator."""
        parts = []
        marks = iter("abcdefgh")
        for arg in self.inputs:
            optional = "?" if (isinstance(arg, Tensor) and arg.optional) else ""
            if isinstance(arg, Tensor):
                kind = f"Tensor({next(marks)}!){optional}" if arg.mutated else f"Tensor{optional}"
                default = "=None" if arg.optional else ""
            else:
                kind = arg.type + ("?" if arg.default is None else "")
                default = "" if arg.default is ... else f"={arg.default}"
            parts.append(f"{kind} {arg.name}{default}")
        returns = ", ".join("Tensor" for _ in self.outputs)
        return f"{self.name}({', '.join(parts)}) -> {returns if len(self.outputs) == 1 else f'({returns})'}"
