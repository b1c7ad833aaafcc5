"""Tile operations of the chunked delta rules' pass over states on Hopper: products of four warps together (wgmma).

Both operands of a product are in shared memory, in rows of 128 bytes whose 16-byte pieces change places by the row's number
(the "128-byte swizzle"). A left operand with more than 64 columns stands in halves of 64, one behind the other; read the other
way round it needs no copy. A right operand has its 32 columns twice in a row: the high part, and behind it the rest, so that one
instruction multiplies both and reads the left operand once for the two.

A product goes on while the next statements run; whatever reads its result waits for it and adds up its sums first. Two groups of
four warps are two teams: each has half of the state, and its own part of the rest of a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import WARP, Fragments, Operand, Packed, Storage, Tile, padded
from tvm_gdn.schedules.gpu_products import GpuChunkTiles

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr, keep

#: Rows of a product, columns of a right operand, and elements of a row of 128 bytes.
ROWS, COLUMNS, WIDE = 64, 32, 64
#: Sums of a thread for 64 rows.
SUMS = ROWS * COLUMNS // 128
#: Threads that multiply together.
GROUP = 4 * WARP
#: Bytes at whose multiple tiles begin.
ALIGN = 1024


@dataclass
class Pending:
    """Products that have been begun and whose result nobody has read."""

    #: The last of them, as the number of products begun until then.
    number: int
    #: Sums besides those in the result's own registers.
    others: list[Any] = field(default_factory=list)
    #: What becomes of the result's own registers, where no sums are in them.
    start: ElementFunction | None = None
    finish: ElementFunction | None = None
    sources: tuple[Any, ...] = ()


class GroupChunkTiles(GpuChunkTiles):
    """Tile operations of one geometry with bf16 data, chunks of 64, K a multiple of 64; parameters as `FragmentTiles` has them.

    What is computed ahead of the states is the common form's.
    """

    deferred = whole = True

    def __init__(self, K: int, V: int, **options: Any) -> None:
        super().__init__(K, V, **options)
        self.align[True] = ALIGN
        self.teams = tuple(range(self.sizes[True] * WARP // GROUP))

    def enter(self, lane: Expr) -> None:
        """Nothing is pending; where this thread's results go in a right operand is the same in every product."""
        self.pending: dict[int, Pending] = {}
        self.spare: dict[int, list[Any]] = {}
        self.begun, self.own, self.written = 0, T.Cast("int32", lane) // GROUP, True
        super().enter(lane)
        if self.states:
            numbers = self._numbers(lane)
            self.places = T.alloc_buffer((len(numbers),), "int32", scope="local")
            for slot, number in enumerate(numbers):
                T.buffer_store(self.places, T.call_extern("int32", "tvm_gdn_once", number), [slot])

    def _numbers(self, lane: Expr) -> list[Expr]:
        """Where this thread's numbers go in a right operand."""
        (i, j), *_ = self._elements(T.Cast("int32", lane) % GROUP // WARP, 0)
        pieces = [T.bitwise_xor(number, i % 8) for number in range(COLUMNS // 8)]
        # The other half of a row is where the highest bit of a piece's number is the other.
        return [*(i * WIDE + piece * 8 + j for piece in pieces), COLUMNS - pieces[0] // 4 * WIDE]

    def leave(self) -> None:
        """Every product's result has been read."""
        assert not self.pending, "a product that nobody waits for"

    @contextlib.contextmanager
    def team(self, number: int) -> Iterator[None]:
        """What one of the groups of four warps does, where there are two: all of it, as no product may go on past the end."""
        if len(self.teams) == 1:
            yield
            return
        lane = self.lane
        with T.If(T.Cast("int32", lane) // GROUP == number), T.Then():
            self.lane, self.threads, self.own = T.Cast("int32", lane) % GROUP, GROUP, number
            yield
            assert not self.pending, "a product that nobody waits for"
        self.lane, self.threads, self.own = lane, self.warps * WARP, T.Cast("int32", lane) // GROUP

    def sync(self, *, loads: bool = True, warp: bool = False, team: bool = False) -> None:
        """A barrier of the block, to which groups come in different places; or of one group."""
        if warp or not self.states:
            super().sync(loads=loads, warp=warp)
            return
        self._arrive(loads)
        if team and len(self.teams) > 1:
            T.evaluate(T.call_extern("int32", "tvm_gdn_team_sync", self.own))
        else:
            T.evaluate(T.call_extern("int32", "tvm_gdn_block_sync", self.warps * WARP))

    def _grid(self, rows: int, cols: int) -> tuple[int, int, int, int]:
        """The rows of one product are a group's; the halves of a state are shared out."""
        return (1, cols // 8, 4, 1) if self.states and rows == ROWS else super()._grid(rows, cols)

    def _warp(self, rows: int) -> Expr:
        """Within a team a thread's number is the team's own, and the state is all teams'."""
        before = 4 * self.own if self.states and rows > ROWS and self.threads == GROUP else 0
        return super()._warp(rows) + before

    def _count(self, tile: Fragments) -> int:
        """Elements of a thread."""
        high, wide, _, _ = self._grid(tile.rows, tile.cols)
        return high * wide * 4

    def asked(self) -> None:
        """The copies' end is marked here: where a thread waits, it would be marked behind what was written since."""
        T.evaluate(T.call_extern("int32", "tvm_gdn_group"))

    def _arrive(self, loads: bool) -> None:
        if not self.states:
            super()._arrive(loads)
            return
        arrived = loads and self.copying
        if arrived:
            self.copying = False
            T.evaluate(T.call_extern("int32", "tvm_gdn_arrived", self.stages - 2))
        # A fence waits for all that this thread has under way in memory, its stores of the output too.
        if arrived or self.written:
            self.written = False
            T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_publish"))

    # Tiles.
    def tile(self, rows: int, cols: int, place: str = "shared", dtype: str = "float32") -> Tile | Fragments:
        """A result has registers for further sums, there wherever the tile is: a product may be begun under a condition."""
        found = super().tile(rows, cols, place, dtype)
        if self.states and isinstance(found, Fragments):
            self.spare[id(found)] = [self._registers("float32", self._count(found)) for _ in range(3)]
        return found

    def _swizzled(self, storage: Storage) -> bool:
        return self.states and storage.dtype == "bfloat16" and storage.cols % WIDE == 0

    def _allocate_rows(self, size: int) -> int:
        """Memory at a multiple of what the matrix unit wants; the free list has none of it."""
        self.used[True] = padded(self.used[True], ALIGN)
        return self._allocate(size)

    def _place(self, storage: Storage) -> None:
        if storage.offset >= 0 or not self._swizzled(storage):
            super()._place(storage)
            return
        storage.stride, storage.size = WIDE, storage.rows * storage.cols * 2
        storage.offset = self._allocate_rows(storage.size)

    def _index(self, tile: Tile, i: Expr, j: Expr) -> Expr:
        storage = tile.storage
        if not self._swizzled(storage):
            return super()._index(tile, i, j)
        i, j = tile.row + i, tile.col + j
        place = (j // WIDE * storage.rows + i) * WIDE + T.bitwise_xor(j % WIDE // 8, i % 8) * 8 + j % 8
        return storage.offset // 2 + place

    def _padded_columns(self, dst: Tile) -> int:
        return dst.cols if self._swizzled(dst.storage) else super()._padded_columns(dst)

    # Results that are pending.
    def _settle(self, *tiles: Any) -> None:
        """Wait for the products that tiles are results of."""
        for tile in tiles:
            found = self.pending.pop(id(tile), None)
            if found is None:
                continue
            # What else the result is made of is read while the products go on.
            read = [self._gathered(tile, source).buffer for source in found.sources]
            own = () if found.start else (tile.buffer,)
            for sums in (*own, *found.others):
                T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_arrived", sums.data, self.begun - found.number))
            if not found.others and found.finish is None:
                continue

            def element(i: Expr, j: Expr, slot: Expr, tile: Any = tile, found: Pending = found, read: Any = read) -> None:
                value, given = tile.buffer[slot], [values[slot] for values in read]
                if found.start is not None:
                    value = found.start(i, j, value, *given)
                for sums in found.others:
                    value = value + sums[slot]
                if found.finish is not None:
                    value = found.finish(i, j, value, *given)
                self._put(tile, value, i, j, slot)

            self._over(tile, element)

    def _gathered(self, dst: Fragments, source: Any) -> Fragments:
        """A source's elements for those of `dst`, in registers."""
        values = self._registers("float32", self._count(dst))
        self._over(dst, lambda i, j, slot: T.buffer_store(values, self._get(source, i, j, slot), [slot]))
        return Fragments(values, dst.rows, dst.cols)

    def map(self, dst: Any, function: ElementFunction, *sources: Any, rows: Expr | None = None, lower: bool = False) -> None:
        """Elements, of results that are there."""
        if not self.states or not isinstance(dst, Fragments):
            super().map(dst, function, *sources, rows=rows, lower=lower)
            return
        # Shared numbers are read before this thread waits.
        read = [source if isinstance(source, Fragments) else self._gathered(dst, source) for source in sources]
        self._settle(dst, *sources)
        super().map(dst, function, *read, rows=rows)

    def store(self, dst: Any, src: Any, rows: Expr | None = None) -> None:
        """A tile, or a result that is there."""
        self._settle(src)
        super().store(dst, src, rows)

    # Products.
    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Parts of a result side by side; tensor data is its own operand."""
        operand = operands[0]
        tile, packed = operand.tile, operand.packed
        if not self.states or not (isinstance(tile, Fragments) or self._swizzled(tile.storage)):
            super().pack(*operands, rows=rows, lower=lower)
            return
        if isinstance(tile, Tile):
            self._place(tile.storage)
            return
        self._settle(tile)
        if packed.offset < 0:
            packed.parts = 1 if packed.coarse else 2
            packed.offset = self._allocate_rows(tile.rows * WIDE * 2)
        *places, apart = (self.places[n] for n in range(COLUMNS // 8 + 1))
        for slot in range(0, self._count(tile), 2):
            number, column, below = slot // SUMS, slot % SUMS // 4, slot % 4 // 2
            place = packed.offset // 2 + (self._rows(tile, number) + below * 8) * WIDE + places[column]
            address, pair = T.address_of(self.views["bfloat16"][place]), (tile.buffer[slot], tile.buffer[slot + 1])
            self.written = True
            T.evaluate(T.call_extern("int32", "tvm_gdn_split", address, apart, packed.parts, *pair))

    def _rows(self, tile: Fragments, number: int) -> Expr:
        """First row of this group's product `number` of those that make a tile."""
        return number * ROWS if tile.rows == ROWS or len(self.teams) == 1 else (number * len(self.teams) + self.own) * ROWS

    @staticmethod
    def _one(sums: Any, at: int, left: Expr, right: Expr, steps: int, apart: int, packed: Packed, fresh: bool) -> tuple[Any, ...]:
        """The call that begins a product with one part of a right operand."""
        del packed
        return "tvm_gdn_wgmma_one", sums, at, left, right, steps, apart, int(fresh)

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
        """Begin a product; it is whole, whatever its bounds."""
        if not self.states:
            super().mma(dst, a, b, start=start, finish=finish, sources=sources, coarse=coarse, **bounds)
            return
        count, both = self._count(dst), b.packed.parts > 1 and not coarse
        pending = self.pending.get(id(dst))
        # More sums of a result that is pending, or sums that go on from one in its registers; others stand beside it until then.
        more, onward = pending is not None, start is keep and not both
        assert not more or (start is keep and pending.finish is None), "a result that is begun before the one before it was read"
        others = pending.others if more else []
        own = dst.buffer
        if more or not (start is None or onward):
            own = self.spare[id(dst)][len(others)]
            others.append(own)
        rest = self.spare[id(dst)][len(others)] if both else None
        if rest is not None:
            others.append(rest)
        fresh = more or not onward
        storage = a.tile.storage
        steps = a.cols // 16
        apart = storage.rows * WIDE * 2
        half = self.views["bfloat16"]
        right = T.address_of(half[b.packed.offset // 2])
        for number in range(count // SUMS):
            at, first = number * SUMS, self._rows(dst, number)
            # The other way round 64 of the columns make the rows, and the columns are the storage's rows.
            place = first * storage.rows if a.transposed else first * WIDE
            operands = T.address_of(half[storage.offset // 2 + a.tile.row * WIDE + place]), right
            if rest is None:
                call = self._one(own.data, at, *operands, steps, apart, b.packed, fresh)
            else:
                call = ("tvm_gdn_wgmma_two", own.data, at, rest.data, at, *operands, steps, apart, int(a.transposed), int(fresh))
            T.evaluate(T.call_extern("int32", *call))
            self.begun += 1
        dst.version += 1
        after = start if not more and own is not dst.buffer else pending.start if more else None
        self.pending[id(dst)] = Pending(self.begun, others, after, finish, sources)
