"""Design space of the convolution on x86 CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu_conv import ConvTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


@schedule("conv", "x86")
class ConvX86:
    """Convolution: memory-bound up to the activation; the knobs are the piece of work and the vectors in flight."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens and channels per worker, elements at once."""
        if geometry.attr.get("update"):
            return {"tokens": (16,), "channels": (256, 512, 1024, 2048), "vector": (8, 16, 32)}
        return {"tokens": (16, 64, 256), "channels": (64, 256, 1024), "vector": (8, 16, 32)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Strips of 1,024 channels: shorter ones leave the memory prefetcher behind. Decode takes two vectors at once."""
        if geometry.attr.get("update"):
            return {"tokens": 16, "channels": 1024, "vector": 32}
        return {"tokens": 64, "channels": 1024, "vector": 16}

    @staticmethod
    def tiles(geometry: Geometry, *, tokens: int, channels: int, vector: int) -> ConvTiles:
        """Vectors of channels or tokens over parallel blocks."""
        del geometry
        return ConvTiles(tokens, channels, vector)
