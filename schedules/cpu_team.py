"""Work shared by the threads there are: every thread learns which pieces are its own, and goes through them in its own order."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array


class TeamTiles(CpuTiles):
    """A CPU's tiles for algorithms that cut their work by the number of threads."""

    @staticmethod
    def team() -> Any:
        """Frame of what every thread runs once; `share` tells them apart."""
        return T.attr(0, "pragma_parallel_launch_point", 1)

    @staticmethod
    def share(count: int) -> Any:
        """Inside `team`: where this thread's own of `count` pieces begin and end; they follow one another.

        Nothing but a parallel loop knows how many threads there are, so one is asked which iterations are whose. (Of two at
        least: TVM drops a loop of one, and then misses the parallel loop.)
        """
        own = local_array(2, dtype="int64")
        T.buffer_store(own, T.int64(count), [0])
        T.buffer_store(own, T.int64(0), [1])
        with T.parallel(T.int64(max(count, 2))) as piece:
            T.buffer_store(own, T.min(own[0], piece), [0])
            T.buffer_store(own, T.min(piece + 1, T.int64(count)), [1])
        return own
