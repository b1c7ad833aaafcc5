"""What algorithms need whose blocks and threads are part of their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles
from tvm_gdn.schedules.gpu_fragments import WARP

Expr = Any


class GridTiles(WarpTiles):
    """Blocks, threads, and what they do together."""

    grid = True
    #: Whether a kernel's blocks may begin before the kernel ahead of it ends.
    early = False

    def __init__(self) -> None:
        super().__init__(WARP)

    def blocks(self, count: Expr) -> Any:
        """The blocks of a kernel."""
        return T.thread_binding(count, thread="blockIdx.x")

    def lanes(self, threads: int = WARP) -> Any:
        """The threads of a block."""
        return T.thread_binding(threads, thread="threadIdx.x")

    @staticmethod
    def sync() -> None:
        """A barrier of the block."""
        T.evaluate(T.tvm_storage_sync("shared"))

    def follow(self) -> None:
        """What the kernels ahead of this one wrote is there from now on."""
        if self.early:
            T.evaluate(T.call_extern("int32", "tvm_gdn_follow"))

    @staticmethod
    def next(buffer: Any, index: Expr) -> Any:
        """The number that stands there, which becomes one more."""
        return T.call_extern("int32", "tvm_gdn_next", T.address_of(buffer[index]))

    @staticmethod
    def reduce(buffer: Any, function: Callable[[Expr, Expr], Expr]) -> None:
        """The numbers of all threads of a warp as one."""
        for bit in (1, 2, 4, 8, 16):
            other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), buffer[0], bit, WARP, WARP)
            T.buffer_store(buffer, function(buffer[0], other), [0])

    @staticmethod
    def before(buffer: Any, lane: Expr) -> None:
        """In buffer[0] the sum of the warp's threads up to this one."""
        for step in (1, 2, 4, 8, 16):
            other = T.Bind(T.tvm_warp_shuffle_up(T.uint32(0xFFFFFFFF), buffer[0], step, WARP, WARP))
            T.buffer_store(buffer, buffer[0] + T.Select(lane >= step, other, T.Cast(buffer.dtype, 0)), [0])

    @staticmethod
    def of(buffer: Any, lane: Expr) -> Any:
        """The number of another thread of the warp."""
        return T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), buffer[0], lane, WARP, WARP)
