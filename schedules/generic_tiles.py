"""Tile operations in plain scalar loops, for code generators that know no vectors: C, and CPUs without a schedule of their own.

Classes that stand before a family's tiles among the bases of a portable schedule. Their exp and log are those of the C library.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array
from tvm_gdn.schedules.cpu_chunk import ChunkTiles
from tvm_gdn.schedules.cpu_conv import ConvTiles
from tvm_gdn.schedules.cpu_fused_decode import FusedDecodeTiles
from tvm_gdn.schedules.cpu_tiles import BLOCK, Tile, ceil_div

from tvm_gdn.ops.tir.plain_tiles import PlainTiles


class Portable:
    """Functions of fp32 numbers, and sums, without vectors or knowledge of a number's bits."""

    exp, log, sigmoid = map(staticmethod, (PlainTiles.exp, PlainTiles.log, PlainTiles.sigmoid))

    @staticmethod
    def sum(part: Any, lanes: int) -> Any:
        """Sum of a vector's lanes."""
        return functools.reduce(operator.add, (part[i] for i in range(lanes)))


class PortableChunkTiles(Portable, ChunkTiles):
    """Tiles of the chunked rules: any alignment, blocks element by element, whole columns, nothing asked for ahead."""

    workers, worker = CpuTiles.workers, CpuTiles.worker

    def expect(self, *windows: Tile, write: bool = False, when: Any = None) -> None:
        """There is no portable way to ask."""

    def outputs(self, *tensors: tuple[Any, Any]) -> None:
        """Their memory is the caller's affair."""

    def first_line(self) -> Any:
        """Scalar code needs no alignment."""
        return T.int32(0)

    def _transpose(self, dst: Tile, src: Tile, rows: Any) -> None:
        with T.serial(ceil_div(src.rows if rows is None else rows, BLOCK)) as b, T.serial(src.cols) as c, T.serial(BLOCK) as i:
            dst.put(src.get(b * BLOCK + i, c), c, b, BLOCK, i)

    def invert_diagonal(self, dst: Tile, a: Tile, rows: Any) -> None:
        """When row k is final, it is subtracted from all rows below."""
        x = local_array(BLOCK, BLOCK)
        with T.serial(ceil_div(rows, BLOCK)) as b:
            with T.serial(BLOCK) as i, T.serial(BLOCK) as j:
                T.buffer_store(x, T.Select(i == j, T.float32(1), T.float32(0)), [i, j])
            with T.serial(BLOCK) as k, T.serial(BLOCK - 1 - k) as below, T.serial(BLOCK) as j:
                i = k + 1 + below
                T.buffer_store(x, x[i, j] - a.get(b * BLOCK + i, b, BLOCK, k) * x[k, j], [i, j])
            with T.serial(BLOCK) as i, T.serial(BLOCK) as j:
                dst.put(x[i, j], b * BLOCK + i, b, BLOCK, j)


class PortableColumns(Portable):
    """Taps and states of the convolution element by element."""

    def columns_in(self, to: Any, at: Any, source: Any, first: Any, count: int, pitch: int, width: int) -> None:
        """Read `width` rows of `count` elements as columns `pitch` apart."""
        with T.serial(width) as lane, T.serial(count) as k:
            T.buffer_store(to, T.Cast(to.dtype, source[first + lane * count + k]), [at + k * pitch + lane])

    def columns_out(self, to: Any, first: Any, source: Any, at: Any, count: int, pitch: int, width: int) -> None:
        """Write columns as rows: the inverse of `columns_in`."""
        with T.serial(width) as lane, T.serial(count) as k:
            T.buffer_store(to, T.Cast(to.dtype, source[at + k * pitch + lane]), [first + lane * count + k])


class PortableConvTiles(PortableColumns, ConvTiles):
    """Loops of the convolution."""


class PortableFusedDecodeTiles(PortableColumns, FusedDecodeTiles):
    """Loops of the fused decode step."""
