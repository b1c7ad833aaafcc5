"""Portable fallback of the gates on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_gating import GatingTiles

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


@schedule("gating", "generic-cpu")
class GatingGeneric(NoKnobs):
    """Gates, one row per piece of work."""

    @staticmethod
    def tiles(geometry: Geometry) -> GatingTiles:
        """Scalar loops."""
        del geometry
        return GatingTiles(1, 1)
