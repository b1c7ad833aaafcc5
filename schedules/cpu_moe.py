"""Tile operations of the experts on CPUs: staged rows, register-blocked products of packed or raw weights.

One micro-kernel serves every packed scheme: `rows` x 32 accumulators, one line of weights times a broadcast word of each row at a
time; 1, 2, 4 ... rows, so that a decode step does not pay for rows that are not there. Raw weights (rows contiguous along the
reduction axis) are multiplied vector by vector, and the vectors summed at the end.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array, sum_lanes
from tvm_gdn.schedules.moe_weights import LANES

#: Bytes between staged rows beyond the row itself: rows a power of two apart would share a set of the L1 cache.
PAD_BYTES = 64
#: Raw rows of weights that are multiplied at once.
RAW_ROWS = 4


class ExpertTiles(CpuTiles):
    """Tile operations of one geometry.

    Parameters
    ----------
    weights : object
        How weights are multiplied (`moe_weights`).
    raw : tuple of int, optional
        Of raw weights: rows of w13 and w2 per expert.
    block : int
        Rows of one expert that are staged together.
    pieces : int
        Pieces of equal cost that the gate-up products are cut into.
    columns : int
        Output columns of one piece of the down products, a multiple of 32.
    rows : int
        Most rows of the micro-kernel, a power of two.
    floor : int
        Reading weights takes as long as multiplying them with so many blocks of 16 rows.
    """

    def __init__(self, weights: Any, *, block: int, pieces: int, columns: int, rows: int, floor: int, raw: Any = None) -> None:
        self.weights, self.block, self.pieces, self.columns, self.floor = weights, block, pieces, columns, floor
        self.operand, self.prelude, self.k_step = weights.operand, weights.prelude, weights.k_step
        self.quantized, self.zero = weights.quantized, weights.zero
        self.pad = PAD_BYTES // {"float32": 4, "bfloat16": 2, "int8": 1}[self.operand]
        self.top = rows
        self.product = self._raw_product() if raw else self._product()

    def begin(self, steps: int) -> None:
        """What a worker does before its first product."""

    def end(self) -> None:
        """What a worker does after its last product."""

    def integers(self, count: int) -> Any:
        """int32 scratch."""
        return local_array(count, dtype="int32")

    def rows(self, count: Any, columns: int) -> Any:
        """Staged rows of the products' left operand, each padded."""
        return T.alloc_buffer((count, columns + self.pad), self.operand)

    def words(self, A: Any) -> Any:
        """Rows of elements as what is multiplied: fp32 numbers, or words of several elements."""
        if self.operand == "float32":
            return A
        *outer, last = A.shape
        return T.decl_buffer((*outer, last // self.weights.per), "int32", data=A.data, align=4)

    @staticmethod
    def to_int8(x: Any) -> Any:
        """Nearest integer of [-127, 127]; of NaN any."""
        return T.Cast("int8", T.nearbyint(T.max(T.min(x, T.float32(127)), T.float32(-127))))

    def _blocks(self, micro: Any) -> Any:
        """Macro that gives rows to the micro-kernel of the least height that holds them."""

        def shortest(height: int) -> Any:
            below = shortest(height // 2) if height > 1 else None

            @T.inline
            def choose(left, args):
                if below is None:
                    micro(height, *args)
                else:
                    if left > height // 2:
                        micro(height, *args)
                    else:
                        below(left, args)

            return choose

        return shortest(self.top)

    def _micro(self) -> Any:
        """C[r, :] = rows first + r of A times the 32 columns of group n, r < height."""
        weights, k_step = self.weights, self.weights.k_step
        lines, per, quantized = weights.lines, weights.per, weights.quantized
        groups = weights.groups if quantized else 1

        @T.inline
        def clear(acc, height):
            for r in T.unroll(height):
                for c in T.unroll(2):
                    acc[r, T.ramp(c * LANES, 1, LANES)] = T.broadcast(T.Cast(acc.dtype, 0), LANES)

        @T.inline
        def run(acc, A, first, W, e, n, s, line0, count, height):
            for i in T.serial(count):
                w = local_array(2, LANES, dtype="int32")
                w[0, T.ramp(0, 1, LANES)] = weights.line(W, e, n, s, line0 + i, 0)
                w[1, T.ramp(0, 1, LANES)] = weights.line(W, e, n, s, line0 + i, 1)
                for r in T.unroll(height):
                    for c in T.unroll(2):
                        acc[r, T.ramp(c * LANES, 1, LANES)] = weights.dot(
                            acc[r, T.ramp(c * LANES, 1, LANES)],
                            A,
                            first + r,
                            s * k_step + (line0 + i) * per,
                            w[c, T.ramp(0, 1, LANES)],
                        )

        @T.inline
        def micro(height, C, A, sums, first, W, scale, e, n, steps):
            acc = local_array(height, 2 * LANES, dtype=weights.sum)
            clear(acc, height)
            if groups == 1:
                for s in T.serial(steps):
                    run(acc, A, first, W, e, n, s, 0, lines, height)
                for r in T.unroll(height):
                    for c in T.unroll(2):
                        if quantized:
                            C[r, T.ramp(c * LANES, 1, LANES)] = T.Cast(
                                "float32x16",
                                acc[r, T.ramp(c * LANES, 1, LANES)] - T.broadcast(sums[first + r, 0], LANES),
                            ) * T.Cast("float32x16", scale[e, n, 0, T.ramp(c * LANES, 1, LANES)])
                        else:
                            C[r, T.ramp(c * LANES, 1, LANES)] = acc[r, T.ramp(c * LANES, 1, LANES)]
            else:
                scaled = local_array(height, 2 * LANES)
                clear(scaled, height)
                for s in T.serial(steps):
                    for g in T.serial(groups // steps):
                        run(acc, A, first, W, e, n, s, g * (lines * steps // groups), lines * steps // groups, height)
                        for r in T.unroll(height):
                            for c in T.unroll(2):
                                scaled[r, T.ramp(c * LANES, 1, LANES)] = scaled[
                                    r, T.ramp(c * LANES, 1, LANES)
                                ] + T.Cast(
                                    "float32x16",
                                    acc[r, T.ramp(c * LANES, 1, LANES)]
                                    - T.broadcast(sums[first + r, s * (groups // steps) + g], LANES),
                                ) * T.Cast(
                                    "float32x16", scale[e, n, s * (groups // steps) + g, T.ramp(c * LANES, 1, LANES)]
                                )
                        clear(acc, height)
                for r in T.unroll(height):
                    for c in T.unroll(2):
                        C[r, T.ramp(c * LANES, 1, LANES)] = scaled[r, T.ramp(c * LANES, 1, LANES)]

        return micro

    def _product(self) -> Any:
        top, choose = self.top, self._blocks(self._micro())

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, sink):
            words = self.words(A)
            C = local_array(top, 2 * LANES)
            for b in T.serial((m + top - 1) // top):
                choose(T.min(m - b * top, top), (C, words, sums, first + b * top, W, scale, e, n, steps))
                sink(C, b * top, T.min(m - b * top, top))

        return product
