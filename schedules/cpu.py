"""Tile operations as plain loops and explicit vectors: every CPU target, and the portable fallback.

A worker is one parallel iteration, run by one thread; it owns whole tiles, so rows and columns are plain indices and nothing
has to be synchronized. `lanes` is the widest vector in fp32 elements; 1 writes scalar loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm.script import tirx as T

from tvm_gdn.ops.tir.plain_tiles import PlainTiles


def divisors(n: int) -> tuple[int, ...]:
    """Divisors of n, ascending."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)


class CpuTiles(PlainTiles):
    """What every algorithm needs of a CPU: a parallel loop and scratch scalars."""

    #: The host part of a kernel can read its tensors, so it checks slots and sequence bounds before it starts.
    host_checks = True
    #: Lanes that share a worker's tiles.
    warp = 1
    #: Workers side by side in a piece of work.
    group = 1
    #: Whether phases are kernels of a grid of blocks.
    grid = False

    def workers(self, count: Any) -> Any:
        """Loop over independent pieces of work."""
        return T.parallel(count)

    def lanes(self) -> Any:
        """Loop over the lanes that share a worker's tiles: one thread holds them whole."""
        return T.serial(1)

    def enter(self, lane: Any) -> None:
        """Take the lane that the following operations belong to."""

    def worker(self, block: Any, lane: Any) -> Any:
        """Number of the worker: every piece of work is one."""
        del lane
        return block

    @staticmethod
    def inside(worker: Any, count: Any) -> bool:
        """Whether a worker is one of `count`: on CPUs no loop runs further."""
        del worker, count
        return True

    def scalars(self, count: int) -> Any:
        """fp32 scratch scalars."""
        return local_array(count)

    @staticmethod
    def exp(x: Any) -> Any:
        """Exp in fp32 as vector code: 2^n times a polynomial on [-ln2/2, ln2/2]; about 1 ulp, NaN and infinities kept.

        A call of libm per element would cost more than the products of a chunk.
        """
        f = T.float32
        scaled = T.Select(x < f(-87.3), f(0.0), CpuTiles._finite_exp(x))
        return T.Select(x > f(88.72), f(float("inf")), scaled)

    @staticmethod
    def sigmoid(lanes: int) -> Any:
        """Macro ``(x)``: the logistic function of `lanes` elements in place, about 2 ulp; below -87 it stays at 1e-38; NaN kept.

        The reciprocal is a guess from the exponent and three Newton steps: a division keeps a core busy twice as long.
        """
        f = T.float32

        @T.inline
        def sigmoid(x):
            d, y = local_array(lanes), local_array(lanes)
            for lane in T.vectorized(lanes):
                d[lane] = f(1.0) + CpuTiles._finite_exp(T.Select(x[lane] < f(-87.0), f(87.0), f(0.0) - x[lane]))
            for lane in T.vectorized(lanes):
                y[lane] = T.reinterpret("float32", 0x7EF311C7 - T.reinterpret("int32", d[lane]))
            for _step in T.unroll(3):
                for lane in T.vectorized(lanes):
                    y[lane] = y[lane] * (f(2.0) - d[lane] * y[lane])
            for lane in T.vectorized(lanes):
                x[lane] = y[lane]

        return sigmoid

    @staticmethod
    def _finite_exp(x: Any) -> Any:
        """Exp of x between -87.3 and 88.7; of the nearer end outside."""
        f = T.float32
        low = T.Select(x < f(-87.3), f(-87.3), x)
        clamped = T.Select(low > f(88.7), f(88.7), low)
        n = T.floor(clamped * f(1.4426950408889634) + f(0.5))
        r = clamped - n * f(0.693359375) - n * f(-2.12194440e-4)
        p = f(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p * r + f(c)
        p = p * r * r + r + f(1.0)
        half_power = T.reinterpret("float32", T.shift_left(T.Cast("int32", n) + 126, 23))  # 2^128 itself is no fp32 number
        return p * half_power * f(2.0)

    @staticmethod
    def log(x: Any) -> Any:
        """Natural logarithm of positive normal fp32 numbers as vector code: exponent plus a polynomial of the mantissa."""
        f = T.float32
        bits = T.reinterpret("int32", x)
        exponent = T.shift_right(bits - 0x3F3504F3, 23)  # of a mantissa in [sqrt(1/2), sqrt(2))
        r = T.reinterpret("float32", bits - T.shift_left(exponent, 23)) - f(1.0)
        e = T.Cast("float32", exponent)
        p = f(7.0376836292e-2)
        for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1):
            p = p * r + f(c)
        for c in (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):
            p = p * r + f(c)
        return r + (p * r * (r * r) - f(0.5) * r * r + e * f(-2.12194440e-4)) + e * f(0.693359375)


def local_array(*shape: int, dtype: str = "float32") -> Any:
    """Array on the worker's stack, where LLVM can keep it in registers.

    Without the annotation TVM 0.27 takes even 64 bytes from the heap, through a call that hides the array from LLVM; its
    StorageRewrite pass drops the annotation, so builds turn that pass off (`pass_config` in targets/x86.toml).
    """
    memory = T.alloc_buffer((math.prod(shape),), dtype, scope="local", annotations={"disable_lower_builtin": True})
    if len(shape) == 1:
        return memory
    return T.decl_buffer(shape, dtype, data=memory.data, scope="local")


def prefetch(element: Any, level: int) -> None:
    """Ask for the cache line of a buffer element, to be in the level 1 or 2 cache when it is read; any address is allowed."""
    T.evaluate(tvm.tirx.call_intrin("void", "tirx.prefetch", T.address_of(element), T.int32(0), T.int32(4 - level), T.int32(1)))


def transpose_16(get: Callable[[int], Any], put: Callable[[int, Any], None], dtype: str = "float32") -> None:
    """Transpose a 16 x 16 block of 32-bit elements in registers: `get(r)` reads row r, ``put(c, vector)`` writes column c.

    Four rounds of pairwise shuffles; element by element it would cost as much as the products of a chunk.
    """
    lanes = T.ramp(0, 1, 16)
    rows = [get(r) for r in range(16)]
    for step in (1, 2, 4, 8):
        low = [lane - step + 16 if lane & step else lane for lane in range(16)]
        high = [lane + 16 if lane & step else lane + step for lane in range(16)]
        kept = local_array(16, 16, dtype=dtype)
        for r, row in enumerate(rows):
            T.buffer_store(kept, row, [r, lanes])
        pairs = [(kept[r & ~step, lanes], kept[r | step, lanes]) for r in range(16)]
        rows = [tvm.tirx.Shuffle(list(pair), high if r & step else low) for r, pair in enumerate(pairs)]
    for c, column in enumerate(rows):
        put(c, column)


def sum_lanes(part: Any, lanes: int) -> Any:
    """Sum of a vector's lanes by halves: log2(lanes) shuffles instead of a chain of lanes additions."""
    if lanes == 1:
        return part[0]
    vector = part[T.ramp(0, 1, lanes)]
    while lanes > 1:
        lanes //= 2
        half = "float32" if lanes == 1 else f"float32x{lanes}"
        vector = T.vectorlow(half, vector) + T.vectorhigh(half, vector)
    return vector
