"""Portable fallback of the chunked delta rule on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.generic_tiles import PortableChunkTiles

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


@schedule("chunk", "generic-cpu")
class ChunkGeneric(NoKnobs):
    """Chunks of 16 tokens, narrow accumulators."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableChunkTiles:
        """Tile operations in fp32."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_tile = max(d for d in divisors(V) if d <= 32)
        return PortableChunkTiles(
            K,
            V,
            v_tile=v_tile,
            chunk=16,
            rows=max(d for d in divisors(K) if d in {1, 2, 4}),
            columns=max(d for d in divisors(v_tile) if d <= 8),
            span=1,
            v_first=bool(geometry.attr.get("state_v_first")),
        )
