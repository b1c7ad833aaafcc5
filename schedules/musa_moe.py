"""Design space of the experts on devices with `mtmusa::wmma` and warps of 32.

bf16 and fp16 are multiplied by wmma, whose fragments keep the sums of all steps; behind the last one these go through the stages'
memory to the threads that hand them on. Words of packed weights, pairs of neighbours on the reduction axis, are put side by side
column by column first. fp32 and bytes are multiplied as on other GPUs without PTX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules import musa_wmma as wmma
from tvm_gdn.schedules.gpu_fragments import BLOCK, WARP, Expr, fragment_elements, when
from tvm_gdn.schedules.gpu_moe import ExpertsSmall
from tvm_gdn.schedules.gpu_moe_copies import Ring, Rows, room
from tvm_gdn.schedules.gpu_moe_tiles import MMA, SCHEMES, WORDS, ExpertGridTiles, Plan

from tvm_gdn.errors import TargetError
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Elements from one column of unpacked weights to the next, and those of a warp: 16 columns of either half.
UNPACKED = BLOCK + 8
HALVES = 2 * BLOCK * UNPACKED


class WmmaGridTiles(ExpertGridTiles):
    """Tile operations of one geometry of 16-bit weights; parameters as `ExpertGridTiles` has them."""

    #: Of a fragment that is 16 columns wide.
    held = 8

    def _ring(self, plan: Plan, left: Rows, right: Rows) -> Ring:
        size, own = plan.stages * (left.size + right.size), plan.warps * HALVES * 2 if self.scheme else 0
        self.memory = room(size + own, left.buffer.dtype, 1)
        self.ring = Ring(self.lane, plan.threads, plan.stages, (left, right), memory=self.memory)
        warp = T.Cast("int32", self.lane) // WARP
        self.unpacked = T.Bind(size // 2 + warp * HALVES) if self.scheme else None
        return self.ring

    def _zeros(self, plan: Plan, dtype: str) -> Any:
        """Sums of a warp's fragments: by row of fragments, column, half."""
        tall, wide, _, _ = plan.grid
        self.sums = wmma.fragments("accumulator", dtype, tall * wide * 2)
        for at in range(tall * wide * 2):
            wmma.clear(self.sums, at)
        return self.sums

    def _slices(self, plan: Plan, ring: Ring, slot: Expr, sums: Any, row: Expr, column: Expr, first: int, count: int) -> None:
        tall, wide, _, _ = plan.grid
        left, right = wmma.fragments("matrix_a", self.data, tall), wmma.fragments("matrix_b", self.data, 2)
        (rows, at), stride = ring.at(0, slot), ring.operands[0].stride
        for kk in range(first, first + count):
            for a in range(tall):
                wmma.load(left, a, rows, at + (row + a) * BLOCK * stride + kk * BLOCK, stride, turned=False)
            for b in range(wide):
                (self._load_unpacked if self.scheme else self._load_raw)(plan, ring, slot, right, column + b, kk)
                for half in range(2):
                    for a in range(tall):
                        wmma.multiply(sums, (a * wide + b) * 2 + half, left, a, right, half)

    @staticmethod
    def _load_raw(plan: Plan, ring: Ring, slot: Expr, right: Any, column: Expr, kk: int) -> None:
        """16 columns of both halves, from ``16 column`` on, elements from ``16 kk`` on."""
        (weights, begin), stride = ring.at(1, slot), ring.operands[1].stride
        for half in range(2):
            place = begin + (half * plan.columns + column * BLOCK) * stride + kk * BLOCK
            wmma.load(right, half, weights, place, stride, turned=True)

    def _load_unpacked(self, plan: Plan, ring: Ring, slot: Expr, right: Any, column: Expr, kk: int) -> None:
        """The same of packed weights, in memory of the warp's own."""
        del plan
        (words, begin), memory = ring.at(1, slot), self.memory[0]
        lane, lines = T.Cast("int32", self.lane) % WARP, BLOCK // 2
        pairs = T.decl_buffer((int(memory.shape[0]) // 2,), "int32", data=memory.data, scope="shared.dyn")
        first = T.Bind(begin + column * ring.operands[1].stride + kk // 2 * WORDS + kk % 2 * lines * BLOCK + lane)
        to = T.Bind((self.unpacked + lane % BLOCK * UNPACKED) // 2 + lane // BLOCK)
        # What was there has been loaded.
        T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))
        for half in range(2):
            for turn in range(lines // 2):
                word = words[first + half * BLOCK * BLOCK + turn * WARP]
                T.buffer_store(pairs, word, [to + half * BLOCK * UNPACKED // 2 + turn * 2])
        T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))
        for half in range(2):
            wmma.load(right, half, memory, self.unpacked + half * BLOCK * UNPACKED, UNPACKED, turned=True)

    def _finish(
        self, plan: Plan, row: Expr, column: Expr, m: Expr, value: Callable[..., Expr], sink: Callable[..., None]
    ) -> None:  # fmt: skip
        """Give the sink the sums of every row that is there."""
        del value
        tall, wide, _, _ = plan.grid
        assert plan.warps * 2 * wmma.ROOM * 4 <= self.ring.stage * self.ring.stages
        count = plan.warps * 2 * wmma.ROOM
        memory = T.decl_buffer((count,), "float32", data=self.ring.views[0][0].data, scope="shared.dyn")
        place = T.Bind(T.Cast("int32", self.lane) // WARP * (2 * wmma.ROOM))
        taken = T.alloc_buffer((2 * self.held,), "float32", scope="local")
        # Other warps may still multiply what is in the last stage.
        self.sync()

        def fragment(a: int, b: int) -> None:
            for half in range(2):
                wmma.put_down(self.sums, (a * wide + b) * 2 + half, memory, place + half * wmma.ROOM)
            T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))
            for half in range(2):
                wmma.pick_up(taken, half * self.held, memory, place + half * wmma.ROOM, self.lane)
            # The next sums are put down in the same place.
            T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))
            for n in range(2):
                for pair in (0, 2):
                    r, c = fragment_elements(self.lane, row + a, (column + b) * 2 + n)[pair]
                    halves = ([taken[half * self.held + n * 4 + pair + i] for i in range(2)] for half in range(2))
                    when(r < m, lambda r=r, c=c, halves=tuple(halves): sink(r, c, *halves))

        for a in range(tall):
            for b in range(wide):
                when((row + a) * BLOCK < m, lambda a=a, b=b: fragment(a, b))


