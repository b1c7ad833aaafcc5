"""Design space of the chunked delta rules on x86 CPUs with matrix units."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import divisors
from tvm_gdn.schedules.cpu_chunk import ChunkTiles
from tvm_gdn.schedules.x86_amx import AmxChunkTiles
from tvm_gdn.schedules.x86_chunk import MAX_TILE, ChunkAvx512, ChunkX86

from tvm_gdn.ops.tir.chunk import chunk_lengths
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


def _on_matrix_unit(geometry: Geometry) -> bool:
    """Whether products run on the matrix unit: 16-bit data, whole blocks, no gates inside the products."""
    whole = geometry.axis["K"] % 32 == 0 and geometry.axis["V"] % 32 == 0
    return whole and geometry.dtype["k"] in {"bfloat16", "float16"} and not geometry.attr.get("channel_gate")


def _parts(geometry: Geometry) -> int:
    """How many bf16 stand for an fp32 operand: two are exact to 2^-17, too coarse for an fp32 state after correlated keys."""
    states = [geometry.dtype.get(name) for name in ("initial_state", "initial_state_source", "final_state")]
    kept = geometry.attr.get("output_final_state") and not any(states)
    return 3 if kept or "float32" in states else 2


@schedule("chunk", "x86-amx")
class ChunkAmx:
    """Chunked delta rules on AMX for 16-bit data; as on other x86 CPUs where the matrix unit does not apply."""

    emulated = False

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, columns and value heads per worker."""
        if not _on_matrix_unit(geometry):
            return ChunkX86.knobs(geometry)
        K, V = geometry.axis["K"], geometry.axis["V"]
        return {
            "chunk": chunk_lengths(K, (32, 64, 128)),
            "v_tile": tuple(d for d in divisors(V) if d % 32 == 0 and d * K <= MAX_TILE) or (32,),
            "span": (1, 2, 4),
        }

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """32 tokens, all columns, two value heads of a q/k head together."""
        if not _on_matrix_unit(geometry):
            return ChunkAvx512.default(geometry)
        return {"chunk": 32, "v_tile": max(ChunkAmx.knobs(geometry)["v_tile"]), "span": 2}

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ChunkTiles:
        """Tile operations on the matrix unit, or in fp32."""
        if not _on_matrix_unit(geometry):
            return ChunkX86.tiles(geometry, **knobs)
        v_first = bool(geometry.attr.get("state_v_first"))
        return AmxChunkTiles(
            geometry.axis["K"],
            geometry.axis["V"],
            v_first=v_first,
            data=geometry.dtype["k"],
            parts=_parts(geometry),
            emulated=cls.emulated,
            **knobs,
        )


@schedule("chunk", "x86-amx-emulated")
class ChunkAmxEmulated(ChunkAmx):
    """The same without the instructions: for tests on any CPU."""

    emulated = True
