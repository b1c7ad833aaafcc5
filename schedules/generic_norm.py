"""Portable fallback of the gated norm on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_norm import NormTiles
from tvm_gdn.schedules.generic_tiles import Portable

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


class PortableNormTiles(Portable, NormTiles):
    """Scalar loops."""


@schedule("norm", "generic-cpu")
class NormGeneric(NoKnobs):
    """Gated norm, element by element."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableNormTiles:
        """Scalar loops."""
        del geometry
        return PortableNormTiles(8, 1)
