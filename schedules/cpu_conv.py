"""Loops of the convolution on CPUs."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array


class ColumnTiles(CpuTiles):
    """Small matrices in memory, such as taps and states of a convolution, as columns."""

    def array(self, count: int, dtype: str) -> Any:
        """Scratch of a worker."""
        return local_array(count, dtype=dtype)

    def columns_in(self, to: Any, at: Any, source: Any, first: Any, count: int, pitch: int, width: int) -> None:
        """Read `width` rows of `count` elements, contiguous from `first` on, as columns `pitch` apart.

        One load of all and shuffles: loads that jump from row to row are one instruction an element.
        """
        rows = source[_ramp(first, width * count)]
        for k in range(count):
            column = rows if count == 1 else T.Shuffle([rows], [k + lane * count for lane in range(width)])
            T.buffer_store(to, T.Cast(_vector(to.dtype, width), column), [_ramp(at + k * pitch, width)])

    def columns_out(self, to: Any, first: Any, source: Any, at: Any, count: int, pitch: int, width: int) -> None:
        """Write columns as rows: the inverse of `columns_in`."""
        columns = [source[_ramp(at + k * pitch, width)] for k in range(count)]
        order = [k * width + lane for lane in range(width) for k in range(count)]
        rows = columns[0] if count == 1 else T.Shuffle(columns, order)
        T.buffer_store(to, T.Cast(_vector(to.dtype, width * count), rows), [_ramp(first, width * count)])


class ConvTiles(ColumnTiles):
    """Loops of the convolution.

    Parameters
    ----------
    tokens, channels : int
        Tokens and channels of one worker.
    vector : int
        Channels or tokens computed at once.
    """

    #: Inputs are read again for every token that needs them: from the first cache.
    ahead = 0

    def __init__(self, tokens: int, channels: int, vector: int) -> None:
        self.tokens, self.channels, self.vector = tokens, channels, vector


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _ramp(first: Any, lanes: int) -> Any:
    return first if lanes == 1 else T.ramp(first, T.int64(1), lanes)
