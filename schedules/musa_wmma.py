"""Products by `mtmusa::wmma`: 16 x 16 x 16 on bf16 or fp16, fp32 sums, as statements of TVM that its generator of CUDA C knows.

Which thread of a warp has which number of a fragment is the vendor's secret. So fragments are filled with zeros, loaded from
shared memory, multiplied and put down in shared memory, and nothing else; what needs the place of a number reads it there.
Addresses of fragments are multiples of 32 bytes, rows of 16.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import move
from tvm_gdn.schedules.gpu_fragments import BLOCK, Expr, fragment_elements

#: fp32 numbers from one row to the next where sums are put down: the eight rows of which threads read at a time share no bank.
ROW = BLOCK + 4
#: fp32 numbers of such a place.
ROOM = BLOCK * ROW
#: Bytes at whose multiple fragments begin.
ALIGN = 32
_SHAPE = (BLOCK, BLOCK, BLOCK)


def fragments(use: str, dtype: str, count: int) -> Any:
    """So many fragments of a warp; `use` is ``"matrix_a"``, ``"matrix_b"`` or ``"accumulator"``."""
    return T.alloc_buffer((count * BLOCK * BLOCK,), dtype, scope=f"wmma.{use}")


def clear(sums: Any, at: int) -> None:
    """Zeros."""
    T.evaluate(T.tvm_fill_fragment(sums.data, *_SHAPE, at, T.float32(0)))


def load(matrices: Any, at: int, memory: Any, place: Expr, stride: int, *, turned: bool) -> None:
    """An operand's fragment from `memory`, which has its own dtype; `turned`: the other way round than products read it.

    All fragments of one buffer are loaded the same way round. The address is an `access_ptr`: with `address_of` TVM 0.27 takes
    the statement for one without effect. That wants memory that was allocated in this dtype, not a view of it.
    """
    address = memory.access_ptr("r", offset=place)
    layout = "col_major" if turned else "row_major"
    T.evaluate(T.tvm_load_matrix_sync(matrices.data, *_SHAPE, at, address, stride, layout))


def multiply(sums: Any, at: int, left: Any, at_left: int, right: Any, at_right: int) -> None:
    """Add a product to the sums."""
    T.evaluate(T.tvm_mma_sync(sums.data, at, left.data, at_left, right.data, at_right, sums.data, at))


def put_down(sums: Any, at: int, memory: Any, place: Expr) -> None:
    """Sums into fp32 memory, in rows of `ROW`; other threads of the warp see them behind its next barrier."""
    T.evaluate(T.tvm_store_matrix_sync(sums.data, *_SHAPE, at, T.address_of(memory[place]), ROW, "row_major"))


def pick_up(numbers: Any, at: int, memory: Any, place: Expr, lane: Expr) -> None:
    """This thread's eight numbers of what was put down, in the places that two fragments of 16 x 8 side by side have."""
    for half in range(2):
        for pair in (0, 2):
            i, j = fragment_elements(lane, 0, half)[pair]
            move(T.address_of(numbers[at + half * 4 + pair]), T.address_of(memory[place + i * ROW + j]), 8)
