"""Routing of a mixture of experts on CPUs: row blocks, vectors of experts."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array
from tvm_gdn.schedules.generic_tiles import Portable

from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry


class RouteTiles(CpuTiles):
    """Loops of the routing operators.

    Parameters
    ----------
    rows_per_worker : int
        Tokens of one piece of work.
    vector : int
        Experts compared at once.
    """

    grid = False

    def __init__(self, rows_per_worker: int = 1, vector: int = 1) -> None:
        self.rows_per_worker, self.vector = rows_per_worker, vector

    def alone(self) -> None:
        """What follows runs on the calling thread, as it would anyway."""

    @staticmethod
    def every(count: int) -> Any:
        """Loop over elements that do not depend on one another."""
        return T.vectorized(count)

    @staticmethod
    def across(count: int) -> Any:
        """Loop over the elements of a vector."""
        return T.vectorized(count)

    @staticmethod
    def each(count: int) -> Any:
        """Loop over pieces of work."""
        return T.serial(count)

    @staticmethod
    def sync() -> None:
        """One thread sees what it wrote."""

    @staticmethod
    def mine(j: Any) -> bool:
        """A row has one thread."""
        del j
        return True

    @staticmethod
    def fold(total: Any, part: Any, function: Any) -> None:
        """All elements of a vector as one, in total[0]."""
        T.buffer_store(total, part[0], [0])
        with T.serial(int(part.shape[0]) - 1) as lane:
            T.buffer_store(total, function(total[0], part[lane + 1]), [0])

    @staticmethod
    def best(winner: Any, best: Any, where: Any) -> None:
        """Of all elements of a vector the largest, of equals the one with the least number: its number."""
        with T.serial(int(best.shape[0]) - 1) as lane:
            with (
                T.If(T.Or(best[lane + 1] > best[0], T.And(best[lane + 1] == best[0], where[lane + 1] < where[0]))),
                T.Then(),
            ):
                T.buffer_store(best, best[lane + 1], [0])
                T.buffer_store(where, where[lane + 1], [0])
        T.buffer_store(winner, where[0], [0])

    @staticmethod
    def strike(buffer: Any, number: Any, value: int) -> None:
        """Write the element with that number."""
        T.buffer_store(buffer, T.int32(value), [number[0]])

    @staticmethod
    def spread(count: int, dtype: str = "float32") -> Any:
        """Scratch of all lanes."""
        return local_array(count, dtype=dtype)

    def integers(self, count: int) -> Any:
        """int32 scratch."""
        return local_array(count, dtype="int32")


class PortableRouteTiles(Portable, RouteTiles):
    """Scalar loops."""


class _Serial(NoKnobs):
    """Scalar loops."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableRouteTiles:
        """One row per piece of work."""
        del geometry
        return PortableRouteTiles()


@schedule("moe_sort", "generic-cpu")
class SortGeneric(_Serial):
    """Counting sort: serial."""


@schedule("moe_stats", "generic-cpu")
class StatsGeneric(_Serial):
    """Load statistics: serial."""


@schedule("moe_route", "generic-cpu")
class RouteGeneric(_Serial):
    """Routing, expert by expert."""


@schedule("moe_route", "x86")
class RouteX86:
    """Routing: vectors of experts; the knob is how many tokens make one piece of work."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per worker, experts at once."""
        del geometry
        return {"rows_per_worker": (4, 16, 64), "vector": (8, 16)}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Some 10 us of work per piece."""
        del geometry
        return {"rows_per_worker": 16, "vector": 16}

    @staticmethod
    def tiles(geometry: Geometry, *, rows_per_worker: int, vector: int) -> RouteTiles:
        """Vectors of experts over parallel row blocks."""
        del geometry
        return RouteTiles(rows_per_worker, vector)
