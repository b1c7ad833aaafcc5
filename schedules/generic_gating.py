"""Portable fallback of the gates on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_gating import GatingTiles
from tvm_gdn.schedules.generic_tiles import Portable

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


class PortableGatingTiles(Portable, GatingTiles):
    """Scalar loops."""


@schedule("gating", "generic-cpu")
class GatingGeneric(NoKnobs):
    """Gates, one row per piece of work."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableGatingTiles:
        """Scalar loops."""
        del geometry
        return PortableGatingTiles(1, 1)
