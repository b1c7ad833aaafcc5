"""Design space of the chunked delta rules on devices with `mtmusa::wmma` and warps of 32.

Tiles in registers have the places of mma.m16n8k16, as on other GPUs, in pairs of fragments side by side. A product is made in
fragments of wmma from operands in shared memory, 16 x 16 at a time, and goes through 1,280 bytes of the warp's own to the threads
that have its places: once per product, whatever its depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules import musa_wmma as wmma
from tvm_gdn.schedules.gpu_chunk import ChunkSmall, arena_bytes
from tvm_gdn.schedules.gpu_fragments import BLOCK, ITEMSIZE, WARP, Expr, Operand, Tile, ceil_div, fragment_elements, padded, when
from tvm_gdn.schedules.gpu_products import GpuChunkTiles

from tvm_gdn.errors import TargetError
from tvm_gdn.ops.tir.chunk import chunk as chunk_rule
from tvm_gdn.ops.tir.tiles import ElementFunction
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


class WmmaChunkTiles(GpuChunkTiles):
    """Tile operations of one geometry; parameters as `FragmentTiles` has them. Inverses are merged by products like others."""

    chained = False

    def enter(self, lane: Expr) -> None:
        """Allocate the arena, with room for sums of every warp, and the worker's state."""
        super().enter(lane)
        self.room = self._allocate(self.warps * wmma.ROOM * 4)

    def _arena(self, size: int) -> Callable[[Expr], None]:
        """Shared memory in bf16: fragments are loaded from what was allocated in their dtype."""
        half = T.alloc_buffer((size // 2,), "bfloat16", scope="shared.dyn")

        def view(dtype: str, itemsize: int) -> Any:
            return T.decl_buffer((size // itemsize,), dtype, data=half.data, scope="shared.dyn")

        self.views = {dtype: half if dtype == "bfloat16" else view(dtype, itemsize) for dtype, itemsize in ITEMSIZE.items()}
        words = view("uint32", 4)

        def clear(piece: Expr) -> None:
            with T.vectorized(4) as word:
                T.buffer_store(words, T.uint32(0), [piece * 4 + word])

        return clear

    def _allocate(self, size: int) -> int:
        return super()._allocate(padded(size, wmma.ALIGN))

    # Fragments, in pairs: those of number 2 n and 2 n + 1 lie side by side.
    def _grid(self, rows: int, cols: int) -> tuple[int, int, int, int]:
        count_a, pairs, along, across = super()._grid(rows, ceil_div(cols, 2))
        return count_a, 2 * pairs, along, across

    def _fragments(self, rows: int, cols: int, body: Any, limit: Expr | None = None) -> None:
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, 8)
        count_a, count_b, along, across = self._grid(rows, cols)
        warp = T.Bind(self._warp(rows))
        for a in range(count_a):
            mi = warp % along + a * along
            bound: Any = True if (a + 1) * along <= high else mi < high
            if limit is not None:
                bound = T.Cast("int64", mi) * BLOCK < limit
            for b in range(count_b):
                ni = (warp // along + b // 2 * across) * 2 + b % 2
                inside: Any = True if (b // 2 + 1) * across * 2 <= wide else ni < wide
                when(bound, lambda a=a, b=b, mi=mi, ni=ni, inside=inside: when(inside, lambda: body(a, b, mi, ni)))

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
        """Sums of a row of fragments of wmma, which threads take over one by one."""
        terms, rows = self._terms(a.packed, b.packed), self._rounded(rows)
        if coarse and self.data == "bfloat16":
            terms = terms[:1]
        high, wide = ceil_div(dst.rows, BLOCK), ceil_div(dst.cols, BLOCK)
        count_a, count_b, along, across = self._grid(dst.rows, dst.cols)
        left, right = (
            wmma.fragments(use, "bfloat16", operand.packed.parts) for use, operand in (("matrix_a", a), ("matrix_b", b))
        )
        sums, taken = wmma.fragments("accumulator", "float32", count_b // 2), self._registers("float32", 8)
        warp = T.Bind(T.Cast("int32", self.lane) // WARP)
        place = T.Bind(self.room // 4 + warp * wmma.ROOM)

        def row_of_fragments(na: int, mi: Expr) -> None:
            columns = [(nb, warp // along + nb * across) for nb in range(count_b // 2)]

            def wanted(nb: int, ni: Expr) -> Expr:
                inside: Any = True if (nb + 1) * across <= wide else ni < wide
                if lower == "result":
                    inside = ni <= mi if inside is True else T.And(inside, ni <= mi)
                if cols is not None:
                    near = T.Cast("int64", ni) * BLOCK < cols
                    inside = near if inside is True else T.And(inside, near)
                return inside

            def step(kk: int) -> None:
                for x in sorted({x for x, _ in terms}):
                    self._load_matrix(left, a, x, mi * BLOCK, kk * BLOCK)
                for nb, ni in columns:
                    when(wanted(nb, ni), lambda nb=nb, ni=ni: column(nb, ni, kk))

            def column(nb: int, ni: Expr, kk: int) -> None:
                for y in sorted({y for _, y in terms}):
                    self._load_matrix(right, b, y, kk * BLOCK, ni * BLOCK)
                for x, y in terms:
                    wmma.multiply(sums, nb, left, x, right, y)

            def end(nb: int, ni: Expr) -> None:
                wmma.put_down(sums, nb, self.views["float32"], place)
                self.sync(warp=True)
                wmma.pick_up(taken, 0, self.views["float32"], place, self.lane)
                # The warp's next sums are put down in the same place.
                self.sync(warp=True)
                for n in range(2):
                    inside: Any = True if dst.cols % BLOCK == 0 else ni * 2 + n < ceil_div(dst.cols, 8)
                    when(inside, lambda n=n: write(nb * 2 + n, n, ni * 2 + n))

            def write(nb: int, n: int, ni: Expr) -> None:
                for e, (i, j) in enumerate(fragment_elements(self.lane, mi, ni)):
                    slot, (ci, cj) = (na * count_b + nb) * 4 + e, self._clamped(dst, i, j)
                    value: Any = taken[n * 4 + e]
                    read = [self._get(source, ci, cj, slot) for source in sources]
                    if start is not None:
                        value = start(i, j, self._get(dst, ci, cj, slot), *read) + value
                    if finish is not None:
                        value = finish(i, j, value, *read)
                    inside: Any = True
                    if isinstance(dst, Tile) and (dst.rows % BLOCK or dst.cols % 8):
                        inside = T.And(i < dst.rows, j < dst.cols)
                    when(inside, lambda value=value, i=i, j=j, slot=slot: self._put(dst, value, i, j, slot))

            for nb, _ in columns:
                wmma.clear(sums, nb)
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

    def _load_matrix(self, matrices: Any, operand: Operand, part: int, row: Expr, col: Expr) -> None:
        """The fragment of an operand's part at (row, col)."""
        packed = operand.packed
        if operand.transposed:
            row, col = col, row
        if isinstance(operand.tile, Tile) and packed.parts == 1 and packed.exact:
            row, col = operand.tile.row + row, operand.tile.col + col
        place = packed.offset // 2 + part * packed.plane + row * packed.stride + col
        wmma.load(matrices, part, self.views["bfloat16"], place, packed.stride, turned=operand.transposed)


def sized(geometry: Geometry, **options: Any) -> WmmaChunkTiles:
    """Tile operations with an arena of the size that the algorithm turns out to use."""
    K, V, data = geometry.axis["K"], geometry.axis["V"], geometry.dtype["v"]
    tiles = WmmaChunkTiles(K, V, data=data, v_first=bool(geometry.attr.get("state_v_first")), **options)
    chunk_rule(geometry, tiles)
    tiles.arenas = tiles.bytes
    return tiles


@schedule("chunk", "musa-mp31")
class ChunkWmma(ChunkSmall):
    """In one pass over a sequence; 64 KiB of shared memory."""

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, value columns and warps per block; whether wmma multiplies, or plain C++."""
        found = super().knobs(geometry)
        return {**{name: found[name] for name in ("chunk", "v_tile", "warps")}, "wmma": (True, False)}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The longest chunk that fits, with 32 columns where V has them."""
        choices = cls.knobs(geometry)
        columns = [d for d in choices["v_tile"] if d <= 32]
        for chunk in sorted(choices["chunk"], reverse=True):
            for v_tile in sorted(columns, reverse=True) if chunk == BLOCK else (max(columns),):
                shape = {"chunk": chunk, "v_tile": v_tile, "warps": 4}
                if arena_bytes(geometry, sized, **shape) <= cls.shared:
                    return {**shape, "wmma": True}
        plain = ChunkSmall.default(geometry)
        return {**{name: plain[name] for name in ("chunk", "v_tile", "warps")}, "wmma": False}

    @classmethod
    def tiles(cls, geometry: Geometry, *, wmma: bool, **shape: Any) -> GpuChunkTiles:
        """Tile operations on the matrix unit, or on shuffles."""
        if not wmma:
            return ChunkSmall.tiles(geometry, **shape, ahead=0, together=1)
        found = sized(geometry, **shape)
        size = max(found.arenas.values())
        if size > cls.shared:
            raise TargetError(f"{shape} need {size} bytes of shared memory by wmma, a block has {cls.shared}")
        return found
