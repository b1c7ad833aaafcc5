"""Tile operations of the experts on GPUs for int8 and int4 weights: fragments of mma.m16n8k32 on bytes, sums in int32.

Rows are bytes in steps of their own, weights unsigned bytes with `zero` added. A word of an int8 pack is what a thread of such
a fragment holds, four neighbours on the reduction axis of one column. A word of an int4 pack is two: the low nibbles of its
bytes belong to the first 16 columns, the high ones to the others. Where a channel has several scales, int32 sums are scaled and
added up in fp32 group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import BLOCK, WARP, when
from tvm_gdn.schedules.gpu_moe_copies import Expr, Ring
from tvm_gdn.schedules.gpu_moe_tiles import WORDS, ExpertGridTiles, Plan

from tvm_gdn.packed_experts import STEP, ZERO
from tvm_gdn.spec import Geometry

NIBBLES = 0x0F0F0F0F


class IntegerGridTiles(ExpertGridTiles):
    """Tile operations of one geometry; parameters as `ExpertGridTiles` has them."""

    quantized = True
    slice = 32

    def __init__(self, geometry: Geometry, plans: tuple[Plan, ...], partial: str = "float32") -> None:
        super().__init__(geometry, plans, partial)
        self.k_step, self.zero, self.unit = STEP[self.scheme], ZERO[self.scheme], "tvm_gdn_mma_bytes"

    def product(
        self, plan: Plan, A: Any, row_of: Callable[[Expr], Expr], m: Expr, W: Any, e: Expr, n: Expr, shift: int,
        sink: Callable[..., None], *, scales: tuple[Any, Any, Any], follow: bool = False,
    ) -> None:  # fmt: skip
        """Rows of A times columns of W[e], in what they stand for, to the sink."""
        row_scale, row_sums, scale = scales
        groups, last = int(scale.shape[2]), int(scale.shape[1]) - 1
        ring = self._ring(plan, self._left(plan, A, row_of, m), self._right(plan, W, e, n, shift))
        row, column = self._place(plan)
        whole = self._zeros(plan, "int32")
        steps, wait = -(-int(A.shape[1]) // plan.depth), self.follow if follow else None

        def scaled(at: int, r: Expr, half: int, c: Expr, group: Expr) -> Expr:
            """A sum of whole numbers, in what it stands for but for its row's scale."""
            of = [e, T.min(n + c // BLOCK, last), group, half * BLOCK + c % BLOCK]
            # Rows that are not there have numbers too, of the last row.
            sums = row_sums[row_of(T.min(r, m - 1)), group]
            return T.Cast("float32", whole[at] - sums) * T.Cast("float32", scale[of])

        if groups == 1:
            ring.run(steps, lambda _step, slot: self._fragments(plan, ring, slot, whole, row, column, m), follow=wait)

            def value(at: int, r: Expr, half: int, c: Expr) -> Expr:
                return scaled(at, r, half, c, 0) * row_scale[row_of(r)]
        else:
            total = self._zeros(plan, "float32")
            size = int(A.shape[1]) // groups
            each = plan.depth // size

            def grouped(step: Expr, slot: Expr) -> None:
                for part in range(each):
                    group = T.Bind(step * each + part)

                    def body(part: int = part, group: Expr = group) -> None:
                        self._slices(plan, ring, slot, whole, row, column, part * size // self.slice, size // self.slice)

                        def add(at: int, r: Expr, c: Expr) -> None:
                            for half in range(2):
                                for i in range(2):
                                    k = at + half * self.held + i
                                    T.buffer_store(total, total[k] + scaled(k, r, half, c + i, group), [k])
                                    T.buffer_store(whole, T.int32(0), [k])

                        self._over(plan, row, column, add)

                    when(T.And(group < groups, row * BLOCK < m), body)

            ring.run(steps, grouped, follow=wait)

            def value(at: int, r: Expr, half: int, c: Expr) -> Expr:
                return total[at] * row_scale[row_of(r)]

        self._finish(plan, row, column, m, value, sink)

    def _load_right(self, plan: Plan, ring: Ring, slot: Expr, registers: Any, b: int, column: Expr, kk: int) -> None:
        """Fragments of both halves: 8 columns from ``8 column`` on, 32 elements from ``32 kk`` on."""
        if self.k_step == STEP["int8"]:
            super()._load_right(plan, ring, slot, registers, b, column, kk)
            return
        view, base = ring.at(1, slot)
        stride = ring.operands[1].stride
        lane = T.Cast("int32", self.lane) % WARP
        first = T.Bind(base + column // 2 * stride + column % 2 * 8 + lane // 4 + lane % 4 * 16)
        for i in range(2):
            word = T.Bind(T.reinterpret("uint32", view[first + kk // 4 * WORDS + (kk % 4 * 8 + i * 4) * 16]))
            T.buffer_store(registers, T.bitwise_and(word, T.uint32(NIBBLES)), [b * 4 + i])
            T.buffer_store(registers, T.bitwise_and(T.shift_right(word, T.uint32(4)), T.uint32(NIBBLES)), [b * 4 + 2 + i])
