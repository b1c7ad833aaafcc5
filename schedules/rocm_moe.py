"""The experts on AMD's matrix units: products of ``schedules/rocm_units.py``, operands through registers into local memory.

Weights are the left operand, so that a thread's numbers are neighbours in a row of the result. Stages are 32-bit words: TVM's
generator of machine code takes views of shared memory of another dtype for global memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import either
from tvm_gdn.schedules.gpu_fragments import BLOCK, ceil_div, when
from tvm_gdn.schedules.gpu_moe import ExpertsGpu
from tvm_gdn.schedules.gpu_moe_copies import SIZES, Expr, Ring, Rows
from tvm_gdn.schedules.gpu_moe_integers import NIBBLES, IntegerGridTiles
from tvm_gdn.schedules.gpu_moe_tiles import WORDS, ExpertGridTiles, Plan
from tvm_gdn.schedules.rocm_units import MFMA, ROW, SUFFIXES, WMMA, MatrixUnit

from tvm_gdn.packed_experts import STEP, ZERO
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Bits that make signed bytes of unsigned ones with 128 added.
SIGNS = 0x80808080


def _flat(buffer: Any, dtype: str) -> tuple[Any, Callable[[tuple[Expr, ...]], Expr]]:
    """A tensor's memory as numbers of another dtype, and where the element of an index begins in it."""
    strides = list(buffer.strides)
    if not strides:
        strides = [1]
        for extent in reversed(buffer.shape[1:]):
            strides.insert(0, strides[0] * extent)
    each = {"uint32": 4, "uint16": 2}[dtype] // SIZES[buffer.dtype]
    size = buffer.shape[0] * strides[0] // each
    view = T.decl_buffer((size,), dtype, data=buffer.data)
    return view, lambda index: sum(T.Cast("int64", i) * stride for i, stride in zip(index, strides, strict=True)) // each


