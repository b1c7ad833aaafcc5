"""Tile operations of the experts on AMX: matrix tiles for many rows of an expert, dot products for few."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_moe import LANES, PAD_BYTES, ExpertTiles
from tvm_gdn.schedules.x86_products import Amx

class AmxExpertTiles(ExpertTiles):
    """Experts with at most `few` rows run on the micro-kernel of `ExpertTiles`, others on AMX tiles.

    Parameters
    ----------
    few : int
        Most rows of an expert for the dot-product kernel.
    depth : int
        Steps of the reduction between two visits of the accumulators: what stays in the L1 cache of the weights.
    """

    def __init__(self, dot: Any, *, few: int, depth: int, **options: Any) -> None:
        self.few, self.depth, self.amx = few, depth, Amx()
        super().__init__(dot, **options)
        self.product = self._regimes(self.product, self._amx_product())

    def begin(self) -> None:
        self.amx.configure()

    def end(self) -> None:
        self.amx.release()

    def _regimes(self, few, many):
        limit = self.few

        @T.inline
        def product(A, first, m, W, e, n, steps, sink):
            if m <= limit:
                few(A, first, m, W, e, n, steps, sink)
            else:
                many(A, first, m, W, e, n, steps, sink)

        return product

    def _amx_product(self):
        amx, dot, block, k_step, depth = self.amx, self.dot, self.block, self.k_step, self.depth

        @T.inline
        def tiles_of(C, A, first, W, e, n, s0, steps, row, two):
            for s in T.serial(steps):
                amx.load(4, A[first + row, (s0 + s) * k_step], A.shape[1] * 64 // k_step)
                if two:
                    amx.load(5, A[first + row + 16, (s0 + s) * k_step], A.shape[1] * 64 // k_step)
                amx.load(6, W[e, n, s0 + s, 0], 64)
                amx.load(7, W[e, n, s0 + s, 256], 64)
                amx.multiply(dot.matrix, 0, 4, 6)
                amx.multiply(dot.matrix, 1, 4, 7)
                if two:
                    amx.multiply(dot.matrix, 2, 5, 6)
                    amx.multiply(dot.matrix, 3, 5, 7)

        @T.inline
        def rows(C, A, first, W, e, n, s0, steps, row, two):
            if s0 == 0:
                for i in T.unroll(4 if two else 2):
                    amx.zero(i)
            else:
                for i in T.unroll(4 if two else 2):
                    amx.load(i, C[row + i // 2 * 16, i % 2 * LANES], 128)
            tiles_of(C, A, first, W, e, n, s0, steps, row, two)
            for i in T.unroll(4 if two else 2):
                amx.store(i, C[row + i // 2 * 16, i % 2 * LANES], 128)

        @T.inline
        def product(A, first, m, W, e, n, steps, sink):
            C = local_array(block, 2 * LANES, dtype=dot.sum)
            for b in T.serial((m + block - 1) // block):
                for c in T.serial((steps + depth - 1) // depth):
                    for r in T.serial((T.min(m - b * block, block) + 31) // 32):
                        if m - b * block - r * 32 > 16:
                            rows(C, A, first + b * block, W, e, n, c * depth, T.min(depth, steps - c * depth), r * 32, True)
                        else:
                            rows(C, A, first + b * block, W, e, n, c * depth, T.min(depth, steps - c * depth), r * 32, False)
                sink(C, b * block, T.min(m - b * block, block))

        return product
