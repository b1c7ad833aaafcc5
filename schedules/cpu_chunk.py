"""Tile operations of the chunked delta rules on CPUs: fp32, explicit vectors, register-blocked products.

A worker is one thread. Tiles lie in one array on its stack (L2-resident: about 0.4 MiB at C = 64, K = V = 128), each from a
cache line on: TVM 0.27 aligns arrays on the stack to 16 bytes only, and vectors across two lines cost twice. Nothing is allocated
per call. Every product runs on one micro-kernel: `rows` x `columns` fp32 accumulators in vector registers, one broadcast of the
left and one vector of the right operand per multiply-add. Operands alias their tiles, except a transposed right one.

Tiles of products over value columns and states are stored in panels of `columns` columns: a panel that the micro-kernel runs
down is then contiguous. In row-major order its rows, 512 bytes apart, fall into a quarter of the sets of a 48 KiB L1 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import gcd, prod
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array, sum_lanes, transpose_16

from tvm_gdn.ops.tir.tiles import GRANULE, ElementFunction, Expr

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


@dataclass(frozen=True)
class Operand:
    """An operand: the tile that products read, and how to bring it up to date with `source` where it is a copy."""

    tile: Tile
    transposed: bool = False
    source: Tile | None = None


def import_llvm(text: str) -> None:
    """Make LLVM functions known to the rest of the enclosing loop."""
    scope = T.attr(T.int32(0), "pragma_import_llvm", text)
    scope.add_callback(partial(scope.__exit__, None, None, None))
    scope.__enter__()


def ceil_div(x: Expr, n: int) -> Expr:
    """Quotient rounded up."""
    return (x + (n - 1)) // n


class ChunkTiles(CpuTiles):
    """Tile operations of one geometry; see `tvm_gdn/ops/tir/tiles.py`.

    Parameters
    ----------
    K, V, v_tile : int
        State rows, state columns, columns per worker.
    chunk : int
        Tokens per chunk, a multiple of 16.
    rows, columns : int
        Accumulators of the micro-kernel; `rows` divides 16 and K, `columns` divides v_tile.
    span : int
        Value heads per worker.
    v_first : bool
        Whether states are stored ``[V, K]``; the tile is then transposed on the way in and out.
    """

    #: LLVM functions that the operations call.
    helpers = TO_LINE

    #: One pass: a worker goes through its sequence once, and what it needs of a chunk stays in the cache.
    ahead = False
    #: Operands are the tiles themselves: there is nothing to save by writing them in a product's epilogue.
    fused = False

    def __init__(self, K: int, V: int, *, v_tile: int, chunk: int, rows: int, columns: int, span: int, v_first: bool) -> None:
        self.K, self.V, self.v_tile, self.chunk, self.span = K, V, v_tile, chunk, span
        self.mr, self.nr, self.v_first = rows, columns, v_first
        self.granule, self.triangle = rows, BLOCK
        #: Panels of a part of the columns, parts; those of this worker, and its first column, known once it has a number.
        self.each = self.cuts = self.shift = T.int64(0)
        self.active: Expr | None = None
        self.expected: list[tuple[Tile, bool]] = []
        self.arena: Any = None
        self.start: Expr = 0
        self.states: Expr = 0
        self.used = self.capacity = 0

    def workers(self, count: Expr) -> Any:
        """Where there are fewer than threads, every one's value columns are cut, panel by panel."""
        panels = self.v_tile // self.nr
        if panels == 1:
            return T.parallel(count)
        import_llvm(THREADS)
        threads = T.Cast("int64", T.call_extern("int32", "tvm_gdn_thread_count"))
        cuts = T.min(T.int64(panels), T.max(T.int64(1), threads // T.max(count, T.int64(1))))
        self.each = T.Bind((panels + cuts - 1) // cuts)
        self.cuts = T.Bind((panels + self.each - 1) // self.each)
        return T.parallel(count * self.cuts)

    def worker(self, block: Expr, lane: Expr) -> Expr:
        """Number of the worker; loops over value columns end with the panels of its part."""
        del lane
        panels = self.v_tile // self.nr
        if panels == 1:
            return block
        first = T.Bind(block % self.cuts * self.each)
        self.active = T.Bind(T.min(self.each, panels - first))
        self.shift = T.Bind(first * self.nr)
        return block // self.cuts

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

    sum = staticmethod(sum_lanes)

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

    # Elements.
    def _vector(self, *tiles: Tile) -> int:
        """Columns per vector loop over these tiles."""
        wide = [tile.width for tile in tiles if tile.cols > 1]
        width = gcd(*wide) if wide else 1
        return next((n for n in (64, 32, 16) if width % n == 0), width)

    def map(self, dst: Tile, function: ElementFunction, *sources: Tile, rows: Expr | None = None, lower: bool = False) -> None:
        """Vector loops; the rows that single products compute, or whole blocks of a triangle."""
        if dst.cols == 1 or (dst.rows == 1 and len(dst.buffer.shape) == 1):
            self._map_vector(dst, function, *sources)
            return
        unit = BLOCK if lower else self._vector(dst, *sources)
        granule = min(GRANULE, self.chunk) if lower else self.granule
        with T.serial(dst.rows if rows is None else ceil_div(rows, granule) * granule) as i:
            with T.serial((i // self.triangle + 1) * (self.triangle // BLOCK) if lower else self.units(unit, dst)) as base:
                with T.vectorized(unit) as lane:
                    values = [source.get(i, base, unit, lane) for source in sources]
                    dst.put(function(i, base * unit + lane, *values), i, base, unit, lane)

    def _map_vector(self, dst: Tile, function: ElementFunction, *sources: Tile) -> None:
        with T.vectorized(max(dst.rows, dst.cols)) as i:
            row, col = (i, 0) if dst.cols == 1 else (0, i)
            values = [source.get(row, col) for source in sources]
            dst.put(function(row, col, *values), row, col)

    def zero(self, dst: Tile) -> None:
        """Vector stores."""
        self.map(dst, lambda _i, _j: T.float32(0))

    def load(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """Converted to fp32; rows from `rows` on are zero."""
        if src.v_first:
            self._copy_v_first(dst, src)
        elif dst.cols == 1 and rows is not None:
            with T.serial(dst.rows) as i:
                with T.If(i < rows):
                    with T.Then():
                        dst.put(src.get(i, 0), i, 0)
                    with T.Else():
                        dst.put(T.float32(0), i, 0)
        else:
            limit = dst.rows if rows is None else rows
            self._copy(dst, src, 0, limit)
            if rows is not None:
                unit = self._vector(dst)
                with T.serial(dst.rows - rows) as i:
                    with T.serial(self.units(unit, dst)) as base:
                        with T.vectorized(unit) as lane:
                            dst.put(T.float32(0), rows + i, base, unit, lane)

    def store(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """Rounded to the tensor's dtype."""
        if dst.v_first:
            self._copy_v_first(dst, src)
        else:
            self._copy(dst, src, 0, src.rows if rows is None else rows)

    def _copy(self, dst: Tile, src: Tile, start: Expr, count: Expr) -> None:
        unit = self._vector(dst, src)
        with T.serial(count) as i:
            with T.serial(self.units(unit, dst, src)) as base:
                with T.vectorized(unit) as lane:
                    dst.put(src.get(start + i, base, unit, lane), start + i, base, unit, lane)

    def _copy_v_first(self, dst: Tile, src: Tile) -> None:
        """Between a [V, K] state in memory and a tile."""
        with T.serial(self.units(1, dst, src)) as j:
            with T.serial(self.K) as i:
                unit = self.nr
                dst.put(src.get(i, j // unit, unit, j % unit), i, j // unit, unit, j % unit)

    def row_sum(self, dst: Tile, function: ElementFunction, *sources: Tile, rows: Expr | None = None) -> None:
        """Partial sums per lane, then across the lanes."""
        cols = sources[0].cols
        lanes = max(n for n in (1, 2, 4, 8, 16, 32, 64) if cols % n == 0)
        part = local_array(lanes)
        with T.serial(dst.rows if rows is None else rows) as i:
            with T.vectorized(lanes) as lane:
                T.buffer_store(part, T.float32(0), [lane])
            with T.serial(cols // lanes) as base:
                with T.vectorized(lanes) as lane:
                    value = function(i, base * lanes + lane, *(s.get(i, base, lanes, lane) for s in sources))
                    T.buffer_store(part, part[lane] + value, [lane])
            dst.put(self.sum(part, lanes), i, 0)

    def scan(self, dst: Tile, src: Tile, rows: Expr) -> None:
        """Running sums row by row."""
        unit = dst.cols
        total = local_array(unit)
        with T.vectorized(unit) as lane:
            T.buffer_store(total, T.float32(0), [lane])
        with T.serial(dst.rows) as i:
            with T.If(i < rows):
                with T.Then():
                    with T.vectorized(unit) as lane:
                        T.buffer_store(total, total[lane] + src.get(i, 0, unit, lane), [lane])
            with T.vectorized(unit) as lane:
                dst.put(total[lane], i, 0, unit, lane)

    def pair_sum(self, dst: Tile, function: ElementFunction, left: tuple[Tile, ...], right: tuple[Tile, ...], rows: Expr) -> None:
        """Partial sums per lane for every pair of rows."""
        cols = left[0].cols
        lanes = max(n for n in (1, 2, 4, 8, 16) if cols % n == 0)
        part = local_array(lanes)
        with T.serial(ceil_div(rows, BLOCK)) as b:
            with T.serial(BLOCK) as i:
                with T.vectorized(BLOCK) as j:
                    dst.put(T.float32(0), b * BLOCK + i, b, BLOCK, j)
                with T.serial(i + 1) as j:
                    with T.vectorized(lanes) as lane:
                        T.buffer_store(part, T.float32(0), [lane])
                    with T.serial(cols // lanes) as base:
                        with T.vectorized(lanes) as lane:
                            x = [tile.get(b * BLOCK + i, base, lanes, lane) for tile in left]
                            y = [tile.get(b * BLOCK + j, base, lanes, lane) for tile in right]
                            T.buffer_store(part, part[lane] + function(*x, *y), [lane])
                    dst.put(self.sum(part, lanes), b * BLOCK + i, b, BLOCK, j)

    # Products.
    def expect(self, *windows: Tile, write: bool = False) -> None:
        """Asked for block by block of the next product: all at once they would wait for each other."""
        self.expected += [(window, write) for window in windows]

    def _fetcher(self, blocks: int) -> Callable[[Expr], None]:
        """What every one of a product's blocks asks for, given its number."""
        expected, self.expected = self.expected, []

        def fetch(number: Expr) -> None:
            for window, write in expected:
                per_line = 4 * LINE // tvm.DataType(window.buffer.dtype).itemsize
                per_row = -(-window.cols // per_line)
                share = -(-window.rows * per_row // blocks)
                with T.serial(share) as n:
                    line = T.Cast("int32", number) * share + n
                    element = window.buffer[line // per_row, line % per_row * per_line]
                    arguments = T.address_of(element), T.int32(int(write)), T.int32(2), T.int32(1)
                    T.evaluate(tvm.tirx.call_intrin("void", "tirx.prefetch", *arguments))

        return fetch

    def operand(self, tile: Tile, side: str, *, transpose: bool = False) -> Operand:
        """The tile itself; a right operand needs its rows contiguous, so a transposed one is a copy."""
        if side == "left" or not transpose:
            return Operand(tile, transpose)
        nr = self._square_columns()
        buffer = self.array(tile.rows // nr, tile.cols, nr)
        return Operand(Tile(buffer, tile.cols, tile.rows, nr), source=tile)

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Transpose those that are copies."""
        del lower
        for operand in operands:
            if operand.source is not None:
                self._transpose(operand.tile, operand.source, rows)

    def _transpose(self, dst: Tile, src: Tile, rows: Expr | None) -> None:
        with T.serial(ceil_div(src.rows if rows is None else rows, BLOCK)) as b:
            if src.cols % BLOCK == 0:
                lanes = T.ramp(0, 1, BLOCK)
                with T.serial(src.cols // BLOCK) as c:
                    transpose_16(
                        lambda r: src.buffer[tuple(src.at(b * BLOCK + r, c, BLOCK, lanes))],
                        lambda r, column: T.buffer_store(dst.buffer, column, dst.at(c * BLOCK + r, b, BLOCK, lanes)),
                    )
            else:
                with T.serial(src.cols) as c:
                    with T.vectorized(BLOCK) as lane:
                        dst.put(src.get(b * BLOCK + lane, c), c, b, BLOCK, lane)

    def _square_columns(self) -> int:
        """Columns of the micro-kernel for results over tokens."""
        return next(n for n in (self.nr, 32, BLOCK) if self.chunk % n == 0 and n % BLOCK == 0)

    def mma(
        self,
        dst: Tile,
        a: Operand,
        b: Operand,
        *,
        rows: Expr | None = None,
        cols: Expr | None = None,
        depth: Expr | None = None,
        lower: str | None = None,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Tile, ...] = (),
    ) -> None:
        """Register-blocked product."""
        mr, nr = self.mr, dst.panel or min(self._square_columns(), dst.cols)
        granule = min(GRANULE, self.chunk) if lower == "result" else self.granule
        row_tiles = dst.rows // mr if rows is None else ceil_div(rows, granule) * (granule // mr)
        col_tiles = self.units(nr, dst) if cols is None else ceil_div(cols, nr)
        full = a.tile.rows if a.transposed else a.tile.cols
        fetch = self._fetcher(dst.rows // mr * (dst.cols // nr))

        def tile(io: Expr, jo: Expr) -> None:
            acc = local_array(mr, nr)
            fetch(jo * (dst.rows // mr) + io)

            def element(r: Expr, lane: Expr) -> tuple[Any, ...]:
                i = io * mr + r
                return i, jo * nr + lane, *(s.get(i, jo, nr, lane) for s in sources)

            with T.unroll(mr) as r:
                with T.vectorized(nr) as lane:
                    i, j, *values = element(r, lane)
                    first = T.float32(0) if start is None else start(i, j, dst.get(i, jo, nr, lane), *values)
                    T.buffer_store(acc, first, [r, lane])
            with T.serial((io + 1) * mr if lower == "left" else full if depth is None else depth) as kk:
                with T.unroll(mr) as r:
                    with T.vectorized(nr) as lane:
                        left = a.tile.get(kk, io * mr + r) if a.transposed else a.tile.get(io * mr + r, kk)
                        T.buffer_store(acc, acc[r, lane] + left * b.tile.get(kk, jo, nr, lane), [r, lane])
            with T.unroll(mr) as r:
                with T.vectorized(nr) as lane:
                    i, j, *values = element(r, lane)
                    last = acc[r, lane]
                    dst.put(last if finish is None else finish(i, j, last, *values), i, jo, nr, lane)

        if lower == "result":
            with T.serial(row_tiles) as io:
                with T.serial((io * mr + mr + nr - 1) // nr) as jo:
                    tile(io, jo)
        else:
            with T.serial(col_tiles) as jo:
                with T.serial(row_tiles) as io:
                    tile(io, jo)

    def invert_diagonal(self, dst: Tile, a: Tile, rows: Expr) -> None:
        """Columns of the block as vectors: when row k is final, it is subtracted from all rows below."""
        lanes = T.ramp(0, 1, BLOCK)
        x = local_array(BLOCK, BLOCK)
        with T.serial(ceil_div(rows, BLOCK)) as b:
            with T.unroll(BLOCK) as i:
                with T.vectorized(BLOCK) as j:
                    T.buffer_store(x, T.Select(i == j, T.float32(1), T.float32(0)), [i, j])
            for k in range(BLOCK - 1):
                for i in range(k + 1, BLOCK):
                    factor = T.broadcast(a.get(b * BLOCK + i, b, BLOCK, k), BLOCK)
                    T.buffer_store(x, x[i, lanes] - factor * x[k, lanes], [i, lanes])
            with T.unroll(BLOCK) as i:
                with T.vectorized(BLOCK) as j:
                    dst.put(x[i, j], b * BLOCK + i, b, BLOCK, j)
