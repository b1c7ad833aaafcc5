"""A ring of stages in shared memory through which the operands of the experts' products pass on GPUs.

Rows come in pieces of 16 bytes without waiting (cp.async where there is PTX), where tensors and their rows begin at multiples
of 16 bytes; element by element otherwise. What lies outside of a tensor is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu_fragments import ITEMSIZE, ceil_div, when

Expr = Any
SIZES = {**ITEMSIZE, "int32": 4, "int8": 1}


@dataclass(frozen=True)
class Rows:
    """What one operand takes from a tensor.

    Attributes
    ----------
    buffer : tvm buffer
        The tensor.
    count, length : int
        Rows in a stage, and elements of each.
    stride : int
        Elements from one row of a stage to the next.
    limit : int
        Elements that a row of the tensor has.
    index : callable
        ``index(i, k, step)``: the indices of element k of row i in the tensor; inside of it for rows that are not there too.
        `step` numbers the pieces that a thread copies in a stage; None where it goes element by element.
    there : callable
        ``there(i)``: whether row i is there; True where all rows of all stages are.
    aligned : bool or expression
        Whether all rows begin at multiples of 16 bytes.
    swizzled : bool
        Whether the 16-byte pieces of a row, 128 bytes of a stage, change places by the row's number.
    ahead : bool
        Whether the cache is asked for 256 bytes where a piece is: the next stage's are there then.
    sparse : bool
        Whether rows that are not there are left as they are.
    """

    buffer: Any
    count: int
    length: int
    stride: int
    limit: int
    index: Callable[[Expr, Expr, int | None], tuple[Expr, ...]]
    there: Callable[[Expr], Expr]
    aligned: Expr
    swizzled: bool = False
    ahead: bool = False
    sparse: bool = False

    def place(self, i: Expr, k: Expr) -> Expr:
        """Where element k of row i stands in a stage."""
        if not self.swizzled:
            return i * self.stride + k
        lanes = 16 // SIZES[self.buffer.dtype]
        return i * self.stride + T.bitwise_xor(k // lanes, i % 8) * lanes + k % lanes

    @property
    def size(self) -> int:
        """Bytes of a stage."""
        return self.count * self.stride * SIZES[self.buffer.dtype]


def room(size: int, dtype: str, align: int) -> tuple[Any, Expr]:
    """Dynamic shared memory for so many bytes, and how many to skip so that they begin at a multiple."""
    # TVM 0.27 asks the driver for as many elements of the first view's dtype as the memory has of its own.
    memory = T.alloc_buffer((ceil_div(size + align - 1, SIZES[dtype]),), dtype, scope="shared.dyn")
    if align == 1:
        return memory, 0
    return memory, T.Bind(T.call_extern("int32", "tvm_gdn_to_multiple", T.address_of(memory[0]), align))


class Ring:
    """Stages of several operands.

    Parameters
    ----------
    threads, stages : int
        Threads of a block; steps whose operands are in shared memory at the same time.
    operands : Rows
        What a stage holds, one after the other.
    align : int
        Bytes at whose multiple the memory begins.
    memory : tuple, optional
        What `room` gave for it.
    """

    def __init__(
        self, lane: Expr, threads: int, stages: int, operands: tuple[Rows, ...], align: int = 1,
        memory: tuple[Any, Expr] | None = None,
    ) -> None:  # fmt: skip
        self.lane, self.threads, self.stages, self.operands = lane, threads, stages, operands
        self.stage = sum(rows.size for rows in operands)
        total = self.stage * stages + align - 1
        self.views, before = [], 0
        whole, self.skip = memory or room(self.stage * stages, operands[0].buffer.dtype, align)
        for rows in operands:
            size = SIZES[rows.buffer.dtype]
            view = T.decl_buffer((total // size,), rows.buffer.dtype, data=whole.data, scope="shared.dyn")
            self.views.append((view, before // size, self.stage // size))
            before += rows.size

    def at(self, number: int, slot: Expr) -> tuple[Any, Expr]:
        """Where an operand's rows begin in a stage: a view of the memory and an index."""
        view, before, stage = self.views[number]
        return view, before + self.skip // SIZES[view.dtype] + slot * stage

    def number(self, operand: int, slot: Expr, place: Expr) -> Expr:
        """Element of an operand in a stage, in fp32."""
        view, base = self.at(operand, slot)
        return T.Cast("float32", view[base + place])

    def word(self, operand: int, slot: Expr, place: Expr) -> Expr:
        """The same of an operand of words, as it is."""
        view, base = self.at(operand, slot)
        return view[base + place]

    def fetch(self, step: Expr, slot: Expr, numbers: tuple[int, ...] = (1, 0)) -> None:
        """Ask for operands of a step: weights first, which take longest and whose place is known first."""
        for number in numbers:
            rows = self.operands[number]
            view, base = self.at(number, slot)
            first = T.Bind(T.Cast("int32", step) * rows.length)

            def copy(kind: Any = None, rows: Rows = rows, view: Any = view, base: Expr = base, first: Expr = first) -> None:
                (self._pieces if kind else self._elements)(rows, view, base, first)

            if rows.aligned is True or rows.aligned is False:
                copy(rows.aligned)
                continue
            with T.If(rows.aligned):
                with T.Then():
                    copy(True)
                with T.Else():
                    copy(False)

    def _pieces(self, rows: Rows, view: Any, base: Expr, first: Expr) -> None:
        lanes = 16 // SIZES[rows.buffer.dtype]
        across = rows.length // lanes
        total = rows.count * across
        for step in range(ceil_div(total, self.threads)):
            index = T.Bind(T.Cast("int32", self.lane) + step * self.threads)
            i, k = index // across, index % across * lanes

            def piece(i: Expr = i, k: Expr = k, step: int = step) -> None:
                there, at = rows.there(i), first + k
                if rows.limit % rows.length:
                    there, at = T.And(there, at < rows.limit), T.Select(at < rows.limit, at, 0)
                source, to = T.address_of(rows.buffer[rows.index(i, at, step)]), T.address_of(view[base + rows.place(i, k)])
                copy = "tvm_gdn_copy_ahead" if rows.ahead else "tvm_gdn_copy"
                whole = there is True or (rows.sparse and not rows.limit % rows.length)
                T.evaluate(T.call_extern("int32", copy, to, source, 1 if whole else T.Cast("int32", there)))

            inside = True if (step + 1) * self.threads <= total else index < total
            when(T.And(inside, rows.there(i)) if rows.sparse else inside, piece)

    def _elements(self, rows: Rows, view: Any, base: Expr, first: Expr) -> None:
        total = rows.count * rows.length
        with T.serial(ceil_div(total, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, k = index // rows.length, index % rows.length

            def element() -> None:
                place = base + rows.place(i, k)
                T.buffer_store(view, T.Cast(view.dtype, 0), [place])
                inside = T.And(rows.there(i), first + k < rows.limit)
                when(inside, lambda: T.buffer_store(view, rows.buffer[rows.index(i, first + k, None)], [place]))

            when(True if total % self.threads == 0 else index < total, element)

    def run(
        self, steps: int, compute: Callable[[Expr, Expr], None], *, publish: Callable[[], None] | None = None,
        finish: Callable[[], None] | None = None, follow: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Call ``compute(step, slot)`` for every step, the operands of the next `stages` - 1 being under way.

        `publish` is called by every thread before the barrier behind which others use what it copied. With `finish`, `compute`
        only begins, and `finish` waits for it; the next operands are asked for in between. `follow` is called between the first
        weights and rows.
        """
        ahead = self.stages - 1
        if follow:
            for step in range(min(ahead, steps)):
                self.fetch(step, step, (1,))
            follow()
        for step in range(ahead):
            if step < steps:
                self.fetch(step, step, (0,) if follow else (1, 0))
            T.evaluate(T.call_extern("int32", "tvm_gdn_group"))
        with T.serial(steps) as step:
            T.evaluate(T.call_extern("int32", "tvm_gdn_arrived", ahead - 1))
            if publish:
                publish()
            T.evaluate(T.tvm_storage_sync("shared"))
            number, slot = T.Cast("int32", step), T.Bind(T.Cast("int32", step % self.stages))
            if finish:
                compute(number, slot)
            # The barrier also says that all threads are done with the step whose stage is filled now.
            with T.If(step + ahead < steps), T.Then():
                self.fetch(step + ahead, T.Bind((step + ahead) % self.stages))
            T.evaluate(T.call_extern("int32", "tvm_gdn_group"))
            if finish:
                finish()
            else:
                compute(number, slot)
