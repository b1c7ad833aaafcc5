"""Tile operations of the token recurrence on GPUs with states in registers: one warp is a worker, its threads share the tiles.

A state tile ``[K, v_tile]`` is spread over the threads of a warp: `row_lanes` threads along K times `column_lanes` along V, each
holding ``K / row_lanes`` rows of ``v_tile / column_lanes`` columns. A product W^T x is a partial sum per thread, finished by
shuffles across the row lanes; no shared memory and no barrier is needed. Shapes that do not fill a warp use a part of one.

States move in vectors where the address allows it and element by element where it does not. Everything else of a token is small
and moves by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import MOVES, WarpTiles, aligned, either, itemsize


class RecurrentWarpTiles(WarpTiles):
    """Tile operations of the token recurrence.

    Parameters
    ----------
    K, V : int
        State rows and columns.
    row_lanes, column_lanes, columns : int
        Threads along K, threads along V, and columns per thread; ``v_tile`` is the product of the last two.
    v_first : bool
        Whether states are stored ``[V, K]``: a thread then holds groups of consecutive rows.
    group : int
        Workers per block. Neighbours read neighbouring columns of the same rows, at the same time when they share a block.
    widest : int
        Elements that move at once at most; 1 for languages without vectors in memory.
    functions : bool
        Whether device code may call C functions; vectors are the code generator's own otherwise.
    """

    direct = False

    def __init__(
        self,
        K: int,
        V: int,
        *,
        row_lanes: int,
        column_lanes: int,
        columns: int,
        v_first: bool,
        group: int = 1,
        widest: int = 4,
        functions: bool = True,
    ) -> None:
        super().__init__(row_lanes * column_lanes)
        self.widest, self.functions = widest, functions
        # Without functions that ask and go on, a state that is there early only takes registers from what is computed meanwhile.
        self.state_last = not (functions or self.state_first)
        self.group = group
        self.K, self.V, self.v_first = K, V, v_first
        self.columns, self.column_lanes, self.row_lanes = columns, column_lanes, row_lanes
        self.v_tile = column_lanes * columns
        self.row_count = K // self.row_lanes
        self.row_group = math.gcd(widest, self.row_count)
        self.zero = self._zero()
        self.sum_rows = self._sum_rows()
        self.dot, self.gemv, self.ger_gemv = self._dot(), self._gemv(), self._ger_gemv()

    def rows(self, count: int) -> Any:
        """Loop over this thread's share of the K axis."""
        return T.unroll(count // self.row_lanes)

    def cols(self, count: int) -> Any:
        """Loop over this thread's share of the V axis."""
        return T.unroll(count // self.column_lanes)

    def row(self, i: Any) -> Any:
        """Index on the K axis of local row i: neighbouring threads read neighbouring rows."""
        group, lane = self.row_group, self.lane // self.column_lanes
        return (i // group * self.row_lanes + lane) * group + i % group

    def col(self, j: Any) -> Any:
        """Index on the V axis of local column j: neighbouring threads hold neighbouring vectors of four."""
        width = math.gcd(self.widest, self.columns)
        return (j // width * self.column_lanes + self.lane % self.column_lanes) * width + j % width

    def read(self, dst: Any, buffer: Any, *index: Any) -> None:
        """This thread's share of K elements of a tensor from `index` on, in vectors where the address allows it."""
        self.read_all((dst, buffer, *index))

    def read_all(self, *reads: tuple[Any, ...]) -> None:
        """Several such shares, behind one test of their addresses: behind a test each, the first would be waited for."""
        width = math.gcd(self.row_group, 16 // itemsize(reads[0][1]))
        fits = self._row_fits(*reads[0][1:])
        for _, *row in reads[1:] if width > 1 else ():
            fits = T.And(fits, self._row_fits(*row))

        def copy(vector: bool) -> None:
            for dst, buffer, *outer, first in reads:
                with T.unroll(self.row_count // width) as i:
                    self._take_row(dst, i * width, buffer, outer, first + self.row(i * width), width, vector)

        either(self.fits if self.fits and width > 1 else fits, copy)

    def _take_row(self, dst: Any, at: Any, buffer: Any, outer: Any, first: Any, width: int, vector: bool) -> None:
        put_one = lambda lane, x: T.buffer_store(dst, x, [at + lane])  # noqa: E731
        self._take(buffer, lambda lane: (*outer, first + lane), width, vector, put_one)

    def settled(self, rows: tuple[Any, ...], view: Any, stride: Any, emit: Callable[[], None]) -> None:
        """A test at each access would split the step's code, and what was asked for before it would be waited for there."""
        tests = [self._fits(view), *(self._row_fits(*row) for row in rows)]
        # Without functions nothing is asked for ahead of its use, so that one test would gain nothing.
        if not self.functions or any(test is False for test in tests):
            emit()
            return

        def choose(vector: bool) -> None:
            self.fits = True if vector else None
            emit()
            self.fits = None

        condition = T.truncmod(stride, T.int64(self._width(view))) == 0
        for test in tests:
            condition = T.And(condition, test)
        either(condition, choose)

    def _row_fits(self, buffer: Any, *index: Any) -> Any:
        *outer, first = index
        return aligned(buffer, *outer, first + self.row(0), elements=math.gcd(self.row_group, 16 // itemsize(buffer)))

    def k_vector(self) -> Any:
        """This thread's share of an fp32 vector along K."""
        return self.scalars(self.row_count)

    def v_vector(self) -> Any:
        """This thread's share of an fp32 vector along the columns."""
        return self.scalars(self.columns)

    def state(self) -> Any:
        """This thread's share of the fp32 state tile."""
        return T.alloc_buffer((self.row_count, self.columns), "float32", scope="local")

    def view(self, buffer: Any, offset: Any, j0: Any) -> Any:
        """One head's state in a larger tensor as a [K, v_tile] tile: `offset` elements in, from column `j0`."""
        strides = (1, self.K) if self.v_first else (self.V, 1)
        return T.decl_buffer(
            (self.K, self.v_tile), buffer.dtype, data=buffer.data, elem_offset=offset + j0 * strides[1], strides=strides
        )

    def load(self, W: Any, view: Any) -> None:
        """Read this thread's share of a state tile."""

        def copy(vector: bool) -> None:
            for place, at, count in self._vectors(view):
                self._take(view, at, count, vector, lambda lane, x, place=place: T.buffer_store(W, x, list(place(lane))))

        either(self._fits(view), copy)

    def ask_state(self, view: Any, present: Any) -> None:
        """Ask for this thread's share of a tile of vectors, or for zeros if it is not `present`."""
        self.asked = []
        for place, at, count in self._vectors(view):
            raw = T.alloc_buffer((count,), view.dtype, scope="local")
            name = MOVES[count * itemsize(view)] + "_if"
            T.evaluate(T.call_extern("int32", name, T.address_of(raw[0]), T.address_of(view[at(0)]), present))
            self.asked.append((raw, place, count))

    def take_state(self, W: Any) -> None:
        """What was asked for, in fp32: where it is needed, since it is waited for there."""
        for raw, place, count in self.asked:
            for lane in range(count):
                T.buffer_store(W, T.Cast("float32", raw[lane]), list(place(lane)))

    def store(self, view: Any, W: Any) -> None:
        """Write this thread's share of a state tile."""

        def copy(vector: bool) -> None:
            for place, at, count in self._vectors(view):
                self._give(view, at, count, vector, lambda lane, place=place: W[place(lane)])

        either(self._fits(view), copy)

    def _fits(self, view: Any) -> Any:
        """Whether a tile moves as vectors."""
        return self.fits or aligned(view, self.row(0), self.col(0), elements=self._width(view))

    def _vectors(self, view: Any) -> Any:
        """This thread's vectors of a tile: where lane n of one stands in registers and in memory, and its length."""
        width, row, col = self._width(view), self.row, self.col
        if self.v_first:
            for j in range(self.columns):
                for i in range(0, self.row_count, width):
                    yield (lambda n, i=i, j=j: (i + n, j)), (lambda n, i=i, j=j: (row(i) + n, col(j))), width
        else:
            for i in range(self.row_count):
                for j in range(0, self.columns, width):
                    yield (lambda n, i=i, j=j: (i, j + n)), (lambda n, i=i, j=j: (row(i), col(j) + n)), width

    def _width(self, view: Any) -> int:
        """Elements that move at once: 16 bytes, or what a thread has."""
        return math.gcd(min(self.widest, 16 // itemsize(view)), self.row_group if self.v_first else self.columns)

    def _zero(self) -> Any:
        rows, columns = self.row_count, self.columns

        @T.inline
        def zero(W):
            for i in T.unroll(rows):
                for j in T.unroll(columns):
                    W[i, j] = T.float32(0)

        return zero

    def _sum_rows(self) -> Any:
        warp, first, steps = self.warp, self.column_lanes, self.row_lanes.bit_length() - 1
        mask = (1 << warp) - 1

        @T.inline
        def sum_rows(acc, at):
            """Sum acc[at] over the row lanes; every thread gets the sum."""
            for bit in T.unroll(steps):
                acc[at] = acc[at] + T.tvm_warp_shuffle_xor(T.uint32(mask), acc[at], first << bit, warp, warp)

        return sum_rows

    def _dot(self) -> Any:
        rows, sum_rows = self.row_count, self.sum_rows

        @T.inline
        def dot(m, at, x, y):
            """m[at] = sum_i x[i] * y[i]."""
            m[at] = T.float32(0)
            for i in T.unroll(rows):
                m[at] = m[at] + x[i] * y[i]
            sum_rows(m, at)

        return dot

    def _gemv(self) -> Any:
        rows, columns, sum_rows = self.row_count, self.columns, self.sum_rows

        @T.inline
        def gemv(acc, W, x):
            """Product acc = W^T x."""
            for j in T.unroll(columns):
                acc[j] = T.float32(0)
                for i in T.unroll(rows):
                    acc[j] = acc[j] + W[i, j] * x[i]
                sum_rows(acc, j)

        return gemv

    def _ger_gemv(self) -> Any:
        rows, columns, sum_rows = self.row_count, self.columns, self.sum_rows

        @T.inline
        def ger_gemv(acc, W, d, x, u, y):
            """W = diag(d) W + x u^T; acc = W^T y."""
            for j in T.unroll(columns):
                acc[j] = T.float32(0)
                for i in T.unroll(rows):
                    W[i, j] = W[i, j] * d[i] + x[i] * u[j]
                    acc[j] = acc[j] + W[i, j] * y[i]
                sum_rows(acc, j)

        return ger_gemv
