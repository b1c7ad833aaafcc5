"""Design space of the convolution on NVIDIA and Moore Threads GPUs: a thread has a strip of channels and some tokens of them.

Neighbouring threads have neighbouring strips, which lie side by side in the layout of engines: a warp reads whole lines of a
token. A thread's inputs, taps and states move in vectors, and its last inputs stay in registers.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles, aligned, itemsize, move, short_sigmoid
from tvm_gdn.schedules.gpu_portable import LoopTiles
from tvm_gdn.schedules.gpu_strips import PIECE, StripColumns

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


class ConvStripTiles(StripColumns, LoopTiles):
    """Loops of the convolution, a strip of channels per thread.

    Parameters
    ----------
    tokens, vector : int
        Tokens and channels of a thread.
    ahead : int
        Tokens that it asks for at once.
    threads : int
        Threads of a block.
    short : bool
        Whether outputs have 16 bits.
    """

    def __init__(self, *, tokens: int, vector: int, ahead: int, threads: int, short: bool) -> None:
        super().__init__(threads)
        self.tokens, self.ahead, self.vector, self.channels, self.strip = tokens, ahead, vector, vector, vector
        self.sigmoid = short_sigmoid if short else WarpTiles.sigmoid

    def fit(self, *options: Any) -> Any:
        """Whether strips of two tensors, given with their tokens' strides, move as vectors from an index on."""
        *tensors, index, tokens = options
        found: Any = True
        for buffer, stride in tensors:
            regular = T.Or(tokens == 1, T.truncmod(stride, T.int64(self.vector)) == 0)
            found = T.And(found, T.And(regular, aligned(buffer, *index, elements=self.vector)))
        return found

    def ask(self, raw: Any, at: Any, source: Any, index: tuple[Any, ...], width: int) -> None:
        """Read a strip of a token as it is, which nothing waits for before it is used."""
        *outer, channel, token = index
        if width > 1:
            move(T.address_of(raw[at]), T.address_of(source[(*outer, channel, token)]), width * itemsize(source))
        else:
            T.buffer_store(raw, source[(*outer, channel, token)], [at])

    def take(self, to: Any, at: Any, source: Any, index: tuple[Any, ...], width: int) -> None:
        """Read a strip of a token, whose channels are the last axis but one."""
        *outer, channel, token = index
        self._take(
            source, lambda lane: (*outer, channel + lane, token), width, width > 1,
            lambda lane, x: T.buffer_store(to, x, [at + lane]),
        )  # fmt: skip

    def give(self, out: Any, index: tuple[Any, ...], values: Any, width: int) -> None:
        """Write a strip of a token."""
        *outer, channel, token = index
        self._give(out, lambda lane: (*outer, channel + lane, token), width, width > 1, lambda lane: values[lane])


@schedule("conv", "cuda")
@schedule("conv", "musa")
class ConvGpu:
    """Convolution: tokens and channels of a thread, tokens that it asks for at once, threads of a block."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """A decode step has few tokens, so that how many a thread takes does not matter."""
        many, longest = not geometry.attr.get("update"), ConvGpu._longest(geometry)
        return {
            "tokens": (16, 32, 64, 128) if many else (16,),
            "vector": tuple(n for n in (2, 4, 8) if n <= longest),
            "ahead": (1, 2, 4, 8) if many else (1,),
            "threads": (64, 128, 256),
        }

    @staticmethod
    def _longest(geometry: Geometry) -> int:
        """Channels of a token that move at once."""
        return PIECE // (4 if geometry.dtype["x"] == "float32" else 2)

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Vectors of 16 bytes in a step; four channels otherwise, so that a multiprocessor has room for more warps."""
        if geometry.attr.get("update"):
            return {"tokens": 16, "vector": cls._longest(geometry), "ahead": 1, "threads": 64}
        return {"tokens": 64, "vector": 4, "ahead": 8, "threads": 128}

    @staticmethod
    def tiles(geometry: Geometry, *, tokens: int, vector: int, ahead: int, threads: int) -> ConvStripTiles:
        """Strips of channels."""
        short = geometry.dtype["x"] != "float32"
        return ConvStripTiles(tokens=tokens, vector=vector, ahead=ahead, threads=threads, short=short)
