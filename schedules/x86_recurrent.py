"""Design space of the token recurrence on x86 CPUs."""

from __future__ import annotations

from typing import Any, ClassVar

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.cpu_recurrent import RecurrentTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: fp32 elements per state tile: what the stack and the L2 cache of every core hold easily.
MAX_TILE = 16384


@schedule("recurrent", "x86")
class RecurrentX86:
    """Token recurrence. The state is streamed through the caches; the knobs decide how much of it one worker holds.

    Measured on 2 threads of a Zen 5 server core at B = 8, H 16, HV 32, K = V = 128, fp32: whole rows (v_tile = V) in place
    1.7 times the bytes/s of a copy, v_tile = 32 0.85 times, a local copy of the tile 1.15 times.
    """

    made: ClassVar[type[RecurrentTiles]] = RecurrentTiles

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Columns per worker, rows unrolled, state updated in the pool's memory or in a local tile."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        tiles = tuple(d for d in divisors(V) if d * K <= MAX_TILE and (d >= 16 or d == max(divisors(V)))) or (divisors(V)[0],)
        along = V if geometry.attr.get("state_v_first") else K
        return {
            "v_tile": tiles,
            "unroll": tuple(d for d in divisors(along) if d <= 8),
            "direct": (True, False) if "initial_state_source" in geometry.dtype else (False,),
        }

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """The widest tile, two rows at a time, in place."""
        knobs = RecurrentX86.knobs(geometry)
        return {
            "v_tile": max(knobs["v_tile"]),
            "unroll": max(choice for choice in knobs["unroll"] if choice <= 2),
            "direct": knobs["direct"][0],
        }

    @classmethod
    def tiles(cls, geometry: Geometry, *, v_tile: int, unroll: int, direct: bool) -> RecurrentTiles:
        """Tile operations with the widest vectors that divide K."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_first = bool(geometry.attr.get("state_v_first"))
        lanes = max(d for d in divisors(K) if d in {1, 2, 4, 8, 16})
        along = v_tile if v_first else K
        return cls.made(
            K,
            V,
            v_tile=v_tile,
            v_first=v_first,
            lanes=lanes,
            direct=direct,
            unroll=max(d for d in divisors(along) if d <= unroll),
        )
