"""Row blocks of the gating operator on CPUs."""

from __future__ import annotations

from tvm_gdn.schedules.cpu import CpuTiles


class GatingTiles(CpuTiles):
    """Row blocks of the gating operator.

    Parameters
    ----------
    rows_per_worker : int
        Rows that one worker computes.
    vector : int
        Heads computed at once.
    """

    def __init__(self, rows_per_worker: int, vector: int) -> None:
        self.rows_per_worker, self.vector = rows_per_worker, vector
