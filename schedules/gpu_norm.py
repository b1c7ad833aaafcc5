"""Design space of the gated norm on GPUs: a warp or a half of one per row, neighbouring threads on neighbouring vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles, aligned, either, short_sigmoid
from tvm_gdn.schedules.gpu_portable import NormThreadTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

WARP = 32
#: Bytes that move at once at most.
PIECE = 16


def _along(index: tuple[Any, ...]) -> Any:
    """Indices of the elements that follow one on the last axis."""
    *outer, first = index
    return lambda lane: (*outer, first + lane)


class NormWarpTiles(WarpTiles):
    """Rows of the gated norm.

    Parameters
    ----------
    rows_per_worker, group : int
        Rows of a team, one after the other, and warps of a block.
    vector : int
        Neighbouring elements of a thread.
    team : int
        Threads of a row, a power of two: a warp or a part of one.
    short : bool
        Whether outputs have 16 bits.
    functions : bool
        Whether device code may call C functions; vectors are the code generator's own otherwise.
    """

    #: A row's gate is on its way while its squares are summed.
    gate_early = True

    def __init__(
        self, rows_per_worker: int, group: int, vector: int, *, team: int = WARP, short: bool = False, functions: bool = True
    ) -> None:
        super().__init__(team)
        self.rows_per_worker, self.group, self.vector = rows_per_worker, group * WARP // team, vector
        self.functions = functions
        self.sigmoid = short_sigmoid if short and functions else WarpTiles.sigmoid

    def enter(self, lane: Any) -> None:
        """Take the thread index that the following operations belong to."""
        super().enter(lane)
        self.thread = lane

    @staticmethod
    def in_register(number: Any) -> Any:
        """An expression with a name is computed wherever it is used."""
        kept = T.alloc_buffer((1,), "int64", scope="local")
        T.buffer_store(kept, number, [0])
        return kept[0]

    @staticmethod
    def lane_loop(count: int) -> Any:
        """Loop over neighbouring elements, which are registers of one thread."""
        return T.unroll(count)

    def turns(self, count: int) -> int:
        """Pieces of `count` that a thread has at most."""
        return (count + self.warp - 1) // self.warp

    def piece(self, turn: Any) -> Any:
        """The piece that is this thread's at a turn."""
        return turn * self.warp + T.Cast("int32", self.lane)

    def has(self, turn: Any, count: int) -> Any:
        """Whether there is such a piece among `count`."""
        return True if count % self.warp == 0 else self.piece(turn) < count

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

    def total(self, acc: Any) -> None:
        """Sum of acc[0] over the row's threads."""
        mask, bit = T.uint32(0xFFFFFFFF), 1
        if self.warp < WARP:
            # The others of the warp may have no row.
            first = T.Cast("uint32", self.thread % WARP // self.warp * self.warp)
            mask = T.shift_left(T.uint32((1 << self.warp) - 1), first)
        while bit < self.warp:
            T.buffer_store(acc, acc[0] + T.tvm_warp_shuffle_xor(mask, acc[0], bit, self.warp, WARP), [0])
            bit *= 2

    def settled_rows(self, places: tuple[Any, ...], further: tuple[Any, ...], emit: Callable[[bool], None]) -> None:
        """One test for all that a row moves."""
        rows = [found for buffer, index, stride in places for found in self._regular(buffer, index, stride)]
        if self.vector == 1 or any(found is False for found in rows):
            emit(False)
            return

        def choose(fits: bool) -> None:
            self.fits = True if fits else None
            emit(fits)
            self.fits = None

        condition: Any = True
        for found in (*rows, *further):
            condition = found if condition is True else condition if found is True else T.And(condition, found)
        either(condition, choose)

    def _regular(self, buffer: Any, index: tuple[Any, ...], stride: Any) -> tuple[Any, Any]:
        """Whether rows that are `stride` elements apart begin at vectors."""
        apart = stride % self.vector == 0 if isinstance(stride, int) else T.truncmod(stride, T.int64(self.vector)) == 0
        return apart, aligned(buffer, *index, elements=self.vector)

    def _vectors(self, buffer: Any, index: tuple[Any, ...], count: int) -> Any:
        """Whether `count` neighbours move as a vector."""
        return self.fits if self.fits and count > 1 else aligned(buffer, *index, elements=count)

    def read(self, dst: Any, to: Any, source: Any, index: tuple[Any, ...], count: int) -> None:
        """Read `count` neighbouring elements in fp32."""

        def put(lane: Any, value: Any) -> None:
            T.buffer_store(dst, value, [to + lane])

        along = _along(index)
        either(self._vectors(source, index, count), lambda vector: self._take(source, along, count, vector, put))

    def write(self, dst: Any, index: tuple[Any, ...], source: Any, at: Any, count: int) -> None:
        """Write `count` neighbouring elements, rounded."""

        def get(lane: Any) -> Any:
            return source[at + lane]

        along = _along(index)
        either(self._vectors(dst, index, count), lambda vector: self._give(dst, along, count, vector, get))


def _power(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()


@schedule("norm", "cuda")
@schedule("norm", "musa")
class NormGpu:
    """Gated norm: rows per warp, warps per block, elements at once."""

    #: Elements that move at once at most, None where the dtype decides it; whether device code may call C functions.
    widest: int | None = None
    functions = True

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per team of threads, warps per block, and elements of a thread that lie side by side."""
        longest = cls._longest(geometry)
        return {"rows_per_worker": (1, 2, 4, 8), "group": (1, 2, 4, 8), "vector": tuple(n for n in (1, 2, 4, 8) if n <= longest)}

    @classmethod
    def _longest(cls, geometry: Geometry) -> int:
        """Elements of the widest dtype that move at once, and that a row has."""
        names = {geometry.dtype[name] for name in ("x", "z", "weight") if name in geometry.dtype}
        usual = PIECE // (4 if "float32" in names else 2)
        return min(cls.widest or usual, usual, 1 << (geometry.axis["D"].bit_length() - 1))

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Vectors of 16 bytes, and enough warps for every multiprocessor at a thousand rows."""
        return {"rows_per_worker": 1, "group": 4, "vector": cls._longest(geometry)}

    @classmethod
    def tiles(
        cls, geometry: Geometry, *, rows_per_worker: int = 1, group: int = 1, vector: int = 1, alone: bool = False
    ) -> WarpTiles:
        """Threads along rows; `alone`, no knob, gives each thread a row: other languages than CUDA C have no shuffles."""
        if alone:
            return NormThreadTiles()
        team = min(WARP, _power(max(1, geometry.axis["D"] // vector)))
        short = geometry.dtype["x"] != "float32"
        return NormWarpTiles(rows_per_worker, group, vector, team=team, short=short, functions=cls.functions)


@schedule("norm", "rocm")
class NormRocm(NormGpu):
    """Vectors are the code generator's own: it takes no C functions, and has none longer than four of 16 bits."""

    widest, functions = 4, False
