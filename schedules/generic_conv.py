"""Portable fallback of the convolution on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.generic_tiles import PortableConvTiles

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


@schedule("conv", "generic-cpu")
class ConvGeneric(NoKnobs):
    """Convolution, element by element."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableConvTiles:
        """Scalar loops."""
        del geometry
        return PortableConvTiles(64, 64, 1)
