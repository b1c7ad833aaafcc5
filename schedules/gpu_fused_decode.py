"""The fused decode step on GPUs: a block per q/k head of a sequence, with its value heads.

The threads of a block convolve a channel each, of q, k and as many value columns as its warps take at a time, and find the
others' in shared memory. So every convolution state has one reader and writer, and each of them is read once.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_portable import LoopTiles
from tvm_gdn.schedules.gpu_recurrent import REGISTERS, SHARED, WARP, RecurrentGpu, RecurrentRocm
from tvm_gdn.schedules.gpu_registers import RecurrentWarpTiles
from tvm_gdn.schedules.gpu_staged import PIECE, StagedWarpTiles
from tvm_gdn.schedules.gpu_strips import StripColumns

from tvm_gdn.errors import TargetError
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


class ConvolvedRow(StripColumns):
    """What stands before a recurrence's tiles: one worker is a block, whose warps have a tile of value columns each."""

    vector = 1
    lines_shared = True
    array = staticmethod(LoopTiles.array)
    warp: int
    group: int
    rows: Any
    row: Any
    cols: Any
    col: Any
    v_tile: int
    K: int

    functions: bool

    @property
    def strip(self) -> int:  # type: ignore[override]
        """Channels that a thread convolves at once, where C functions move them."""
        return 2 if self.functions and self.K % 2 == 0 and self.v_tile % 2 == 0 else 0

    @property
    def beside(self) -> int:
        """Tiles of value columns at the same time."""
        return self.group

    @staticmethod
    def workers(count: Any) -> Any:
        """A block each."""
        return T.thread_binding(count, thread="blockIdx.x")

    @staticmethod
    def worker(block: Any, lane: Any) -> Any:
        """Number of the worker that a thread of a block belongs to."""
        del lane
        return block

    def enter(self, lane: Any) -> None:
        """Take the thread index that the following operations belong to."""
        super().enter(lane)  # type: ignore[misc]
        self.own = T.Cast("int64", lane)

    def channels(self, count: Any) -> Any:
        """Loop over this thread's share of channels: neighbouring threads have neighbouring channels."""
        threads = self.warp * self.group
        return T.serial((count + (threads - 1) - self.own) // threads)

    def channel(self, i: Any) -> Any:
        """The channel of a turn of that loop."""
        return i * (self.warp * self.group) + self.own

    @staticmethod
    def line(vector: Any, count: int) -> Any:
        """Memory that all threads of the block see."""
        del vector
        return T.alloc_buffer((count,), "float32", scope="shared")

    def mate(self) -> Any:
        """Which of the tiles at the same time is this thread's."""
        return self.own // self.warp

    def take_rows(self, vector: Any, line: Any) -> None:
        """This thread's share of K channels."""
        with self.rows(self.K) as i:
            T.buffer_store(vector, line[self.row(i)], [i])

    def take_columns(self, vector: Any, line: Any) -> None:
        """This thread's share of its tile's columns."""
        with self.cols(self.v_tile) as j:
            T.buffer_store(vector, line[self.mate() * self.v_tile + self.col(j)], [j])

    @staticmethod
    def sync() -> None:
        """What the block's threads wrote is there for the others."""
        T.evaluate(T.tvm_storage_sync("shared"))


class FusedWarpTiles(ConvolvedRow, RecurrentWarpTiles):
    """States in registers."""


class FusedStagedTiles(ConvolvedRow, StagedWarpTiles):
    """States in shared memory."""

    @property
    def memory(self) -> int:
        """Bytes of shared memory of a block: a state tile per warp, and in fp32 k, q and the warps' value columns."""
        return self.group * self.warp * self.pieces * PIECE + 4 * (2 * self.K + self.beside * self.v_tile)


@schedule("fused_decode", "cuda")
class FusedDecodeGpu(RecurrentGpu):
    """The recurrence's, with the warps of a block on the tiles of one q/k head. Not timed yet."""

    made = MappingProxyType({REGISTERS: FusedWarpTiles, SHARED: FusedStagedTiles})
    #: Bytes of shared memory that a block may have.
    shared = 99 * 1024

    @classmethod
    def placed(cls, geometry: Geometry) -> bool:
        """Whether there is a choice of where states are during a step."""
        del geometry
        return cls.stages

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The recurrence's tiles, four to a block where a warp has one of its own."""
        found = super().default(geometry)
        whole = found["column_lanes"] * math.gcd(geometry.axis["K"], WARP // found["column_lanes"]) == WARP
        return {**found, "group": 4 if whole else 1}

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> RecurrentWarpTiles:
        """The recurrence's; a block's tiles are of any number of heads, so that their states may be too many."""
        made = super().tiles(geometry, **knobs)
        if isinstance(made, FusedStagedTiles) and made.memory > cls.shared:
            raise TargetError(f"{knobs} need {made.memory} bytes of shared memory, a block has {cls.shared}")
        return made

    @staticmethod
    def _side_by_side(tiles: int, group: int) -> bool:
        """Warps without a tile wait."""
        del tiles, group
        return True


@schedule("fused_decode", "cuda-sm90")
class FusedDecodeHopper(FusedDecodeGpu):
    """With 227 KiB of shared memory."""

    shared = 227 * 1024


@schedule("fused_decode", "musa")
class FusedDecodeMusa(FusedDecodeGpu):
    """Copies are waited for there, so that states gain nothing in shared memory."""

    stages = False


@schedule("fused_decode", "rocm")
class FusedDecodeRocm(FusedDecodeGpu):
    """As the recurrence's."""

    stages = False
    widest, functions = RecurrentRocm.widest, RecurrentRocm.functions
