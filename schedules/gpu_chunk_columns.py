"""Tile operations of the chunked delta rules' pass over states on Hopper: results are the next product's operand where they are.

As in `gpu_chunk_groups.py` four warps multiply together (wgmma), but the state, R and U stand the other way round: their columns
are the rows of a *left* operand, which may come from registers. Of a warp's 16 rows the first eight are the high parts of eight
columns, the others what these leave. So a thread has both sums that make an element, and the elements that it needs as operand of
the next product: on the way from one to the next is no shared memory and no barrier.

Three groups of four warps: the first has the state and makes R and U of a chunk; the second the output, from a state and a U that
are shown to it in shared memory (their high parts); the third brings the chunks' data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_chunk_groups import COLUMNS, GROUP, ROWS, WIDE, GroupChunkTiles, Pending
from tvm_gdn.schedules.gpu_fragments import ITEMSIZE, Fragments, Operand, Packed, Storage, Tile, ceil_div, when

from tvm_gdn.ops.tir.tiles import Expr, keep


@dataclass
class Columns(Fragments):
    """A tile of which a thread has numbers of one column, pairs of rows eight apart; `sums` of the products that become them."""

    #: Of one product, 64 rows, each.
    sums: tuple[Any, ...] = ()


@dataclass
class Held(Packed):
    """Both parts of a tile as left operand in registers; or, in shared memory, the high part, columns as rows."""

    registers: Any = None


class ColumnChunkTiles(GroupChunkTiles):
    """Tile operations of one geometry; parameters as `FragmentTiles` has them."""

    held_right, stages = True, 2

    def _numbers(self, lane: Expr) -> list[Expr]:
        """Where this thread's first pair goes in what is shown; the others are where some bits are different."""
        i, j = self._first(T.Cast("int32", lane) % GROUP)
        return [j * WIDE + j % 8 * 8 + i]

    def enter(self, lane: Expr) -> None:
        """Nothing was written, and nothing is zero."""
        self.blank: list[Storage] = []
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
        sums = tuple(self._registers("float32", ROWS // 2) for _ in range(rows // ROWS))
        return Columns(self._registers("float32", rows // 4), rows, cols, sums=sums)

    def clear(self, *tiles: Tile) -> None:
        """Zero in tiles of which `load` with `lower` leaves what is above the diagonal as it is."""
        self.blank = [tile.storage for tile in tiles]
        for storage in self.blank:
            self._place(storage)
            pieces = storage.size // 16
            with T.serial(ceil_div(pieces, self.threads)) as step:
                index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                when(index < pieces, lambda storage=storage, index=index: self._clear_piece(storage.offset // 16 + index))
        self.written = True
        self.sync()

    def _copy_name(self, dst: Tile, lower: bool) -> str:
        return "tvm_gdn_copy_rows_below" if lower and dst.storage in self.blank else super()._copy_name(dst, lower)

    def _place(self, storage: Storage) -> None:
        """Rows that share 128 bytes change pieces, so that neither copies nor reads of a column meet in a bank."""
        if storage.offset >= 0 or not self._narrow(storage):
            super()._place(storage)
            return
        storage.stride, storage.size = storage.cols, storage.rows * storage.cols * ITEMSIZE[storage.dtype]
        storage.offset = self._allocate_rows(storage.size)

    def _narrow(self, storage: Storage) -> bool:
        """Rows of 32 or 64 bytes."""
        return self.states and storage.cols * ITEMSIZE[storage.dtype] in {32, 64}

    def _index(self, tile: Tile, i: Expr, j: Expr) -> Expr:
        storage = tile.storage
        if not self._narrow(storage):
            return super()._index(tile, i, j)
        i, j = tile.row + (0 if tile.rows == 1 else i), tile.col + (0 if tile.cols == 1 else j)
        lanes, size = 16 // ITEMSIZE[storage.dtype], storage.cols * ITEMSIZE[storage.dtype]
        piece = T.bitwise_xor(j // lanes, i // (128 // size) % 2 if size == 32 else i // 2 % 4)
        return storage.offset // ITEMSIZE[storage.dtype] + i * storage.cols + piece * lanes + j % lanes

    def _padded_columns(self, dst: Tile) -> int:
        return dst.cols if self._narrow(dst.storage) else super()._padded_columns(dst)

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
        # Only the first group has them.
        when(True if self.threads == GROUP else self.lane < GROUP, lambda: self._each(range(self._count(dst)), body))

    def _each(self, slots: range, body: Any) -> None:
        i, j = self._first(T.Cast("int32", self.lane))
        for slot in slots:
            body(slot // 2 * 8 + i + slot % 2, j, slot)

    def store(self, dst: Any, src: Any, rows: Expr | None = None) -> None:
        """A result that is there."""
        if not isinstance(src, Columns):
            super().store(dst, src, rows)
            return
        self._settle(src)
        self._store_elements(dst, src, rows)

    # Products.
    def _settle(self, *tiles: Any) -> None:
        """Wait for the products that tiles are results of."""
        for tile in tiles:
            if not isinstance(tile, Columns):
                super()._settle(tile)
            elif id(tile) in self.pending:
                for _ in self._settled(tile):
                    pass

    def _settled(self, tile: Columns) -> Iterator[range]:
        """The slots of each product of a tile, when it is there: what becomes of them needs not wait for the next one."""
        found = self.pending.pop(id(tile), None)
        each = self._count(tile) // len(tile.sums)
        for number, sums in enumerate(tile.sums):
            slots = range(number * each, (number + 1) * each)
            if found is not None:
                left = self.begun - found.number + len(tile.sums) - 1 - number
                T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_arrived", sums.data, left))

                def end(i: Expr, j: Expr, slot: Expr, sums: Any = sums, first: int = slots.start) -> None:
                    place = (slot - first) // 2 * 4 + slot % 2
                    value = sums[place] + sums[place + 2]
                    if found.start is not None:
                        value = tile.buffer[slot] + value
                    if found.finish is not None:
                        value = found.finish(i, j, value, *(values[slot] for values in found.sources))
                    self._put(tile, value, i, j, slot)

                self._each(slots, end)
            yield slots

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Parts of a result in registers, or its high part for others."""
        operand = operands[0]
        tile, packed = operand.tile, operand.packed
        if not isinstance(tile, Columns):
            super().pack(*operands, rows=rows, lower=lower)
            return
        if packed.coarse and packed.offset < 0:
            packed.plane = COLUMNS * WIDE * 2
            packed.offset = self._allocate_rows(tile.rows // WIDE * packed.plane)
        for slots in self._settled(tile):
            for slot in slots[::2]:
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

    def mma(self, dst: Any, a: Operand, b: Operand, **options: Any) -> None:
        """Begin a product; it is whole, whatever its bounds, and of both parts."""
        if not isinstance(dst, Columns):
            super().mma(dst, a, b, **options)
            return
        start, finish, sources = options.get("start"), options.get("finish"), options.get("sources", ())
        pending = self.pending.get(id(dst))
        more = pending is not None
        assert not more or (start is keep and pending.finish is None), "a result that is begun before the one before it was read"
        storage, half = a.tile.storage, self.views["bfloat16"]
        apart = storage.rows * WIDE * 2
        # Columns of a tile, its rows, or its rows left of the diagonal.
        kind = 1 if a.transposed else 2 if options.get("lower") == "left" else 0
        for number in range(dst.rows // ROWS):
            # The rows of a left operand that is no tile's turned columns are one product's.
            first = storage.offset // 2 + a.tile.row * WIDE + number * storage.rows * WIDE
            call = (dst.sums[number].data, 0, b.packed.registers.data, T.address_of(half[first]), a.cols // 16)
            T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_held", *call, apart, kind, int(not more)))
            self.begun += 1
        dst.version += 1
        if more:
            pending.number = self.begun
            return
        # What else the result is made of is read, and computed, while the products go on.
        read = tuple(self._gathered(dst, source).buffer for source in sources)
        if start is not None:

            def begin(i: Expr, j: Expr, slot: Expr) -> None:
                self._put(dst, start(i, j, dst.buffer[slot], *(values[slot] for values in read)), i, j, slot)

            self._over(dst, begin)
        self.pending[id(dst)] = Pending(self.begun, [], start, finish, read)
