"""Tiles of the chunked delta rules on CPUs: where they lie, and what their elements' indices are.

A worker is one thread. Tiles lie in one array on its stack (L2-resident: about 0.4 MiB at C = 64, K = V = 128), each from a
cache line on: TVM 0.27 aligns arrays on the stack to 16 bytes only, and vectors across two lines cost twice. Nothing is allocated
per call.

Tiles of products over value columns and states are stored in panels of `columns` columns: a panel that the micro-kernel runs
down is then contiguous. In row-major order its rows, 512 bytes apart, fall into a quarter of the sets of a 48 KiB L1 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array

from tvm_gdn.ops.tir.tiles import Expr

BLOCK = 16
#: 32-bit elements of a cache line.
LINE = 16


#: 32-bit elements from an address to the next cache line. (TVM has no arithmetic on addresses.)
TO_LINE = """
define i32 @tvm_gdn_to_line(ptr %p) alwaysinline {
  %a = ptrtoint ptr %p to i64
  %n = sub i64 0, %a
  %m = and i64 %n, 63
  %s = lshr i64 %m, 2
  %r = trunc i64 %s to i32
  ret i32 %r
}
"""


#: Ask for huge pages of 2 MiB, MADV_HUGEPAGE (14), in memory that is about to be written. It is advice: any error is fine.
HUGE_PAGES = """
declare i32 @madvise(ptr, i64, i32)
define i32 @tvm_gdn_huge_pages(ptr %p, i64 %bytes) alwaysinline {
  %a = ptrtoint ptr %p to i64
  %up = add i64 %a, 2097151
  %first = and i64 %up, -2097152
  %end = add i64 %a, %bytes
  %last = and i64 %end, -2097152
  %n = sub i64 %last, %first
  %q = inttoptr i64 %first to ptr
  %r = call i32 @madvise(ptr %q, i64 %n, i32 14)
  ret i32 %r
}
"""
#: Threads that a parallel loop runs on: the library's loader sets the function.
THREADS = """
@tvm_gdn_threads = global ptr null
define i32 @tvm_gdn_thread_count() alwaysinline {
  %f = load ptr, ptr @tvm_gdn_threads
  %n = icmp eq ptr %f, null
  br i1 %n, label %one, label %ask
one:
  ret i32 1
ask:
  %r = call i32 %f()
  ret i32 %r
}
"""
#: Bytes from which it pays: smaller tensors come from memory that the allocator kept.
LARGE = 8 << 20


@dataclass(frozen=True)
class Tile:
    """A tile: `buffer` is [rows, cols], or [panels, rows, panel] if `panel`; `row`, `col` shift a block of a larger one.

    `values`: columns are value columns, of which a worker may have a part only.

    ``(n, 1)`` tiles of the worker and their turned views are one-dimensional buffers. `v_first`: a state in memory whose columns
    are contiguous.
    """

    buffer: Any
    rows: int
    cols: int
    panel: int = 0
    row: Expr = 0
    col: Expr = 0
    v_first: bool = False
    values: bool = False

    @property
    def width(self) -> int:
        """Columns that are contiguous."""
        return self.panel or self.cols

    def at(self, i: Expr, base: Expr, unit: int = 1, lane: Expr = 0) -> Any:
        """Index of element (i, base * unit + lane) for lane < unit; `unit` divides `width`; axes of length 1 broadcast."""
        i = 0 if self.rows == 1 else i
        base, unit, lane = (0, 1, 0) if self.cols == 1 else (base, unit, lane)
        if len(self.buffer.shape) == 1:
            return [self.row + i if self.cols == 1 else self.col + base * unit + lane]
        if not self.panel:
            return [self.row + i, self.col + base * unit + lane]
        per_panel = self.panel // unit
        if per_panel == 1:
            return [base, self.row + i, lane]
        return [base // per_panel, self.row + i, base % per_panel * unit + lane]

    def get(self, i: Expr, base: Expr, unit: int = 1, lane: Expr = 0) -> Expr:
        """The element in fp32."""
        value = self.buffer[tuple(self.at(i, base, unit, lane))]
        return value if self.buffer.dtype == "float32" else T.Cast("float32", value)

    def put(self, value: Expr, i: Expr, base: Expr, unit: int = 1, lane: Expr = 0) -> None:
        """Write the element, rounded to the buffer's dtype."""
        value = value if self.buffer.dtype == "float32" else T.Cast(self.buffer.dtype, value)
        T.buffer_store(self.buffer, value, self.at(i, base, unit, lane))


