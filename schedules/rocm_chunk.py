"""Tile operations of the chunked delta rules on AMD's matrix units (`schedules/rocm_units.py`; bf16, fp32 accumulators).

Everything but products is the common GPU form. `tvm_gdn_bits` is lowered to a reinterpretation (`schedules/rocm_lowering.py`);
in C form it is a function of the emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_chunk import arena_bytes
from tvm_gdn.schedules.gpu_fragments import BLOCK, Fragments, Operand, Tile, Window, ceil_div, padded, when
from tvm_gdn.schedules.gpu_products import GpuChunkTiles
from tvm_gdn.schedules.rocm_units import MFMA, WMMA, MatrixUnit

from tvm_gdn.errors import TargetError
from tvm_gdn.ops.tir.chunk import chunk as chunk_rule
from tvm_gdn.ops.tir.chunk import chunk_lengths
from tvm_gdn.ops.tir.tiles import ElementFunction, Expr
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


def _rounded_bits(bits: Expr) -> Expr:
    """The bf16 number nearest to an fp32 number, both as bits; what is no number stays none."""
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    near = T.shift_right(bits + T.uint32(0x7FFF) + odd, T.uint32(16))
    number = T.bitwise_and(bits, T.uint32(0x7FFFFFFF)) <= T.uint32(0x7F800000)
    return T.Cast("uint16", T.Select(number, near, T.uint32(0x7FC0)))


class UnitChunkTiles(GpuChunkTiles):
    """Products on fragments of 16 x 16; value columns come in multiples of 16.

    Parameters
    ----------
    K, V : int
        State rows and columns.
    matrix : MatrixUnit
        What multiplies; other options as `FragmentTiles` has them.
    """

    chained = False

    def __init__(self, K: int, V: int, *, matrix: MatrixUnit, **options: Any) -> None:
        super().__init__(K, V, **options)
        self.matrix, self.held = matrix, matrix.held

    def _arena(self, size: int) -> Callable[[Expr], None]:
        """Shared memory as 16-bit words: TVM's generator of machine code takes views of other dtypes for global memory."""
        self.shorts = T.alloc_buffer((size // 2,), "uint16", scope="shared.dyn")

        def clear(piece: Expr) -> None:
            with T.unroll(2) as half, T.vectorized(4) as short:  # C has no longer vectors of them
                T.buffer_store(self.shorts, T.uint16(0), [piece * 8 + half * 4 + short])

        return clear

    def _read(self, dtype: str, place: Expr) -> Expr:
        """An element of shared memory in fp32; LLVM makes one access of neighbouring words."""
        if dtype == "float16":
            return T.Cast("float32", T.reinterpret(dtype, self.shorts[place]))
        if dtype == "bfloat16":
            return T.reinterpret("float32", T.shift_left(T.Cast("uint32", self.shorts[place]), T.uint32(16)))
        low, high = (T.Cast("uint32", self.shorts[place * 2 + n]) for n in range(2))
        return T.reinterpret("float32", T.bitwise_or(low, T.shift_left(high, T.uint32(16))))

    def _write(self, dtype: str, place: Expr, value: Expr) -> None:
        """The same, written, rounded to nearest even."""
        if dtype == "float16":
            T.buffer_store(self.shorts, T.reinterpret("uint16", T.Cast(dtype, value)), [place])
            return
        bits = T.Bind(T.call_extern("uint32", "tvm_gdn_bits", T.Cast("float32", value)))
        if dtype == "bfloat16":
            T.buffer_store(self.shorts, _rounded_bits(bits), [place])
            return
        T.buffer_store(self.shorts, T.Cast("uint16", T.bitwise_and(bits, T.uint32(0xFFFF))), [place * 2])
        T.buffer_store(self.shorts, T.Cast("uint16", T.shift_right(bits, T.uint32(16))), [place * 2 + 1])

    def _take_four(self, registers: Any, at: int, tile: Tile, i: Expr, j: Expr) -> None:
        for n in range(4):
            T.buffer_store(registers, self._get(tile, i, j + n), [at + n])

    # Fragments.
    def _grid(self, rows: int, cols: int) -> tuple[int, int, int, int]:
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, BLOCK)
        waves, along = self.threads // self.matrix.wave, 1
        while along * 2 <= min(high, waves):
            along *= 2
        return ceil_div(high, along), ceil_div(wide, waves // along), along, waves // along

    def _fragments(self, rows: int, cols: int, body: Any, limit: Expr | None = None) -> None:
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, BLOCK)
        count_a, count_b, along, across = self._grid(rows, cols)
        wave = T.Bind(T.Cast("int32", self.lane) // self.matrix.wave)
        for a in range(count_a):
            mi = wave % along + a * along
            bound: Any = True if (a + 1) * along <= high else mi < high
            if limit is not None:
                bound = T.Cast("int64", mi) * BLOCK < limit
            for b in range(count_b):
                ni = wave // along + b * across
                inside: Any = True if (b + 1) * across <= wide else ni < wide
                when(bound, lambda a=a, b=b, mi=mi, ni=ni, inside=inside: when(inside, lambda: body(a, b, mi, ni)))

    def _elements(self, mi: Expr, ni: Expr) -> list[tuple[Expr, Expr]]:
        lane = self.matrix.lane(self.lane)
        return [(mi * BLOCK + row, ni * BLOCK + lane % BLOCK) for row in self.matrix.rows(lane)]

    # Copies and operands: element by element, without C functions.
    def _load_shared(self, dst: Tile, src: Window, rows: Expr | None, **known: Any) -> None:
        del known
        self._place(dst.storage)
        storage, limit = dst.storage, dst.rows if rows is None else rows
        storage.version += 1
        wide = storage.stride - 8 if storage.dtype == "bfloat16" and dst.cols > 1 else dst.cols
        with T.serial(ceil_div(dst.rows * wide, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // wide, index % wide

            def element() -> None:
                inside = T.Cast("int64", i) < limit
                inside = inside if wide == dst.cols else T.And(inside, j < dst.cols)
                place = self._index(dst, i, j)
                self._write(storage.dtype, place, T.float32(0))
                when(inside, lambda: self._write(storage.dtype, place, src.buffer[i, j]))

            when(True if dst.rows * wide % self.threads == 0 else index < dst.rows * wide, element)

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
        base, rest = packed.offset // 2, self.scalars(1)

        def split(value: Expr, i: Expr, j: Expr) -> None:
            T.buffer_store(rest, value, [0])
            for part in range(packed.parts):
                place = base + i * packed.stride + j + part * packed.plane
                self._write("bfloat16", place, rest[0])
                if part + 1 < packed.parts:
                    T.buffer_store(rest, rest[0] - self._read("bfloat16", place), [0])

        if isinstance(tile, Fragments):
            self._over(tile, lambda i, j, slot: split(tile.buffer[slot], i, j), rows)
            return
        wide = padded(tile.cols)
        total = padded(tile.rows) * wide
        with T.serial(ceil_div(total if rows is None else rows * wide, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // wide, index % wide

            def element() -> None:
                inside: Any = i < tile.rows if tile.rows % BLOCK else True
                if tile.cols % BLOCK:
                    inside = j < tile.cols if inside is True else T.And(inside, j < tile.cols)
                value = self._get(tile, i, j)
                split(value if inside is True else T.if_then_else(inside, value, T.float32(0)), i, j)

            when(index < total, element)

    def store(self, dst: Window, src: Any, rows: Expr | None = None) -> None:
        """Rounded to the tensor's dtype."""
        self._store_elements(dst, src, rows)

    # Products.
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
        per_row = self._grid(dst.rows, dst.cols)[1]
        words, held = self.matrix.words, self.held
        left, right = self._registers("uint32", words), self._registers("uint32", words)
        acc = self._registers("float32", held)

        def product(kk: int, mi: Expr, ni: Expr) -> None:
            for x, y in terms:
                self._load_words(a, left, x, mi * BLOCK, kk * BLOCK, depth_first=a.transposed)
                self._load_words(b, right, y, ni * BLOCK, kk * BLOCK, depth_first=not b.transposed)
                operands = ([registers[w] for w in range(words)] for registers in (left, right))
                for e, made in enumerate(self.matrix.product("", *operands, [acc[e] for e in range(held)])):
                    T.buffer_store(acc, made, [e])

        def fragment(na: int, nb: int, mi: Expr, ni: Expr) -> None:
            def whole() -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * per_row + nb) * held + e, self._clamped(dst, i, j)
                    first: Any = T.float32(0)
                    if start is not None:
                        values = [self._get(source, ci, cj, slot) for source in sources]
                        first = start(i, j, self._get(dst, ci, cj, slot), *values)
                    T.buffer_store(acc, first, [e])
                for kk in range(padded(a.cols) // BLOCK):
                    inside: Any = True if depth is None else kk * BLOCK < depth
                    if lower == "left":
                        inside = kk <= mi if inside is True else T.And(inside, kk <= mi)
                    when(inside, lambda kk=kk: product(kk, mi, ni))
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * per_row + nb) * held + e, self._clamped(dst, i, j)
                    last: Any = acc[e]
                    if finish is not None:
                        last = finish(i, j, last, *(self._get(source, ci, cj, slot) for source in sources))
                    keep: Any = True
                    if isinstance(dst, Tile) and (dst.rows % BLOCK or dst.cols % BLOCK):
                        keep = T.And(i < dst.rows, j < dst.cols)
                    when(keep, lambda last=last, i=i, j=j, slot=slot: self._put(dst, last, i, j, slot))

            wanted: Any = True
            if lower == "result":
                wanted = ni <= mi
            if cols is not None:
                near = T.Cast("int64", ni) * BLOCK < cols
                wanted = near if wanted is True else T.And(wanted, near)
            when(wanted, whole)

        self._fragments(dst.rows, dst.cols, fragment, rows)

    @staticmethod
    def _clamped(dst: Any, i: Expr, j: Expr) -> tuple[Expr, Expr]:
        i = i if dst.rows % BLOCK == 0 else T.min(i, dst.rows - 1)
        return i, j if dst.cols % BLOCK == 0 else T.min(j, dst.cols - 1)

    def _load_words(self, operand: Operand, words: Any, part: int, across: Expr, deep: Expr, *, depth_first: bool) -> None:
        """This thread's words of a fragment; `depth_first`: the depth runs along the rows of the memory."""
        packed, lane = operand.packed, self.matrix.lane(self.lane)
        across, deep = across + lane % BLOCK, deep + self.matrix.word(lane) * 2
        row, col = (deep, across) if depth_first else (across, deep)
        if isinstance(operand.tile, Tile) and packed.parts == 1 and packed.exact:
            row, col = operand.tile.row + row, operand.tile.col + col
        place = T.Bind(packed.offset // 2 + part * packed.plane + row * packed.stride + col)
        step = packed.stride if depth_first else 1
        for word in range(self.matrix.words):
            low, high = (T.Cast("uint32", self.shorts[place + (2 * word + n) * step]) for n in range(2))
            T.buffer_store(words, T.bitwise_or(low, T.shift_left(high, T.uint32(16))), [word])


def sized(geometry: Geometry, *, matrix: MatrixUnit, **options: Any) -> UnitChunkTiles:
    """Tile operations with an arena of the size that the algorithm turns out to use."""
    K, V, data = geometry.axis["K"], geometry.axis["V"], geometry.dtype["v"]
    tiles = UnitChunkTiles(K, V, matrix=matrix, data=data, v_first=bool(geometry.attr.get("state_v_first")), **options)
    chunk_rule(geometry, tiles)
    tiles.arenas = tiles.bytes
    return tiles


@schedule("chunk", "rocm-gfx90a")
@schedule("chunk", "rocm-gfx942")
class ChunkMfma:
    """Chunked delta rules: a block per tile of value columns, the state in accumulator fragments; 64 KiB of LDS, 256 threads."""

    shared, matrix = 64 * 1024, MFMA

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk and value columns."""
        tiles = tuple(d for d in (16, 32, 64) if geometry.axis["V"] % d == 0)
        if not tiles:
            raise TargetError(f"V = {geometry.axis['V']} is no multiple of 16: fragments of the matrix unit have 16 columns")
        return {"chunk": chunk_lengths(geometry.axis["K"], (16, 32, 64)), "v_tile": tiles}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The longest chunk that fits with 32 columns or fewer."""
        columns = [d for d in cls.knobs(geometry)["v_tile"] if d <= 32]
        for chunk in sorted(cls.knobs(geometry)["chunk"], reverse=True):
            for v_tile in sorted(columns, reverse=True):
                if arena_bytes(geometry, sized, chunk=chunk, v_tile=v_tile, warps=8, matrix=cls.matrix) <= cls.shared:
                    return {"chunk": chunk, "v_tile": v_tile}
        raise TargetError(f"K = {geometry.axis['K']} needs more than {cls.shared} bytes of local memory")

    @classmethod
    def tiles(cls, geometry: Geometry, *, chunk: int, v_tile: int) -> UnitChunkTiles:
        """Tile operations on the matrix unit."""
        found = sized(geometry, chunk=chunk, v_tile=v_tile, warps=8, matrix=cls.matrix)
        size = max(found.arenas.values())
        if size > cls.shared:
            raise TargetError(f"chunk {chunk} and v_tile {v_tile} need {size} bytes of local memory, a block has {cls.shared}")
        return found


@schedule("chunk", "rocm-gfx1100")
class ChunkWmma(ChunkMfma):
    """The same on WMMA."""

    matrix = WMMA
