"""What the chunked delta rules with a gate per channel compute ahead of states on GPUs.

A chunk goes in blocks of eight tokens. A pair of tokens in different blocks has the gates before the later block between its own:
each token's numbers are taken relative to these, in registers, and multiplied as matrices, eight rows of k above eight of q.
Inside a block every pair has its own exponential: a warp's threads share out the channels, so that each reads its numbers once,
and add up the sums of all pairs together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import BLOCK, ITEMSIZE, WARP, Operand, Packed, Tile, Window, ceil_div, when
from tvm_gdn.schedules.gpu_triangles import TriangleTiles

from tvm_gdn.ops.tir.tiles import Expr

#: Tokens whose pairs are taken one by one.
NEAR = 8
#: Of those pairs, the ones of different tokens.
PAIRS = NEAR * (NEAR - 1) // 2
#: bf16 numbers that are written at once.
EIGHT = 8


class ChannelTiles(TriangleTiles):
    """Tile operations on bf16 data with K a multiple of 32."""

    @staticmethod
    def power(x: Expr) -> Expr:
        """``2^x`` as a factor."""
        return T.call_extern("float32", "tvm_gdn_power", x)

    def channel_triangles(
        self,
        dsts: tuple[Tile, ...],
        lefts: tuple[Tile, Tile],
        right: Tile,
        gates: Tile,
        *,
        decay: Callable[[Expr], Expr],
        finish: Callable[..., tuple[Expr, ...]],
        sources: tuple[Tile, ...],
    ) -> None:
        """``dsts = finish(i, j, *sums, *sources)`` for j <= i, the sums one per left tile.

        A sum is ``sum_c left[i, c] right[j, c] decay(gates[i, c] - gates[j, c])``, where ``decay(x + y) = decay(x) decay(y)``.
        """

        def write(i: Expr, j: Expr, *sums: Expr) -> None:
            values = [self._get(source, i, j) for source in sources]
            for dst, value in zip(dsts, finish(i, j, *sums, *values), strict=True):
                self._put(dst, value, i, j)

        count = gates.rows // NEAR
        self._in_turn(count - 1, lambda number: self._far_pairs(count - 1 - number, lefts, right, gates, decay, write))
        self._in_turn(count, lambda number: self._near_pairs(number, lefts, right, gates, decay, write))

    def _neighbours(self, tile: Tile, i: Expr, c: Expr, count: int) -> Any:
        """Neighbouring elements of a row in fp32 registers."""
        found, place = self.scalars(count), T.Bind(self._index(tile, i, c))
        view = self.views[tile.storage.dtype]
        self._take(view, lambda e: (place + e,), count, count > 1, lambda e, value: T.buffer_store(found, value, [e]))
        return found

    def _far_pairs(
        self, block: Expr, lefts: tuple[Tile, Tile], right: Tile, gates: Tile, decay: Callable[[Expr], Expr], write: Any
    ) -> None:
        """Pairs of a block's tokens with those of all blocks before it."""
        block, lane = T.Bind(block), T.Cast("int32", self.lane) % WARP
        before, parts = gates.rows // NEAR - 1, self.parts
        a, b = self._registers("uint32", 4 * parts), self._registers("uint32", 2 * parts)
        sums = self._registers("float32", 4 * before)
        terms = self._terms(*(Packed(parts, 0, 0, 0, exact=False),) * 2)
        row, own = T.Bind(lane // 4), T.Bind(block * NEAR + lane // 4)
        for e in range(4 * before):
            T.buffer_store(sums, T.float32(0), [e])

        def split(registers: Any, at: int, apart: int, numbers: Any, weights: Any) -> None:
            for half in range(2):
                pair = [numbers[half * 2 + e] * weights[half * 2 + e] for e in range(2)]
                place = at + half * apart // 2
                T.evaluate(T.call_extern("int32", "tvm_gdn_split_pair", registers.data, place, apart, parts, *pair))

        def weigh(later: Any, earlier: Any) -> Any:
            weights = self.scalars(4)
            for e in range(4):
                T.buffer_store(weights, decay(later[e] - earlier[e]), [e])
            return weights

        with T.serial(gates.cols // BLOCK) as step:
            # Products sum over channels in any order: a thread has four neighbours where fragments have two and two.
            c = T.Bind(T.Cast("int32", step) * BLOCK + lane % 4 * 4)
            between = self._neighbours(gates, block * NEAR - 1, c, 4)
            weights = weigh(self._neighbours(gates, own, c, 4), between)
            for number, left in enumerate(lefts):
                split(a, number, 4, self._neighbours(left, own, c, 4), weights)
            for other in range(before):

                def multiply(other: int = other) -> None:
                    j = T.Bind(other * NEAR + row)
                    split(b, 0, 2, self._neighbours(right, j, c, 4), weigh(between, self._neighbours(gates, j, c, 4)))
                    for x, y in terms:
                        self._multiply(sums, other * 4, a, x * 4, b, y * 2)

                when(other < block, multiply)
        for other in range(before):

            def put(other: int = other) -> None:
                for e in range(2):
                    write(own, other * NEAR + lane % 4 * 2 + e, sums[other * 4 + e], sums[other * 4 + 2 + e])

            when(other < block, put)

    def _near_pairs(
        self, block: Expr, lefts: tuple[Tile, Tile], right: Tile, gates: Tile, decay: Callable[[Expr], Expr], write: Any
    ) -> None:
        """Pairs inside a block: the sums of pair n are numbers 2 n and 2 n + 1, behind them those of tokens with themselves."""
        lane, first = T.Bind(T.Cast("int32", self.lane) % WARP), T.Bind(T.Cast("int32", block) * NEAR)
        width = next(n for n in (4, 2, 1) if gates.cols % (n * WARP) == 0)
        sums, weight = self.scalars(2 * WARP), self.scalars(1)
        for at in range(2 * WARP):
            T.buffer_store(sums, T.float32(0), [at])

        def add(at: int, value: Expr) -> None:
            T.buffer_store(sums, sums[at] + value, [at])

        with T.serial(gates.cols // (width * WARP)) as step:
            c = T.Bind(T.Cast("int32", step) * (width * WARP) + lane * width)
            rows: list[tuple[Any, Any]] = []
            for i in range(NEAR):
                gate, partner = (self._neighbours(tile, first + i, c, width) for tile in (gates, right))
                above, below = (partner if tile is right else self._neighbours(tile, first + i, c, width) for tile in lefts)
                for j, (earlier, other) in enumerate(rows):
                    at = 2 * (i * (i - 1) // 2 + j)
                    for e in range(width):
                        T.buffer_store(weight, other[e] * decay(gate[e] - earlier[e]), [0])
                        add(at, above[e] * weight[0])
                        add(at + 1, below[e] * weight[0])
                for e in range(width):
                    add(2 * PAIRS + i, below[e] * partner[e])
                rows.append((gate, partner))
        # Each turn halves the numbers that a thread still adds up, and ends with those of thread n at 2 n.
        kept = self.scalars(1)
        for turn in range(WARP.bit_length() - 1):
            bit, half = WARP >> (turn + 1), WARP >> turn
            high = T.bitwise_and(lane, bit) != 0
            for at in range(half):
                T.buffer_store(kept, T.Select(high, sums[at + half], sums[at]), [0])
                T.buffer_store(sums, T.Select(high, sums[at], sums[at + half]), [at])
                other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), sums[at], bit, WARP, WARP)
                T.buffer_store(sums, kept[0] + other, [at])
        later = T.Bind(sum((T.Cast("int32", lane >= n * (n - 1) // 2) for n in range(2, NEAR)), T.int32(1)))
        with T.If(lane < PAIRS):
            with T.Then():
                write(first + later, first + lane - later * (later - 1) // 2, sums[0], sums[1])
            with T.Else():
                for e in range(2):
                    i = first + (lane - PAIRS) * 2 + e
                    write(i, i, T.float32(0), sums[e])

    def keep_rows(
        self,
        groups: tuple[tuple[Window, ...], ...],
        common: Callable[..., tuple[Expr, ...]],
        function: Callable[..., tuple[Expr, ...]],
        *sources: Tile,
    ) -> None:
        """Windows of the kernel's own memory, the sum of each group's elementwise ``function(*common(*values), *values)``.

        `common` is computed once for all groups.
        """
        first = groups[0][0]
        across, numbers = first.cols // EIGHT, [self.scalars(EIGHT) for _ in groups]
        pieces = first.rows * across
        with T.serial(ceil_div(pieces, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = T.Bind(index // across), T.Bind(index % across * EIGHT)

            def piece() -> None:
                read = [self._eight(tile, i, j) for tile in sources]
                for e in range(EIGHT):
                    values = [of[e] for of in read]
                    held = [self.scalars(1) for _ in common(*values)]
                    for to, value in zip(held, common(*values), strict=True):
                        T.buffer_store(to, value, [0])
                    for to, value in zip(numbers, function(*(x[0] for x in held), *values), strict=True):
                        T.buffer_store(to, value, [e])
                for windows, values in zip(groups, numbers, strict=True):
                    name = "tvm_gdn_sum_of" if len(windows) == 2 else "tvm_gdn_rounded_eight"
                    T.evaluate(T.call_extern("int32", name, *(T.address_of(x.buffer[i, j]) for x in windows), values.data))

            when(True if pieces % self.threads == 0 else index < pieces, piece)

    def _eight(self, tile: Tile, i: Expr, j: Expr) -> list[Expr]:
        """Eight neighbouring elements; of a tile ``(n, 1)`` one eight times."""
        if tile.cols == 1:
            return [self._neighbours(tile, i, 0, 1)[0]] * EIGHT
        count = 16 // ITEMSIZE[tile.storage.dtype]
        found = [self._neighbours(tile, i, j + start, count) for start in range(0, EIGHT, count)]
        return [found[e // count][e % count] for e in range(EIGHT)]

    def summands(self, tile: Tile, side: str, *, transpose: bool = False) -> Operand:
        """The sum of two bf16 tiles that stand one above the other, as an operand; there is nothing to pack."""
        self._place(tile.storage)
        high, stride = tile.rows // 2, tile.storage.stride
        offset = tile.storage.offset + (tile.row * stride + tile.col) * 2
        rows, cols = (tile.cols, high) if transpose else (high, tile.cols)
        return Operand(tile, side, transpose, rows, cols, Packed(2, offset, stride, high * stride, exact=False))