def import_llvm(text: str) -> None:
    """Make LLVM functions known to the rest of the enclosing loop."""
    scope = T.attr(T.int32(0), "pragma_import_llvm", text)
    scope.add_callback(partial(scope.__exit__, None, None, None))
    scope.__enter__()


@contextmanager
def where(condition: Expr | None) -> Iterator[None]:
    """What follows happens where a condition holds; None: always."""
    if condition is None:
        yield
        return
    with T.If(condition):
        with T.Then():
            yield


def ceil_div(x: Expr, n: int) -> Expr:
    """Quotient rounded up."""
    return (x + (n - 1)) // n


class TileMemory(CpuTiles):
    """The worker's memory, its tiles, and its part of the value columns; parameters as in `cpu_chunk.ChunkTiles`."""

    #: LLVM functions that the operations call.
    helpers = TO_LINE

    def __init__(self, K: int, V: int, *, v_tile: int, chunk: int, rows: int, columns: int, span: int, v_first: bool) -> None:
        self.K, self.V, self.v_tile, self.chunk, self.span = K, V, v_tile, chunk, span
        self.mr, self.nr, self.v_first = rows, columns, v_first
        self.granule, self.triangle = rows, BLOCK
        #: Panels of a part of the columns, parts; those of this worker, and its first column, known once it has a number.
        self.each = self.cuts = self.shift = T.int64(0)
        self.active: Expr | None = None
        self.expected: list[tuple[Tile, bool, Expr | None]] = []
        self.arena: Any = None
        self.start: Expr = 0
        self.states: Expr = 0
        self.used = self.capacity = 0

    def workers(self, count: Expr) -> Any:
        """Where there are fewer than threads, every one's value columns are cut, panel by panel."""
        panels = self.v_tile // self.nr
        if panels == 1:
            return T.parallel(count)
        # Truncated divisions: proving that nothing is negative takes TVM seconds.
        import_llvm(THREADS)
        threads = T.Cast("int64", T.call_extern("int32", "tvm_gdn_thread_count"))
        cuts = T.min(T.int64(panels), T.max(T.int64(1), T.truncdiv(threads, T.max(count, T.int64(1)))))
        self.each = T.Bind(T.truncdiv(panels + cuts - 1, cuts))
        self.cuts = T.Bind(T.truncdiv(panels + self.each - 1, self.each))
        return T.parallel(count * self.cuts)

    def worker(self, block: Expr, lane: Expr) -> Expr:
        """Number of the worker; loops over value columns end with the panels of its part."""
        del lane
        panels = self.v_tile // self.nr
        if panels == 1:
            return block
        first = T.Bind(T.truncmod(block, self.cuts) * self.each)
        self.active = T.Bind(T.Cast("int32", T.min(self.each, panels - first)))
        self.shift = T.Bind(first * self.nr)
        return T.truncdiv(block, self.cuts)

    def units(self, unit: int, *tiles: Tile) -> Expr:
        """How many units of columns loops over these tiles, equally wide, take."""
        if self.active is not None and any(tile.values for tile in tiles):
            return self.active * (self.nr // unit)
        return max(tile.cols for tile in tiles) // unit

    def sync(self) -> None:
        """One thread owns every tile."""

    def outputs(self, *tensors: tuple[Any, Expr]) -> None:
        """Page faults of memory fresh from the system, one for 4 KiB, would cost half as much as the work on short sequences."""
        import_llvm(HUGE_PAGES)
        for buffer, elements in tensors:
            size = T.Bind(elements * tvm.DataType(buffer.dtype).itemsize)
            with T.If(size >= LARGE):
                with T.Then():
                    T.evaluate(T.call_extern("int32", "tvm_gdn_huge_pages", buffer.data, size))

    def enter(self, lane: Expr) -> None:
        """Allocate the worker's states."""
        del lane
        K, VT, C = self.K, self.v_tile, self.chunk
        # More than the tiles of any gate take; pages of the stack that are never touched cost nothing.
        self.capacity = 3 * self.span * K * VT + 12 * C * (K + C + VT) + 4096
        self.arena = local_array(self.capacity + LINE)
        self.start = self.first_line()
        self.used = 0
        self.states = self._take(self.span * K * VT)

    def first_line(self) -> Expr:
        """Offset in the arena at which its first cache line starts."""
        import_llvm(self.helpers)
        return T.Bind(T.call_pure_extern("int32", "tvm_gdn_to_line", T.address_of(self.arena[0])))

    def _take(self, count: int) -> Expr:
        """Offset in the arena of so many 32-bit elements, from the start of a cache line."""
        offset = self.used
        self.used += (count + LINE - 1) // LINE * LINE
        if self.used > self.capacity:
            raise ValueError(f"tiles of {self.used} elements do not fit in {self.capacity}")
        return self.start + offset

    def array(self, *shape: int, dtype: str = "float32") -> Any:
        """Array of the worker's arena, of 32-bit elements."""
        return T.decl_buffer(shape, dtype, data=self.arena.data, elem_offset=self._take(prod(shape)), scope="local")

    def leave(self) -> None:
        """Nothing to give back."""

    def tile(self, rows: int, cols: int, place: str = "shared", dtype: str = "float32") -> Tile:
        """Array on the worker's stack, fp32 whatever it holds."""
        del dtype
        if rows == 1 or cols == 1:
            return Tile(self.array(rows * cols), rows, cols)
        if place == "register":
            return self._panels(rows, cols, self._take(rows * cols))
        return Tile(self.array(rows, cols), rows, cols)

    def _panels(self, rows: int, cols: int, offset: Expr) -> Tile:
        shape = (cols // self.nr, rows, self.nr)
        buffer = T.decl_buffer(shape, "float32", data=self.arena.data, elem_offset=offset, scope="local")
        return Tile(buffer, rows, cols, self.nr, values=True)

    def state(self, index: Expr) -> Tile:
        """State of one of the worker's value heads."""
        return self._panels(self.K, self.v_tile, self.states + T.Cast("int32", index) * (self.K * self.v_tile))

    def window(self, buffer: Any, offset: Expr, rows: int, cols: int, strides: tuple[Expr, Expr]) -> Tile:
        """Window of a tensor in memory."""
        view = T.decl_buffer((rows, cols), buffer.dtype, data=buffer.data, elem_offset=offset, strides=strides)
        return Tile(view, rows, cols)

    def view(self, buffer: Any, offset: Expr, j0: Expr) -> Tile:
        """State in memory."""
        strides = (1, self.K) if self.v_first else (self.V, 1)
        window = self.window(buffer, offset + (j0 + self.shift) * strides[1], self.K, self.v_tile, strides)
        return replace(window, v_first=self.v_first)

    def block(self, tile: Tile, row: Expr, col: Expr, rows: int, cols: int) -> Tile:
        """Part of a row-major tile."""
        return Tile(tile.buffer, rows, cols, 0, tile.row + row, tile.col + col)

    def turn(self, tile: Tile) -> Tile:
        """The same numbers along the other axis."""
        return Tile(tile.buffer, tile.cols, tile.rows, 0, tile.col, tile.row)
