"""The portable fallback of every algorithm: scalar loops, nothing to tune, right on any CPU target."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import GatingTiles, RecurrentTiles, divisors
from tvm_gdn.schedules.cpu_chunk import ChunkTiles

from tvm_gdn.schedule import GENERIC, schedule
from tvm_gdn.spec import Geometry


class _NoKnobs:
    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Nothing to tune."""
        del geometry
        return {}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Nothing to set."""
        del geometry
        return {}


@schedule("recurrent", GENERIC)
class RecurrentGeneric(_NoKnobs):
    """Token recurrence on a local state tile of at most 32 columns."""

    @staticmethod
    def tiles(geometry: Geometry) -> RecurrentTiles:
        """Scalar tile operations."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_tile = max(d for d in divisors(V) if d <= 32)
        v_first = bool(geometry.attr.get("state_v_first"))
        return RecurrentTiles(K, V, v_tile=v_tile, v_first=v_first, lanes=1, unroll=1, direct=False)


@schedule("chunk", GENERIC)
class ChunkGeneric(_NoKnobs):
    """Chunks of 16 tokens, narrow accumulators."""

    @staticmethod
    def tiles(geometry: Geometry) -> ChunkTiles:
        """Tile operations in fp32."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_tile = max(d for d in divisors(V) if d <= 32)
        return ChunkTiles(
            K,
            V,
            v_tile=v_tile,
            chunk=16,
            rows=max(d for d in divisors(K) if d in {1, 2, 4}),
            columns=max(d for d in divisors(v_tile) if d <= 8),
            v_first=bool(geometry.attr.get("state_v_first")),
            direct=False,
        )


@schedule("gating", GENERIC)
class GatingGeneric(_NoKnobs):
    """Gates, one row per piece of work."""

    @staticmethod
    def tiles(geometry: Geometry) -> GatingTiles:
        """Scalar loops."""
        del geometry
        return GatingTiles(1, 1)
