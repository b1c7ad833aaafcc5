"""Random calls for `fuzz.py`: call number i of a seed is always the same call.

A call is drawn on one of a few kernels (`fuzz_kernels.py`) with any sizes, strides, values and options. Two accounts of the
contract that share nothing judge it: `check.validate`, in Python, says whether it is allowed, and the float64 reference what
it computes. An allowed call must give those numbers and change nothing else; another must raise an error that names an
argument, and leave what it would have written to as it was. Some calls are broken in a way that is certain to be against the
contract, so that a rule that both forgot shows as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fuzz_kernels import Kernel
from torch.utils._python_dispatch import TorchDispatchMode

import tvm_gdn
from tvm_gdn import cases, check, parity, reference
from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Axis, OpSpec, Scalar, Tensor

#: Tensors that get no NaN or infinity, by algorithm (none: no tensor does). A chunk's products carry it to the chunk's earlier
#: tokens, and a tap of a convolution that is infinite meets zeros before the first token: the references do not.
_FINITE: dict[str, tuple[str, ...]] = {"chunk": (), "conv": ("weight",)}
_WRONG_DTYPES = (torch.float64, torch.int16, torch.bool, torch.complex64, torch.uint8, torch.int32, torch.float16)


class Call:
    """Call `index` of `seed`.

    Attributes
    ----------
    op : str
        The operator.
    arguments : dict
        What it gets.
    broken : str
        What is wrong with them; empty for a valid call.
    """

    def __init__(self, seed: int, index: int, kernels: tuple[Kernel, ...]) -> None:
        self.random = random.Random(f"{seed}/{index}")
        # Operators first, so that each gets as many calls as another.
        op = self.random.choice(list(dict.fromkeys(kernel.spec.name for kernel in kernels)))
        self.kernel = self.random.choice([kernel for kernel in kernels if kernel.spec.name == op])
        self.op, self.spec = op, self.kernel.spec
        self.broken = self._draw()
        # The functions in front of an operator take more shapes than it does: what they make of odd ones is judged at the
        # operator, or the operator is called itself.
        self.captured = self.odd_shape = False
        # What is wrong with a call that both the operator and the function in front of it must refuse.
        self.name = ""
        self._vary()
        if not self.broken and self.random.random() < 0.45:
            self._break()
        self.public = hasattr(tvm_gdn, op) and (self.captured or (not self.odd_shape and self.random.random() < 0.6))
        if self.public and not self.broken:
            self._one_token_batch()

    def _draw(self) -> str:
        """Draw arguments; what is wrong with them, if anything: sizes are drawn one by one, and not all go together."""
        patience, broken = (8 if self.random.random() < 0.9 else 1), "not drawn"
        while broken and patience > 0:
            try:
                self.arguments = cases.draw(self.spec, self._case(), seed=self.random.randrange(2**31))
            except (IndexError, RuntimeError):
                continue  # sizes of which not even arguments can be made
            broken, patience = self._refusal(), patience - 1
        return broken

    def _refusal(self) -> str:
        """Why the arguments are not allowed; empty where they are."""
        try:
            check.validate(self.spec, self.arguments)
        except (ArgumentError, ArgumentTypeError) as error:
            return f"{error}"
        return ""

    def _case(self) -> dict[str, Any]:
        pick = self.random.randint
        case = dict(self.kernel.case)
        for key in self.kernel.free:
            case[key] = pick(0, 4) if pick(0, 5) else pick(5, 9)
        if "T" in self.kernel.free and pick(0, 7) == 0:
            case |= {"T": pick(60, 140), **{key: pick(1, 2) for key in self.kernel.free if key in {"B", "H", "HV"}}}
        if "lengths" in case:
            longest = self.random.choice([5, 5, 5, 80])
            case["lengths"] = tuple(pick(0, longest) if pick(0, 4) else 1 for _ in range(pick(0, 4)))
            if pick(0, 9) == 0:
                case["lengths"] = (1,) * pick(2, 5)
        for word, values in self.kernel.words.items():
            case.pop(word, None)
            if pick(0, 1):
                case[word] = self.random.choice(values)
        for scalar in self.spec.scalars:
            if not scalar.static and scalar.name not in self.kernel.free:
                case[scalar.name] = self._scalar(scalar)
        return case

    def _scalar(self, scalar: Scalar) -> Any:
        usual = [scalar.usual] * 4
        if scalar.type == "bool":
            return self.random.choice([False, True])
        if scalar.type == "float":
            return self.random.choice([*usual, 1.0, 0.5, 2.0, *([-0.3, 0.0] if scalar.default is None else [])])
        return self.random.choice([*usual, *usual, -1, 0, 1, 3, -5, 2**31, -(2**40)])

    def _vary(self) -> None:
        """Other strides, alignments and values than `cases.draw` gives; the same numbers in another place of memory."""
        arguments, chance = self.arguments, self.random.random
        if arguments.get("g") is not None and chance() < 0.3:
            # Where a state grows (g > 0), a chunk's products amplify rounding by the growth within the chunk.
            chunked = self.spec.algorithm == "chunk"
            arguments["g"] *= self.random.choice([20.0, 0.0, *((100.0, -0.25) if chunked else (100.0, -0.5))])
        finite = _FINITE.get(self.spec.algorithm)
        if chance() < 0.05 and finite != ():
            tensors = [t.name for t in self._present() if t.name not in (finite or ()) and arguments[t.name].is_floating_point()]
            name = self.random.choice([*tensors, ""])
            if name and arguments[name].numel():
                spot = tuple(self.random.randrange(size) for size in arguments[name].shape)
                arguments[name][spot] = self.random.choice([math.nan, math.inf, -math.inf])
        for tensor in self._present():
            if chance() < 0.3:
                arguments[tensor.name] = self._moved(tensor, arguments[tensor.name])

    def _one_token_batch(self) -> None:
        """Sequences of one token as a batch, which the public functions of the delta rules take as well."""
        bounds = self.arguments.get("cu_seqlens")
        if bounds is not None and len(bounds) > 2 and set(bounds.diff().tolist()) == {1} and self.random.random() < 0.5:
            names = [tensor.name for tensor in self.spec.tensors if tensor.axes.startswith("B T ")]
            self.arguments |= {name: self.arguments[name].transpose(0, 1) for name in names}

    def _moved(self, tensor: Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same values with other strides or another alignment, as far as the SPEC allows."""
        free = {"any": value.ndim, "inner": value.ndim - 1, "outer": 1, "outer2": 2, "dense": 0}[tensor.strides]
        if not free:
            return torch.cat([value.reshape(-1)[:1], value.reshape(-1)])[1:].view(value.shape) if value.numel() else value
        axis = self.random.randrange(free)
        wide = value.dtype in {torch.int32, torch.int64}
        gap = torch.full_like(value, math.nan if value.is_floating_point() else -(2**30) if wide else 1)
        return torch.stack([value, gap], axis + 1).select(axis + 1, 0) if self.random.random() < 0.7 else (
            torch.cat([gap, value], axis).narrow(axis, value.shape[axis], value.shape[axis])
        )  # fmt: skip

    def _present(self) -> list[Tensor]:
        return [tensor for tensor in self.spec.tensors if self.arguments[tensor.name] is not None]

    def _break(self) -> None:
        certain = [
            self._dtype, self._device, self._no_tensor, self._required, self._strides, self._overlap, self._grad, self._choice,
        ]  # fmt: skip
        possible = [self._rank, self._size, self._shared_size, self._integer, self._integer, self._duplicate, self._number]
        ways: list[Callable[[], str]] = [*certain, *possible]
        self.random.shuffle(ways)
        for way in ways:
            before = dict(self.arguments)
            what = way()
            if not what:
                continue
            refusal = self._refusal()
            if not refusal and way in possible and not self._is_served():
                self.arguments = before
                continue
            # What is certainly wrong must be refused whatever the rules say; of the rest they decide.
            self.broken = what if way in certain else f"{what}: {refusal}" if refusal else ""
            self.name = self.name if way in certain else ""
            self.odd_shape = way in (self._rank, self._size, self._shared_size)
            self.captured = self.odd_shape and self.random.random() < 0.5
            return

    def _is_served(self) -> bool:
        return check.geometry_of(self.spec, self.arguments) == self.kernel.geometry

    def _replace(self, name: str, value: Any, what: str) -> str:
        self.arguments[name], self.name = value, name
        return f"{name}: {what}"

    def _any_tensor(self) -> tuple[Tensor, torch.Tensor]:
        tensor = self.random.choice(self._present())
        return tensor, self.arguments[tensor.name]

    def _dtype(self) -> str:
        tensor, value = self._any_tensor()
        shared = any(other is not tensor and other.dtype_role == tensor.dtype_role for other in self._present())
        wrong = [dtype for dtype in _WRONG_DTYPES if check.DTYPE_NAMES.get(dtype) not in tensor.dtypes]
        wrong += [dtype for dtype in map(check.TORCH_DTYPES.get, tensor.dtypes) if shared and dtype != value.dtype]
        return self._replace(tensor.name, value.to(self.random.choice(wrong)), "another dtype")

    def _device(self) -> str:
        tensor, value = self._any_tensor()
        return self._replace(tensor.name, value.to("meta"), "on the meta device") if len(self._present()) > 1 else ""

    def _no_tensor(self) -> str:
        tensor, value = self._any_tensor()
        return self._replace(tensor.name, self.random.choice(["text", 1.5, [1, 2], {}, value.shape]), "no tensor")

    def _required(self) -> str:
        # Without g the gated functions compute the plain delta rule.
        names = [tensor.name for tensor in self.spec.tensors if not tensor.optional and tensor.name != "g"]
        return self._replace(self.random.choice(names), None, "None")

    def _strides(self) -> str:
        tensor, value = self._any_tensor()
        if tensor.strides == "any" or value.shape[-1] < 2 or not value.numel():
            return ""
        return self._replace(tensor.name, torch.stack([value, value], -1)[..., 0], "last axis strided")

    def _overlap(self) -> str:
        names = [tensor.name for tensor in self._present() if tensor.mutated and self.arguments[tensor.name].shape[0] > 1]
        if not names:
            return ""
        name = self.random.choice(names)
        value = self.arguments[name]
        return self._replace(name, value[:1].expand(value.shape), "expanded") if value.numel() else ""

    def _grad(self) -> str:
        names = [tensor.name for tensor in self._present() if tensor.mutated and self.arguments[tensor.name].numel()]
        if not names:
            return ""
        name = self.random.choice(names)
        return self._replace(name, self.arguments[name].detach().clone().requires_grad_(), "requires grad")

    def _choice(self) -> str:
        names = [scalar.name for scalar in self.spec.scalars if scalar.choices]
        return self._replace(self.random.choice(names), "nonsense", "no such choice") if names else ""

    def _rank(self) -> str:
        tensor, value = self._any_tensor()
        more = self.random.random() < 0.5 or value.ndim == 0 or value.shape[0] == 0
        return self._replace(tensor.name, value[None] if more else value[0], "another rank")

    def _resized(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        size = value.shape[axis]
        changed = value.narrow(axis, 0, size - 1) if size and self.random.random() < 0.5 else (
            torch.cat([value, value.narrow(axis, 0, 1)], axis) if size else value.new_zeros(
                [1 if at == axis else extent for at, extent in enumerate(value.shape)]
            )
        )  # fmt: skip
        return changed.contiguous()

    def _size(self) -> str:
        """One element less or more on an axis of one tensor."""
        tensor, value = self._any_tensor()
        if not value.ndim:
            return ""
        axis = self.random.randrange(value.ndim)
        changed = self._resized(value, axis)
        return self._replace(tensor.name, changed, f"{changed.shape[axis]} instead of {value.shape[axis]} on axis {axis}")

    def _shared_size(self) -> str:
        """One element less or more on an axis wherever it occurs."""
        names = {Axis.parse(text).name for tensor in self._present() for text in tensor.axis_names(self.arguments)}
        name = self.random.choice(sorted(names - {""}))
        less = self.random.random() < 0.5
        for tensor in self._present():
            value = self.arguments[tensor.name]
            for axis, text in enumerate(tensor.axis_names(self.arguments)):
                size = Axis.parse(text)
                named = size.named(value.shape[axis])
                if size.name != name or named is None or (less and not named):
                    continue
                wanted = size.size({name: named - 1 if less else named + 1})
                more = wanted - value.shape[axis]
                if more > 0:
                    fill = value.narrow(axis, 0, 1).repeat_interleave(more, axis) if value.shape[axis] else value.new_zeros(
                        [more if at == axis else extent for at, extent in enumerate(value.shape)]
                    )  # fmt: skip
                    value = torch.cat([value, fill], axis)
                else:
                    value = value.narrow(axis, 0, max(wanted, 0)).contiguous()
            self.arguments[tensor.name] = value
        return f"axis {name}: one {'less' if less else 'more'}"

    def _integers(self) -> list[str]:
        tensors = [(t.name, self.arguments[t.name]) for t in self._present() if t.axes.count(" ") < 2]
        return [name for name, value in tensors if value.dtype in {torch.int32, torch.int64} and value.numel()]

    def _integer(self) -> str:
        """Another number in a tensor of slots, bounds, parents or ids."""
        names = self._integers()
        if not names:
            return ""
        name = self.random.choice(names)
        value = self.arguments[name].clone()
        limits = torch.iinfo(value.dtype)
        extents = sorted({size for tensor in self._present() for size in self.arguments[tensor.name].shape})
        near = [*extents, *(size - 1 for size in extents), *(size + 1 for size in extents)]
        number = self.random.choice([-2, -1, 0, 1, limits.max, limits.min, limits.min + 1, *near])
        spot = tuple(self.random.randrange(size) for size in value.shape)
        value[spot] = number
        return self._replace(name, value, f"{number} at {spot}")

    def _duplicate(self) -> str:
        """One number of such a tensor twice."""
        names = [name for name in self._integers() if self.arguments[name].numel() > 1]
        if not names:
            return ""
        name = self.random.choice(names)
        value = self.arguments[name].clone(memory_format=torch.contiguous_format)
        first, second = self.random.sample(range(value.numel()), 2)
        value.view(-1)[first] = value.reshape(-1)[second]
        return self._replace(name, value, f"elements {first} and {second} the same")

    def _number(self) -> str:
        """Another value of an int that is passed."""
        names = [scalar.name for scalar in self.spec.scalars if scalar.type == "int" and not scalar.static]
        if not names:
            return ""
        # A million experts are allowed and take their time.
        value = self.random.choice([-1, 0, 1, 2, 3, 5, 100, -(2**31), -(2**40)])
        return self._replace(self.random.choice(names), value, f"{value}")

    def judge(self) -> str:
        """Make the call; what was wrong about its outcome, or nothing."""
        if self.captured and self.public:
            return self._judge_captured()
        return self._judge_refusal() if self.broken else self._judge_result()

    def _call(self) -> Any:
        """Call the public function, or the operator, or the function that leads to it."""
        arguments = self.arguments
        if self.public:
            return getattr(tvm_gdn, self.op)(**arguments)
        leading = getattr(tvm_gdn, self.op.removesuffix("_update"), None) if "final_state" in arguments else None
        if self.broken or leading is None or hasattr(tvm_gdn, self.op) or self.random.random() < 0.5:
            return getattr(torch.ops.tvm_gdn, self.op)(**arguments)
        wanted = arguments["final_state"] is not None
        pool = {"initial_state": arguments["initial_state_source"], "output_final_state": wanted}
        rest = {name: value for name, value in arguments.items() if name not in {"initial_state_source", "final_state"}}
        o, final = leading(**rest, **pool)
        arguments["final_state"] = final
        return o

    def _judge_refusal(self) -> str:
        written = [self.arguments[t.name] for t in self.spec.tensors if t.mutated]
        written = [value for value in written if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
        before = [value.detach().clone() for value in written]
        try:
            self._call()
        except (ArgumentError, ArgumentTypeError) as error:
            if self.name not in str(error) or not any(arg.name in str(error) for arg in self.spec.inputs):
                return f"the error does not name {self.name or 'an argument'}: {error}"
        except (RuntimeError, TypeError) as error:
            # torch itself refuses what does not fit the schema's types, and tensor methods of what is no tensor.
            if "no tensor" not in self.broken and not str(error).startswith("tvm_gdn::"):
                return f"{type(error).__name__} instead of an error of the package: {error}"
        else:
            return "was accepted"
        unchanged = all(torch.equal(_bits(new.detach()), _bits(old)) for new, old in zip(written, before, strict=True))
        return "" if unchanged else "was refused after something had been written"

    def _judge_captured(self) -> str:
        """The function in front refuses, or hands the operator a call that the rules allow and that gives the right numbers."""
        with _Capture() as seen:
            try:
                self._call()
            except (ArgumentError, ArgumentTypeError):
                return ""
            except Exception as error:
                return f"{type(error).__name__} instead of an error of the package: {error}"
        if len(seen.calls) != 1:
            return ""
        spec, given, result = seen.calls[0]
        try:
            check.validate(spec, given)
        except (ArgumentError, ArgumentTypeError) as error:
            return f"was accepted: {error}"
        named = _outputs(spec, result, given)
        return _differences(
            spec, named, {name: want for name, want in parity.expected(spec, given).items() if name in named}, given
        )

    def _judge_result(self) -> str:
        # The public functions take [N, 1, H, K]; the reference does as well.
        want, given = parity.expected(self.spec, self.arguments), cases.clone(self.arguments)
        result = self._call()
        got = _outputs(self.spec, result, given) | {t.name: self.arguments[t.name] for t in self._present() if t.mutated}
        if set(got) != set(want):
            return f"outputs {sorted(got)} instead of {sorted(want)}"
        for tensor in self._present():
            if not tensor.mutated and not torch.equal(_bits(self.arguments[tensor.name]), _bits(given[tensor.name])):
                return f"{tensor.name} was written to"
        return _differences(self.spec, got, want, given)

    def __str__(self) -> str:
        shapes = {
            name: f"{tuple(x.shape)} {str(x.dtype)[6:]} strides {x.stride()}" if isinstance(x, torch.Tensor) else x
            for name, x in self.arguments.items()
        }
        way = "function, judged at the operator" if self.captured else "function" if self.public else "operator"
        return f"{self.op} ({way}) [{self.broken or 'valid'}] " + ", ".join(f"{name}={x}" for name, x in shapes.items())


class _Capture(TorchDispatchMode):
    """Sees what reaches the operators: each one's SPEC, arguments as they were before, and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpSpec, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace != "tvm_gdn":
            return func(*args, **(kwargs or {}))
        spec = OPS[func._schema.name.partition("::")[2]]
        defaults = {arg.name: None if isinstance(arg, Tensor) else arg.default for arg in spec.inputs}
        given = {**defaults, **dict(zip(defaults, args, strict=False)), **(kwargs or {})}
        given = cases.clone(given)
        result = func(*args, **(kwargs or {}))
        self.calls.append((spec, given, result))
        return result


def _outputs(spec: OpSpec, result: Any, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    values = result if isinstance(result, tuple) else (result,)
    outputs = zip(spec.outputs, values, strict=True)
    return {output.name: value for output, value in outputs if value is not None and (not output.when or given[output.when])}


def _differences(
    spec: OpSpec, got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> str:
    wrong = []
    for name in want:
        value = got[name]
        error, limit = parity.rms_ratio(value, want[name]), parity.limit(spec, name, value.dtype)
        if not error <= limit:
            limit = max(limit, 2 * _error_in_fp32(spec, name, want[name], given), 2 * _sensitivity(spec, name, want[name], given))
        if value.shape != want[name].shape or not error <= limit:
            wrong.append(f"{name} is off by {error:.2e} (limit {limit:.0e})")
    return "; ".join(wrong)


def _error_in_fp32(spec: OpSpec, name: str, want: torch.Tensor, given: Mapping[str, Any]) -> float:
    """Error of the torch reference in fp32 and the storage dtypes.

    Where q is nearly orthogonal to the state, or a bf16 tensor has a handful of elements, rounding alone passes the limit.
    """
    arguments = cases.clone(given)
    result = getattr(reference, spec.name)(**spec.for_reference(arguments))
    found = _outputs(spec, result, given) | {tensor.name: arguments[tensor.name] for tensor in spec.tensors if tensor.mutated}
    return parity.rms_ratio(found[name], want)


def _sensitivity(spec: OpSpec, name: str, want: torch.Tensor, given: Mapping[str, Any]) -> float:
    """How far a result moves when every number moves by a few parts in 1e7.

    Where a number is rounded to an integer on the way, or experts are chosen, fp32 may take the other of two ways. (bf16 numbers
    fall on the border of two integers all the time.)
    """
    found = 0.0
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        moved = {
            key: value.double() * (1 + 2e-7 * torch.randn(value.shape, generator=rng, dtype=torch.float64))
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for key, value in given.items()
        }
        found = max(found, parity.rms_ratio(parity.expected(spec, moved)[name], want))
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.element_size()
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
