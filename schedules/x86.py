"""Design spaces of x86 CPUs: explicit vectors over the tile operations of `cpu.py`."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import GatingTiles, RecurrentTiles, divisors
from tvm_gdn.schedules.cpu_chunk import ChunkTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: fp32 elements per tile that fit the stack and the L2 cache of every core in use.
MAX_TILE = 16384


@schedule("recurrent", "x86")
class RecurrentX86:
    """Token recurrence. The state is streamed through the caches; the knobs decide how much of it one worker holds.

    Measured on 2 threads of a Zen 5 server core at B = 8, H 16, HV 32, K = V = 128, fp32: whole rows (v_tile = V) in place
    1.7 times the bytes/s of a copy, v_tile = 32 0.85 times, a local copy of the tile 1.15 times.
    """

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

    @staticmethod
    def tiles(geometry: Geometry, *, v_tile: int, unroll: int, direct: bool) -> RecurrentTiles:
        """Tile operations with the widest vectors that divide K."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        v_first = bool(geometry.attr.get("state_v_first"))
        lanes = max(d for d in divisors(K) if d in {1, 2, 4, 8, 16})
        along = v_tile if v_first else K
        return RecurrentTiles(
            K,
            V,
            v_tile=v_tile,
            v_first=v_first,
            lanes=lanes,
            direct=direct,
            unroll=max(d for d in divisors(along) if d <= unroll),
        )


@schedule("chunk", "x86")
class ChunkX86:
    """Chunked delta rule in fp32: matrix products on a register-blocked micro-kernel."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, columns per worker, accumulators of the micro-kernel, state in place or in a local tile."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        columns = tuple(d for d in divisors(V) if d in {16, 32, 48, 64}) or (max(d for d in divisors(V) if d <= 64),)
        return {
            "chunk": (16, 32, 64, 128),
            "v_tile": tuple(d for d in divisors(V) if d % min(columns) == 0 and d * K <= MAX_TILE) or (min(columns),),
            "rows": tuple(d for d in (4, 8, 16) if K % d == 0),
            "columns": columns,
            "direct": (True, False) if "initial_state_source" in geometry.dtype else (False,),
        }

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """64 tokens, all columns, 8 x 32 accumulators, in place."""
        knobs = ChunkX86.knobs(geometry)
        return {
            "chunk": 64,
            "v_tile": max(knobs["v_tile"]),
            "rows": max(d for d in knobs["rows"] if d <= 8),
            "columns": max((d for d in knobs["columns"] if d <= 32), default=min(knobs["columns"])),
            "direct": knobs["direct"][0],
        }

    @staticmethod
    def tiles(geometry: Geometry, *, chunk: int, v_tile: int, rows: int, columns: int, direct: bool) -> ChunkTiles:
        """Tile operations in fp32."""
        return ChunkTiles(
            geometry.axis["K"],
            geometry.axis["V"],
            v_tile=v_tile,
            chunk=chunk,
            rows=rows,
            columns=max(d for d in divisors(v_tile) if d <= columns),
            v_first=bool(geometry.attr.get("state_v_first")),
            direct=direct,
        )


@schedule("gating", "x86")
class GatingX86:
    """Gates: exp and log dominate; the knob is how many rows make one piece of work."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per worker, heads at once."""
        del geometry
        return {"rows_per_worker": (4, 16, 64, 256), "vector": (8, 16, 32)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Pieces of about 2,000 gates at 32 heads."""
        del geometry
        return {"rows_per_worker": 64, "vector": 16}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int, vector: int) -> GatingTiles:
        """Vectors of heads over parallel row blocks."""
        del geometry
        return GatingTiles(rows_per_worker, vector)
