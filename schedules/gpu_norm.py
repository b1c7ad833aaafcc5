"""Design space of the gated norm on GPUs: a warp per row, neighbouring threads on neighbouring vectors."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles, aligned, either
from tvm_gdn.schedules.gpu_portable import NormThreadTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

WARP = 32


def _along(index: tuple[Any, ...]) -> Any:
    """Indices of the elements that follow one on the last axis."""
    *outer, first = index
    return lambda lane: (*outer, first + lane)


class NormWarpTiles(WarpTiles):
    """Rows of the gated norm.

    Parameters
    ----------
    rows_per_worker, group : int
        Rows of a warp, one after the other, and warps of a block.
    vector : int
        Neighbouring elements of a thread.
    """

    def __init__(self, rows_per_worker: int, group: int, vector: int) -> None:
        super().__init__(WARP)
        self.rows_per_worker, self.group, self.vector = rows_per_worker, group, vector

    @staticmethod
    def turns(count: int) -> int:
        """Pieces of `count` that a thread has at most."""
        return (count + WARP - 1) // WARP

    def piece(self, turn: Any) -> Any:
        """The piece that is this thread's at a turn."""
        return turn * WARP + T.Cast("int32", self.lane)

    def has(self, turn: Any, count: int) -> Any:
        """Whether there is such a piece among `count`."""
        return True if count % WARP == 0 else self.piece(turn) < count

    @staticmethod
    def every(count: int) -> Any:
        """Loop over a thread's pieces, which stay in registers."""
        return T.unroll(count)

    @staticmethod
    def sum(part: Any, lanes: int) -> Any:
        """Sum of a thread's part."""
        total = part[0]
        for lane in range(1, lanes):
            total = total + part[lane]
        return total

    @staticmethod
    def total(acc: Any) -> None:
        """Sum of acc[0] over the warp."""
        for bit in (1, 2, 4, 8, 16):
            T.buffer_store(acc, acc[0] + T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), acc[0], bit, WARP, WARP), [0])

    def read(self, dst: Any, to: Any, source: Any, index: tuple[Any, ...], count: int) -> None:
        """Read `count` neighbouring elements in fp32."""

        def put(lane: Any, value: Any) -> None:
            T.buffer_store(dst, value, [to + lane])

        along = _along(index)
        either(aligned(source, *index, elements=count), lambda vector: self._take(source, along, count, vector, put))

    def write(self, dst: Any, index: tuple[Any, ...], source: Any, at: Any, count: int) -> None:
        """Write `count` neighbouring elements, rounded."""

        def get(lane: Any) -> Any:
            return source[at + lane]

        along = _along(index)
        either(aligned(dst, *index, elements=count), lambda vector: self._give(dst, along, count, vector, get))


@schedule("norm", "cuda")
@schedule("norm", "musa")
class NormGpu:
    """Gated norm: rows per warp, warps per block, elements at once."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per warp, warps per block, and elements of a thread that lie side by side."""
        del geometry
        return {"rows_per_worker": (1, 2, 4, 8), "group": (1, 2, 4, 8), "vector": (1, 2, 4)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """As long vectors as keep all threads of a warp busy, and enough warps for every multiprocessor at a thousand rows."""
        return {"rows_per_worker": 1, "group": 4, "vector": max(n for n in (1, 2, 4) if n == 1 or geometry.axis["D"] >= n * WARP)}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int = 1, group: int = 1, vector: int = 1, alone: bool = False) -> WarpTiles:
        """Threads along rows; `alone`, no knob, gives each thread a row: other languages than CUDA C have no shuffles."""
        if alone:
            return NormThreadTiles()
        # A row shorter than a vector is all there is.
        return NormWarpTiles(rows_per_worker, group, min(vector, 1 << (geometry.axis["D"].bit_length() - 1)))
