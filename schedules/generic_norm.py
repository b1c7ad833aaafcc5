"""Portable fallback of the gated norm on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_norm import NormTiles

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


@schedule("norm", "generic-cpu")
class NormGeneric(NoKnobs):
    """Gated norm, element by element."""

    @staticmethod
    def tiles(geometry: Geometry) -> NormTiles:
        """Scalar loops."""
        del geometry
        return NormTiles(8, 1)
