"""Tile operations of the experts on Hopper in blocks that go through all tiles: some warps copy while eight multiply.

A ring of stages in shared memory runs through all tiles of a block, so that the next tile's operands are on their way while the
last products of a tile run and its results are written. Two barriers belong to a stage: threads that copy arrive at one with what
they copied, warps that multiply at the other when they are done with it.

Weights are the left operand, 128 rows of either half, and rows of A the columns of a product: as many as a tile has, rounded up
to 16. A thread has two rows of a column then; it exchanges one of them for the next column of the other with its neighbour, and
weights lie in shared memory in an order that leaves it with four columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import BLOCK, WARP
from tvm_gdn.schedules.gpu_moe_copies import SIZES, Expr, Ring, Rows, room
from tvm_gdn.schedules.gpu_moe_groups import GroupGridTiles
from tvm_gdn.schedules.gpu_moe_tiles import Plan

#: Instruction by dtype of both operands.
PAIRS = {"bfloat16": "tvm_gdn_wgmma_pair_bf16", "float16": "tvm_gdn_wgmma_pair_f16"}
#: Threads that multiply.
MULTIPLY = 8 * WARP
#: Registers of threads that multiply and of those that copy, by the number of warps that copy.
REGISTERS = {4: (192, 120), 8: (192, 64)}
#: Rows of a product of four warps.
GROUP = 64


def _call(name: str, *args: Expr) -> None:
    T.evaluate(T.call_extern("int32", name, *args))


def _column(i: Expr) -> Expr:
    """The row of weights that lies in the i-th: 16 of a product are a warp's, of which a thread has two, 8 from each other."""
    return i // BLOCK * BLOCK + i % 8 // 2 * 4 + i // 8 % 2 * 2 + i % 2


