"""Products of the experts on AMX: matrix tiles for many rows of an expert, dot products for few."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_moe import ExpertTiles
from tvm_gdn.schedules.moe_weights import LANES, nibbles
from tvm_gdn.schedules.x86_products import Amx


class AmxExpertTiles(ExpertTiles):
    """Experts with at most `few` rows run on the micro-kernel of `ExpertTiles`, others on AMX tiles.

    Parameters
    ----------
    few : int
        Most rows of an expert for the micro-kernel.
    depth : int
        Elements of the reduction axis, in AMX steps, between two visits of the accumulators: what of the weights stays in the
        L1 cache while the blocks of rows pass.
    """

    def __init__(self, weights: Any, *, few: int, depth: int, **options: Any) -> None:
        self.depth, self.amx = depth, Amx()
        super().__init__(weights, few=few, **options)

    def begin(self, steps: int) -> None:
        """Configure the tiles; memory for weights that have to be laid out anew."""
        super().begin(steps)
        self.amx.configure()
        if self.weights.lines == 2 * LANES:
            self.panel = T.alloc_buffer((1, 1, 2 * steps, 512), "int32")

    def end(self) -> None:
        """Give the tiles up."""
        self.amx.release()

    def _product(self) -> Any:
        few, many, limit = super()._product(), self._many(), self.few

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, sink):
            if m <= limit:
                few(A, sums, first, m, W, scale, e, n, steps, shift, sink)
            else:
                many(A, sums, first, m, W, scale, e, n, steps, sink)

        return product

    def _many(self) -> Any:
        """Blocks of 32 rows, two by two tiles; int4 weights are widened to bytes once for all rows."""
        amx, weights, block = self.amx, self.weights, self.block
        matrix, widen = weights.matrix, weights.lines == 2 * LANES
        depth, k_step = self.depth, weights.k_step // (2 if widen else 1)

        @T.inline
        def multiply(A, first, W, e, n, s0, steps, both):
            for s in T.serial(steps):
                amx.load(4, A[first, (s0 + s) * k_step], A.shape[1] * 64 // k_step)
                if both:
                    amx.load(5, A[first + 16, (s0 + s) * k_step], A.shape[1] * 64 // k_step)
                amx.load(6, W[e, n, s0 + s, 0], 64)
                amx.load(7, W[e, n, s0 + s, 256], 64)
                amx.multiply(matrix, 0, 4, 6)
                amx.multiply(matrix, 1, 4, 7)
                if both:
                    amx.multiply(matrix, 2, 5, 6)
                    amx.multiply(matrix, 3, 5, 7)

        @T.inline
        def rows(C, r0, A, first, W, e, n, s0, steps, both):
            if s0 == 0:
                for i in T.unroll(4 if both else 2):
                    amx.zero(i)
            else:
                for i in T.unroll(4 if both else 2):
                    amx.load(i, C[r0 + i // 2 * 16, i % 2 * LANES], 128)
            multiply(A, first + r0, W, e, n, s0, steps, both)
            for i in T.unroll(4 if both else 2):
                amx.store(i, C[r0 + i // 2 * 16, i % 2 * LANES], 128)

        @T.inline
        def blocks(C, A, first, m, W, e, n, steps):
            for d in T.serial((steps + depth - 1) // depth):
                for r in T.serial((m + 31) // 32):
                    if m - r * 32 > 16:
                        rows(C, r * 32, A, first, W, e, n, d * depth, T.min(depth, steps - d * depth), True)
                    else:
                        rows(C, r * 32, A, first, W, e, n, d * depth, T.min(depth, steps - d * depth), False)

        @T.inline
        def unpack(panel, W, e, n, steps):
            for s in T.serial(steps):
                for i in T.serial(2 * LANES):
                    panel[0, 0, s * 2 + i // LANES, T.ramp(i % LANES * LANES, 1, LANES)] = nibbles(
                        W[e, n, s, T.ramp(i * LANES, 1, LANES)], 0
                    )
                    panel[0, 0, s * 2 + i // LANES, T.ramp((LANES + i % LANES) * LANES, 1, LANES)] = nibbles(
                        W[e, n, s, T.ramp(i * LANES, 1, LANES)], 1
                    )

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, sink):
            C = local_array(block, 2 * LANES, dtype=weights.sum)
            if widen:
                unpack(self.panel, W, e, n, steps)
            for b in T.serial((m + block - 1) // block):
                left = T.min(m - b * block, block)
                if widen:
                    blocks(C, A, first + b * block, left, self.panel, 0, 0, 2 * steps)
                else:
                    blocks(C, A, first + b * block, left, W, e, n, steps)
                if weights.quantized:
                    Y = local_array(block, 2 * LANES)
                    for r in T.serial(left):
                        for c in T.unroll(2):
                            Y[r, T.ramp(c * LANES, 1, LANES)] = T.Cast(
                                "float32x16",
                                C[r, T.ramp(c * LANES, 1, LANES)] - T.broadcast(sums[first + b * block + r, 0], LANES),
                            ) * T.Cast("float32x16", scale[e, n, 0, T.ramp(c * LANES, 1, LANES)])
                    sink(Y, b * block, left)
                else:
                    sink(C, b * block, left)

        return product
