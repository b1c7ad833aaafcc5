"""Design space of the convolution on NVIDIA and Moore Threads GPUs: a thread per channel and some tokens.

Neighbouring threads have neighbouring channels, which lie side by side in the layout of engines; a token's inputs are read again
by the next tokens of the same thread, from the first cache.
"""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu_portable import LoopTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


@schedule("conv", "cuda")
@schedule("conv", "musa")
class ConvGpu:
    """Convolution: tokens of a thread, threads of a block."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """A decode step has few tokens, so that how many a thread takes does not matter."""
        update = bool(geometry.attr.get("update"))
        return {"tokens": (32,) if update else (4, 8, 16, 32, 64), "threads": (32, 64, 128, 256)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """The portable schedule's."""
        del geometry
        return {"tokens": 32, "threads": 128}

    @staticmethod
    def tiles(geometry: Geometry, *, tokens: int, threads: int) -> LoopTiles:
        """Plain loops."""
        del geometry
        tiles = LoopTiles(threads)
        tiles.tokens = tokens
        return tiles
