"""Design space of the gates on x86 CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu_gating import GatingTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


@schedule("gating", "x86")
class GatingX86:
    """Gates: exp and log dominate; the knob is how many rows make one piece of work."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per worker, heads at once."""
        del geometry
        return {"rows_per_worker": (4, 16, 64, 256), "vector": (8, 16, 32)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Pieces of about 2,000 gates at 32 heads."""
        del geometry
        return {"rows_per_worker": 64, "vector": 16}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int, vector: int) -> GatingTiles:
        """Vectors of heads over parallel row blocks."""
        del geometry
        return GatingTiles(rows_per_worker, vector)
