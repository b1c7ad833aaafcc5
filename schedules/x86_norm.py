"""Design space of the gated norm on x86 CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu_norm import NormTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


@schedule("norm", "x86")
class NormX86:
    """Gated norm: a row stays in the first cache between its two passes; the knob is how many rows make one piece of work."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per worker, elements at once."""
        del geometry
        return {"rows_per_worker": (4, 16, 64, 256), "vector": (8, 16)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Pieces of about 4,096 elements; vectors whose halves sum up."""
        return {"rows_per_worker": 64 if geometry.axis["D"] < 128 else 16, "vector": 16 if geometry.axis["D"] >= 16 else 8}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int, vector: int) -> NormTiles:
        """Vectors along rows over parallel row blocks."""
        # The sum of a vector is by halves, so its length is a power of two that fits into the row.
        fitting = 1 << (geometry.axis["D"].bit_length() - 1)
        return NormTiles(rows_per_worker, min(vector, fitting))
