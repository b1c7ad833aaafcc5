"""Tile operations of the experts on CPUs: packed weight lines, register-blocked products.

Packed weights are 32-bit words (see `tvm_gdn/packed_experts.py`): a *line* is 16 words, one for each of 16 columns; a word holds
1, 2, 4 or 8 consecutive elements along the reduction axis, by scheme. A *step* is 32 lines for 32 columns. One micro-kernel
serves every scheme: `rows` x 32 accumulators, one line times the broadcast words of the rows at a time.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array
from tvm_gdn.schedules.x86_products import IR, dpbf16

LANES = 16
#: Elements between rows of staged activations beyond the row itself: rows a power of two apart would share a cache set.
PAD_BYTES = 64


class Fma:
    """Products in fp32 by fused multiply-add, of weights that a scheme widens in registers."""

    prelude = ""
    operand, sum = "float32", "float32"

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.k_step = {"fp32": 16, "fp16": 32, "bf16": 32}[scheme]
        self.per = self.k_step // LANES

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """Accumulator plus the products of a line with one row's elements from k on."""
        a = [T.broadcast(A[row, k + i], LANES) for i in range(self.per)]
        if self.scheme == "fp32":
            return acc + a[0] * T.reinterpret("float32x16", line)
        if self.scheme == "bf16":
            even = T.reinterpret("float32x16", T.shift_left(line, T.broadcast(16, LANES)))
            odd = T.reinterpret("float32x16", T.bitwise_and(line, T.broadcast(-65536, LANES)))
        else:
            half = T.Cast("uint16x16", T.bitwise_and(line, T.broadcast(0xFFFF, LANES)))
            even = T.Cast("float32x16", T.reinterpret("float16x16", half))
            half = T.Cast("uint16x16", T.shift_right(T.reinterpret("uint32x16", line), T.broadcast(T.uint32(16), LANES)))
            odd = T.Cast("float32x16", T.reinterpret("float16x16", half))
        return acc + a[0] * even + a[1] * odd


class DotBf16:
    """Products of bf16 pairs summed in fp32 by vdpbf16ps."""

    prelude = IR
    operand, sum, matrix = "bfloat16", "float32", "bf16ps"
    k_step, per = 32, 2

    def dot(self, acc: Any, A: Any, row: Any, k: Any, line: Any) -> Any:
        """Accumulator plus the products of a line with one row's pair at k."""
        return dpbf16(acc, T.broadcast(A[row, k // 2], LANES), line)


class ExpertTiles(CpuTiles):
    """Tile operations of one geometry.

    Parameters
    ----------
    dot : object
        How a line of weights is multiplied.
    block : int
        Rows of one expert that are staged together.
    pieces : int
        Pieces of equal cost that the gate-up products are cut into.
    columns : int
        Output columns of one piece of the down products, a multiple of 32.
    rows : int
        Most rows of the micro-kernel.
    """

    def __init__(self, dot: Any, *, block: int, pieces: int, columns: int, rows: int) -> None:
        self.dot, self.block, self.pieces, self.columns = dot, block, pieces, columns
        self.operand, self.prelude, self.k_step = dot.operand, dot.prelude, dot.k_step
        self.heights = tuple(2**i for i in range(rows.bit_length()))
        self.floor = 6
        self.product = self._product()

    def begin(self) -> None:
        """What a worker does before its first product."""

    def end(self) -> None:
        """What a worker does after its last product."""

    def rows(self, count: Any, columns: int) -> Any:
        """Staged rows of the products' left operand, each padded."""
        pad = PAD_BYTES // {"float32": 4, "bfloat16": 2, "int8": 1}[self.operand]
        return T.alloc_buffer((count, columns + pad), self.operand)

    def words(self, A: Any) -> Any:
        """Staged rows as what the micro-kernel broadcasts: fp32 numbers, or words of several elements."""
        if self.operand == "float32":
            return A
        return T.decl_buffer((A.shape[0], A.shape[1] // self.dot.per), "int32", data=A.data)

    def _product(self) -> Any:
        """sink(C, r, m): rows r to r + m of A W^T for the 32 columns of group n, for all rows."""
        dot, heights, k_step = self.dot, self.heights, self.k_step
        top = heights[-1]

        @T.inline
        def micro(C, A, first, W, e, n, steps, height):
            acc = local_array(height, 2 * LANES, dtype=dot.sum)
            for r in T.unroll(height):
                for c in T.unroll(2):
                    acc[r, T.ramp(c * LANES, 1, LANES)] = T.broadcast(T.Cast(dot.sum, 0), LANES)
            for s in T.serial(steps):
                for line in T.serial(LANES):
                    for r in T.unroll(height):
                        for c in T.unroll(2):
                            acc[r, T.ramp(c * LANES, 1, LANES)] = dot.dot(
                                acc[r, T.ramp(c * LANES, 1, LANES)],
                                A,
                                first + r,
                                s * k_step + line * dot.per,
                                W[e, n, s, T.ramp((c * LANES + line) * LANES, 1, LANES)],
                            )
            for r in T.unroll(height):
                for c in T.unroll(2):
                    C[r, T.ramp(c * LANES, 1, LANES)] = acc[r, T.ramp(c * LANES, 1, LANES)]

        def shortest(height):
            """The micro-kernel of the least height that holds the rows left."""
            if height == 1:
                below = None
            else:
                below = shortest(height // 2)

            @T.inline
            def choose(C, A, first, left, W, e, n, steps):
                if below is None:
                    micro(C, A, first, W, e, n, steps, height)
                else:
                    if left > height // 2:
                        micro(C, A, first, W, e, n, steps, height)
                    else:
                        below(C, A, first, left, W, e, n, steps)

            return choose

        tallest = shortest(top)

        @T.inline
        def product(A, first, m, W, e, n, steps, sink):
            words = self.words(A)
            C = local_array(top, 2 * LANES, dtype=dot.sum)
            for b in T.serial((m + top - 1) // top):
                left = T.min(m - b * top, top)
                tallest(C, words, first + b * top, left, W, e, n, steps)
                sink(C, b * top, left)

        return product
