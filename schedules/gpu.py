"""What tile operations of GPUs have in common: warps, and moving elements.

Data moves in vectors where the address allows it and element by element where it does not: a tensor is the caller's memory, and
a misaligned vector would end the process's device context.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.plain_tiles import PlainTiles


class WarpTiles(PlainTiles):
    """What every algorithm on one warp per worker needs.

    Parameters
    ----------
    warp : int
        Threads that work together: a warp, or a part of one.
    """

    #: Checking slots on the host would synchronize the device; the kernel treats a slot out of range as padding.
    host_checks = False

    #: Workers of a block that run side by side, each on a warp of its own.
    group = 1

    #: Whether device code may call C functions; vectors are the code generator's own otherwise.
    functions = True

    def __init__(self, warp: int) -> None:
        self.warp = warp
        self.lane: Any = None

    def workers(self, count: Any) -> Any:
        """Blocks, of one worker each or of several."""
        return T.thread_binding((count + self.group - 1) // self.group, thread="blockIdx.x")

    def lanes(self) -> Any:
        """The threads of the block: of the worker's warp, or of several workers' warps."""
        return T.thread_binding(self.warp * self.group, thread="threadIdx.x")

    def enter(self, lane: Any) -> None:
        """Take the thread index that the following operations belong to."""
        self.lane = lane if self.group == 1 else lane % self.warp

    def worker(self, block: Any, lane: Any) -> Any:
        """Number of the worker that a thread of a block belongs to."""
        return block if self.group == 1 else block * self.group + lane // self.warp

    def inside(self, worker: Any, count: Any) -> Any:
        """Whether a worker is one of `count`: the last block may be larger than what is left."""
        return True if self.group == 1 else worker < count

    def scalars(self, count: int) -> Any:
        """fp32 scratch scalars, one set per thread."""
        return T.alloc_buffer((count,), "float32", scope="local")

    def _take(self, buffer: Any, at: Any, count: int, vector: bool, put: Any) -> None:
        """Call ``put(lane, value)`` for neighbours ``buffer[at(lane)]`` in fp32: `count` as a vector, or element by element."""
        raw, place = buffer, at
        if vector and self.functions:
            raw, place = T.alloc_buffer((count,), buffer.dtype, scope="local"), lambda lane: (lane,)
            move(T.address_of(raw[0]), T.address_of(buffer[at(0)]), count * itemsize(buffer))
        with (T.vectorized if vector and not self.functions else T.unroll)(count) as lane:
            put(lane, T.Cast("float32", raw[place(lane)]))

    def _give(self, buffer: Any, at: Any, count: int, vector: bool, get: Any) -> None:
        """Write ``get(lane)``, fp32 numbers, to neighbours ``buffer[at(lane)]``."""
        raw, place = buffer, at
        if vector and self.functions:
            raw, place = T.alloc_buffer((count,), buffer.dtype, scope="local"), lambda lane: (lane,)
        with (T.vectorized if vector and not self.functions else T.unroll)(count) as lane:
            T.buffer_store(raw, T.Cast(buffer.dtype, get(lane)), list(place(lane)))
        if raw is not buffer:
            put(T.address_of(buffer[at(0)]), T.address_of(raw[0]), count * itemsize(buffer))


def itemsize(buffer: Any) -> int:
    """Bytes of a buffer's element."""
    return 4 if str(buffer.dtype).endswith("32") else 2


def aligned(buffer: Any, *index: Any, elements: int) -> Any:
    """Whether a vector of so many elements may be read or written at an element of a buffer; of single ones False, known now."""
    if elements == 1:
        return False
    return T.call_extern("bool", "tvm_gdn_aligned", T.address_of(buffer[index]), elements * itemsize(buffer))


#: C functions that move so many aligned bytes. TVM's generator of CUDA C loads a vector where it can prove an index a multiple
#: of the vector's length, as no slot's is, and reads element by element otherwise.
MOVES = {4: "tvm_gdn_move_4", 8: "tvm_gdn_move_8", 16: "tvm_gdn_move"}
#: From registers to global memory.
PUTS = {8: "tvm_gdn_put_8", 16: "tvm_gdn_put"}


def short_sigmoid(lanes: int) -> Any:
    """Macro ``(x)``: the logistic function of `lanes` elements in place, for what is rounded to 16 bits."""

    @T.inline
    def sigmoid(x):
        for lane in T.unroll(lanes):
            x[lane] = T.call_extern("float32", "tvm_gdn_sigmoid", x[lane])

    return sigmoid


def either(condition: Any, emit: Any) -> None:
    """``emit(condition)``, for both outcomes where it is not known yet."""
    if isinstance(condition, bool):
        emit(condition)
        return
    with T.If(condition):
        with T.Then():
            emit(True)
        with T.Else():
            emit(False)


def move(to: Any, source: Any, size: int) -> None:
    """Move aligned bytes from one address to another."""
    T.evaluate(T.call_extern("int32", MOVES[size], to, source))


def put(to: Any, source: Any, size: int) -> None:
    """Move aligned bytes of registers to an address in global memory."""
    T.evaluate(T.call_extern("int32", PUTS.get(size, MOVES[size]), to, source))
