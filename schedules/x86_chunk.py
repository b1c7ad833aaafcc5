"""Design space of the chunked delta rule on x86 CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.cpu_chunk import ChunkTiles

from tvm_gdn.ops.tir.chunk import chunk_lengths
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
            "chunk": chunk_lengths(K, (16, 32, 64, 128)),
            "v_tile": tuple(d for d in divisors(V) if d % min(columns) == 0 and d * K <= MAX_TILE) or (min(columns),),
            "rows": tuple(d for d in (4, 8, 16) if K % d == 0) or (2 if K % 2 == 0 else 1,),
            "columns": columns,
            "span": (1, 2, 4),
        }

    #: Accumulators that the registers of AVX2 hold.
    columns, chunk = 16, 64

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """All columns, two value heads of a q/k head together, four rows of accumulators."""
        knobs = ChunkX86.knobs(geometry)
        return {
            "chunk": max(length for length in knobs["chunk"] if length <= cls.chunk),
            "v_tile": max(knobs["v_tile"]),
            "rows": min(knobs["rows"]),
            "columns": max((d for d in knobs["columns"] if d <= cls.columns), default=min(knobs["columns"])),
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


@schedule("chunk", "x86-avx512")
class ChunkAvx512(ChunkX86):
    """The same with the 32 registers of AVX-512: 4 x 64 accumulators, and chunks of 32 tokens, which take fewer operations."""

    columns, chunk = 64, 32
