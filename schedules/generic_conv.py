"""Portable fallback of the convolution on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_conv import ConvTiles

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


@schedule("conv", "generic-cpu")
class ConvGeneric(NoKnobs):
    """Convolution, element by element."""

    @staticmethod
    def tiles(geometry: Geometry) -> ConvTiles:
        """Scalar loops."""
        del geometry
        return ConvTiles(64, 64, 1)
