"""The matrix unit of x86 (AMX): eight tile registers, their products, and the same as plain loops for CPUs without it.

A register is `ROWS` rows of 16 32-bit *words*: fp32 or int32 sums in registers 0 to 3, words of several elements in 4 and 5 (left
operands) and in 6 and 7 (right operands, whose row k holds elements k * n to k * n + n of the reduction axis of 16 columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array

#: Index of a row's first word.
Rows = Callable[[Any], list[Any]]
#: Rows of a tile register, and words of each.
ROWS = 16
LANES = T.ramp(0, 1, ROWS)


class MatrixUnit:
    """The instructions of AMX."""

    def enter(self, depth: int = ROWS, sums: str = "float32", used: Sequence[int] = range(8)) -> None:
        """Configure the thread's registers (palette 1).

        Parameters
        ----------
        depth : int
            Words of the reduction axis that a product takes: columns of left operands, rows of right ones.
        sums : str
            Dtype of the sums.
        used : sequence of int
            Registers; what the others would hold in the core is left to instructions that run at once.
        """
        del sums
        left, right = (4, 5), (6, 7)
        values = {0: 1}
        for n in used:
            values[16 + 2 * n] = 4 * depth if n in left else 4 * ROWS
            values[48 + n] = depth if n in right else ROWS
        config = local_array(64, dtype="uint8")
        for at in range(64):
            T.buffer_store(config, T.uint8(values.get(at, 0)), [at])
        self._emit("ldtilecfg", T.address_of(config[0]))

    def leave(self) -> None:
        """Let the system forget the registers."""
        self._emit("tilerelease")

    def clear(self, n: int) -> None:
        """Register n = 0."""
        self._emit("tilezero", T.uint8(n))

    def load(self, n: int, buffer: Any, row: Rows, stride: int) -> None:
        """Register n from memory; `row(r)` is the index of the first word of row r, rows are `stride` words apart."""
        self._emit("tileloadd64", T.uint8(n), T.address_of(buffer[tuple(row(0))]), T.int64(4 * stride))

    def store(self, n: int, buffer: Any, row: Rows, stride: int) -> None:
        """Register n to memory."""
        self._emit("tilestored64", T.uint8(n), T.address_of(buffer[tuple(row(0))]), T.int64(4 * stride))

    def dot(self, c: int, a: int, b: int, kind: str = "bf16ps") -> None:
        """Register c += a b on pairs of bf16, or on four bytes: kind ``bssd`` both signed, ``bsud`` the right ones unsigned."""
        self._emit(f"tdp{kind}", T.uint8(c), T.uint8(a), T.uint8(b))

    @staticmethod
    def _emit(name: str, *arguments: Any) -> None:
        T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


class EmulatedMatrixUnit(MatrixUnit):
    """The same as loops over arrays, for CPUs without AMX: to test what is computed, not how fast."""

    def enter(self, depth: int = ROWS, sums: str = "float32", used: Sequence[int] = range(8)) -> None:
        """Registers of sums, and of operands."""
        self.used = frozenset(used)
        self.depth, self.zero = depth, T.Cast(sums, 0)
        self.sums = local_array(4, ROWS, ROWS, dtype=sums)
        self.words = local_array(8, ROWS, ROWS, dtype="int32")

    def leave(self) -> None:
        """Nothing to give back."""

    def _expect(self, *registers: int) -> None:
        """One that is not configured is an illegal instruction on the unit."""
        if not self.used.issuperset(registers):
            raise ValueError(f"registers {registers} are not all among those configured, {sorted(self.used)}")

    def clear(self, n: int) -> None:
        """Register n = 0."""
        self._expect(n)
        with T.serial(ROWS) as r:
            T.buffer_store(self.sums, T.broadcast(self.zero, ROWS), [n, r, LANES])

    def load(self, n: int, buffer: Any, row: Rows, stride: int) -> None:
        """Register n from memory."""
        del stride
        self._expect(n)
        width = self.depth if n in (4, 5) else ROWS
        with T.serial(self.depth if n in (6, 7) else ROWS) as r:
            *outer, lane = row(r)
            value = buffer[(*outer, T.ramp(lane, 1, width))]
            T.buffer_store(self.sums if n < 4 else self.words, value, [n, r, T.ramp(0, 1, width)])

    def store(self, n: int, buffer: Any, row: Rows, stride: int) -> None:
        """Register n to memory."""
        del stride
        self._expect(n)
        with T.serial(ROWS) as r:
            *outer, lane = row(r)
            T.buffer_store(buffer, self.sums[n, r, LANES], [*outer, T.ramp(lane, 1, ROWS)])

    def dot(self, c: int, a: int, b: int, kind: str = "bf16ps") -> None:
        """Register c += a b, word by word of the reduction axis."""
        self._expect(c, a, b)
        with T.serial(ROWS) as r:
            with T.serial(self.depth) as k:
                left, right = T.broadcast(self.words[a, r, k], ROWS), self.words[b, k, LANES]
                total = self.sums[c, r, LANES]
                if kind == "bf16ps":
                    total = total + low_part(left) * low_part(right) + high_part(left) * high_part(right)
                else:
                    for i in range(4):
                        total = total + byte(left, i, signed=True) * byte(right, i, signed=kind == "bssd")
                T.buffer_store(self.sums, total, [c, r, LANES])


def high_part(pairs: Any) -> Any:
    """The upper bf16 of every pair in fp32."""
    return T.reinterpret("float32x16", T.bitwise_and(pairs, T.broadcast(T.int32(-65536), ROWS)))


def low_part(pairs: Any) -> Any:
    """The lower bf16 of every pair in fp32."""
    return T.reinterpret("float32x16", T.shift_left(pairs, T.broadcast(T.int32(16), ROWS)))


def byte(words: Any, i: int, *, signed: bool) -> Any:
    """Byte i of every word as int32."""
    moved = T.shift_left(words, T.broadcast(T.int32(24 - 8 * i), ROWS))
    if signed:
        return T.shift_right(moved, T.broadcast(T.int32(24), ROWS))
    return T.bitwise_and(T.shift_right(words, T.broadcast(T.int32(8 * i), ROWS)), T.broadcast(T.int32(255), ROWS))