@schedule("moe_experts", "musa-mp31")
class ExpertsWmma(ExpertsSmall):
    """Tiles of 16 rows that stream weights, and tiles of 64 that multiply; 64 KiB of shared memory."""

    @classmethod
    def _multiplied(cls, geometry: Geometry) -> bool:
        """Whether wmma has products of what is multiplied."""
        scheme, data = geometry.attr.get("scheme"), geometry.dtype["x"]
        weights = {SCHEMES.get(scheme)} if scheme else {geometry.dtype["w13"], geometry.dtype["w2"]}
        return data in MMA and weights == {data}

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """As everywhere, and whether wmma multiplies, or plain C++."""
        return {**super().knobs(geometry), "wmma": (True, False) if cls._multiplied(geometry) else (False,)}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """As many stages as fit."""
        return {**super().default(geometry), "wmma": cls._multiplied(geometry)}

    @classmethod
    def plans(cls, geometry: Geometry, *, wmma: bool | None = None, **knobs: Any) -> tuple[Plan, ...]:
        """The plans that knobs stand for; by wmma, the default, a warp of the first has 16 columns of either half."""
        few, many = super().plans(geometry, **knobs)
        if not (cls._multiplied(geometry) if wmma is None else wmma):
            return few, many
        return replace(few, warps=few.columns // BLOCK, fragment=BLOCK), replace(many, fragment=BLOCK)

    @classmethod
    def _bytes(cls, geometry: Geometry, plan: Plan) -> int:
        own = plan.warps * HALVES * 2 if plan.fragment == BLOCK and geometry.attr.get("scheme") else 0
        return super()._bytes(geometry, plan) + own

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ExpertGridTiles:
        """Tile operations on the matrix unit, or as on other GPUs without PTX."""
        if knobs["wmma"] not in cls.knobs(geometry)["wmma"]:
            raise TargetError("wmma has products of bf16 and of fp16 only, by weights of the same dtype")
        plain = super().tiles(geometry, **knobs)
        return WmmaGridTiles(geometry, plain.plans, knobs["partial"]) if knobs["wmma"] else plain
