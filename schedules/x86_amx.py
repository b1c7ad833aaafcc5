"""Tile operations of the chunked delta rules on x86 matrix units (AMX): products of bf16 operands with fp32 sums.

A product of split operands (`x86_operands.py`) is one of every pair of parts whose product is above the error: with bf16 data,
whose K and Q need no splitting, states stay within the fp32 tolerance. What is no product runs as in `cpu_elements.py`; what
follows a product, and the operands made of its results, are computed while the results are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_chunk import Operand
from tvm_gdn.schedules.cpu_tiles import Tile, ceil_div, where
from tvm_gdn.schedules.x86_matrix import LANES, ROWS, Rows
from tvm_gdn.schedules.x86_operands import MatrixOperand, OperandTiles, State

from tvm_gdn.ops.tir.tiles import GRANULE, ElementFunction, Expr, keep

#: What is done with rows 2 p and 2 p + 1 of half y of a block's columns, given p and y.
Elements = Callable[[Any, Any], None]
#: Where 16 x 16 results go, given which rows and columns of a block they are: buffer, its rows, and how far apart they are.
Place = Callable[[int, Any], tuple[Any, Rows, int]]


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
        """Blocks of 32 x 32 results."""
        if isinstance(a, Operand):
            super().mma(
                dst, a, b, rows=rows, cols=cols, depth=depth, lower=lower, start=start, finish=finish, sources=sources
            )  # fmt: skip
            return
        most = (b.source.cols if b.transposed else b.source.rows) // GRANULE
        # A chunk has a token: where one step is the most, it is known to be one, and so are the addresses between products.
        full = most if most == 1 or depth is None or b.transposed else ceil_div(depth, GRANULE)
        row_blocks = dst.rows // GRANULE if rows is None or dst.rows == GRANULE else ceil_div(rows, GRANULE)
        col_blocks = self.units(GRANULE, dst)

        fetch = self._fetcher(dst.rows // GRANULE * (dst.cols // GRANULE))
        added = start is keep and finish is None and not into

        def products(io: Expr, jo: Expr, place: Place, meanwhile: Elements | None = None) -> None:
            fetch(jo * (dst.rows // GRANULE) + io)
            steps = io + 1 if lower == "left" and most > 1 else full
            limit = 2 if dst.buffer in self.exact else self.parts
            self._products(a, b, io, jo, steps, limit, place, added, self._tall(rows, io), meanwhile)

        if added or (start is None and finish is None and not into):

            def block(io: Expr, jo: Expr) -> None:
                products(io, jo, lambda x, y: (dst.buffer, self._rows_of(dst, io, jo, x, y), dst.width))

            if lower == "result":
                with T.serial(row_blocks) as io, T.serial(io + 1) as jo:
                    block(io, jo)
            else:
                with T.serial(col_blocks) as jo, T.serial(row_blocks) as io:
                    block(io, jo)
            return

        height = row_blocks if isinstance(row_blocks, int) else T.Bind(T.Cast("int32", row_blocks))
        count = T.Bind(T.Cast("int32", col_blocks) * height)

        def at(n: Expr) -> tuple[Any, Any]:
            if isinstance(height, int) and height == 1:
                return 0, n
            return T.Bind(T.truncmod(n, height)), T.Bind(T.truncdiv(n, height))

        def begin(n: Expr, meanwhile: Elements | None = None) -> None:
            place: Place = lambda x, y: (self.scratch, lambda r: [x * ROWS + r, y * ROWS], GRANULE)  # noqa: E731
            products(*at(n), place, meanwhile)

        def elements(n: Expr) -> Elements:
            io, jo = at(n)
            return lambda p, y: self._finish(dst, io, jo, p, y, start, finish, sources, into, wanted, self._tall(rows, io))

        self.turns.append((begin, elements))
        # K S waits for Q S: in turns, one finds what the other has loaded of the state in the L1 cache.
        if isinstance(b.source, State) and len(self.turns) < 2:
            return
        turns, self.turns = self.turns, []
        self._in_turns(turns, count)

    @staticmethod
    def _in_turns(turns: list[tuple[Any, Any]], count: Expr) -> None:
        """Blocks of products that have as many, block by block: those of all products, then the next ones.

        On busy cores every product waits for the one before (docs/performance.md): the elements of a block are computed between
        the next block's products. Behind them all they would be out of the core's sight.
        """
        first, last = turns[0][0], turns[-1][1]

        def others(n: Expr) -> None:
            for (_, elements), (begin, _) in pairwise(turns):
                begin(n, elements(n))

        first(T.int32(0))
        with T.serial(count - 1) as n:
            others(n)
            first(n + 1, last(n))
        others(count - 1)
        left = last(count - 1)
        with T.serial(2) as y, T.serial(ROWS) as p:
            left(p, y)

    @staticmethod
    def _tall(rows: Expr | None, io: Expr) -> Expr | None:
        """Whether a block has tokens in its lower 16 rows; None: always."""
        return None if rows is None else rows - io * GRANULE > ROWS

    @staticmethod
    def _rows_of(dst: Tile, io: Expr, jo: Expr, x: int, y: Expr) -> Rows:
        """Where the tile has rows of 16 x 16 of its elements."""
        return lambda r: dst.at(io * GRANULE + x * ROWS + r, jo * 2 + y, ROWS)

    def _products(
        self,
        a: MatrixOperand,
        b: MatrixOperand,
        io: Expr,
        jo: Expr,
        steps: Any,
        limit: int,
        place: Place,
        added: bool,
        tall: Expr | None,
        meanwhile: Elements | None,
    ) -> None:
        """Result rows 32 io to 32 io + 31, columns 32 jo to 32 jo + 31; unless `tall`, the lower 16 rows of `a` are zero.

        Sixteen columns at a time, in five registers: a core whose other thread is at work has few to rename them to, and with
        all eight in use every instruction waits for the one before (docs/performance.md).

        `limit`: of parts that the result takes; `added`: to what stands there; `meanwhile`: what is done 16 times between the
        products.
        """
        unit = self.unit
        # The rest of the pairs are below the rounding that the split leaves.
        limit = min(max(a.parts, b.parts), limit)
        pairs = [(part, other) for part in range(a.parts) for other in range(min(b.parts, limit - part))]
        times = steps * len(pairs)
        each = -(-ROWS // times) if isinstance(times, int) else T.Bind(T.truncdiv(T.int32(ROWS - 1), T.Cast("int32", times)) + 1)
        with T.serial(2) as y:
            for x in (0, 1):
                if added:
                    unit.load(x, *place(x, y))
                else:
                    unit.clear(x)
            with T.serial(steps) as kk:
                for number, (part, other) in enumerate(pairs):
                    unit.load(6, b.buffer, lambda r, other=other: b.row(other, kk, jo * 2 + y, r), b.stride)
                    for x in (0, 1) if other == 0 else ():
                        with where(tall if x else None):
                            unit.load(4 + x, a.buffer, lambda r, x=x, part=part: a.row(part, io * 2 + x, kk, r), a.stride)
                    for x in (0, 1):
                        with where(tall if x else None):
                            unit.dot(x, 4 + x, 6)
                    if meanwhile and isinstance(steps, int) and steps == 1:
                        for p in range(number * each, min((number + 1) * each, ROWS)):
                            meanwhile(p, y)
                    elif meanwhile:
                        first = (T.Cast("int32", kk) * len(pairs) + number) * each
                        with T.serial(T.max(0, T.min(each, ROWS - first))) as p:
                            meanwhile(first + p, y)
            for x in (0, 1):
                unit.store(x, *place(x, y))

    def _finish(
        self,
        dst: Tile,
        io: Expr,
        jo: Expr,
        p: Any,
        y: Expr,
        start: ElementFunction | None,
        finish: ElementFunction | None,
        sources: tuple[Tile, ...],
        into: tuple[Any, ...],
        wanted: Expr | None,
        tall: Expr | None,
    ) -> None:
        """Two rows of half the columns from sums in the scratch tile to elements of the result, and to operands made of it.

        Unless `tall`, the lower 16 rows are nobody's tokens: zeros in operands, which products meet with zeros of the other side.
        """
        written = not into or start is not None

        def value(i: Expr, r: Expr, lane: Expr) -> Any:
            values = [source.get(i, jo * 2 + y, ROWS, lane) for source in sources]
            total = self.scratch[r, y * ROWS + lane]
            column = (jo * 2 + y) * ROWS + lane
            if start is not None:
                total = start(i, column, dst.get(i, jo * 2 + y, ROWS, lane), *values) + total
            return total if finish is None else finish(i, column, total, *values)

        if tall is None:
            used = unused = None
        elif isinstance(p, int):
            used, unused = (None, None) if p < ROWS // 2 else (tall, T.Not(tall))
        else:
            used, unused = T.Or(tall, p < ROWS // 2), T.And(T.Not(tall), p >= ROWS // 2)
        with where(used):
            pair = local_array(2, ROWS)
            i = io * GRANULE + p * 2
            for n in (0, 1):
                with T.vectorized(ROWS) as lane:
                    T.buffer_store(pair, value(i + n, p * 2 + n, lane), [n, lane])
                if written:
                    with T.vectorized(ROWS) as lane:
                        dst.put(pair[n, lane], i + n, jo * 2 + y, ROWS, lane)
            with where(wanted):
                for operand in into:
                    self._split_rows(operand, i, pair[0, LANES], pair[1, LANES], [io, jo * 2 + y, p])
        if unused is not None and into:
            with where(unused):
                for operand in into:
                    operand.clear([io, jo * 2 + y, p])
