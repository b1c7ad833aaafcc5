"""Portable schedules on GPUs: one thread is a worker, and runs the plain loops of the CPU's fallback.

They make every operator run; they are not fast: neighbouring threads read neighbouring pieces of work, not neighbouring elements.
"""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu import WarpTiles

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


class NormThreadTiles(ThreadTiles):
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
