"""Routing on GPUs: a token per warp, its scores in shared memory; sort and statistics in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import WARP
from tvm_gdn.schedules.gpu_grid import GridTiles
from tvm_gdn.schedules.gpu_portable import LoopTiles

from tvm_gdn.errors import TargetError
from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry

#: Three arrays of them are in the 48 KiB of shared memory that every kernel may have.
MOST_EXPERTS = 3840


class RouteWarpTiles(LoopTiles):
    """Loops of a warp: a block has one."""

    vector = WARP

    def __init__(self) -> None:
        super().__init__(WARP)

    def workers(self, count: Any) -> Any:
        """The block's own token: to the end of the enclosing scope everything runs on the device."""
        block, thread = self._launch(count, WARP)
        self.lane = T.Bind(T.Cast("int32", thread))
        own = T.Bind(T.Cast("int64", block))
        return T.serial(own, own + 1)

    def spread(self, count: int, dtype: str = "float32") -> Any:
        """Scratch of the warp."""
        return T.alloc_buffer((count,), dtype, scope="shared")

    def across(self, count: int) -> Any:
        """The thread's own lane."""
        assert count == WARP
        return T.serial(self.lane, self.lane + 1)

    def every(self, count: int) -> Any:
        """Every thread takes one of WARP elements that follow one another."""
        return T.serial(self.lane, count, step=WARP)

    each = every

    def sync(self) -> None:
        """What a warp's threads wrote is there for the others of the warp."""
        T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))

    def mine(self, j: Any) -> Any:
        """Choices are shared out."""
        return T.Cast("int32", j) % WARP == self.lane

    def fold(self, total: Any, part: Any, function: Callable[[Any, Any], Any]) -> None:
        """All threads' elements as one, in total[0]."""
        T.buffer_store(total, part[self.lane], [0])
        for bit in (1, 2, 4, 8, 16):
            T.buffer_store(total, function(total[0], self._other(total[0], bit)), [0])

    def best(self, winner: Any, best: Any, where: Any) -> None:
        """Of all threads' elements the largest, of equals the one with the least number: its number."""
        own = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(own, best[self.lane], [0])
        T.buffer_store(winner, where[self.lane], [0])
        for bit in (1, 2, 4, 8, 16):
            other, place = T.Bind(self._other(own[0], bit)), T.Bind(self._other(winner[0], bit))
            with T.If(T.Or(other > own[0], T.And(other == own[0], place < winner[0]))), T.Then():
                T.buffer_store(own, other, [0])
                T.buffer_store(winner, place, [0])

    def strike(self, buffer: Any, number: Any, value: int) -> None:
        """Write the element with that number: a thread its own, which it compares again without waiting for others."""
        with T.If(number[0] % WARP == self.lane), T.Then():
            T.buffer_store(buffer, T.int32(value), [number[0]])

    @staticmethod
    def _other(value: Any, bit: int) -> Any:
        return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, bit, WARP, WARP)


class RouteBlockTiles(RouteWarpTiles):
    """The same where a warp has no barrier of its own: its block, which is no more than the warp, has one."""

    def sync(self) -> None:
        """What a block's threads wrote is there for the others of the block."""
        T.evaluate(T.tvm_storage_sync("shared"))


@schedule("moe_route", "cuda")
class RouteGpu(NoKnobs):
    """Routing, a token per warp."""

    made = RouteWarpTiles

    @classmethod
    def tiles(cls, geometry: Geometry) -> RouteWarpTiles:
        """Scores, what decides, and keys are in shared memory."""
        if geometry.axis["E"] > MOST_EXPERTS:
            raise TargetError(f"{geometry.axis['E']} experts: routing has shared memory for {MOST_EXPERTS}")
        return cls.made()


@schedule("moe_route", "rocm")
class RouteRocm(RouteGpu):
    """The same. With a token per thread the scores were 1 KB of scratch, and LLVM died of the biased form with groups."""

    made = RouteBlockTiles


class _Grid(NoKnobs):
    """Nothing to tune."""

    @staticmethod
    def tiles(geometry: Geometry) -> GridTiles:
        """Blocks and threads."""
        del geometry
        return GridTiles()


@schedule("moe_sort", "cuda")
class SortGpu(_Grid):
    """Counting sort, a block per expert."""


@schedule("moe_stats", "cuda")
class StatsGpu(_Grid):
    """Load statistics, one block."""
