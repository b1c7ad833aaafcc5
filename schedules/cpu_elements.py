"""Operations on elements of tiles as explicit vectors: maps, sums, loads and stores."""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array, sum_lanes, transpose_16
from tvm_gdn.schedules.cpu_tiles import BLOCK, Tile, TileMemory, ceil_div

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr


class ElementTiles(TileMemory):
    """Vector loops over the elements of tiles."""

    sum = staticmethod(sum_lanes)

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
        granule = BLOCK if lower else self.granule
        # Masks compare indices: vectors of 32 bits take half the instructions.
        with T.serial(dst.rows if rows is None else T.Cast("int32", ceil_div(rows, granule)) * granule) as i:
            with T.serial((i // self.triangle + 1) * (self.triangle // BLOCK) if lower else self.units(unit, dst)) as base:
                with T.vectorized(unit) as lane:
                    values = [source.get(i, base, unit, lane) for source in sources]
                    dst.put(function(i, base * unit + lane, *values), i, base, unit, lane)

    def _map_vector(self, dst: Tile, function: ElementFunction, *sources: Tile) -> None:
        with T.vectorized(max(dst.rows, dst.cols)) as i:
            row, col = (i, 0) if dst.cols == 1 else (0, i)
            values = [source.get(row, col) for source in sources]
            dst.put(function(row, col, *values), row, col)

    def decays(self, dst: Tile, gates: Tile, factors: Tile, rows: Expr) -> None:
        """Left of the diagonal blocks an exponential is a product of two, from j to the block's first token and on to i.

        Neither exceeds one for decaying gates; so a block takes one of each, and not 16.
        """
        near, far = local_array(BLOCK), local_array(BLOCK)
        with T.serial(T.Cast("int32", ceil_div(rows, BLOCK))) as b:
            first = gates.get(b * BLOCK, 0)
            with T.vectorized(BLOCK) as lane:
                T.buffer_store(near, self.exp(gates.get(b * BLOCK + lane, 0) - first), [lane])
            with T.serial(b) as c:
                with T.vectorized(BLOCK) as lane:
                    j = c * BLOCK + lane
                    T.buffer_store(far, factors.get(j, 0) * self.exp(first - gates.get(j, 0)), [lane])
                with T.serial(BLOCK) as r:
                    with T.vectorized(BLOCK) as lane:
                        dst.put(near[r] * far[lane], b * BLOCK + r, c, BLOCK, lane)
            with T.serial(BLOCK) as r:
                with T.vectorized(BLOCK) as lane:
                    j = b * BLOCK + lane
                    value = factors.get(j, 0) * self.exp(gates.get(b * BLOCK + r, 0) - gates.get(j, 0))
                    dst.put(T.Select(lane <= r, value, T.float32(0)), b * BLOCK + r, b, BLOCK, lane)
                # What the last columns of a larger triangle hold is read too.
                beyond = (b * BLOCK // self.triangle + 1) * (self.triangle // BLOCK) - 1 - b
                with T.serial(beyond) as c:
                    with T.vectorized(BLOCK) as lane:
                        dst.put(T.float32(0), b * BLOCK + r, b + 1 + c, BLOCK, lane)

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
        """Between a [V, K] state in memory and a tile: blocks of 16 x 16 transposed in registers, or element by element."""
        unit = self.nr
        if self.K % BLOCK or unit % BLOCK:
            with T.serial(self.units(1, dst, src)) as j:
                with T.serial(self.K) as i:
                    dst.put(src.get(i, j // unit, unit, j % unit), i, j // unit, unit, j % unit)
            return
        lanes = T.ramp(0, 1, BLOCK)
        state = (src if src.v_first else dst).buffer
        # The last axis of a buffer is the one that vectors run along.
        columns = T.decl_buffer(
            (self.v_tile, self.K), state.dtype, data=state.data, elem_offset=state.elem_offset, strides=(self.K, 1)
        )
        with T.serial(self.units(BLOCK, dst, src)) as cb:
            with T.serial(self.K // BLOCK) as rb:

                def line(tile: Tile, n: int, cb: Expr = cb, rb: Expr = rb) -> tuple[Any, list[Any]]:
                    """16 elements in a row: of the n-th column of the block in memory, of the n-th row of a tile."""
                    if tile.v_first:
                        return columns, [cb * BLOCK + n, T.ramp(rb * BLOCK, 1, BLOCK)]
                    return tile.buffer, tile.at(rb * BLOCK + n, cb, BLOCK, lanes)

                def get(n: int) -> Any:
                    buffer, index = line(src, n)
                    return buffer[tuple(index)] if buffer.dtype == "float32" else T.Cast(f"float32x{BLOCK}", buffer[tuple(index)])

                def put(n: int, value: Any) -> None:
                    buffer, index = line(dst, n)
                    dtype = buffer.dtype
                    T.buffer_store(buffer, value if dtype == "float32" else T.Cast(f"{dtype}x{BLOCK}", value), index)

                transpose_16(get, put)

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

    def pair_sum(
        self,
        dsts: tuple[Tile, ...],
        weight: ElementFunction,
        lefts: tuple[Tile, ...],
        own: tuple[Tile, ...],
        right: tuple[Tile, ...],
        rows: Expr,
    ) -> None:
        """Partial sums per lane for every pair of rows."""
        cols = own[0].cols
        lanes = max(n for n in (1, 2, 4, 8, 16) if cols % n == 0)
        parts, weights = [local_array(lanes) for _ in dsts], local_array(lanes)
        with T.serial(ceil_div(rows, BLOCK)) as b:
            with T.serial(BLOCK) as i:
                with T.vectorized(BLOCK) as j:
                    for dst in dsts:
                        dst.put(T.float32(0), b * BLOCK + i, b, BLOCK, j)
                with T.serial(i + 1) as j:
                    with T.vectorized(lanes) as lane:
                        for part in parts:
                            T.buffer_store(part, T.float32(0), [lane])
                    with T.serial(cols // lanes) as base:
                        with T.vectorized(lanes) as lane:
                            x = [tile.get(b * BLOCK + i, base, lanes, lane) for tile in own]
                            y = [tile.get(b * BLOCK + j, base, lanes, lane) for tile in right]
                            T.buffer_store(weights, weight(*x, *y), [lane])
                            for part, left in zip(parts, lefts, strict=True):
                                value = left.get(b * BLOCK + i, base, lanes, lane) * weights[lane]
                                T.buffer_store(part, part[lane] + value, [lane])
                    for dst, part in zip(dsts, parts, strict=True):
                        dst.put(self.sum(part, lanes), b * BLOCK + i, b, BLOCK, j)
