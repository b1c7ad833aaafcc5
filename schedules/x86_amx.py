"""Tile operations of the chunked delta rules on x86 matrix units (AMX): products of bf16 operands with fp32 sums.

A product of split operands (`x86_operands.py`) is one of every pair of parts whose product is above the error: with bf16 data,
whose K and Q need no splitting, states stay within the fp32 tolerance. What is no product runs as in `cpu_elements.py`; what
follows a product, and the operands made of its results, are computed while the results are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_chunk import Operand
from tvm_gdn.schedules.cpu_tiles import Tile, ceil_div, where
from tvm_gdn.schedules.x86_matrix import LANES, ROWS, Rows
from tvm_gdn.schedules.x86_operands import MatrixOperand, OperandTiles

from tvm_gdn.ops.tir.tiles import GRANULE, ElementFunction, Expr, keep


class AmxChunkTiles(OperandTiles):
    """Tile operations with products on the matrix unit; K, v_tile and chunk are multiples of 32, gates per head or none.

    Operands that are not exact in bf16 are split into `parts` of them. `emulated` computes the same without AMX.
    """

    def mma(
        self,
        dst: Tile,
        a: Any,
        b: Any,
        *,
        rows: Expr | None = None,
        cols: Expr | None = None,
        depth: Expr | None = None,
        lower: str | None = None,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Tile, ...] = (),
        into: tuple[Any, ...] = (),
        wanted: Expr | None = None,
    ) -> None:
        """32 x 32 results in four tile registers, two more for each side."""
        if isinstance(a, Operand):
            super().mma(
                dst, a, b, rows=rows, cols=cols, depth=depth, lower=lower, start=start, finish=finish, sources=sources
            )  # fmt: skip
            return
        full = b.source.rows // 32 if depth is None else ceil_div(depth, 32)
        if b.transposed:
            full = b.source.cols // 32
        row_blocks = dst.rows // GRANULE if rows is None else ceil_div(rows, GRANULE)
        col_blocks = self.units(GRANULE, dst)

        fetch = self._fetcher(dst.rows // GRANULE * (dst.cols // GRANULE))

        def block(io: Expr, jo: Expr) -> None:
            fetch(jo * (dst.rows // GRANULE) + io)
            tall = None if rows is None else rows - io * GRANULE > ROWS
            steps = io + 1 if lower == "left" else full
            added = start is keep and finish is None and not into
            self._products(dst, a, b, io, jo, steps, added, tall)
            if added or (start is None and finish is None and not into):
                self._results(lambda n, x, y: self.unit.store(n, dst.buffer, *self._place(dst, io, jo, x, y)))
            else:
                self._results(lambda n, x, y: self.unit.store(n, self.scratch, lambda r: [x * ROWS + r, y * ROWS], GRANULE))
                self._finish(dst, io, jo, start, finish, sources, into, wanted, tall)

        if lower == "result":
            with T.serial(row_blocks) as io:
                with T.serial(io + 1) as jo:
                    block(io, jo)
        else:
            with T.serial(col_blocks) as jo:
                with T.serial(row_blocks) as io:
                    block(io, jo)

    @staticmethod
    def _results(each: Callable[[int, int, int], None]) -> None:
        for x in (0, 1):
            for y in (0, 1):
                each(2 * x + y, x, y)

    @staticmethod
    def _place(dst: Tile, io: Expr, jo: Expr, x: int, y: int) -> tuple[Rows, int]:
        """Where the tile has 16 x 16 of its elements."""
        return lambda r: dst.at(io * GRANULE + x * ROWS + r, jo, GRANULE, y * ROWS), dst.width

    def _products(
        self, dst: Tile, a: MatrixOperand, b: MatrixOperand, io: Expr, jo: Expr, steps: Expr, added: bool, tall: Expr | None
    ) -> None:
        """Result rows 32 io to 32 io + 31, columns 32 jo to 32 jo + 31; unless `tall`, the lower 16 rows of `a` are zero."""
        unit = self.unit
        if added:
            self._results(lambda n, x, y: unit.load(n, dst.buffer, *self._place(dst, io, jo, x, y)))
        else:
            self._results(lambda n, _x, _y: unit.clear(n))
        # The rest of the pairs are below the rounding that the split leaves.
        limit = min(max(a.parts, b.parts), 2 if dst.buffer in self.exact else self.parts)
        with T.serial(steps) as kk:
            for part in range(a.parts):
                for other in range(min(b.parts, limit - part)):
                    for y in (0, 1):
                        unit.load(6 + y, b.buffer, lambda r, y=y, other=other: b.row(other, kk, jo * 2 + y, r), b.stride)
                    for x in (0, 1):
                        with where(tall if x else None):
                            if other == 0:
                                unit.load(4 + x, a.buffer, lambda r, x=x, part=part: a.row(part, io * 2 + x, kk, r), a.stride)
                            for y in (0, 1):
                                unit.dot(2 * x + y, 4 + x, 6 + y)

    def _finish(
        self,
        dst: Tile,
        io: Expr,
        jo: Expr,
        start: ElementFunction | None,
        finish: ElementFunction | None,
        sources: tuple[Tile, ...],
        into: tuple[Any, ...],
        wanted: Expr | None,
        tall: Expr | None,
    ) -> None:
        """From sums in the scratch tile to elements of the result, and to operands made of it.

        Unless `tall`, the lower 16 rows are nobody's tokens: zeros in operands, which products meet with zeros of the other side.
        """
        written = not into or start is not None
        rows = GRANULE if tall is None else T.Select(tall, GRANULE, ROWS)

        def value(i: Expr, r: Expr, unit: int, y: Expr, lane: Expr) -> Any:
            base = jo * (GRANULE // unit) + y
            values = [source.get(i, base, unit, lane) for source in sources]
            total = self.scratch[r, y * unit + lane]
            if start is not None:
                total = start(i, base * unit + lane, dst.get(i, base, unit, lane), *values) + total
            return total if finish is None else finish(i, base * unit + lane, total, *values)

        if not into:
            with T.serial(rows) as r:
                with T.vectorized(GRANULE) as lane:
                    i = io * GRANULE + r
                    dst.put(value(i, r, GRANULE, 0, lane), i, jo, GRANULE, lane)
            return
        pair = local_array(2, ROWS)
        with T.serial(ROWS if tall is None else T.Select(tall, ROWS, ROWS // 2)) as p:
            for y in (0, 1):
                i = io * GRANULE + p * 2
                for n in (0, 1):
                    with T.vectorized(ROWS) as lane:
                        T.buffer_store(pair, value(i + n, p * 2 + n, ROWS, y, lane), [n, lane])
                    if written:
                        with T.vectorized(ROWS) as lane:
                            dst.put(pair[n, lane], i + n, jo * 2 + y, ROWS, lane)
                with where(wanted):
                    for operand in into:
                        self._split_rows(operand, i, pair[0, LANES], pair[1, LANES], [io, jo * 2 + y, p])
        if tall is not None:
            with where(T.Not(tall)), T.serial(ROWS // 2) as p:
                for operand, y in product(into, (0, 1)):
                    operand.clear([io, jo * 2 + y, p + ROWS // 2])
