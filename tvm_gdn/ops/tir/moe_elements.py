"""Elementwise maths of the experts, for every form of their loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T


def silu_product(gate: Any, up: Any, exp: Callable[[Any], Any]) -> Any:
    """The product silu(gate) * up."""
    return gate / (T.float32(1) + exp(-gate)) * up


#: Bits of infinity; those of NaN are larger.
INFINITE = 0x7F800000


def magnitude(x: Any) -> Any:
    """The bits of |x|, which order numbers as |x| does, with infinity and then NaN as the largest."""
    return T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF))


def per_step(largest: Any) -> Any:
    """Steps of a row's numbers per unit: its largest element is 127 of them. From that element's `magnitude`, as is `step_of`."""
    number = T.reinterpret("float32", largest)
    return T.Select(number > T.float32(1e-30), T.float32(127) / number, T.float32(0))


def step_of(largest: Any) -> Any:
    """One step. A row with NaN or an infinity has none: NaN reaches its output (a literal NaN is no C)."""
    number = T.reinterpret("float32", largest)
    return T.Select(
        largest >= INFINITE,
        T.reinterpret("float32", T.bitwise_or(largest, T.int32(0x7FC00000))),
        T.Select(number > T.float32(1e-30), number / T.float32(127), T.float32(0)),
    )


def to_int8(x: Any) -> Any:
    """Nearest integer of [-127, 127]; of NaN any."""
    return T.Cast("int8", T.Cast("int32", T.nearbyint(T.max(T.min(x, T.float32(127)), T.float32(-127)))))
