"""Chunked delta rules where a block has 99 KiB of shared memory: what does not fit ahead of the states is done beside them."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu_chunk import ChunkGpu

from tvm_gdn.errors import TargetError
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


class ChunkBeside(ChunkGpu):
    """Without blocks that compute ahead, whose results need room beside the state: fp32 data with K = 128 fits so."""

    ahead = 0


@schedule("chunk", "cuda-sm80")
class ChunkAmpere(ChunkGpu):
    """As everywhere, and for what that leaves out without chunks ahead."""

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The longest chunk that fits, ahead of states if there is room."""
        try:
            return super().default(geometry)
        except TargetError:
            return ChunkBeside.default(geometry)
