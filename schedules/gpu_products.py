"""Products of the chunked delta rules on GPUs: 16 x 8 x 16 bf16 matrix fragments with fp32 accumulators.

Numbers. An operand is one to three bf16 arrays whose sum is the tile: one for bf16 data (exact), two for fp16 data (exact) and
for everything computed from 16-bit data (error 2^-17), three for fp32 (2^-24). A product adds the terms that matter. So one
instruction serves every dtype within the contract's tolerances.

The functions that are called by name (`tvm_gdn_mma` and others) stand in `csrc/device_functions.h`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import move
from tvm_gdn.schedules.gpu_channels import ChannelTiles
from tvm_gdn.schedules.gpu_fragments import (
    BLOCK,
    WARP,
    Fragments,
    Operand,
    Packed,
    Tile,
    ceil_div,
    padded,
    when,
)

from tvm_gdn.ops.tir.tiles import GRANULE, ElementFunction, Expr

#: Pairs of parts up to which each has sums of its own.
APART = 3


class GpuChunkTiles(ChannelTiles):
    """Tile operations of one geometry; see `tvm_gdn/ops/tir/tiles.py`, and `FragmentTiles` for its parameters."""

    fused, shift, tail = False, 0, GRANULE

    def expect(self, *windows: Any, write: bool = False, when: Any = None) -> None:
        """Other warps run while one waits."""

    def decays(self, dst: Any, gates: Any, factors: Any, rows: Expr) -> None:
        """An exponential for every pair: threads have instructions for it."""
        self.map(
            dst, lambda i, j, a, b, f: T.Select(j <= i, f * self.exp(a - b), T.float32(0)), gates, self.turn(gates),
            self.turn(factors), rows=rows, lower=True,
        )  # fmt: skip

    def operand(self, tile: Any, side: str, *, transpose: bool = False, coarse: bool = False) -> Operand:
        """Operands of one tile share their bf16 arrays, whatever their side: fragments are loaded either way round."""
        rows, cols = (tile.cols, tile.rows) if transpose else (tile.rows, tile.cols)
        owner = tile if isinstance(tile, Fragments) else tile.storage
        whole = isinstance(tile, Fragments) or (tile.rows, tile.cols) == (owner.rows, owner.cols)
        if whole and owner.packed is not None:
            return Operand(tile, side, transpose, rows, cols, owner.packed)
        packed = Packed(0, -1, 0, 0, False, coarse=coarse)
        if whole:
            owner.packed = packed
        return Operand(tile, side, transpose, rows, cols, packed)

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Split the tile into bf16 parts; tensor data in bf16 is its own operand."""
        del lower
        operand, rows = operands[0], self._rounded(rows)
        tile, packed = operand.tile, operand.packed
        source = tile if isinstance(tile, Fragments) else tile.storage
        if packed.offset >= 0 and packed.version == source.version:
            return
        native = isinstance(tile, Tile) and tile.storage.dtype == "bfloat16" and tile.cols > 1
        if packed.offset < 0:
            self._place_packed(packed, tile, native)
        packed.version = source.version
        if native:
            return
        base, wide = packed.offset // 2, padded(tile.cols)

        def split(place: Expr, first: Expr, second: Expr) -> None:
            """Neighbouring elements, as one word in every part."""
            address = T.address_of(self.views["bfloat16"][place])
            T.evaluate(T.call_extern("int32", "tvm_gdn_split", address, packed.plane, packed.parts, first, second))

        if isinstance(tile, Fragments):
            # Rows and columns of the last fragments that lie outside the tile hold zeros: products of zeros, or zeros loaded.
            per_row = self._grid(tile.rows, tile.cols)[1]

            def fragment(a: int, b: int, mi: Expr, ni: Expr) -> None:
                slot, places = (a * per_row + b) * 4, self._elements(mi, ni)
                for e in (0, 2):
                    i, j = places[e]
                    split(base + i * packed.stride + j, tile.buffer[slot + e], tile.buffer[slot + e + 1])

            self._fragments(tile.rows, tile.cols, fragment, rows)
            if wide > padded(tile.cols, 8):
                self._clear(packed, padded(tile.rows), padded(tile.cols, 8), wide)
            return
        pairs = wide // 2
        count = padded(tile.rows) * pairs if rows is None else rows * pairs
        with T.serial(ceil_div(count, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // pairs, index % pairs * 2

            def value(j: Expr) -> Expr:
                inside: Any = True
                if tile.rows % BLOCK:
                    inside = i < tile.rows
                if tile.cols % BLOCK:
                    inside = j < tile.cols if inside is True else T.And(inside, j < tile.cols)
                return self._get(tile, i, j) if inside is True else T.if_then_else(inside, self._get(tile, i, j), T.float32(0))

            even = padded(tile.rows) * pairs % self.threads == 0
            when(
                True if even else index < padded(tile.rows) * pairs,
                lambda: split(base + i * packed.stride + j, value(j), value(j + 1)),
            )

    def _place_packed(self, packed: Packed, tile: Any, native: bool) -> None:
        if native:
            storage = tile.storage
            packed.parts, packed.offset, packed.stride, packed.exact = 1, storage.offset, storage.stride, True
            return
        data = isinstance(tile, Tile) and tile.storage.dtype == "float16"
        packed.parts, packed.exact = 2 if data else self.parts, data
        packed.stride = padded(tile.cols) + 8
        packed.plane = padded(tile.rows) * packed.stride
        packed.offset = self._allocate(packed.parts * packed.plane * 2)

    def _clear(self, packed: Packed, high: int, first: int, wide: int) -> None:
        """Zero in the columns that pad the last fragment along the depth."""
        width = wide - first
        with T.serial(ceil_div(high * width, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))

            def element() -> None:
                place = packed.offset // 2 + index // width * packed.stride + first + index % width
                for part in range(packed.parts):
                    T.buffer_store(self.views["bfloat16"], T.Cast("bfloat16", T.float32(0)), [place + part * packed.plane])

            when(index < high * width, element)

    def mma(
        self,
        dst: Any,
        a: Operand,
        b: Operand,
        *,
        rows: Expr | None = None,
        cols: Expr | None = None,
        depth: Expr | None = None,
        lower: str | None = None,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Any, ...] = (),
        coarse: bool = False,
    ) -> None:
        """Fragment by fragment, in accumulators of its own."""
        terms, rows = self._terms(a.packed, b.packed), self._rounded(rows)
        if coarse and self.data == "bfloat16":
            terms = terms[:1]
        high, wide = ceil_div(dst.rows, BLOCK), ceil_div(dst.cols, 8)
        count_a, count_b, along, across = self._grid(dst.rows, dst.cols)
        parts = sorted({y for _, y in terms})
        # Sums of their own for every pair of parts: products that wait for one another would stand still most of the time.
        sets = len(terms) if len(terms) <= APART else 1
        left = self._registers("uint32", 4 * a.packed.parts)
        right = self._registers("uint32", 2 * (count_b + 1) * len(parts))
        acc = self._registers("float32", 4 * count_b * sets)
        warp = T.Bind(T.Cast("int32", self.lane) // WARP)

        def row_of_fragments(na: int, mi: Expr) -> None:
            columns = [(nb, warp // along + nb * across) for nb in range(count_b)]

            def wanted(nb: int, ni: Expr) -> Expr:
                inside: Any = True if (nb + 1) * across <= wide else ni < wide
                if lower == "result":
                    inside = ni * 8 < (mi + 1) * BLOCK if inside is True else T.And(inside, ni * 8 < (mi + 1) * BLOCK)
                if cols is not None:
                    near = T.Cast("int64", ni) * 8 < cols
                    inside = near if inside is True else T.And(inside, near)
                return inside

            def begin(nb: int, ni: Expr) -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * count_b + nb) * 4 + e, self._clamped(dst, i, j)
                    first: Any = T.float32(0)
                    if start is not None:
                        values = [self._get(source, ci, cj, slot) for source in sources]
                        first = start(i, j, self._get(dst, ci, cj, slot), *values)
                    T.buffer_store(acc, first, [nb * 4 + e])
                    for other in range(1, sets):
                        T.buffer_store(acc, T.float32(0), [(other * count_b + nb) * 4 + e])

            def end(nb: int, ni: Expr) -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * count_b + nb) * 4 + e, self._clamped(dst, i, j)
                    last: Any = acc[nb * 4 + e]
                    for other in range(1, sets):
                        last = last + acc[(other * count_b + nb) * 4 + e]
                    if finish is not None:
                        last = finish(i, j, last, *(self._get(source, ci, cj, slot) for source in sources))
                    inside: Any = True
                    if isinstance(dst, Tile) and (dst.rows % BLOCK or dst.cols % 8):
                        inside = T.And(i < dst.rows, j < dst.cols)
                    when(inside, lambda last=last, i=i, j=j, slot=slot: self._put(dst, last, i, j, slot))

            def load_right(nb: int, ni: Expr, kk: int) -> None:
                """All parts of a fragment; of a single part, those of two fragments where both are wanted anyway."""
                slot = nb * len(parts) * 2
                if len(parts) == 1 and wanted(nb, ni) is True and nb % 2 == 0 and nb + 1 < count_b:
                    if wanted(nb + 1, columns[nb + 1][1]) is True:
                        apart = across * 8 * (b.packed.stride if b.transposed else 1)
                        self._load_fragment("b_pair", b, right, slot, parts[0], kk * BLOCK, ni * 8, apart)
                        return
                if len(parts) == 1 and wanted(nb, ni) is True and nb % 2 and wanted(nb - 1, columns[nb - 1][1]) is True:
                    return
                for at in range(0, len(parts) - 1, 2):
                    self._load_fragment("b_pair", b, right, slot + at * 2, parts[at], kk * BLOCK, ni * 8, b.packed.plane)
                if len(parts) % 2:
                    self._load_fragment("b", b, right, slot + (len(parts) - 1) * 2, parts[-1], kk * BLOCK, ni * 8)

            def multiply(nb: int, number: int, x: int, y: int) -> None:
                own = number if sets > 1 else 0
                self._multiply(acc, (own * count_b + nb) * 4, left, x * 4, right, (nb * len(parts) + parts.index(y)) * 2)

            for nb, ni in columns:
                when(wanted(nb, ni), lambda nb=nb, ni=ni: begin(nb, ni))

            def step(kk: int) -> None:
                for x in sorted({x for x, _ in terms}):
                    self._load_fragment("a", a, left, x * 4, x, mi * BLOCK, kk * BLOCK)
                # Loads of all columns first, then products that do not wait for one another.
                for nb, ni in columns:
                    when(wanted(nb, ni), lambda nb=nb, ni=ni: load_right(nb, ni, kk))
                for number, (x, y) in enumerate(terms):
                    for nb, ni in columns:
                        when(wanted(nb, ni), lambda nb=nb, number=number, x=x, y=y: multiply(nb, number, x, y))

            for kk in range(padded(a.cols) // BLOCK):
                inside: Any = True if depth is None else kk * BLOCK < depth
                if lower == "left":
                    inside = kk <= mi if inside is True else T.And(inside, kk <= mi)
                when(inside, lambda kk=kk: step(kk))
            for nb, ni in columns:
                when(wanted(nb, ni), lambda nb=nb, ni=ni: end(nb, ni))

        for na in range(count_a):
            mi = warp % along + na * along
            bound: Any = True if (na + 1) * along <= high else mi < high
            if rows is not None:
                bound = T.Cast("int64", mi) * BLOCK < rows
            when(bound, lambda na=na, mi=mi: row_of_fragments(na, mi))

    @staticmethod
    def _clamped(dst: Any, i: Expr, j: Expr) -> tuple[Expr, Expr]:
        """Elements that pad a fragment read some element of the tile: their result is not kept."""
        i = i if dst.rows % BLOCK == 0 else T.min(i, dst.rows - 1)
        return i, j if dst.cols % 8 == 0 else T.min(j, dst.cols - 1)

    def _take_four(self, registers: Any, at: int, tile: Tile, i: Expr, j: Expr) -> None:
        """Four neighbouring fp32 numbers of a shared tile; its rows, and so every fourth column, begin at 16 bytes."""
        move(T.address_of(registers[at]), T.address_of(self.views["float32"][self._index(tile, i, j)]), 16)

    def invert_diagonal(self, dst: Tile, a: Tile, rows: Expr) -> None:
        """A thread per column of a block: forward substitution in registers.

        Triangles may stand one above the other. Two blocks go to the warp that gets their merge in `chain`.
        """
        x, row = self.scalars(BLOCK), self.scalars(BLOCK)
        blocks = dst.rows // BLOCK
        self._place(dst.storage)
        dst.storage.version += 1
        with T.serial(ceil_div(blocks * BLOCK, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            b, j = index // BLOCK, index % BLOCK
            left = T.Bind(b % (dst.cols // BLOCK) * BLOCK)
            inside = T.Cast("int64", b) * BLOCK < rows
            with T.If(inside if blocks * BLOCK % self.threads == 0 else T.And(inside, b < blocks)):
                with T.Then():
                    for i in range(BLOCK):
                        T.buffer_store(x, T.Select(j == i, T.float32(1), T.float32(0)), [i])
                        for k in range(0, i, 4):
                            self._take_four(row, k, a, b * BLOCK + i, left + k)
                        for k in range(i):
                            T.buffer_store(x, x[i] - row[k] * x[k], [i])
                    for i in range(BLOCK):
                        self._put(dst, x[i], b * BLOCK + i, left + j)
