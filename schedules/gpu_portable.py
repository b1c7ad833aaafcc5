"""Portable schedules on GPUs: one thread is a worker, and runs the plain loops of the CPU's fallback.

They make every operator run; they are not fast: neighbouring threads read neighbouring pieces of work, not neighbouring elements.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu_moe_route import RouteTiles
from tvm_gdn.schedules.gpu import WarpTiles
from tvm_gdn.schedules.whole_rows import WholeRows

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


class ThreadTiles(WarpTiles):
    """A worker per thread, 128 of them in a block."""

    group = 128
    vector = 1

    def __init__(self) -> None:
        super().__init__(1)

    @staticmethod
    def sum(part: Any, lanes: int) -> Any:
        """Sum of a vector of one element."""
        del lanes
        return part[0]


class NormThreadTiles(WholeRows, ThreadTiles):
    """One row per thread."""

    rows_per_worker = 1


@schedule("norm", "generic-cuda")
@schedule("norm", "generic-musa")
class NormThreads(NoKnobs):
    """Gated norm, a thread per row."""

    @staticmethod
    def tiles(geometry: Geometry) -> NormThreadTiles:
        """Scalar loops."""
        del geometry
        return NormThreadTiles()


class LoopTiles(ThreadTiles):
    """Loops of an algorithm whose workers are plain iterations: an iteration per thread.

    Parameters
    ----------
    threads : int
        Iterations of a block.
    """

    grid = False
    rows_per_worker = 1
    #: Tokens and channels of a thread in the convolution.
    tokens, channels = 32, 1
    #: Its inputs are read again for every token that needs them.
    ahead = 0

    def __init__(self, threads: int = 128) -> None:
        super().__init__()
        self.group = threads

    def alone(self) -> Any:
        """What follows runs on one thread of the device."""
        self._launch(1, 1)

    def workers(self, count: Any) -> Any:
        """The thread's own iteration, or none: to the end of the enclosing scope everything runs on the device."""
        block, thread = self._launch((count + self.group - 1) // self.group, self.group)
        own = T.Bind(T.Cast("int64", block) * self.group + T.Cast("int64", thread))
        return T.serial(own, T.min(own + 1, count))

    @staticmethod
    def _launch(blocks: Any, threads: int) -> list[Any]:
        indices = []
        for tag, extent in (("blockIdx.x", blocks), ("threadIdx.x", threads)):
            frame = T.launch_thread(tag, extent)
            frame.add_callback(partial(frame.__exit__, None, None, None))
            indices.append(frame.__enter__())
        return indices

    @staticmethod
    def sync() -> None:
        """One thread sees what it wrote."""

    mine, fold, best = staticmethod(RouteTiles.mine), staticmethod(RouteTiles.fold), staticmethod(RouteTiles.best)
    strike = staticmethod(RouteTiles.strike)

    def spread(self, count: int, dtype: str = "float32") -> Any:
        """Scratch of a thread, which has all lanes."""
        return self.array(count, dtype)

    def integers(self, count: int) -> Any:
        """int32 scratch of a thread."""
        return self.array(count, "int32")

    @staticmethod
    def array(count: int, dtype: str) -> Any:
        """Scratch of a thread."""
        return T.alloc_buffer((count,), dtype, scope="local")

    @staticmethod
    def every(count: int) -> Any:
        """Loop over elements that do not depend on one another."""
        return T.serial(count)

    across = each = every

    @staticmethod
    def columns_in(to: Any, at: Any, source: Any, first: Any, count: int, pitch: int, width: int) -> None:
        """Read one row of `count` elements, contiguous from `first` on, as elements `pitch` apart."""
        del width
        for k in range(count):
            T.buffer_store(to, T.Cast(to.dtype, source[first + k]), [at + k * pitch])

    @staticmethod
    def columns_out(to: Any, first: Any, source: Any, at: Any, count: int, pitch: int, width: int) -> None:
        """The inverse of `columns_in`."""
        del width
        for k in range(count):
            T.buffer_store(to, T.Cast(to.dtype, source[at + k * pitch]), [first + k])


class _Loops(NoKnobs):
    """Plain loops, nothing to tune."""

    @staticmethod
    def tiles(geometry: Geometry) -> LoopTiles:
        """An iteration per thread."""
        del geometry
        return LoopTiles()


@schedule("moe_sort", "generic-cuda")
@schedule("moe_sort", "generic-musa")
class SortThread(_Loops):
    """Counting sort, on one thread."""


@schedule("moe_stats", "generic-cuda")
@schedule("moe_stats", "generic-musa")
class StatsThread(_Loops):
    """Load statistics, on one thread."""


@schedule("moe_route", "generic-cuda")
@schedule("moe_route", "generic-musa")
class RouteThreads(_Loops):
    """Routing, a token per thread."""


@schedule("conv", "generic-cuda")
@schedule("conv", "generic-musa")
class ConvThreads(_Loops):
    """Convolution: a channel and 32 tokens per thread, neighbouring threads on neighbouring channels."""
