"""Design space of the chunked delta rule on x86 CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.cpu_chunk import ChunkTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: fp32 elements per state tile: what the stack and the L2 cache of every core hold easily.
MAX_TILE = 16384


@schedule("chunk", "x86")
class ChunkX86:
    """Chunked delta rules in fp32: matrix products on a register-blocked micro-kernel."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, columns and value heads per worker, accumulators of the micro-kernel."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        columns = tuple(d for d in divisors(V) if d in {16, 32, 48, 64}) or (max(d for d in divisors(V) if d <= 64),)
        return {
            "chunk": (16, 32, 64, 128),
            "v_tile": tuple(d for d in divisors(V) if d % min(columns) == 0 and d * K <= MAX_TILE) or (min(columns),),
            "rows": tuple(d for d in (4, 8, 16) if K % d == 0) or (2 if K % 2 == 0 else 1,),
            "columns": columns,
            "span": (1, 2, 4),
        }

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """64 tokens, all columns, 8 x 32 accumulators, two value heads of a q/k head together."""
        knobs = ChunkX86.knobs(geometry)
        return {
            "chunk": 64,
            "v_tile": max(knobs["v_tile"]),
            "rows": max((d for d in knobs["rows"] if d <= 8), default=min(knobs["rows"])),
            "columns": max((d for d in knobs["columns"] if d <= 32), default=min(knobs["columns"])),
            "span": 1 if geometry.attr.get("channel_gate") else 2,
        }

    @staticmethod
    def tiles(geometry: Geometry, *, chunk: int, v_tile: int, rows: int, columns: int, span: int) -> ChunkTiles:
        """Tile operations in fp32."""
        return ChunkTiles(
            geometry.axis["K"],
            geometry.axis["V"],
            v_tile=v_tile,
            chunk=chunk,
            rows=rows,
            columns=max(d for d in divisors(v_tile) if d <= columns),
            span=span,
            v_first=bool(geometry.attr.get("state_v_first")),
        )
