"""Tile operations of the fused decode step on CPUs: those of the recurrence, and the columns of a convolution."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu_conv import ColumnTiles
from tvm_gdn.schedules.cpu_recurrent import RecurrentTiles


class FusedDecodeTiles(RecurrentTiles, ColumnTiles):
    """Tile operations of the token recurrence on a row that is convolved on the way."""

    #: Tiles of value columns at the same time; whether several threads convolve them.
    beside, lines_shared = 1, False

    @staticmethod
    def channels(count: int) -> Any:
        """Loop over this thread's share of channels."""
        return T.serial(count)

    @staticmethod
    def channel(i: Any) -> Any:
        """The channel of a turn of that loop."""
        return i

    @staticmethod
    def line(vector: Any, count: int) -> Any:
        """Where the channels of a vector are written."""
        del count
        return vector

    @staticmethod
    def mate() -> Any:
        """Which of the tiles at the same time is this thread's."""
        return T.int64(0)

    def take_columns(self, vector: Any, line: Any) -> None:
        """They are in the vector."""

    def sync(self) -> None:
        """One thread sees what it wrote."""
