"""Tile operations of the fused decode step on CPUs: those of the recurrence, and the columns of a convolution."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_conv import ColumnTiles
from tvm_gdn.schedules.cpu_recurrent import RecurrentTiles


class FusedDecodeTiles(RecurrentTiles, ColumnTiles):
    """Tile operations of the token recurrence on a row that is convolved on the way."""
