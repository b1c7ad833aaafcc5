"""Tile operations of the experts on Hopper: products of four warps together (wgmma), both operands in shared memory.

Tiles are rows of 128 bytes, 16-byte pieces of which change places by the row's number (the "128-byte swizzle"), as the matrix
unit reads them. The next stage is asked for while it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import WARP, when
from tvm_gdn.schedules.gpu_moe_copies import Expr, Ring
from tvm_gdn.schedules.gpu_moe_tiles import ExpertGridTiles, Plan

#: Instruction by dtype of both operands.
WGMMA = {"bfloat16": "tvm_gdn_wgmma_bf16", "float16": "tvm_gdn_wgmma_f16"}


class GroupGridTiles(ExpertGridTiles):
    """Tile operations of one geometry of raw 16-bit weights; parameters as `ExpertGridTiles` has them."""

    def product(
        self, plan: Plan, A: Any, row_of: Callable[[Expr], Expr], m: Expr, W: Any, e: Expr, n: Expr, shift: int,
        sink: Callable[..., None], *, follow: bool = False,
    ) -> None:  # fmt: skip
        """Rows of A times columns of W[e], to the sink."""
        if not plan.grouped:
            super().product(plan, A, row_of, m, W, e, n, shift, sink, follow=follow)
            return
        left, right = (
            replace(rows, stride=plan.depth, swizzled=True)
            for rows in (self._left(plan, A, row_of, m), self._right(plan, W, e, n, shift))
        )
        ring = Ring(self.lane, plan.threads, plan.stages, (left, right), align=1024)
        group = T.Bind(T.Cast("int32", self.lane) // (4 * WARP) * 64)
        count = plan.columns
        sums = T.alloc_buffer((count,), "float32", scope="local")
        with T.unroll(count) as i:
            T.buffer_store(sums, T.float32(0), [i])

        def begin(_step: Expr, slot: Expr) -> None:
            (rows, at), (weights, first) = ring.at(0, slot), ring.at(1, slot)
            places = T.address_of(rows[at + group * plan.depth]), T.address_of(weights[first])
            when(group < m, lambda: T.evaluate(T.call_extern("int32", WGMMA[self.data], sums.data, *places)))

        ring.run(
            -(-int(A.shape[1]) // plan.depth), begin,
            publish=lambda: T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_publish")),
            finish=lambda: T.evaluate(T.call_extern("int32", "tvm_gdn_wgmma_arrived", sums.data, 0)),
            follow=self.follow if follow else None,
        )  # fmt: skip

        lane = T.Cast("int32", self.lane)
        for below in range(2):
            r = T.Bind(group + lane // WARP % 4 * 16 + lane % WARP // 4 + below * 8)

            def row(r: Expr = r, below: int = below) -> None:
                for b in range(plan.columns // 8):
                    halves = [(half * plan.columns // 8 + b) * 4 + below * 2 for half in range(2)]
                    sink(r, b * 8 + lane % 4 * 2, *([sums[at], sums[at + 1]] for at in halves))

            when(r < m, row)
