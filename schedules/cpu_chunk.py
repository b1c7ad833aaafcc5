"""Tile operations of the chunked delta rules on CPUs: fp32, explicit vectors, register-blocked products.

Every product runs on one micro-kernel: `rows` x `columns` fp32 accumulators in vector registers, one broadcast of the left and
one vector of the right operand per multiply-add. Operands alias their tiles, except a transposed right one. Memory and elements
of tiles: `cpu_tiles.py`, `cpu_elements.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array, transpose_16
from tvm_gdn.schedules.cpu_elements import ElementTiles
from tvm_gdn.schedules.cpu_tiles import BLOCK, LINE, Tile, ceil_div, where

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr


@dataclass(frozen=True)
class Operand:
    """An operand: the tile that products read, and how to bring it up to date with `source` where it is a copy."""

    tile: Tile
    transposed: bool = False
    source: Tile | None = None


class ChunkTiles(ElementTiles):
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

    #: One pass: a worker goes through its sequence once, and what it needs of a chunk stays in the cache.
    ahead = False
    #: Operands are the tiles themselves: there is nothing to save by writing them in a product's epilogue.
    fused, chained, tail = False, False, BLOCK

    def expect(self, *windows: Tile, write: bool = False, when: Expr | None = None) -> None:
        """Asked for block by block of the next product: all at once they would wait for each other."""
        self.expected += [(window, write, when) for window in windows]

    def _fetcher(self, blocks: int) -> Callable[[Expr], None]:
        """What every one of a product's blocks asks for, given its number."""
        expected, self.expected = self.expected, []

        def fetch(number: Expr) -> None:
            for window, write, when in expected:
                per_line = 4 * LINE // tvm.DataType(window.buffer.dtype).itemsize
                per_row = -(-window.cols // per_line)
                share = -(-window.rows * per_row // blocks)
                with where(when), T.serial(share) as n:
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
        granule = BLOCK if lower == "result" else self.granule
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