class StreamGridTiles(GroupGridTiles):
    """Tile operations of one geometry of raw 16-bit weights; parameters as `ExpertGridTiles` has them."""

    def parts(self, plan: Plan, work: Callable[[], None]) -> None:
        """Emit the work of threads that multiply, and that of threads that copy."""
        lane = T.Bind(T.Cast("int32", self.lane))
        taken, left = REGISTERS[plan.warps - MULTIPLY // WARP]
        self.memory = room(self._stage(plan) * plan.stages * SIZES[self.data], self.data, 1024)
        self.barriers = T.alloc_buffer((2 * plan.stages,), "uint64", scope="shared")
        with T.If(lane == 0), T.Then():
            for slot in range(plan.stages):
                _call("tvm_gdn_ring_open", self._barrier(slot), plan.threads - MULTIPLY)
                _call("tvm_gdn_ring_open", self._barrier(plan.stages + slot), MULTIPLY // WARP)
        self.sync()
        #: Stages that this thread has been through.
        self.passed = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(self.passed, T.int32(0), [0])
        with T.If(lane < MULTIPLY):
            with T.Then():
                _call(f"tvm_gdn_take_registers<{taken}>")
                self.lane, self.copying = lane, False
                work()
            with T.Else():
                _call(f"tvm_gdn_leave_registers<{left}>")
                self.lane, self.copying = T.Bind(lane - MULTIPLY), True
                work()

    def product(
        self, plan: Plan, A: Any, row_of: Callable[[Expr], Expr], m: Expr, W: Any, e: Expr, n: Expr, shift: int,
        sink: Callable[..., None], *, follow: bool = False,
    ) -> None:  # fmt: skip
        """Rows of A times columns of W[e], to the sink."""
        if not plan.blocks:
            super().product(plan, A, row_of, m, W, e, n, shift, sink, follow=follow)
            return
        steps = -(-int(A.shape[1]) // plan.depth)
        if self.copying:
            copier = replace(plan, warps=plan.warps - MULTIPLY // WARP)
            self._copy(plan, steps, self._left(copier, A, row_of, m), self._right(copier, W, e, n, shift), follow)
        else:
            self._multiply(plan, steps, m, sink)
        T.buffer_store(self.passed, self.passed[0] + steps, [0])

    def _stage(self, plan: Plan) -> int:
        """Elements of a stage."""
        return (plan.rows + 2 * plan.columns) * plan.depth

    def _barrier(self, number: Expr) -> Expr:
        return T.address_of(self.barriers[number])

    def _copy(self, plan: Plan, steps: int, left: Rows, right: Rows, follow: bool) -> None:
        operands = (
            replace(left, stride=plan.depth, swizzled=True, sparse=True),
            replace(
                right,
                stride=plan.depth,
                swizzled=True,
                index=lambda i, k, step: right.index(_column(i), k, step),
                there=lambda i: right.there(_column(i)),
            ),
        )
        # Two loops and not two ways in one: what either computes before it begins has registers in it alone.
        fitting = [rows.aligned for rows in operands if rows.aligned is not True]
        if not fitting or False in fitting:
            self._pass(plan, steps, operands, not fitting, follow)
            return
        with T.If(T.And(*fitting) if len(fitting) == 2 else fitting[0]):
            with T.Then():
                self._pass(plan, steps, operands, True, follow)
            with T.Else():
                self._pass(plan, steps, operands, False, follow)

    def _pass(self, plan: Plan, steps: int, operands: tuple[Rows, ...], aligned: bool, follow: bool) -> None:
        """Fill a stage per step, when it is free."""
        operands = tuple(replace(rows, aligned=aligned) for rows in operands)
        ring = Ring(self.lane, plan.threads - MULTIPLY, plan.stages, operands, align=1024, memory=self.memory)
        first = min(plan.stages, steps)
        if follow:
            with T.If(self.passed[0] == 0), T.Then():
                with T.serial(first) as step:
                    ring.fetch(step, step, (1,))
                self.follow()
        with T.serial(steps) as step:
            at = T.Bind(self.passed[0] + T.Cast("int32", step))
            slot = T.Bind(at % plan.stages)
            _call("tvm_gdn_ring_wait", self._barrier(plan.stages + slot), (at // plan.stages + 1) % 2)
            ring.fetch(step, slot, (0,))
            if follow:
                with T.If(at >= first), T.Then():
                    ring.fetch(step, slot, (1,))
            else:
                ring.fetch(step, slot, (1,))
            if not aligned:
                _call("tvm_gdn_wgmma_publish")
            _call("tvm_gdn_ring_copied", self._barrier(slot))

    def _multiply(self, plan: Plan, steps: int, m: Expr, sink: Callable[..., None]) -> None:
        memory, skip = self.memory
        sums = T.alloc_buffer((plan.rows,), "float32", scope="local")
        lane = T.Cast("int32", self.lane)
        group = T.Bind(lane // (4 * WARP))
        weights = T.Bind(skip // SIZES[self.data] + (plan.rows + group * GROUP) * plan.depth)
        rows, apart = T.Bind(skip // SIZES[self.data]), plan.columns * plan.depth * SIZES[self.data]

        def done(at: Expr) -> None:
            _call("tvm_gdn_warp_sync")
            with T.If(lane % WARP == 0), T.Then():
                _call("tvm_gdn_ring_arrive", self._barrier(plan.stages + at % plan.stages))

        def products(columns: int) -> None:
            with T.serial(steps) as step:
                at = T.Bind(self.passed[0] + T.Cast("int32", step))
                slot = T.Bind(at % plan.stages)
                _call("tvm_gdn_ring_wait", self._barrier(slot), at // plan.stages % 2)
                # What others copied is there for the matrix unit.
                _call("tvm_gdn_wgmma_publish")
                left, right = (T.address_of(memory[first + slot * self._stage(plan)]) for first in (weights, rows))
                name = f"{PAIRS[self.data]}<{columns}>"
                _call(name, sums.data, left, apart, right, T.Cast("int32", step == 0))
                _call("tvm_gdn_wgmma_left", 1)
                with T.If(step > 0), T.Then():
                    done(at - 1)

        def as_many(columns: int) -> None:
            if columns >= plan.rows:
                products(plan.rows)
                return
            with T.If(m <= columns):
                with T.Then():
                    products(columns)
                with T.Else():
                    as_many(columns + BLOCK)

        as_many(BLOCK)
        _call("tvm_gdn_wgmma_arrived", sums.data, 0)
        done(self.passed[0] + (steps - 1))
        self._give(plan, sums, group, m, sink)

    def _give(self, plan: Plan, sums: Any, group: Expr, m: Expr, sink: Callable[..., None]) -> None:
        """A thread has two neighbours of a column; one of them, and one of the next column, become two of a row."""
        lane = T.Bind(T.Cast("int32", self.lane) % (4 * WARP))
        second = T.Bind(lane // 4 % 2 == 1)
        column = T.Bind(group * GROUP + lane // WARP * BLOCK + lane % WARP // 8 * 4)

        def two(at: int) -> list[Expr]:
            mine, others = T.Select(second, sums[at + 1], sums[at]), T.Select(second, sums[at], sums[at + 1])
            given = T.Bind(T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), others, 4, WARP, WARP))
            return [T.Select(second, given, mine), T.Select(second, mine, given)]

        for b in range(plan.rows // 8):
            with T.If(m > b * 8), T.Then():
                halves = [[*two(at), *two(at + 2)] for at in (b * 4, plan.rows // 2 + b * 4)]
                r = T.Bind(b * 8 + lane % 4 * 2 + T.Cast("int32", second))
                with T.If(r < m), T.Then():
                    sink(r, column, *halves)
