"""Loops of the convolution on CPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu import CpuTiles, local_array


class ConvTiles(CpuTiles):
    """Loops of the convolution.

    Parameters
    ----------
    tokens, channels : int
        Tokens and channels of one worker.
    vector : int
        Channels or tokens computed at once.
    """

    def __init__(self, tokens: int, channels: int, vector: int) -> None:
        self.tokens, self.channels, self.vector = tokens, channels, vector

    def integers(self, count: int) -> Any:
        """int64 scratch scalars."""
        return local_array(count, dtype="int64")
