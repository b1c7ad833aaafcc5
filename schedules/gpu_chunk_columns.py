"""Tile operations of the chunked delta rules' pass over states on Hopper: results are the next product's operand where they are.

As in `gpu_chunk_groups.py` four warps multiply together (wgmma), but the state, R and U stand the other way round: their columns
are the rows of a *left* operand, which may come from registers. Of a warp's 16 rows the first eight are the high parts of eight
columns, the others what these leave. So a thread has, of the sums of one product, both that make an element, and the elements that
it needs as operand of the next: between the products of a chunk is no shared memory and no barrier.

Three groups of four warps: the first has the state and makes R and U of a chunk, the second the output, from a state and a U that
are shown to it in shared memory (their high parts); the third brings the chunks' data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_chunk_groups import COLUMNS, GROUP, ROWS, WIDE, GroupChunkTiles, Pending
from tvm_gdn.schedules.gpu_fragments import WARP, Fragments, Operand, Packed, when

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr, keep


@dataclass
class Columns(Fragments):
    """A tile of which a thread has numbers of one column, pairs of rows eight apart; `sums` are of products that become them."""

    sums: Any = None


@dataclass
class Held(Packed):
    """Both parts of a tile as left operand in registers; or, in shared memory, the high part, columns as rows."""

    registers: Any = None


class ColumnChunkTiles(GroupChunkTiles):
    """Tile operations of one geometry; parameters as `FragmentTiles` has them."""

    held_right, stages = True, 3

    def _numbers(self, lane: Expr) -> list[Expr]:
        """Where this thread's first pair goes in what is shown; the others are where some bits are different."""
        i, j = self._first(T.Cast("int32", lane) % GROUP)
        return [j * WIDE + j % 8 * 8 + i]

    def enter(self, lane: Expr) -> None:
        """Nothing was written."""
        super().enter(lane)
        self.written = self.written and not self.states

    @staticmethod
    def _first(lane: Expr) -> tuple[Expr, Expr]:
        """Row of a thread's first number, and the column of all of them."""
        return lane % 4 * 2, lane // 4

    def sync(self, *, loads: bool = True, warp: bool = False, team: bool = False) -> None:
        """Nobody of a team reads what others have; who brings data comes only where it is waited for."""
        if warp or loads or not self.states:
            super().sync(loads=loads, warp=warp)
        elif not team:
            self._arrive(False)
            T.evaluate(T.call_extern("int32", "tvm_gdn_pair_sync"))

    # Tiles.
    def tile(self, rows: int, cols: int, place: str = "shared", dtype: str = "float32") -> Any:
        """Columns, but for what becomes no operand: results in the data's dtype."""
        if not self.states or place != "register" or dtype != "float32":
            return super().tile(rows, cols, place, dtype)
        return Columns(self._registers("float32", rows // 4), rows, cols, sums=self._registers("float32", rows // 2))

    def operand(self, tile: Any, side: str, *, transpose: bool = False, coarse: bool = False) -> Operand:
        """In registers, or shown to others."""
        if not isinstance(tile, Columns):
            return super().operand(tile, side, transpose=transpose, coarse=coarse)
        registers = None if coarse else self._registers("uint32", tile.rows // 4)
        return Operand(tile, side, transpose, tile.rows, tile.cols, Held(1, -1, 0, 0, False, coarse=coarse, registers=registers))

    def _count(self, tile: Fragments) -> int:
        return tile.rows // 4 if isinstance(tile, Columns) else super()._count(tile)

    def _over(self, dst: Any, body: Any, rows: Expr | None = None, *, cut: bool = False) -> None:
        if not isinstance(dst, Columns):
            super()._over(dst, body, rows, cut=cut)
            return
        i, j = self._first(T.Cast("int32", self.lane))

        def elements() -> None:
            for slot in range(self._count(dst)):
                body(slot // 2 * 8 + i + slot % 2, j, slot)

        # Only the first group has them.
        when(True if self.threads == GROUP else self.lane < GROUP, elements)

    def store(self, dst: Any, src: Any, rows: Expr | None = None) -> None:
        """A result that is there."""
        if not isinstance(src, Columns):
            super().store(dst, src, rows)
            return
        self._settle(src)
        self._store_elements(dst, src, rows)

    # Products.
    def _settle(self, *tiles: Any) -> None:
        """Wait for the products that tiles are results of; what is not of a product goes first."""
        for tile in tiles:
            found = self.pending.get(id(tile)) if isinstance(tile, Columns) else None
            if found is None:
                super()._settle(tile)
                continue
            del self.pending[id(tile)]
            read = [self._gathered(tile, source).buffer for source in found.sources]

            def begin(i: Expr, j: Expr, slot: Expr, tile: Any = tile, found: Pending = found, read: Any = read) -> None:
                self._put(tile, found.start(i, j, tile.buffer[slot], *(values[slot] for values in read)), i, j, slot)

            def end(i: Expr, j: Expr, slot: Expr, tile: Any = tile, found: Pending = found, read: Any = read) -> None:
                place = slot // 2 * 4 + slot % 2
                value = tile.sums[place] + tile.sums[place + 2]
                if found.start is not None:
                    value = tile.buffer[slot] + value
                if found.finish is not None:
                    value = found.finish(i, j, value, *(values[slot] for values in read))
                self._put(tile, value, i, j, slot)

            if found.start is not None:
                self._over(tile, begin)
            T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_arrived", tile.sums.data, self.begun - found.number))
            self._over(tile, end)

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Parts of a result in registers, or its high part for others."""
        operand = operands[0]
        tile, packed = operand.tile, operand.packed
        if not isinstance(tile, Columns):
            super().pack(*operands, rows=rows, lower=lower)
            return
        self._settle(tile)
        if packed.coarse and packed.offset < 0:
            packed.plane = COLUMNS * WIDE * 2
            packed.offset = self._allocate_rows(tile.rows // WIDE * packed.plane)
        for slot in range(0, self._count(tile), 2):
            number, pair = slot // 2, (tile.buffer[slot], tile.buffer[slot + 1])
            if not packed.coarse:
                at = number // 2 * 4 + number % 2 * 2
                T.evaluate(T.call_extern("int32", "tvm_gdn_split_pair", packed.registers.data, at, 1, 2, *pair))
                continue
            self.written = True
            place = packed.offset // 2 + number // 8 * COLUMNS * WIDE + T.bitwise_xor(self.places[0], number % 8 * 8)
            T.evaluate(T.call_extern("int32", "tvm_gdn_split", T.address_of(self.views["bfloat16"][place]), 0, 1, *pair))

    @staticmethod
    def _one(sums: Any, at: int, left: Expr, right: Expr, steps: int, apart: int, packed: Packed, fresh: bool) -> tuple[Any, ...]:
        return "tvm_gdn_wgmma_shown", sums, at, left, right, steps, apart, packed.plane, int(fresh)

    def mma(
        self,
        dst: Any,
        a: Operand,
        b: Operand,
        *,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Any, ...] = (),
        coarse: bool = False,
        **bounds: Any,
    ) -> None:
        """Begin a product; it is whole, whatever its bounds, and of both parts."""
        if not isinstance(dst, Columns):
            super().mma(dst, a, b, start=start, finish=finish, sources=sources, coarse=coarse, **bounds)
            return
        pending = self.pending.get(id(dst))
        more = pending is not None
        assert not more or (start is keep and pending.finish is None), "a result that is begun before the one before it was read"
        storage, half = a.tile.storage, self.views["bfloat16"]
        apart = storage.rows * WIDE * 2
        for number in range(dst.rows // ROWS):
            # The rows of a left operand that is no tile's turned columns are one product's.
            first = storage.offset // 2 + a.tile.row * WIDE + number * storage.rows * WIDE
            call = (dst.sums.data, number * (ROWS // 2), b.packed.registers.data, T.address_of(half[first]), a.cols // 16)
            T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_held", *call, apart, int(a.transposed), int(not more)))
            self.begun += 1
        dst.version += 1
        if more:
            pending.number = self.begun
        else:
            self.pending[id(dst)] = Pending(self.begun, [], start, finish, sources)
