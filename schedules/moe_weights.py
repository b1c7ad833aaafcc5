"""How lines of expert weights are multiplied: one class per kind of arithmetic.

Packed weights are 32-bit words (`tvm_gdn/packed_experts.py` states the layout): a *line* is 16 words, one for each of 16 columns;
a word holds `per` elements that follow one another on the reduction axis. A *step* holds `k_step` elements of 32 columns. Int4
words hold one element of either half of the 32 columns per byte.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.x86_products import BYTES, IR, dpbf16, dpbusd, helper

LANES = 16


def _all(value: Any) -> Any:
    return T.broadcast(value, LANES)


class Float:
    """Products in fp32 by multiply-add; bf16 and fp16 weights are widened in registers."""

    quantized, prelude, operand, sum, matrix = False, "", "float32", "float32", ""
    #: Lines whose products are summed in words of their own, before `fold` adds them to the accumulators; 0: none.
    zero = folds = 0

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.k_step = {"fp32": 16, "fp16": 32, "bf16": 32}[scheme]
        self.per, self.lines = self.k_step // LANES, LANES

    def line(self, W: Any, e: Any, n: Any, s: Any, line: Any, half: int) -> Any:
        """A line of one half of the 32 columns."""
        return W[e, n, s, T.ramp((half * LANES + line) * LANES, 1, LANES)]

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """Accumulator plus the products of a line with one row's elements from k on."""
        a = [_all(A[row, k + i]) for i in range(self.per)]
        if self.scheme == "fp32":
            return acc + a[0] * T.reinterpret("float32x16", line)
        if self.scheme == "bf16":
            even = T.reinterpret("float32x16", T.shift_left(line, _all(16)))
            odd = T.reinterpret("float32x16", T.bitwise_and(line, _all(-65536)))
        else:
            low = T.Cast("uint16x16", T.bitwise_and(line, _all(0xFFFF)))
            high = T.Cast("uint16x16", T.shift_right(T.reinterpret("uint32x16", line), _all(T.uint32(16))))
            even, odd = (T.Cast("float32x16", T.reinterpret("float16x16", half)) for half in (low, high))
        return acc + a[0] * even + a[1] * odd

    #: Elements of a raw row that `dot_row` takes at once.
    run = LANES

    def dot_row(self, acc: Any, A: Any, row: Any, W: Any, e: Any, column: Any, k: Any) -> Any:
        """Accumulator plus the products of `run` elements of a raw row of weights and of A, element by element."""
        return acc + A[row, T.ramp(k, 1, LANES)] * T.Cast("float32x16", W[e, column, T.ramp(k, 1, LANES)])


class DotBf16(Float):
    """bf16 pairs by vdpbf16ps, summed in fp32; AMX does the same with tiles."""

    prelude, operand, matrix, run = IR, "bfloat16", "bf16ps", 32

    def __init__(self) -> None:
        super().__init__("bf16")

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """As `Float.dot`, on words of A."""
        return dpbf16(acc, _all(A[row, k // 2]), line)

    def dot_row(self, acc: Any, A: Any, row: Any, W: Any, e: Any, column: Any, k: Any) -> Any:
        """As `Float.dot_row`, on words of A and W."""
        return dpbf16(acc, A[row, T.ramp(k // 2, 1, LANES)], W[e, column, T.ramp(k // 2, 1, LANES)])


class Int8:
    """Bytes, weights unsigned (stored with 128 added), rows signed, summed in int32: exact, whatever adds them up.

    `zero` times a row's sum is what the 128 adds to every product with it. `dots`: instructions for it, ``"vnni"``, ``"avx2"``
    (products of pairs of 16-bit numbers: those of bytes would saturate) or none.
    """

    quantized, operand, sum, matrix = True, "int8", "int32", "bsud"
    zero, k_step, per, lines, folds = 128, 64, 4, LANES, 0

    def __init__(self, dots: str = "") -> None:
        self.dots = dots
        self.prelude = BYTES if dots == "avx2" else ""

    line = Float.line

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """Accumulator plus the products of a line with one row's word at k."""
        word = A[row, k // 4]
        if self.dots == "vnni":
            return dpbusd(acc, line, _all(word))
        if self.dots == "avx2":
            return helper("dot_pairs", acc, line, _all(word))
        for i in range(4):
            signed = T.shift_right(T.shift_left(word, T.int32(24 - 8 * i)), T.int32(24))
            acc = acc + T.bitwise_and(T.shift_right(line, _all(8 * i)), _all(255)) * _all(signed)
        return acc


class Int4(Int8):
    """Nibbles, stored with 8 added; a word's low nibbles belong to the first 16 columns, its high ones to the others.

    The matrix unit takes them as signed bytes, which they become when they are widened. In AVX2 products of bytes are summed as
    16-bit pairs, which hold those of 8 lines: 16 * 15 * 128 < 2^15.
    """

    zero, k_step, lines, matrix = 8, 128, 32, "bssd"

    def __init__(self, dots: str = "") -> None:
        super().__init__(dots)
        self.folds = 8 if dots == "avx2" else 0

    def line(self, W: Any, e: Any, n: Any, s: Any, line: Any, half: int) -> Any:
        """A line of one half of the 32 columns, a nibble per byte."""
        return nibbles(W[e, n, s, T.ramp(line * LANES, 1, LANES)], half)

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """As of bytes; where they are folded, sums of 16-bit pairs."""
        if self.folds:
            return helper("dot_bytes", acc, line, _all(A[row, k // 4]))
        return super().dot(acc, A, row, k, line)

    def fold(self, acc: Any, sums: Any) -> Any:
        """Accumulator plus both numbers of every pair."""
        return helper("add_pairs", acc, sums, sums)


def nibbles(words: Any, half: int) -> Any:
    """Low or high nibbles of bytes, a byte each."""
    return T.bitwise_and(words if half == 0 else T.shift_right(words, _all(4)), _all(0x0F0F0F0F))


def signed_nibbles(words: Any, half: int) -> Any:
    """Low or high nibbles of bytes as signed bytes, without the 8 that was added to them."""
    return T.reinterpret("int32x16", T.reinterpret("int8x64", nibbles(words, half)) - T.broadcast(T.int8(8), 4 * LANES))
