"""Moving and computing elements of the chunked delta rules' tiles on GPUs."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import aligned
from tvm_gdn.schedules.gpu_fragments import (
    BLOCK,
    ITEMSIZE,
    WARP,
    Fragments,
    FragmentTiles,
    Tile,
    Window,
    ceil_div,
    when,
)

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr


class ElementTiles(FragmentTiles):
    """Loads, stores, elementwise functions and sums; the threads of a block take elements in turn."""

    def map(self, dst: Any, function: ElementFunction, *sources: Any, rows: Expr | None = None, lower: bool = False) -> None:
        """Elements of registers, or shared elements thread by thread."""
        del lower

        def element(i: Expr, j: Expr, slot: Expr) -> None:
            self._put(dst, function(i, j, *(self._get(source, i, j, slot) for source in sources)), i, j, slot)

        self._over(dst, element, rows)

    def zero(self, dst: Any) -> None:
        """All elements of the tile zero."""
        self.map(dst, lambda _i, _j: T.float32(0))

    def load(self, dst: Any, src: Window, rows: Expr | None = None, *, lower: bool = False, pieces: Expr = None) -> None:
        """Zero where there is no token; tensor data stays in its dtype where products can read it so.

        `lower`: with zeros above the diagonal. `pieces`: what the method of that name says, where it is known.
        """
        if isinstance(dst, Tile):
            self._load_shared(dst, src, rows, lower=lower, pieces=pieces)
            return

        def element(i: Expr, j: Expr, slot: Expr) -> None:
            self._put(dst, T.float32(0), i, j, slot)
            inside = [] if rows is None else [T.Cast("int64", i) < rows]
            inside += [i < dst.rows] if dst.rows % BLOCK else []
            inside += [j < dst.cols] if dst.cols % 8 else []
            condition: Any = True
            for part in inside:
                condition = part if condition is True else T.And(condition, part)
            when(condition, lambda: self._put(dst, self._get(src, i, j), i, j, slot))

        self._over(dst, element)

    def _padded_columns(self, dst: Tile) -> int:
        """Columns that are written; products on bf16 read the padding too."""
        return dst.storage.stride - 8 if dst.storage.dtype == "bfloat16" and dst.cols > 1 else dst.cols

    def _load_shared(self, dst: Tile, src: Window, rows: Expr | None, *, lower: bool, pieces: Expr) -> None:
        dtype = src.buffer.dtype
        self.copying = True
        self._place(dst.storage)
        storage, limit = dst.storage, dst.rows if rows is None else rows
        storage.version += 1
        view = self.views[storage.dtype]
        wide = self._padded_columns(dst)

        def plain() -> None:
            count = ceil_div(dst.rows * wide, self.threads)
            with T.serial(count) as step:
                index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                i, j = index // wide, index % wide

                def element() -> None:
                    inside = T.Cast("int64", i) < limit
                    inside = inside if wide == dst.cols else T.And(inside, j < dst.cols)
                    place = self._index(dst, i, j)
                    T.buffer_store(view, T.Cast(storage.dtype, T.float32(0)), [place])
                    when(inside, lambda: T.buffer_store(view, T.Cast(storage.dtype, src.buffer[i, j]), [place]))

                when(True if dst.rows * wide % self.threads == 0 else index < dst.rows * wide, element)

        lanes = 16 // ITEMSIZE[dtype] if dtype in ITEMSIZE else 1
        count = dst.rows * dst.cols // lanes
        # The kernel's own memory is copied whatever the number of threads.
        if storage.dtype != dtype or wide != dst.cols or dst.cols % lanes or (count % self.threads and pieces is not True):
            plain()
            return
        across = dst.cols // lanes
        pieces = self.pieces(src) if pieces is None else pieces
        if self.threads % across == 0 and self.threads // across % 8 == 0 and count % self.threads == 0:
            self._copy_rows(dst, src, limit, lanes, pieces, lower=lower)
            return

        def whole() -> None:
            with T.unroll(ceil_div(count, self.threads)) as step:
                index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                i, j = index // across, index % across * lanes
                to, source = T.address_of(view[self._index(dst, i, j)]), T.address_of(src.buffer[i, j])
                inside = T.Cast("int32", T.Cast("int64", i) < limit)
                copy = T.call_extern("int32", "tvm_gdn_copy", to, source, inside)
                when(True if count % self.threads == 0 else index < count, lambda: T.evaluate(copy))

        if pieces is True:
            whole()
            return
        with T.If(pieces):
            with T.Then():
                whole()
            with T.Else():
                plain()

    def _copy_rows(self, dst: Tile, src: Window, limit: Expr, lanes: int, pieces: Expr, *, lower: bool) -> None:
        """Pieces of 16 bytes; a thread has every n-th row's in the same columns, so that addresses go on by constants."""
        across, view, dtype = dst.cols // lanes, self.views[dst.storage.dtype], dst.storage.dtype
        rows, lane = self.threads // across, T.Cast("int32", self.lane)
        i, j = lane // across, lane % across * lanes
        to, source = T.address_of(view[self._index(dst, i, j)]), T.address_of(src.buffer[i, j])
        apart, stride = (
            rows * dst.storage.stride * ITEMSIZE[dtype],
            T.Cast("int64", src.buffer.strides[0]) * (rows * ITEMSIZE[dtype]),
        )
        # Zeros above a diagonal need not come from memory.
        bounds = (j - i if lower else T.int32(0), T.Cast("int32", limit) - i)

        def copy(name: str) -> None:
            T.evaluate(T.call_extern("int32", name, to, source, apart, stride, dst.rows // rows, rows, *bounds))

        name = self._copy_name(dst, lower)
        if pieces is True:
            copy(name)
            return
        with T.If(pieces):
            with T.Then():
                copy(name)
            with T.Else():
                copy("tvm_gdn_copy_elements")

    def _copy_name(self, dst: Tile, lower: bool) -> str:
        """The function that copies rows."""
        del dst, lower
        return "tvm_gdn_copy_rows"

    @staticmethod
    def pieces(src: Window) -> Expr:
        """Whether all rows of a window begin at multiples of 16 bytes."""
        lanes = 16 // ITEMSIZE[src.buffer.dtype]
        return T.And(aligned(src.buffer, 0, 0, elements=lanes), aligned(src.buffer, 1, 0, elements=lanes))

    def store(self, dst: Window, src: Any, rows: Expr | None = None) -> None:
        """Rounded to the tensor's dtype."""
        if isinstance(src, Tile) and rows is None and src.cols > 1 and src.storage.dtype == dst.buffer.dtype:
            lanes = 16 // ITEMSIZE[dst.buffer.dtype]
            if src.cols % lanes == 0:
                self._store_shared(dst, src, lanes)
                return

        if isinstance(src, Fragments) and dst.buffer.dtype == "bfloat16" and src.cols % 8 == 0 and src.rows % BLOCK == 0:
            even = T.And(aligned(dst.buffer, 0, 0, elements=2), aligned(dst.buffer, 1, 0, elements=2))
            with T.If(even):
                with T.Then():
                    self._store_pairs(dst, src, rows)
                with T.Else():
                    self._store_elements(dst, src, rows)
            return
        self._store_elements(dst, src, rows)

    def _store_elements(self, dst: Window, src: Any, rows: Expr | None) -> None:
        def element(i: Expr, j: Expr, slot: Expr) -> None:
            inside: Any = True if rows is None else T.Cast("int64", i) < rows
            when(inside, lambda: self._put(dst, self._get(src, i, j, slot), i, j))

        self._over(src, element, cut=True)

    def _store_pairs(self, dst: Window, src: Fragments, rows: Expr | None) -> None:
        """Two neighbouring bf16 numbers as one word."""
        per_row = self._grid(src.rows, src.cols)[1]

        def fragment(a: int, b: int, mi: Expr, ni: Expr) -> None:
            slot, places = (a * per_row + b) * 4, self._elements(mi, ni)
            for e in (0, 2):
                i, j = places[e]
                pair = (T.address_of(dst.buffer[i, j]), 0, 1, src.buffer[slot + e], src.buffer[slot + e + 1])
                inside: Any = True if rows is None else T.Cast("int64", i) < rows
                when(inside, lambda pair=pair: T.evaluate(T.call_extern("int32", "tvm_gdn_split", *pair)))

        self._fragments(src.rows, src.cols, fragment)

    def _store_shared(self, dst: Window, src: Tile, lanes: int) -> None:
        """A whole shared tile, 16 bytes at once; into memory of the kernel's own, which is aligned."""
        pieces = src.rows * src.cols // lanes
        self._place(src.storage)
        with T.serial(ceil_div(pieces, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // (src.cols // lanes), index % (src.cols // lanes) * lanes
            to, source = T.address_of(dst.buffer[i, j]), T.address_of(self.views[src.storage.dtype][self._index(src, i, j)])
            when(
                True if pieces % self.threads == 0 else index < pieces,
                lambda: T.evaluate(T.call_extern("int32", "tvm_gdn_move", to, source)),
            )

    def row_sum(self, dst: Tile, function: ElementFunction, *sources: Any, rows: Expr | None = None) -> None:
        """Four threads per row, neighbours on neighbouring columns."""
        cols, part = sources[0].cols, self.scalars(1)
        lane, limit = T.Cast("int32", self.lane), dst.rows if rows is None else rows
        with T.serial(ceil_div(dst.rows * 4, self.threads)) as step:
            row = T.Bind((T.Cast("int32", step * self.threads) + lane) // 4)
            # No condition around the shuffles: all threads of a warp take part.
            safe = row if dst.rows * 4 % self.threads == 0 else T.min(row, dst.rows - 1)
            T.buffer_store(part, T.float32(0), [0])
            for first in range(0, cols, 4):
                j = lane % 4 + first

                def add(j: Expr = j) -> None:
                    value = function(safe, j, *(self._get(source, safe, j) for source in sources))
                    T.buffer_store(part, part[0] + value, [0])

                when(True if first + 4 <= cols else j < cols, add)
            for bit in (1, 2):
                other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), part[0], bit, WARP, WARP)
                T.buffer_store(part, part[0] + other, [0])
            own = T.And(lane % 4 == 0, T.Cast("int64", row) < limit)
            when(own, lambda: self._put(dst, part[0], row, 0))

    def scan(self, dst: Tile, src: Window, rows: Expr, *, turn: int = 0, unit: float = 1) -> None:
        """One column: a warp, the last but `turn`, by shuffles. Several: a thread per column, of `unit` times each number."""
        total = self.scalars(3)
        if dst.cols > 1:
            rows_at_once = 2 * BLOCK if dst.rows % (2 * BLOCK) == 0 else BLOCK
            fetched, places, last = self.scalars(rows_at_once), self.integers(1), T.Bind(T.Cast("int32", rows) - 1)
            step_down = T.Cast("int64", src.buffer.strides[0])

            def fetch(first: Expr, whole: bool) -> None:
                """Rows that do not wait for one another; no branch between: the last one in place of what lies behind it."""
                for row in range(rows_at_once):
                    T.buffer_store(fetched, self._get(self.window(src.buffer, places[0], 1, 1, (1, 1)), 0, 0), [row])
                    down = step_down if whole else T.Select(first + row < last, step_down, T.int64(0))
                    T.buffer_store(places, places[0] + down, [0])

            with T.serial(ceil_div(dst.cols, self.threads)) as step:
                j = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                with T.If(j < dst.cols):
                    with T.Then():
                        T.buffer_store(total, T.float32(0), [0])
                        T.buffer_store(places, src.buffer.elem_offset + T.Cast("int64", j) * src.buffer.strides[1], [0])
                        with T.serial(dst.rows // rows_at_once) as block:
                            first = T.Bind(T.Cast("int32", block) * rows_at_once)
                            with T.If(first + (rows_at_once - 1) <= last):
                                with T.Then():
                                    fetch(first, True)
                                with T.Else():
                                    fetch(first, False)
                                    for row in range(rows_at_once):
                                        T.buffer_store(fetched, T.Select(first + row <= last, fetched[row], T.float32(0)), [row])
                            for row in range(rows_at_once):
                                own = fetched[row] if unit == 1 else fetched[row] * T.float32(unit)
                                T.buffer_store(total, total[0] + own, [0])
                                self._put(dst, total[0], first + row, j)
            return
        lane = T.Cast("int32", self.lane) - (self.threads - WARP * (1 + turn % self.warps))
        with T.If(T.And(lane >= 0, lane < WARP)):
            with T.Then():
                T.buffer_store(total, T.float32(0), [1])
                # Rows that do not wait for one another first.
                fetched = self.scalars(ceil_div(dst.rows, WARP))
                for first in range(0, dst.rows, WARP):
                    row, at = lane + first, first // WARP
                    T.buffer_store(fetched, T.float32(0), [at])
                    inside = T.Cast("int64", row) < rows
                    inside = inside if first + WARP <= dst.rows else T.And(inside, row < dst.rows)
                    when(inside, lambda row=row, at=at: T.buffer_store(fetched, self._get(src, row, 0), [at]))
                for first in range(0, dst.rows, WARP):
                    row = lane + first
                    T.buffer_store(total, fetched[first // WARP], [0])
                    for bit in (1, 2, 4, 8, 16):
                        # In a variable of its own: a condition around a shuffle would leave threads out of it.
                        T.buffer_store(total, T.tvm_warp_shuffle_up(T.uint32(0xFFFFFFFF), total[0], bit, WARP, WARP), [2])
                        T.buffer_store(total, total[0] + T.Select(lane >= bit, total[2], T.float32(0)), [0])
                    T.buffer_store(total, total[0] + total[1], [0])
                    keep = True if first + WARP <= dst.rows else row < dst.rows
                    when(keep, lambda row=row: self._put(dst, total[0], row, 0))
                    last = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), total[0], WARP - 1, WARP, WARP)
                    T.buffer_store(total, last, [1])

    def pair_sum(
        self,
        dsts: tuple[Tile, ...],
        weight: ElementFunction,
        lefts: tuple[Tile, ...],
        own: tuple[Tile, ...],
        right: tuple[Tile, ...],
        rows: Expr,
    ) -> None:
        """Columns on the threads of a warp, which takes rows n and 15 - n of a block: together they have 17 pairs."""
        cols, half, blocks = own[0].cols, BLOCK // 2, ceil_div(rows, BLOCK)
        sums, weights = self.scalars(len(dsts)), self.scalars(1)
        with T.serial(ceil_div(blocks * (BLOCK * BLOCK), self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // BLOCK, index % BLOCK
            above = T.And(j > i % BLOCK, T.Cast("int64", i) < blocks * BLOCK)
            with T.If(above):
                with T.Then():
                    for dst in dsts:
                        self._put(dst, T.float32(0), i, i // BLOCK * BLOCK + j)
        lane, warp = T.Bind(T.Cast("int32", self.lane) % WARP), T.Bind(T.Cast("int32", self.lane) // WARP)
        with T.serial(ceil_div(blocks * half, self.warps)) as step:
            number = T.Bind(T.Cast("int32", step * self.warps) + warp)
            # Beyond the last block no row is written; all threads take part in the shuffles.
            mine = T.And(T.Cast("int64", number) < blocks * half, lane == 0)
            block = T.Bind(T.min(number // half, dsts[0].rows // BLOCK - 1) * BLOCK)
            first = number % half
            with T.serial(BLOCK + 1) as pair:
                i = T.Bind(block + T.Select(pair <= first, first, BLOCK - 1 - first))
                j = T.Bind(block + T.Select(pair <= first, pair, pair - first - 1))
                for at in range(len(dsts)):
                    T.buffer_store(sums, T.float32(0), [at])
                for start in range(0, cols, WARP):
                    c = lane + start

                    def add(c: Expr = c) -> None:
                        x, y = [self._get(tile, i, c) for tile in own], [self._get(tile, j, c) for tile in right]
                        T.buffer_store(weights, weight(*x, *y), [0])
                        for at, left in enumerate(lefts):
                            T.buffer_store(sums, sums[at] + self._get(left, i, c) * weights[0], [at])

                    when(True if start + WARP <= cols else c < cols, add)
                for bit in (1, 2, 4, 8, 16):
                    for at in range(len(dsts)):
                        other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), sums[at], bit, WARP, WARP)
                        T.buffer_store(sums, sums[at] + other, [at])
                with T.If(mine):
                    with T.Then():
                        for at, dst in enumerate(dsts):
                            self._put(dst, sums[at], i, j)
