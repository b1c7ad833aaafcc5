"""Random calls for `fuzz.py`: call number i of a seed is always the same call.

A valid call is drawn on one of a few geometries (each is a kernel to compile) with any sizes, strides, slots and options that
the contract allows, and is held against the float64 reference. An invalid one breaks a valid call in one way that is certain
to be against the contract; it must raise, and leave what it would have written to as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import cases, check, parity, reference
from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec, Tensor

_POOL = ("initial_state_source", "initial_state_indices")
_BUFFER = ("intermediate_states_buffer", "intermediate_state_indices")
_UPDATE, _SIGMOID = "fused_recurrent_gated_delta_rule_update", "fused_sigmoid_gating_delta_rule_update"
_RECURRENT, _PACKED = "fused_recurrent_gated_delta_rule", "packed_decode_gated_delta_rule"
_CHUNK, _CHUNK_KDA, _FINAL = "chunk_gated_delta_rule", "chunk_kda", ("final_state",)
_BF16 = {"dtype": "bfloat16", "state_dtype": "bfloat16"}
_FP16 = {"dtype": "float16", "state_dtype": "float16"}
_I32 = {"index_dtype": "int32"}
_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fused_gdn_gating", {"dtypes": {"A_log": "float32", "dt_bias": "float32"}}),
    ("fused_gdn_gating", {"dtype": "bfloat16", "dtypes": {"A_log": "float32", "dt_bias": "bfloat16"}}),
    (_RECURRENT, {"K": 8, "V": 12, "with": ("initial_state",), "output_final_state": True}),
    (_RECURRENT, {"K": 16, "V": 8, "with": ("initial_state", "cu_seqlens"), "output_final_state": True,
                  "state_v_first": True, "dtype": "bfloat16"}),
    (_CHUNK, {"K": 16, "V": 8, "with": ("initial_state", "cu_seqlens"), "output_final_state": True, **_I32}),
    (_CHUNK_KDA, {"K": 8, "V": 12, "with": (), "output_final_state": True, "dtype": "bfloat16"}),
    (_CHUNK + "_update", {"K": 16, "V": 24, "with": (*_POOL, *_FINAL, "cu_seqlens"), **_BF16, **_I32}),
    (_CHUNK_KDA + "_update", {"K": 7, "V": 16, "with": (*_POOL, "cu_seqlens"), "state_v_first": True}),
    ("fused_recurrent_kda", {"K": 8, "V": 12, "with": ("initial_state",), "output_final_state": True, **_FP16}),
    ("fused_recurrent_kda_update", {"K": 12, "V": 9, "with": (*_POOL, *_FINAL, "cu_seqlens"), "state_v_first": True}),
    ("chunk_delta_rule", {"K": 12, "V": 9, "with": ("initial_state", "cu_seqlens"), "output_final_state": True}),
    ("chunk_delta_rule_update", {"K": 8, "V": 20, "with": (*_POOL, *_FINAL), **_FP16}),
    ("fused_recurrent_delta_rule", {"K": 7, "V": 16, "with": (), "output_final_state": True}),
    ("fused_recurrent_delta_rule_update", {"K": 16, "V": 8, "with": (*_POOL, "cu_seqlens"), "dtype": "bfloat16"}),
    (_UPDATE, {"K": 16, "V": 8, "with": (*_POOL, *_FINAL)}),
    (_UPDATE, {"K": 8, "V": 8, "with": _POOL}),
    (_UPDATE, {"K": 16, "V": 24, "with": (*_POOL, "cu_seqlens"), "state_v_first": True, **_BF16, **_I32}),
    (_UPDATE, {"K": 8, "V": 20, "with": (*_POOL, *_BUFFER, "retrieve_parent_token")}),
    (_UPDATE, {"K": 7, "V": 16, "with": (*_POOL, *_BUFFER, "cu_seqlens", "retrieve_parent_token"), **_FP16, **_I32}),
    (_SIGMOID, {"K": 16, "V": 8, "with": _POOL, "dtype": "bfloat16"}),
    (_SIGMOID, {"K": 12, "V": 9, "with": (*_POOL, *_BUFFER, "cu_seqlens"), "state_v_first": True, **_I32}),
    ("rms_norm_gated", {"D": 20, "with": ("z",), "dtype": "bfloat16"}),
    ("causal_conv1d_fn", {"D": 33, "with": ("conv_states", "query_start_loc", "cache_indices"), **_I32}),
    ("causal_conv1d_update", {"D": 33, "with": ("conv_state_indices", "bias"), **_BF16}),
    (_PACKED, {"K": 16, "V": 8, "with": _POOL}),
    (_PACKED, {"K": 8, "V": 16, "with": _POOL, "state_v_first": True, **_BF16}),
)  # fmt: skip


def kernels() -> list[tuple[OpSpec, Geometry]]:
    """Every kernel that drawn calls need."""
    sizes = {"M": 1, "G": 1, "B": 1, "T": 1, "H": 1, "HV": 1}
    found = []
    for op, case in _CASES:
        packed = {"lengths": (1,)} if {"cu_seqlens", "query_start_loc"} & set(case.get("with", ())) else {}
        found.append((OPS[op], check.geometry_of(OPS[op], cases.draw(OPS[op], {**sizes, **case, **packed}))))
    return found


class Call:
    """Call `index` of `seed`.

    Attributes
    ----------
    op : str
        The operator.
    arguments : dict
        What its public function gets.
    broken : str
        What is wrong with them; empty for a valid call.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(f"{seed}/{index}")
        self.op, case = self.random.choice(_CASES)
        self.spec = OPS[self.op]
        case = {**case, **self._sizes(case), **self._options()}
        self.arguments = cases.draw(self.spec, case, seed=self.random.randrange(2**31))
        self._vary(case)
        self.broken = ""
        if self.random.random() < 0.4:
            self._break(case)

    def _sizes(self, case: Mapping[str, Any]) -> dict[str, Any]:
        pick = self.random.randint
        heads = pick(1, 3)
        sizes: dict[str, Any] = {"M": pick(0, 9), "G": pick(1, 3), "H": heads, "HV": heads * pick(1, 3)}
        if {"cu_seqlens", "query_start_loc"} & set(case.get("with", ())):
            longest = self.random.choice([5, 5, 80]) if self.op.startswith("chunk") else 5
            sizes["lengths"] = tuple(pick(0, longest) for _ in range(pick(0, 4)))
            sequences = len(sizes["lengths"])
        else:
            sizes |= {"B": pick(0, 3), "T": 1 if self.op == _PACKED else pick(0, 5)}
            sequences = sizes["B"]
        return {**sizes, "S": sequences + pick(0, 2), "padding": pick(0, 2) == 0}

    def _options(self) -> dict[str, Any]:
        pick = self.random.choice
        return {
            "scale": pick([None, None, 1.0, -0.3, 0.0]), "use_qk_l2norm_in_kernel": pick([False, True]),
            "disable_state_update": pick([False, False, True]), "softplus_beta": pick([1.0, 0.5, 2.0]),
            "softplus_threshold": pick([20.0, 1.0]),
        }  # fmt: skip

    def _vary(self, case: Mapping[str, Any]) -> None:
        """Other strides, alignments and values than `cases.draw` gives; the same numbers in another place of memory."""
        arguments, chance = self.arguments, self.random.random
        if arguments.get("g") is not None and chance() < 0.3:
            # Where a state grows (g > 0), a chunk's products amplify rounding by the growth within the chunk.
            chunked = self.op.startswith("chunk")
            arguments["g"] *= self.random.choice([20.0, 0.0, *((20.0, -0.1) if chunked else (100.0, -0.5))])
        if "cache_steps" in arguments and arguments["intermediate_states_buffer"] is not None and chance() < 0.5:
            arguments["cache_steps"] = arguments["intermediate_states_buffer"].shape[1]
        # A chunk's matrix products carry NaN to earlier tokens of the chunk; the reference is a loop over tokens.
        if chance() < 0.05 and not self.op.startswith("chunk"):
            # A tap of a convolution that is infinite meets zeros before the first token; kernels leave those out.
            present = [t.name for t in self._present() if t.name != "weight" and arguments[t.name].is_floating_point()]
            name = self.random.choice(present)
            if arguments[name].numel():
                spot = tuple(self.random.randrange(size) for size in arguments[name].shape)
                arguments[name][spot] = self.random.choice([math.nan, math.inf, -math.inf])
        for tensor in self._present():
            if chance() < 0.3:
                arguments[tensor.name] = self._moved(tensor, arguments[tensor.name])
        lengths = case.get("lengths", ()) if hasattr(tvm_gdn, self.op) else ()
        names = [name for name in ("q", "k", "v", "g", "beta", "a", "b") if name in arguments]
        if len(lengths) > 1 and set(lengths) == {1} and chance() < 0.5:
            arguments |= {name: arguments[name].transpose(0, 1) for name in names}

    def _moved(self, tensor: Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same values with other strides or another alignment, as far as the SPEC allows."""
        free = {"any": value.ndim, "inner": value.ndim - 1, "outer": 1, "outer2": 2, "dense": 0}[tensor.strides]
        if not free:
            return torch.cat([value.reshape(-1)[:1], value.reshape(-1)])[1:].view(value.shape) if value.numel() else value
        axis = self.random.randrange(free)
        gap = torch.full_like(value, math.nan) if value.is_floating_point() else torch.full_like(value, -(2**30))
        return torch.stack([value, gap], axis + 1).select(axis + 1, 0) if self.random.random() < 0.7 else (
            torch.cat([gap, value], axis).narrow(axis, value.shape[axis], value.shape[axis])
        )  # fmt: skip

    def _present(self) -> list[Tensor]:
        return [tensor for tensor in self.spec.tensors if self.arguments[tensor.name] is not None]

    def _break(self, case: Mapping[str, Any]) -> None:
        ways: list[Callable[[Mapping[str, Any]], str]] = [
            self._dtype, self._rank, self._device, self._no_tensor, self._required, self._size, self._strides, self._index,
            self._shared, self._bounds, self._parents, self._steps, self._overlap, self._heads, self._grad,
        ]  # fmt: skip
        self.random.shuffle(ways)
        for way in ways:
            self.broken = way(case)
            if self.broken:
                return

    def _replace(self, name: str, value: Any, what: str) -> str:
        self.arguments[name] = value
        return f"{name}: {what}"

    def _any_tensor(self) -> tuple[Tensor, torch.Tensor]:
        tensor = self.random.choice(self._present())
        return tensor, self.arguments[tensor.name]

    def _dtype(self, _: Mapping[str, Any]) -> str:
        tensor, value = self._any_tensor()
        dtype = self.random.choice([torch.float64, torch.int16, torch.bool, torch.complex64, torch.uint8])
        with torch.no_grad():
            return self._replace(tensor.name, value.to(dtype), str(dtype))

    def _rank(self, _: Mapping[str, Any]) -> str:
        tensor, value = self._any_tensor()
        # a and b may lack the batch axis; every leading axis of the gating and the norm counts as rows, as x may be unpacked.
        if tensor.name in {"a", "b", "x", "z"} or (value.ndim > 1 and value.shape[0] == 0):
            return ""
        more = self.random.random() < 0.5 or value.shape[0] == 0
        return self._replace(tensor.name, value[None] if more else value[0], "another rank")

    def _device(self, _: Mapping[str, Any]) -> str:
        tensor, value = self._any_tensor()
        return self._replace(tensor.name, value.to("meta"), "on the meta device")

    def _no_tensor(self, _: Mapping[str, Any]) -> str:
        tensor, value = self._any_tensor()
        return self._replace(tensor.name, self.random.choice(["text", 1.5, [1, 2], {}, value.shape]), "no tensor")

    def _required(self, _: Mapping[str, Any]) -> str:
        # Without g the gated functions compute the plain delta rule.
        names = [tensor.name for tensor in self.spec.tensors if not tensor.optional and tensor.name != "g"]
        return self._replace(self.random.choice(names), None, "None")

    def _size(self, _: Mapping[str, Any]) -> str:
        """One element less or more on an axis that another tensor has too."""
        tensor, value = self._any_tensor()
        names = tensor.axis_names(self.arguments)
        axis = self.random.randrange(len(names))
        others = [other for other in self._present() if other is not tensor]
        known = {name.partition("+")[0] for other in others for name in other.axis_names(self.arguments)}
        base = names[axis].partition("+")[0]
        # With one batch item a and b of a 2-d form, and sequences on the batch axis, make B another thing.
        if base not in known or base in {"B", "T", "N"} or self.arguments[tensor.name].shape[axis] == 0:
            return ""
        size = value.shape[axis]
        if base in {"HV", "H"} and tensor.name in {"v", "q", "k", "A_log"}:
            return ""
        changed = value.narrow(axis, 0, size - 1) if size > 1 else torch.cat([value, value], axis)
        return self._replace(tensor.name, changed.contiguous(), f"{changed.shape[axis]} instead of {size} on axis {axis}")

    def _strides(self, _: Mapping[str, Any]) -> str:
        tensor, value = self._any_tensor()
        if tensor.strides == "any" or value.shape[-1] < 2 or not value.numel():
            return ""
        return self._replace(tensor.name, torch.stack([value, value], -1)[..., 0], "last axis strided")

    def _index(self, _: Mapping[str, Any]) -> str:
        names = [name for name in (_POOL[1], _BUFFER[1]) if self.arguments.get(name) is not None]
        name = self.random.choice(names) if names else ""
        if not name or not self.arguments[name].numel():
            return ""
        slots = self.arguments[name].clone()
        pool = self.arguments[_POOL[0] if name == _POOL[1] else _BUFFER[0]].shape[0]
        largest = torch.iinfo(slots.dtype).max
        wrong = self.random.choice([-2, pool, pool + 1, largest, -largest - 1, self.random.randrange(pool, largest)])
        slots[self.random.randrange(slots.numel())] = wrong
        return self._replace(name, slots, f"slot {wrong} of {pool}")

    def _shared(self, _: Mapping[str, Any]) -> str:
        """Two sequences that write to one slot."""
        names = [] if self.arguments.get("disable_state_update") else [_POOL[1]]
        names = [name for name in (*names, _BUFFER[1]) if self.arguments.get(name) is not None]
        for name in names:
            slots = self.arguments[name].clone()
            used = [n for n, slot in enumerate(slots.tolist()) if slot >= 0]
            if used and slots.numel() > 1:
                owner = self.random.choice(used)
                slots[self.random.choice([n for n in range(slots.numel()) if n != owner])] = slots[owner]
                return self._replace(name, slots, "a shared slot")
        return ""

    def _bounds(self, _: Mapping[str, Any]) -> str:
        if self.arguments.get("cu_seqlens") is None:
            return ""
        bounds = self.arguments["cu_seqlens"].clone()
        tokens = int(bounds[-1])
        largest = torch.iinfo(bounds.dtype).max
        bounds[self.random.randrange(bounds.numel())] = self.random.choice([-1, tokens + 1, largest, -largest, 1])
        values = bounds.tolist()
        if values[0] == 0 and values[-1] == tokens and values == sorted(values):
            return ""
        return self._replace("cu_seqlens", bounds, str(values))

    def _parents(self, case: Mapping[str, Any]) -> str:
        if self.arguments.get("retrieve_parent_token") is None:
            return ""
        lengths = case.get("lengths", (case.get("T", 0),) * case.get("B", 0))
        rows = [n for n, length in enumerate(lengths) if length > 1]
        if not rows:
            return ""
        parents = self.arguments["retrieve_parent_token"].clone()
        n = self.random.choice(rows)
        t = self.random.randrange(1, lengths[n])
        wrong = self.random.choice([t, t + 1, -2, torch.iinfo(parents.dtype).max])
        parents[n, t] = wrong
        return self._replace("retrieve_parent_token", parents, f"step {t} of sequence {n} follows {wrong}")

    def _steps(self, case: Mapping[str, Any]) -> str:
        buffer = self.arguments.get("intermediate_states_buffer")
        if buffer is None:
            return ""
        if self.random.random() < 0.5:
            return self._replace("cache_steps", buffer.shape[1] + self.random.choice([-1, 1, -1000, 2**40]), "not the buffer's")
        longest = max(case.get("lengths", (case.get("T", 0),) * case.get("B", 0)), default=0)
        if longest < 1 or self.arguments["cache_steps"] is not None:
            return ""
        return self._replace("intermediate_states_buffer", buffer[:, : longest - 1], f"steps for {longest} tokens")

    def _overlap(self, _: Mapping[str, Any]) -> str:
        names = [tensor.name for tensor in self._present() if tensor.mutated and self.arguments[tensor.name].shape[0] > 1]
        if not names:
            return ""
        name = self.random.choice(names)
        value = self.arguments[name]
        return self._replace(name, value[:1].expand(value.shape), "expanded") if value.numel() else ""

    def _heads(self, _: Mapping[str, Any]) -> str:
        if "q" not in self.arguments or not self.arguments["q"].numel():
            return ""
        heads = self.arguments["v"].shape[2] + 1
        for name in ("q", "k"):
            self.arguments[name] = self.arguments[name][:, :, :1].repeat(1, 1, heads, 1)
        return f"q, k: {heads} heads for {heads - 1} of v"

    def _grad(self, _: Mapping[str, Any]) -> str:
        names = [tensor.name for tensor in self._present() if tensor.mutated and self.arguments[tensor.name].numel()]
        if not names:
            return ""
        name = self.random.choice(names)
        return self._replace(name, self.arguments[name].detach().clone().requires_grad_(), "requires grad")

    def judge(self) -> str:
        """Make the call; what was wrong about its outcome, or nothing."""
        return self._judge_refusal() if self.broken else self._judge_result()

    def _call(self) -> Any:
        """Call the public function; an operator without one as what it is, or through the function that leads to it."""
        arguments = self.arguments
        function = getattr(tvm_gdn, self.op, None)
        if function is not None:
            return function(**arguments)
        if self.broken or self.random.random() < 0.5:
            return getattr(torch.ops.tvm_gdn, self.op)(**arguments)
        wanted = arguments["final_state"] is not None
        pool = {"initial_state": arguments["initial_state_source"], "output_final_state": wanted}
        rest = {name: value for name, value in arguments.items() if name not in {"initial_state_source", "final_state"}}
        o, final = getattr(tvm_gdn, self.op.removesuffix("_update"))(**rest, **pool)
        arguments["final_state"] = final
        return o

    def _judge_refusal(self) -> str:
        written = [self.arguments[t.name] for t in self.spec.tensors if t.mutated]
        written = [value for value in written if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
        before = [value.detach().clone() for value in written]
        try:
            self._call()
        except (ArgumentError, ArgumentTypeError):
            pass
        except (RuntimeError, TypeError) as error:
            # torch itself refuses what does not fit the schema's types, and tensor methods of what is no tensor.
            if "no tensor" not in self.broken and not str(error).startswith("tvm_gdn::"):
                return f"{type(error).__name__} instead of an error of the package: {error}"
        else:
            return "was accepted"
        unchanged = all(torch.equal(_bits(new.detach()), _bits(old)) for new, old in zip(written, before, strict=True))
        return "" if unchanged else "was refused after something had been written"

    def _judge_result(self) -> str:
        # The public functions take [N, 1, H, K]; the reference does as well.
        want, given = parity.expected(self.spec, self.arguments), cases.clone(self.arguments)
        result = self._call()
        values = result if isinstance(result, tuple) else (result,)
        got = self._named(values, self.arguments)
        if set(got) != set(want):
            return f"outputs {sorted(got)} instead of {sorted(want)}"
        wrong = []
        for name, value in got.items():
            error, limit = parity.rms_ratio(value, want[name]), parity.limit(self.spec, name, value.dtype)
            if not error <= limit:
                limit = max(limit, 2 * self._error_in_fp32(name, want[name], cases.clone(given)))
            if value.shape != want[name].shape or not error <= limit:
                wrong.append(f"{name} is off by {error:.2e} (limit {limit:.0e})")
        return "; ".join(wrong)

    def _named(self, values: tuple[Any, ...], arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        outputs = {o.name: value for o, value in zip(self.spec.outputs, values, strict=True) if value is not None}
        return outputs | {t.name: arguments[t.name] for t in self._present() if t.mutated}

    def _error_in_fp32(self, name: str, want: torch.Tensor, arguments: dict[str, Any]) -> float:
        """Error of the torch reference in fp32 and the storage dtypes.

        Where q is nearly orthogonal to the state, or a bf16 tensor has a handful of elements, rounding alone passes the limit.
        """
        result = getattr(reference, self.op)(**arguments)
        values = result if isinstance(result, tuple) else (result,)
        return parity.rms_ratio(self._named(values, arguments)[name], want)

    def __str__(self) -> str:
        shapes = {
            name: f"{tuple(x.shape)} {str(x.dtype)[6:]} strides {x.stride()}" if isinstance(x, torch.Tensor) else x
            for name, x in self.arguments.items()
        }
        return f"{self.op} [{self.broken or 'valid'}] " + ", ".join(f"{name}={x}" for name, x in shapes.items())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