class WordRing(Ring):
    """Two stages of words; what is asked for waits in registers while the step before it is multiplied."""

    def __init__(self, lane: Expr, threads: int, operands: tuple[Rows, ...]) -> None:
        self.lane, self.threads, self.stages, self.operands = lane, threads, 2, operands
        self.stage = sum(rows.size for rows in operands)
        self.memory = T.alloc_buffer((self.stage * self.stages // 4,), "uint32", scope="shared.dyn")
        self.pieces = [rows.count * rows.length * SIZES[rows.buffer.dtype] // 16 for rows in operands]
        self.registers = [T.alloc_buffer((4 * ceil_div(pieces, threads),), "uint32", scope="local") for pieces in self.pieces]

    def at(self, number: int, slot: Expr) -> tuple[Any, Expr]:
        """The memory, and the first word of an operand in a stage."""
        before = sum(rows.size for rows in self.operands[:number])
        return self.memory, before // 4 + slot * (self.stage // 4)

    def stride(self, number: int) -> int:
        """Words from one row of an operand to the next."""
        rows = self.operands[number]
        return rows.stride * SIZES[rows.buffer.dtype] // 4

    def number(self, operand: int, slot: Expr, place: Expr) -> Expr:
        """Element of an operand in a stage, in fp32."""
        (memory, base), dtype = self.at(operand, slot), self.operands[operand].buffer.dtype
        if dtype == "float32":
            return T.reinterpret("float32", memory[base + place])
        bits = T.bitwise_and(T.shift_right(memory[base + place // 2], T.Cast("uint32", place % 2 * 16)), T.uint32(0xFFFF))
        if dtype == "bfloat16":
            return T.reinterpret("float32", T.shift_left(bits, T.uint32(16)))
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))

    def word(self, operand: int, slot: Expr, place: Expr) -> Expr:
        """The same of an operand of words, as it is."""
        memory, base = self.at(operand, slot)
        return T.reinterpret("int32", memory[base + place])

    def ask(self, step: Expr) -> None:
        """Ask for the operands of a step, weights first; those that begin anywhere are read when they are put down."""
        for number in (1, 0):
            aligned = self.operands[number].aligned
            if aligned is not False:
                when(aligned, lambda number=number: self._ask(number, step))

    def _ask(self, number: int, step: Expr) -> None:
        rows, registers = self.operands[number], self.registers[number]
        words, begin = _flat(rows.buffer, "uint32")
        first = T.Bind(T.Cast("int32", step) * rows.length)

        def piece(turn: int, i: Expr, k: Expr) -> None:
            there, at = rows.there(i), first + k
            if rows.limit % rows.length:
                there, at = T.And(there, at < rows.limit), T.Select(at < rows.limit, at, 0)
            place = T.Bind(begin(rows.index(i, at, turn)))
            with T.vectorized(4) as word:
                T.buffer_store(registers, words[place + word], [turn * 4 + word])
            if there is not True:
                with T.If(T.Not(there)), T.Then():
                    for word in range(4):
                        T.buffer_store(registers, T.uint32(0), [turn * 4 + word])

        self._each(number, piece)

    def put(self, step: Expr, slot: Expr) -> None:
        """Write the operands of a step to its stage."""
        for number in (1, 0):
            either(self.operands[number].aligned, lambda aligned, number=number: self._put(number, step, slot, aligned))

    def _put(self, number: int, step: Expr, slot: Expr, aligned: Any) -> None:
        rows, registers, base = self.operands[number], self.registers[number], self.at(number, slot)[1]
        if not aligned:
            self._scattered(rows, base, T.Bind(T.Cast("int32", step) * rows.length))
            return

        def piece(turn: int, i: Expr, k: Expr) -> None:
            # No name for the place: the generator tells LLVM how it is aligned where it sees it.
            place = base + rows.place(i, k) // (4 // SIZES[rows.buffer.dtype])
            with T.vectorized(4) as word:
                T.buffer_store(self.memory, registers[turn * 4 + word], [place + word])

        self._each(number, piece)

    def _each(self, number: int, body: Callable[[int, Expr, Expr], None]) -> None:
        """Call ``body(turn, i, k)`` for this thread's pieces of 16 bytes: row, and first element."""
        rows, pieces = self.operands[number], self.pieces[number]
        lanes = 16 // SIZES[rows.buffer.dtype]
        across = rows.length // lanes
        for turn in range(ceil_div(pieces, self.threads)):
            index = T.Bind(T.Cast("int32", self.lane) + turn * self.threads)
            inside: Any = True if (turn + 1) * self.threads <= pieces else index < pieces
            when(inside, lambda turn=turn, index=index: body(turn, index // across, index % across * lanes))

    def _scattered(self, rows: Rows, base: Expr, first: Expr) -> None:
        """Element by element, a word at a time."""
        size = SIZES[rows.buffer.dtype]
        per = 4 // size
        numbers, begin = _flat(rows.buffer, f"uint{8 * size}")
        across, total = rows.length // per, rows.count * rows.length // per
        with T.serial(ceil_div(total, self.threads)) as turn:
            index = T.Bind(T.Cast("int32", turn * self.threads + self.lane))
            i, k = index // across, index % across * per

            def word() -> None:
                bits: Expr = T.uint32(0)
                for n in range(per):
                    inside = T.And(rows.there(i), first + k + n < rows.limit)
                    number = T.Cast("uint32", numbers[begin(rows.index(i, first + k + n, None))])
                    part = T.if_then_else(inside, number, T.uint32(0))
                    bits = T.bitwise_or(bits, T.shift_left(part, T.uint32(8 * size * n))) if n else part
                T.buffer_store(self.memory, bits, [base + rows.place(i, k) // per])

            when(True if total % self.threads == 0 else index < total, word)

    def run(
        self, steps: int, compute: Callable[[Expr, Expr], None], *, publish: Callable[[], None] | None = None,
        finish: Callable[[int], None] | None = None, lag: int = 0, follow: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Call ``compute(step, slot)`` for every step."""
        del publish, finish, lag, follow
        self.ask(0)
        self.put(0, 0)
        with T.serial(steps) as step:
            T.evaluate(T.tvm_storage_sync("shared"))
            number, more = T.Cast("int32", step), step + 1 < steps
            slot = T.Bind(number % 2)
            with T.If(more), T.Then():
                self.ask(number + 1)
            compute(number, slot)
            # The barrier also says that all threads are done with the stage that is filled now.
            with T.If(more), T.Then():
                self.put(number + 1, 1 - slot)


class UnitTiles(ExpertGridTiles):
    """Products on a matrix unit; other parameters as `ExpertGridTiles` has them."""

    sorters = 256

    def __init__(self, matrix: MatrixUnit, bytes_suffix: str, geometry: Geometry, plans: tuple[Plan, ...], rows: str) -> None:
        super().__init__(geometry, plans, rows)
        self.matrix, self.held, self.beside = matrix, matrix.held, matrix.held
        self.suffix = bytes_suffix if self.quantized else SUFFIXES.get(self.data, "")

    def _ring(self, plan: Plan, left: Rows, right: Rows) -> WordRing:
        return WordRing(self.lane, plan.threads, (left, right))

    def _where(self, row: Expr, column: Expr) -> list[tuple[Expr, Expr]]:
        lane = self.matrix.lane(self.lane)
        first = column * BLOCK + lane // BLOCK * self.held
        return [(row * BLOCK + lane % BLOCK, first + e) for e in range(self.held)]

    def _slices(self, plan: Plan, ring: WordRing, slot: Expr, sums: Any, row: Expr, column: Expr, first: int, count: int) -> None:
        (tall, wide, _, _), held, words = plan.grid, self.held, self.matrix.words
        lane = T.Bind(self.matrix.lane(self.lane))
        across, deep = lane % BLOCK, self.matrix.word(lane)
        left = T.alloc_buffer((tall * words,), "uint32", scope="local")
        right = T.alloc_buffer((words,), "uint32", scope="local")
        memory, base = ring.at(0, slot)
        for kk in range(first, first + count):
            for a in range(tall):
                place = T.Bind(base + ((row + a) * BLOCK + across) * ring.stride(0) + kk * ROW + deep)
                for w in range(words):
                    T.buffer_store(left, memory[place + w], [a * words + w])
            for b in range(wide):
                for half in range(2):
                    for w, word in enumerate(self._weights(plan, ring, slot, half, column + b, kk, lane)):
                        T.buffer_store(right, word, [w])
                    for a in range(tall):
                        at = ((a * wide + b) * 2 + half) * held
                        made = self.matrix.product(
                            self.suffix, [right[w] for w in range(words)], [left[a * words + w] for w in range(words)],
                            [sums[at + e] for e in range(held)],
                        )  # fmt: skip
                        for e in range(held):
                            T.buffer_store(sums, made[e], [at + e])

    def _weights(self, plan: Plan, ring: WordRing, slot: Expr, half: int, column: Expr, kk: int, lane: Expr) -> list[Expr]:
        """A thread's words of 16 columns of a half, from ``16 column`` on, in slice kk."""
        memory, base = ring.at(1, slot)
        own, deep, words = self.matrix.gathered(lane % BLOCK), self.matrix.word(lane), range(self.matrix.words)
        if not self.scheme:
            row = half * plan.columns + column * BLOCK + own
            place = T.Bind(base + row * ring.stride(1) + kk * ROW + deep)
            return [memory[place + w] for w in words]
        # A line of 16 words has a word of each column; a nibble of either half where bytes have two.
        lines = BLOCK * (1 if STEP[self.scheme] == STEP["int4"] else 2)
        slices = 2 * BLOCK // ROW if lines == BLOCK else BLOCK // ROW
        line = (half * BLOCK if lines > BLOCK else 0) + kk % slices * ROW + deep
        place = T.Bind(base + column * ring.stride(1) + kk // slices * WORDS + line * BLOCK + own)
        found = [memory[place + w * BLOCK] for w in words]
        if self.scheme == "int8":
            return [T.bitwise_xor(word, T.uint32(SIGNS)) for word in found]
        if self.quantized:
            return [T.bitwise_and(T.shift_right(word, T.uint32(4 * half)), T.uint32(NIBBLES)) for word in found]
        return found


class UnitIntegerTiles(UnitTiles, IntegerGridTiles):
    """Products of bytes; of int8 packs both operands are signed, so that nothing is to be taken off again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.scheme == "int8":
            self.zero = 0


class ExpertsUnit(ExpertsGpu):
    """Tiles of 16 rows that stream weights, and of 64 that multiply; two stages, 64 KiB of local memory, at most 256 threads."""

    shared = 64 * 1024
    matrix = MFMA
    #: End of the name of the unit's product of bytes.
    bytes_suffix = "_bytes"

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per expert where the plans meet; columns of both; rows of the second; dtype of rows to be summed."""
        found = {"most": (2, 5, 10, 16, 24), "few_columns": (32, 64), "rows": (32, 64), "columns": (32, 64)}
        return {**found, "partial": cls._partial(geometry)}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Two blocks to a compute unit, of both plans."""
        return {"most": 10, "few_columns": 32, "rows": 64, "columns": 64, "partial": cls._partial(geometry)[0]}

    @classmethod
    def plans(cls, geometry: Geometry, **knobs: Any) -> tuple[Plan, ...]:
        """The plans that knobs stand for."""
        quantized = geometry.attr.get("scheme") in ZERO
        shape = {"wave": cls.matrix.wave, "fragment": BLOCK}
        few, many = knobs["few_columns"], 256 // cls.matrix.wave
        return (
            Plan(16, few, 128 if quantized else 64, 2, few // BLOCK, knobs["most"], **shape),
            Plan(knobs["rows"], knobs["columns"], 128 if quantized else 32, 2, many, **shape),
        )

    @classmethod
    def kind(cls, geometry: Geometry) -> Callable[..., ExpertGridTiles]:
        """Tile operations by what is multiplied."""
        kind = UnitIntegerTiles if geometry.attr.get("scheme") in ZERO else UnitTiles
        return partial(kind, cls.matrix, cls.bytes_suffix)


@schedule("moe_experts", "rocm-gfx942")
class ExpertsMfma(ExpertsUnit):
    """On MFMA."""


@schedule("moe_experts", "rocm-gfx90a")
class ExpertsShortMfma(ExpertsUnit):
    """The same; a product of bytes is two instructions of half the depth."""

    bytes_suffix = "_bytes_short"


@schedule("moe_experts", "rocm-gfx1100")
class ExpertsWmma(ExpertsUnit):
    """On WMMA."""

    matrix = WMMA
