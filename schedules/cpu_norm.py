"""Loops of the gated norm on CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import CpuTiles, sum_lanes
from tvm_gdn.schedules.whole_rows import WholeRows


class NormTiles(WholeRows, CpuTiles):
    """Row blocks of the gated norm.

    Parameters
    ----------
    rows_per_worker : int
        Rows that one worker computes.
    vector : int
        Elements computed at once.
    """

    def __init__(self, rows_per_worker: int, vector: int) -> None:
        self.rows_per_worker, self.vector = rows_per_worker, vector

    @staticmethod
    def sum(part: Any, lanes: int) -> Any:
        """Sum of a vector."""
        return sum_lanes(part, lanes)
