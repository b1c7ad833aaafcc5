"""What an operator is, stated once: names, axes, dtypes, attributes, cases and tolerances.

Everything else reads this: the torch schema and the fake kernel, the argument checks, the geometry that a compiled kernel
is keyed on, the inputs of parity tests, benchmarks and tuning, the command line's listing.

An axis is *static* (compiled into the kernel: ``K``, ``V``) or *symbolic* (any size at run time: batch, tokens, heads, slots).
A :class:`Geometry` is what one compiled kernel serves: the static axes, the dtype of every tensor that is present, and the
static attributes. Two calls of one geometry share a kernel whatever their batch, tokens, heads and pool size.

Sizes are written as a name, a number, or a name with a factor, a divisor and an offset: ``HV``, ``1``, ``N+1``, ``W-1``,
``2*I``, ``D/2``. The name is an axis of some tensor argument or, in outputs, an int scalar (``top_k``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "int64")
#: Bytes of an element, where a call's floor counts them.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8}
#: Storage of packed quantized data.
BYTES = ("int8", "uint8")

_AXIS = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?:/(\d+))?([+-]\d+)?")


@dataclass(frozen=True)
class Axis:
    """A size as a SPEC writes it: ``times * name / over + plus``; a plain number has no name."""

    name: str
    times: int = 1
    over: int = 1
    plus: int = 0

    @staticmethod
    @cache
    def parse(text: str) -> Axis:
        """Read ``HV``, ``N+1``, ``2*I``, ``D/2`` or ``1``."""
        if text.isdigit():
            return Axis("", plus=int(text))
        match = _AXIS.fullmatch(text)
        if match is None:
            raise ValueError(f"axis {text!r}: write a name, a number, or 2*NAME/2+1")
        times, name, over, plus = match.groups()
        return Axis(name, int(times or 1), int(over or 1), int(plus or 0))

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size, given those of the named axes."""
        return (self.times * sizes[self.name] // self.over if self.name else 0) + self.plus

    def named(self, size: int) -> int | None:
        """Size of the named axis, given this one's; None where none fits."""
        whole = (size - self.plus) * self.over
        return whole // self.times if whole >= 0 and whole % self.times == 0 else None

    def expression(self, name: str) -> str:
        """Python text of the size, given that of the named axis's."""
        text = name if self.times == 1 else f"{self.times} * {name}"
        text = text if self.over == 1 else f"{text} // {self.over}"
        return text if self.plus == 0 else f"{text} + {self.plus}"

    def named_expression(self, size: str) -> str:
        """Python text of the named axis's size, given that of this one."""
        text = size if self.plus == 0 else f"({size} - {self.plus})"
        text = text if self.over == 1 else f"{text} * {self.over}"
        return text if self.times == 1 else f"{text} // {self.times}"


@dataclass(frozen=True)
class Draw:
    """What is known when a case draws one tensor.

    Parameters
    ----------
    shape : tuple of int
        The tensor's.
    sizes : mapping
        Axis sizes of the case.
    case : mapping
        The case.
    rng : torch.Generator
        Where random numbers come from.
    arguments : mapping
        Arguments that stand before this one in the SPEC, drawn already.
    """

    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    case: Mapping[str, Any]
    rng: Any
    arguments: Mapping[str, Any]


def named_sizes(case: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes that a case states: its keys in capital letters."""
    return {name: value for name, value in case.items() if name.isupper() and isinstance(value, int)}


def holds(args: Mapping[str, Any], name: str) -> bool:
    """Whether an argument is given: a tensor that is there, a switch that is on."""
    value = args.get(name)
    return value is not None and value is not False


def _names(axes: str, other: tuple[str, str] | None, args: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple((other[1] if other and holds(args, other[0]) else axes).split())


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
    strides : {"inner", "any", "outer", "outer2", "dense"}
        Which strides the kernel takes: the last axis contiguous, any, all but the first axis contiguous, all but the first two,
        all contiguous.
    values : callable, optional
        ``values(draw)`` gives the tensor of a case (of any dtype: it is converted), from a `Draw`; default: normal values.
    usual : str
        Its dtype in cases that do not say; default: the case's ``dtype``, or the first that is allowed.
    axes_if : (str, str), optional
        Name of another argument, and the axis names where that is given (a tensor) or true (a switch).
    """

    name: str
    axes: str
    role: str = ""
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False
    mutated: bool = False
    strides: str = "inner"
    # Not in the repr, from which a kernel's digest is made: what cases draw is no part of a kernel.
    values: Callable[[Draw], Any] | None = field(default=None, repr=False)
    usual: str = field(default="", repr=False)
    axes_if: tuple[str, str] | None = None

    @property
    def dtype_role(self) -> str:
        """Name under which tensors share a dtype."""
        return self.role or self.name

    def axis_names(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Axis names under the arguments of a call."""
        return _names(self.axes, self.axes_if, args)


@dataclass(frozen=True)
class Scalar:
    """One scalar argument.

    Parameters
    ----------
    name : str
        Name in the public signature.
    type : {"float", "int", "bool", "str"}
        Its torch schema type.
    default : float, int, bool, str, None or ...
        ``...`` means required.
    static : bool
        Compiled into the kernel instead of passed to it.
    passed : bool
        Whether the kernel takes it (a scalar that only the shim or the outputs need is not passed).
    resolve : callable, optional
        ``resolve(static_axes)`` gives the value that stands for ``None``.
    choices : tuple of (value, value)
        The values that are allowed, each with what it means: ``(("silu", "silu"), ("swish", "silu"), (None, "none"))``. A
        geometry holds the meaning.
    drawn : float, int, bool, str, optional
        Value of a required scalar in cases that do not say.
    """

    name: str
    type: str
    default: Any = ...
    static: bool = False
    passed: bool = True
    resolve: Callable[[Mapping[str, int]], float] | None = None
    choices: tuple[tuple[Any, Any], ...] = ()
    drawn: Any = field(default=None, repr=False)

    @property
    def usual(self) -> Any:
        """Value in cases that do not say."""
        return self.drawn if self.default is ... else self.default

    def meaning(self, value: Any) -> Any:
        """What a value means, as a geometry holds it."""
        if self.choices:
            return dict(self.choices)[value]
        return bool(value) if self.type == "bool" else value


@dataclass(frozen=True)
class Output:
    """One tensor that the operator allocates and returns.

    Parameters
    ----------
    name, axes, axes_if
        As in `Tensor`; no axes: a single number.
    like : str
        Role whose dtype it has; ``"float32"``, ``"int32"`` and such name a dtype directly.
    fallback : str
        The dtype where no tensor of the role `like` is present.
    when : str, optional
        Name of a bool scalar; where that is false the output is an empty tensor.
    strides_of : str, optional
        Name of a required tensor of the same shape, whose order of strides it has.
    """

    name: str
    axes: str
    like: str
    fallback: str = "float32"
    when: str = ""
    axes_if: tuple[str, str] | None = None
    strides_of: str = ""

    def axis_names(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Axis names under the arguments of a call."""
        return _names(self.axes, self.axes_if, args)


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
        attrs = " ".join(name if value is True else f"{name}={value}" for name, value in self.attrs if value is not False)
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
        The TIR builder that makes its kernels: a module of `ops/tir` and the function of the same name in it; schedules are
        registered for it.
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
        RMS error ratio against the float64 reference by storage dtype, or by role and dtype (``"state_bfloat16"``), which
        wins. Integers must be equal.
    derived : tuple of (str, tuple of str)
        Axes that no required tensor has: ``("N", ("cu_seqlens", "B"))`` takes N from `cu_seqlens` where that is given, else
        from the axis B.
    sizes : callable, optional
        ``sizes(case)`` gives the sizes of every named axis; default: the capital letters of the case.
    shaping : tuple of str
        Keys of cases, beside static axes and attributes, that decide which kernel runs: what `sizes` computes static axes from.
    smallest : mapping
        Sizes of the smallest call that makes sense; axes that it does not name are 1 then.
    steady : callable, optional
        ``steady(arguments)`` changes drawn arguments in place so that a thousand calls on them stay in range.
    reference_arguments : callable, optional
        ``reference_arguments(arguments)`` gives the arguments of the operator's reference by name; default: the same.
    storage_matters_with : str, optional
        Name of an argument that makes the dtype of a mutated tensor part of the result: what is written is read again.
    second : OpSpec, optional
        Another operator that computes the same of the same arguments, by an algorithm that needs less. Where a target has no plan
        of this operator's own algorithm for a geometry, that one's kernel serves under this one's name, and says so.
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
    derived: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sizes: Callable[[Mapping[str, Any]], dict[str, int]] | None = None
    shaping: tuple[str, ...] = ()
    smallest: Mapping[str, int] = field(default_factory=dict)
    steady: Callable[[dict[str, Any]], None] | None = None
    reference_arguments: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    storage_matters_with: str = ""
    second: OpSpec | None = field(default=None, repr=False)

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

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """Names of the arguments on which axis names depend."""
        layouts = [*(tensor.axes_if for tensor in self.tensors), *(output.axes_if for output in self.outputs)]
        return tuple(dict.fromkeys(layout[0] for layout in layouts if layout))

    def axis_sources(self, axis: str, args: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
        """Arguments that have an axis, and its position there, in the order in which they are asked; required ones first.

        The layout of `args` decides which axes a tensor has; whether one is given is for the caller to see.
        """
        order = dict(self.derived).get(axis)
        found = []
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.optional):
            for position, text in enumerate(tensor.axis_names(args)):
                if Axis.parse(text).name == axis and (order is None or tensor.name in order):
                    found.append((tensor, position))
                    break
        return found

    def for_reference(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the operator's reference by name, from those of the torch operator."""
        return dict(args if self.reference_arguments is None else self.reference_arguments(args))

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
                kind = arg.type + ("?" if None in (arg.default, *(given for given, _ in arg.choices)) else "")
                value = json.dumps(arg.default) if isinstance(arg.default, str) else arg.default
                default = "" if arg.default is ... else f"={value}"
            parts.append(f"{kind} {arg.name}{default}")
        returns = ", ".join("Tensor" for _ in self.outputs)
        return f"{self.name}({', '.join(parts)}) -> {returns if len(self.outputs) == 1 else f'({returns})'}"
