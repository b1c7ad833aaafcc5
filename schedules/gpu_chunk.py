"""Design spaces of the chunked delta rules on GPUs: a block of threads is a worker, its state in accumulator registers."""

from __future__ import annotations

from typing import Any, ClassVar

from tvm_gdn.schedules.gpu_chunk_columns import ColumnChunkTiles
from tvm_gdn.schedules.gpu_chunk_groups import COLUMNS, ROWS, WIDE, GroupChunkTiles
from tvm_gdn.schedules.gpu_fragments import WARP
from tvm_gdn.schedules.gpu_products import GpuChunkTiles

from tvm_gdn.errors import TargetError
from tvm_gdn.ops.tir.chunk import chunk as chunk_rule
from tvm_gdn.ops.tir.chunk import chunk_lengths
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


def sized(geometry: Geometry, *, groups: int = 0, **options: Any) -> GpuChunkTiles:
    """Tile operations with an arena of the size that the algorithm turns out to use."""
    K, V, data = geometry.axis["K"], geometry.axis["V"], geometry.dtype["v"]
    kind = (GpuChunkTiles, GroupChunkTiles, GroupChunkTiles, ColumnChunkTiles)[groups]
    tiles = kind(K, V, data=data, v_first=bool(geometry.attr.get("state_v_first")), **options)
    chunk_rule(geometry, tiles)
    tiles.arenas = tiles.bytes
    return tiles


#: Bytes of the largest arena by geometry and options: every target asks for the same ones, and finding one out is a trace.
_ARENAS: dict[tuple[Any, ...], int] = {}


def arena_bytes(geometry: Geometry, size: Any = sized, **options: Any) -> int:
    """Shared memory of a block, in bytes."""
    key = (size, geometry.key, *sorted(options.items()))
    if key not in _ARENAS:
        _ARENAS[key] = max(size(geometry, **options).arenas.values())
    return _ARENAS[key]


def channels_fit(geometry: Geometry) -> bool:
    """Whether a chunk with a gate per channel can be computed ahead of the states."""
    return geometry.dtype["v"] == "bfloat16" and geometry.axis["K"] % WARP == 0


@schedule("chunk", "cuda")
class ChunkGpu:
    """Chunked delta rules: a block per tile of value columns, the state in registers for the whole sequence."""

    #: Bytes of shared memory that a block may have.
    shared = 99 * 1024
    #: Warps of blocks that compute what does not depend on states first.
    ahead = 8

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, value columns and warps per block; warps and value heads of the blocks ahead."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        tiles = tuple(d for d in (8, 16, 32, 64) if V % d == 0) or (max(d for d in range(1, 33) if V % d == 0),)
        channel = bool(geometry.attr.get("channel_gate"))
        ahead = (0,) if channel and not channels_fit(geometry) else (0, 4, 8)
        # With a gate per channel value heads have little in common.
        together = (1,) if channel else (1, 2)
        return {
            "chunk": chunk_lengths(K, (16, 32, 64)), "v_tile": tiles, "warps": (4, 8), "ahead": ahead, "together": together
        }  # fmt: skip

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The longest chunk that fits, with 32 columns where V has them."""
        v_tile = max(d for d in cls.knobs(geometry)["v_tile"] if d <= 32)
        channel = bool(geometry.attr.get("channel_gate"))
        ahead = cls.ahead
        if channel and ahead:
            ahead = 4 if channels_fit(geometry) else 0
        for chunk_size in sorted(cls.knobs(geometry)["chunk"], reverse=True):
            for columns in sorted({v_tile, *(d for d in cls.knobs(geometry)["v_tile"] if d < v_tile)}, reverse=True):
                # With less to do per chunk, four warps wait less for each other than eight.
                warps = 8 if chunk_size > 16 and not ahead else 4
                knobs = {
                    "chunk": chunk_size, "v_tile": columns, "warps": warps, "ahead": ahead, "together": 1 if channel else 2
                }  # fmt: skip
                if (columns == v_tile or chunk_size == 16) and arena_bytes(geometry, **knobs) <= cls.shared:
                    return knobs
        raise TargetError(f"K = {geometry.axis['K']} needs more than {cls.shared} bytes of shared memory")

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> GpuChunkTiles:
        """Tile operations on matrix fragments."""
        if knobs["ahead"] not in cls.knobs(geometry)["ahead"]:
            raise TargetError(f"ahead {knobs['ahead']} with a gate per channel needs bf16 data and K a multiple of {WARP}")
        found = sized(geometry, **knobs)
        size = max(found.arenas.values())
        if size > cls.shared:
            raise TargetError(f"{knobs} need {size} bytes of shared memory, a block has {cls.shared}")
        return found


@schedule("chunk", "cuda-sm90")
class ChunkHopper(ChunkGpu):
    """With 227 KiB of shared memory; the pass over states may have products of four warps together."""

    shared = 227 * 1024
    #: What these products want of the other knobs.
    grouped: ClassVar[dict[str, Any]] = {"chunk": ROWS, "v_tile": COLUMNS}

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """As everywhere, and how many groups of four warps there are that multiply together; 0: every warp on its own.

        Two share out the state. Of three one has it, one makes the output, and one brings data.
        """
        found = super().knobs(geometry)
        fits = geometry.dtype["v"] == "bfloat16" and geometry.axis["K"] % WIDE == 0 and not geometry.attr.get("channel_gate")
        fits = fits and all(value in found[name] for name, value in cls.grouped.items())
        K = geometry.axis["K"]
        # With K = 64 three have run, and were not timed.
        groups = {WIDE: (1, 3), 2 * WIDE: (3, 2, 1)}.get(K, (2, 1) if K % (2 * WIDE) == 0 else (1,))
        if fits:
            found["warps"] = tuple(sorted({*found["warps"], *(4 * number for number in groups)}))
        return {**found, "groups": (*groups, 0) if fits else (0,)}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """With as many groups as there may be; where there is none, every warp on its own."""
        knobs = {**super().default(geometry), "groups": 0}
        for groups in cls.knobs(geometry)["groups"]:
            together = {**knobs, **cls.grouped, "groups": groups, "warps": 4 * groups}
            if groups and arena_bytes(geometry, **together) <= cls.shared:
                return together
        return knobs

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> GpuChunkTiles:
        """Tile operations on matrix fragments, or on tiles in shared memory."""
        groups = knobs.get("groups", 0)
        wanted = {**cls.grouped, "warps": 4 * groups}
        if groups not in cls.knobs(geometry)["groups"] or (
            groups and any(knobs[name] != value for name, value in wanted.items())
        ):
            raise TargetError(f"groups {groups} needs {wanted}")
        if groups and not knobs["ahead"]:
            raise TargetError(f"groups {groups} needs chunks ahead")
        alone = super().knobs(geometry)["warps"]
        if not groups and knobs["warps"] not in alone:
            raise TargetError(f"warps {knobs['warps']} without groups share out no tile; allowed: {', '.join(map(str, alone))}")
        return super().tiles(geometry, **knobs)


@schedule("chunk", "musa")
class ChunkSmall(ChunkGpu):
    """With 64 KiB of shared memory."""

    shared, ahead = 64 * 1024, 0
