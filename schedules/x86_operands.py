"""Operands of the chunked delta rules on x86 matrix units: numbers as sums of bf16, in blocks of a tile register each.

Numbers that are not exact in bf16 are split into two or three of them, ``x = high + low + O(2^-16 x)``: all but the last are cut
off, which takes fewer instructions than rounding and makes three exact; the last of two is rounded. Layouts have blocks of 1 KiB:
left operands ``[parts, rows / 16, depth / 32, 16, 16]``, right ones ``[parts, depth / 32, columns / 16, 16, 16]``, of pairs of
bf16, 32 bits, that follow each other along the depth. A tile of bf16 data is its own left operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array, transpose_16
from tvm_gdn.schedules.cpu_chunk import ChunkTiles, Operand
from tvm_gdn.schedules.cpu_tiles import BLOCK, TO_LINE, Tile, ceil_div
from tvm_gdn.schedules.x86_matrix import LANES, ROWS, EmulatedMatrixUnit, MatrixUnit, Rows, high_part

from tvm_gdn.ops.tir.tiles import GRANULE, Expr

#: Two fp32 vectors as bf16, one after the other: by the instruction, and in steps that every CPU has.
ROUND = """
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x i32> @tvm_gdn_join(<16 x float> %a, <16 x float> %b) alwaysinline {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %b, <16 x float> %a)
  %c = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %c
}
"""
ROUND_EMULATED = """
define <16 x i32> @tvm_gdn_join(<16 x float> %a, <16 x float> %b) alwaysinline {
  %v = shufflevector <16 x float> %a, <16 x float> %b, <32 x i32> <WHOLE>
  %u = bitcast <32 x float> %v to <32 x i32>
  %s = lshr <32 x i32> %u, splat (i32 16)
  %l = and <32 x i32> %s, splat (i32 1)
  %h = add <32 x i32> %l, splat (i32 32767)
  %n = add <32 x i32> %u, %h
  %q = or <32 x i32> %u, splat (i32 4194304)
  %x = fcmp uno <32 x float> %v, %v
  %y = select <32 x i1> %x, <32 x i32> %q, <32 x i32> %n
  %z = lshr <32 x i32> %y, splat (i32 16)
  %t = trunc <32 x i32> %z to <32 x i16>
  %c = bitcast <32 x i16> %t to <16 x i32>
  ret <16 x i32> %c
}
"""
#: The same interleaved, rounded or cut off, or written to a tensor, the halves of the 32-bit pairs of two vectors, and pairs of a
#: tile that was written as bf16 (an access of another type than the writing one's, which LLVM may not move across it).
HELPERS = """
define i32 @tvm_gdn_put(ptr %p, <16 x float> %a, <16 x float> %b) alwaysinline {
  %r = call <16 x i32> @tvm_gdn_join(<16 x float> %a, <16 x float> %b)
  store <16 x i32> %r, ptr %p, align 2
  ret i32 0
}
define <16 x i32> @tvm_gdn_cut(<16 x float> %a, <16 x float> %b) alwaysinline {
  %x = bitcast <16 x float> %a to <16 x i32>
  %y = bitcast <16 x float> %b to <16 x i32>
  %l = lshr <16 x i32> %x, splat (i32 16)
  %h = and <16 x i32> %y, splat (i32 -65536)
  %r = or <16 x i32> %l, %h
  ret <16 x i32> %r
}
define <16 x i32> @tvm_gdn_words(ptr %p) alwaysinline {
  %r = load <16 x i32>, ptr %p, align 4
  ret <16 x i32> %r
}
define <16 x i32> @tvm_gdn_pair(<16 x float> %a, <16 x float> %b) alwaysinline {
  %r = call <16 x i32> @tvm_gdn_join(<16 x float> %a, <16 x float> %b)
  %c = bitcast <16 x i32> %r to <32 x i16>
  %d = shufflevector <32 x i16> %c, <32 x i16> poison, <32 x i32> <INTERLEAVED>
  %e = bitcast <32 x i16> %d to <16 x i32>
  ret <16 x i32> %e
}
define <16 x i32> @tvm_gdn_even(<16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x i16>
  %y = bitcast <16 x i32> %b to <32 x i16>
  %c = shufflevector <32 x i16> %x, <32 x i16> %y, <32 x i32> <EVEN>
  %d = bitcast <32 x i16> %c to <16 x i32>
  ret <16 x i32> %d
}
define <16 x i32> @tvm_gdn_odd(<16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x i16>
  %y = bitcast <16 x i32> %b to <32 x i16>
  %c = shufflevector <32 x i16> %x, <32 x i16> %y, <32 x i32> <ODD>
  %d = bitcast <32 x i16> %c to <16 x i32>
  ret <16 x i32> %d
}
"""
ROUND_EMULATED = ROUND_EMULATED.replace("WHOLE", ", ".join(f"i32 {lane}" for lane in range(32)))
for _name, _order in (
    ("INTERLEAVED", [lane // 2 + 16 * (lane % 2) for lane in range(32)]),
    ("EVEN", [2 * lane for lane in range(32)]),
    ("ODD", [2 * lane + 1 for lane in range(32)]),
):
    HELPERS = HELPERS.replace(_name, ", ".join(f"i32 {lane}" for lane in _order))


#: 32-bit elements between arrays of a worker: five cache lines.
STAGGER = 80


class Block(Tile):
    """A block of a tile, even one that fills its buffer: its products stay with the vector unit."""


class Bits(Tile):
    """Numbers in bf16 as their bits: TVM has no arithmetic to spoil in moving them."""

    def get(self, i: Expr, base: Expr, unit: int = 1, lane: Expr = 0) -> Expr:
        """The element in fp32."""
        bits = T.Cast("uint32", self.buffer[tuple(self.at(i, base, unit, lane))])
        return T.reinterpret("float32", T.shift_left(bits, T.uint32(16)))

    def put(self, value: Expr, i: Expr, base: Expr, unit: int = 1, lane: Expr = 0) -> None:
        """Write a number that is exact in bf16."""
        bits = T.shift_right(T.reinterpret("uint32", value), T.uint32(16))
        T.buffer_store(self.buffer, T.Cast("uint16", bits), self.at(i, base, unit, lane))


@dataclass(frozen=True)
class State(Tile):
    """The state of value head `index` of the worker."""

    index: Expr = 0


@dataclass(frozen=True)
class MatrixOperand:
    """An operand in the layout of the matrix unit: `buffer`, or the tile itself where it holds bf16 (`native`).

    `scale`: factors of the rows. `first`: the state's number, whose parts start at `first` * `parts`.
    """

    buffer: Any
    source: Tile
    side: str
    transposed: bool
    parts: int
    scale: Tile | None = None
    first: Expr = 0

    @property
    def native(self) -> bool:
        """Whether the tile is its own operand."""
        return self.buffer is self.source.buffer

    @property
    def stride(self) -> int:
        """Words from row to row of a block."""
        return self.source.cols // 2 if self.native else ROWS

    def row(self, part: int, block: Expr, depth: Expr, r: Expr) -> list[Any]:
        """Index of a row of a block."""
        if self.native:
            return [block * ROWS + r, depth * 2 * ROWS]
        return [self.first * self.parts + part, block, depth, r, 0]

    def clear(self, index: list[Any]) -> None:
        """A row of a block, [block, depth, row], is zero in all parts."""
        for part in range(self.parts):
            zeros = T.broadcast(T.int32(0), ROWS)
            T.buffer_store(self.buffer, zeros, [self.first * self.parts + part, *index, LANES])

    def words(self, part: int, block: Expr, depth: Expr, r: Expr) -> Any:
        """A row of a block, as pairs."""
        index = self.row(part, block, depth, r)
        if self.native:
            return T.call_extern("int32x16", "tvm_gdn_words", T.address_of(self.buffer[tuple(index)]))
        return self.buffer[(*index[:-1], LANES)]


class EmulatedUnit(EmulatedMatrixUnit):
    """The emulated unit, which also reads words from tiles of bf16."""

    def load(self, n: int, buffer: Any, row: Rows, stride: int) -> None:
        """Register n from memory."""
        if buffer.dtype != "uint16":
            super().load(n, buffer, row, stride)
            return
        self._expect(n)
        with T.serial(ROWS) as r:
            words = T.call_extern("int32x16", "tvm_gdn_words", T.address_of(buffer[tuple(row(r))]))
            T.buffer_store(self.words, words, [n, r, LANES])


def helper(name: str, a: Any, b: Any) -> Any:
    """Call one of `HELPERS`."""
    return T.call_pure_extern("int32x16", f"tvm_gdn_{name}", a, b)


def upper(x: Any) -> Any:
    """The digits of fp32 numbers that bf16 has, the rest cut off."""
    return high_part(T.reinterpret("int32x16", x))


class OperandTiles(ChunkTiles):
    """Tiles, and their operands for the matrix unit; parameters as in `x86_amx.AmxChunkTiles`."""

    fused = True

    def __init__(
        self, K: int, V: int, *, v_tile: int, chunk: int, span: int, v_first: bool, data: str, parts: int, emulated: bool = False
    ) -> None:
        super().__init__(K, V, v_tile=v_tile, chunk=chunk, rows=8, columns=32, span=span, v_first=v_first)
        self.unit = EmulatedUnit() if emulated else MatrixUnit()
        self.helpers = TO_LINE + HELPERS + (ROUND_EMULATED if emulated else ROUND)
        self.granule, self.triangle = BLOCK, GRANULE
        # A third part of a state hardly shows in later ones: K S takes errors of earlier chunks out (docs/performance.md).
        self.parts, self.state_parts, self.data = parts, min(parts, 2), data
        #: Tiles whose numbers, or results that only go into a tensor of them, need no more than bf16.
        self.exact = set[Any]()

    def enter(self, lane: Expr) -> None:
        """Allocate, and configure the thread's tile registers."""
        super().enter(lane)
        self.unit.enter(used=(0, 1, 4, 5, 6))
        self.scratch = self.array(GRANULE, GRANULE)
        #: Products that go through their blocks in turns with the next one: how a block begins, and its elements.
        self.turns: list[tuple[Any, Any]] = []
        self.state_operands = self._blocks(self.span * self.state_parts, self.K // 32, self.v_tile // 16, by_columns=True)

    def _take(self, count: int) -> Expr:
        """Like the others, a few lines apart: what a loop reads and writes side by side should not meet in a set of the cache."""
        return super()._take(count + STAGGER)

    def _blocks(self, parts: int, *blocks: int, by_columns: bool = False) -> Any:
        """Array of 16 x 16 words, [parts, *blocks, 16, 16]; `by_columns`: those of the same columns lie together."""
        words = ROWS * ROWS
        size = prod(blocks) * words + STAGGER
        outer = (words, blocks[0] * words) if by_columns else (blocks[1] * words, words)
        strides = (size, *outer, ROWS, 1)
        offset = self._take(parts * size)
        shape = (parts, *blocks, ROWS, ROWS)
        return T.decl_buffer(shape, "int32", data=self.arena.data, elem_offset=offset, strides=strides, scope="local")

    def leave(self) -> None:
        """Let the system forget the tile registers."""
        self.unit.leave()

    def tile(self, rows: int, cols: int, place: str = "shared", dtype: str = "float32") -> Tile:
        """Array on the worker's stack; remembers whether bf16 is all that its numbers need."""
        if dtype == "bfloat16" and place == "shared" and cols % 32 == 0:
            offset = 2 * self._take(rows * cols // 2)
            bits = T.decl_buffer((rows, cols), "uint16", data=self.arena.data, elem_offset=offset, scope="local")
            tile = Bits(bits, rows, cols)
        else:
            tile = super().tile(rows, cols, place)
        if dtype == "bfloat16":
            self.exact.add(tile.buffer)
        return tile

    def state(self, index: Expr) -> State:
        """State of one of the worker's value heads."""
        tile = super().state(index)
        return State(tile.buffer, tile.rows, tile.cols, tile.panel, values=True, index=T.Cast("int32", index))

    def load(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """A state's operand is made of its rows on their way."""
        if not isinstance(dst, State) or src.v_first:
            super().load(dst, src, rows)
            if isinstance(dst, State):
                self.pack(self.operand(dst, "right"))
            return
        operand = self.operand(dst, "right")
        pair = local_array(2, ROWS)
        with T.serial(dst.rows // 2) as p:
            with T.serial(self.units(ROWS, dst)) as cb:
                for n in (0, 1):
                    with T.vectorized(ROWS) as lane:
                        T.buffer_store(pair, src.get(p * 2 + n, cb, ROWS, lane), [n, lane])
                    with T.vectorized(ROWS) as lane:
                        dst.put(pair[n, lane], p * 2 + n, cb, ROWS, lane)
                self._split_rows(operand, p * 2, pair[0, LANES], pair[1, LANES], [p // ROWS, cb, p % ROWS])

    def store(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """Rounded to bf16 by the instruction; TVM takes seven for it."""
        if dst.v_first or dst.buffer.dtype != "bfloat16" or src.cols % GRANULE:
            super().store(dst, src, rows)
            return
        with T.serial(src.rows if rows is None else rows) as i:
            with T.serial(self.units(GRANULE, dst, src)) as jo:
                pair = (src.buffer[tuple(src.at(i, jo * 2 + n, ROWS, LANES))] for n in (0, 1))
                address = T.address_of(dst.buffer[tuple(dst.at(i, jo, GRANULE))])
                T.evaluate(T.call_extern("int32", "tvm_gdn_put", address, *pair))

    def block(self, tile: Tile, row: Expr, col: Expr, rows: int, cols: int) -> Tile:
        """Part of a row-major tile."""
        return Block(tile.buffer, rows, cols, 0, tile.row + row, tile.col + col)

    def operand(self, tile: Tile, side: str, *, transpose: bool = False, scale: Tile | None = None, coarse: bool = False) -> Any:
        """Blocks of bf16 pairs; small blocks of a tile stay with the vector unit."""
        if isinstance(tile, Block):
            return super().operand(tile, side, transpose=transpose)
        # Two parts are plenty for an output in 16 bits.
        parts = min(self.parts, 2) if coarse and self.data != "float32" else self.parts
        parts = 1 if tile.buffer in self.exact else parts
        if isinstance(tile, State):
            return MatrixOperand(self.state_operands, tile, side, transpose, self.state_parts, scale, tile.index)
        if isinstance(tile, Bits) and side == "left" and not transpose:
            return MatrixOperand(tile.buffer, tile, side, transpose, 1)
        rows, cols = (tile.cols, tile.rows) if transpose else (tile.rows, tile.cols)
        blocks = (rows // 16, cols // 32) if side == "left" else (rows // 32, cols // 16)
        return MatrixOperand(self._blocks(parts, *blocks), tile, side, transpose, parts, scale)

    def pack(self, *operands: Any, rows: Expr | None = None, lower: bool = False) -> None:
        """Convert; transposed operands are made from a left one of the same tile that is packed with them."""
        if isinstance(operands[0], Operand):
            super().pack(*operands, rows=rows, lower=lower)
            return
        done: dict[tuple[str, bool], Any] = {}
        for operand in operands:
            made = done[operand.side, operand.transposed] = operand
            count = operand.source.rows if rows is None else rows
            if operand.native:
                continue
            if not operand.transposed:
                (self._left if operand.side == "left" else self._right)(made, count, lower)
            elif operand.side == "right":
                self._right_transposed(made, done["left", False], count)
            else:
                self._left_transposed(made, done["right", True], count)

    @staticmethod
    def _split(dst: MatrixOperand, format_: str, a: Any, b: Any, index: list[Any]) -> None:
        """Write two vectors as bf16 pairs, and what is left of them as further parts."""
        kept = local_array(2, ROWS)
        T.buffer_store(kept, a, [0, LANES])
        T.buffer_store(kept, b, [1, LANES])
        x, y = kept[0, LANES], kept[1, LANES]
        start = dst.first * dst.parts
        for part in range(dst.parts):
            more = part + 1 < dst.parts
            if more or part == 2:  # The last of three has no digits that bf16 lacks.
                words = helper("cut", x, y) if format_ == "pair" else helper(format_, upper(x), upper(y))
            else:
                words = helper(format_, x, y)
            T.buffer_store(dst.buffer, words, [start + part, *index, LANES])
            if more:
                T.buffer_store(kept, x - upper(x), [0, LANES])
                T.buffer_store(kept, y - upper(y), [1, LANES])

    def _left(self, dst: MatrixOperand, rows: Expr, lower: bool) -> None:
        src = dst.source
        row = lambda i, at: src.buffer[tuple(src.at(i, at, ROWS, LANES))]  # noqa: E731
        with T.serial(ceil_div(rows, ROWS)) as rb:
            with T.serial(rb // 2 + 1 if lower else src.cols // 32) as db:
                with T.serial(ROWS) as r:
                    self._split(dst, "join", row(rb * ROWS + r, db * 2), row(rb * ROWS + r, db * 2 + 1), [rb, db, r])

    def _right(self, dst: MatrixOperand, rows: Expr, lower: bool) -> None:
        del lower
        src = dst.source
        row = lambda i, at: src.buffer[tuple(src.at(i, at, ROWS, LANES))]  # noqa: E731
        with T.serial(ceil_div(rows, GRANULE)) as db:
            with T.serial(self.units(16, src)) as cb:
                with T.serial(ROWS) as p:
                    i = db * 32 + p * 2
                    self._split_rows(dst, i, row(i, cb), row(i + 1, cb), [db, cb, p])

    def _split_rows(self, dst: MatrixOperand, i: Expr, a: Any, b: Any, index: list[Any]) -> None:
        """Write rows i and i + 1 as pairs, multiplied by the operand's factors."""
        if dst.scale is not None:
            a, b = (x * T.broadcast(dst.scale.get(i + n, 0), ROWS) for n, x in enumerate((a, b)))
        self._split(dst, "pair", a, b, index)

    @staticmethod
    def _right_transposed(dst: MatrixOperand, left: MatrixOperand, rows: Expr) -> None:
        """Every block of a left operand, transposed as 32-bit elements, is one of a right operand."""
        with T.serial(ceil_div(rows, GRANULE) * 2) as rb:
            with T.serial(left.source.cols // 32) as db:
                for part in range(dst.parts):
                    transpose_16(
                        lambda r, part=part: left.words(part, rb, db, r),
                        lambda r, column, part=part: T.buffer_store(dst.buffer, column, [part, db, rb, r, LANES]),
                        "int32",
                    )

    @staticmethod
    def _left_transposed(dst: MatrixOperand, right: MatrixOperand, rows: Expr) -> None:
        """Rows of pairs of a transposed right operand, their halves put together."""
        with T.serial(dst.buffer.shape[1]) as kb:
            with T.serial(ceil_div(rows, GRANULE)) as tb:
                with T.serial(ROWS // 2) as p:
                    for part in range(dst.parts):
                        x, y = (right.buffer[part, kb // 2, tb * 2 + n, kb % 2 * 8 + p, LANES] for n in (0, 1))
                        T.buffer_store(dst.buffer, helper("even", x, y), [part, kb, tb, p * 2, LANES])
                        T.buffer_store(dst.buffer, helper("odd", x, y), [part, kb, tb, p * 2 + 1, LANES])
