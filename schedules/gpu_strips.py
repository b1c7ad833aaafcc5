"""Strips of neighbouring channels on GPUs: taps and states, rows in memory, as columns in a thread's registers."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import MOVES, aligned, itemsize, move, put

#: Bytes that move at once.
PIECE = 16


class StripColumns:
    """What a convolution moves besides its inputs and outputs."""

    #: Channels of a strip.
    strip: int

    @staticmethod
    def lane_loop(count: int) -> Any:
        """Loop over neighbouring elements, which are registers of one thread."""
        return T.unroll(count)

    def fit_rows(self, *places: Any) -> Any:
        """Whether a strip's rows of so many elements move as vectors, at places of flat buffers and any number of strides on."""
        found: Any = True
        for buffer, first, count, stride in places:
            size = _piece(buffer, count * self.strip)
            found = T.And(found, T.And(T.truncmod(stride, T.int64(size)) == 0, aligned(buffer, first, elements=size)))
        return found

    def columns_in(
        self, to: Any, at: Any, source: Any, first: Any, count: int, pitch: int, width: int, present: Any = None
    ) -> None:
        """Read `width` rows of `count` elements, contiguous from `first` on, as columns `pitch` apart; zeros if not `present`."""
        size, place = _piece(source, count * width), _turned(at, count, pitch)
        if width == 1:
            for n in range(count * width):
                T.buffer_store(to, T.Cast(to.dtype, source[first + n]), [place(n)])
            return
        raw = T.alloc_buffer((count * width,), source.dtype, scope="local")
        for n in range(0, count * width, size):
            ends = T.address_of(raw[n]), T.address_of(source[first + n])
            if present is None:
                move(*ends, size * itemsize(source))
            else:
                T.evaluate(T.call_extern("int32", MOVES[size * itemsize(source)] + "_if", *ends, present))
        for n in range(count * width):
            T.buffer_store(to, T.Cast(to.dtype, raw[n]), [place(n)])

    def columns_out(self, to: Any, first: Any, source: Any, at: Any, count: int, pitch: int, width: int) -> None:
        """The inverse of `columns_in`."""
        size, place = _piece(to, count * width), _turned(at, count, pitch)
        if width == 1:
            for n in range(count * width):
                T.buffer_store(to, T.Cast(to.dtype, source[place(n)]), [first + n])
            return
        raw = T.alloc_buffer((count * width,), to.dtype, scope="local")
        for n in range(count * width):
            T.buffer_store(raw, T.Cast(to.dtype, source[place(n)]), [n])
        for n in range(0, count * width, size):
            put(T.address_of(to[first + n]), T.address_of(raw[n]), size * itemsize(to))


def _piece(buffer: Any, count: int) -> int:
    """Elements that move at once where `count` lie side by side."""
    return math.gcd(count, PIECE // itemsize(buffer))


def _turned(at: Any, count: int, pitch: int) -> Any:
    """Place of the n-th of elements that lie in rows of `count`, in columns `pitch` apart from `at` on."""
    return lambda n: at + n % count * pitch + n // count
