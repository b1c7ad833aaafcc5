"""Design space of the gates on GPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu import WarpTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

WARP = 32


class GatingWarpTiles(WarpTiles):
    """One warp per block of rows, one thread per head.

    Parameters
    ----------
    rows_per_worker : int
        Rows that one warp computes.
    """

    vector = 1

    def __init__(self, rows_per_worker: int) -> None:
        super().__init__(WARP)
        self.rows_per_worker = rows_per_worker


@schedule("gating", "cuda")
@schedule("gating", "rocm")
@schedule("gating", "musa")
@schedule("gating", "generic-cuda")
class GatingGpu:
    """Gates: the knob is how many rows make one piece of work."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per warp."""
        del geometry
        return {"rows_per_worker": (1, 2, 4, 8, 16)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Enough warps for every multiprocessor at a thousand rows."""
        del geometry
        return {"rows_per_worker": 4}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int) -> GatingWarpTiles:
        """Threads over heads."""
        del geometry
        return GatingWarpTiles(rows_per_worker)
