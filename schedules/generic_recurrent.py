"""Portable fallback of the token recurrence on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from typing import ClassVar

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.cpu_recurrent import RecurrentTiles
from tvm_gdn.schedules.generic_tiles import Portable

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


class PortableRecurrentTiles(Portable, RecurrentTiles):
    """Scalar loops."""


@schedule("recurrent", "generic-cpu")
class RecurrentGeneric(NoKnobs):
    """Token recurrence on a local state tile of at most 32 columns."""

    made: ClassVar[type[RecurrentTiles]] = PortableRecurrentTiles

    @classmethod
    def tiles(cls, geometry: Geometry) -> RecurrentTiles:
        """Scalar tile operations."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_tile = max(d for d in divisors(V) if d <= 32)
        v_first = bool(geometry.attr.get("state_v_first"))
        return cls.made(K, V, v_tile=v_tile, v_first=v_first, lanes=1, unroll=1, direct=False)
