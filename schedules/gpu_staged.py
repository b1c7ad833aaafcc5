"""Tile operations of one-token steps on GPUs with states in shared memory, where copies that nobody waits for bring them.

Each thread copies, in pieces of 16 bytes, what it computes on and nobody else does: no barrier is needed. A state costs no
registers, so that more warps of a multiprocessor have theirs under way. States keep their dtype in shared memory and are rounded
to it when they are written back there, which is why one token is all that a call may have.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import either, itemsize, move
from tvm_gdn.schedules.gpu_registers import RecurrentWarpTiles

#: Bytes that are copied at once.
PIECE = 16


class StagedWarpTiles(RecurrentWarpTiles):
    """Tile operations of the packed decode step.

    Parameters
    ----------
    pool : str
        Dtype of the states.
    options
        Those of `RecurrentWarpTiles`.
    """

    #: Copies that nobody waits for go first.
    state_first = True

    def __init__(self, K: int, V: int, *, pool: str, **options: Any) -> None:
        super().__init__(K, V, **options)
        self.pool = pool
        self.piece = PIECE // (4 if pool == "float32" else 2)
        if math.gcd(self.piece, self.row_group if self.v_first else self.columns) < self.piece:
            raise ValueError(
                f"{self.columns} columns of {self.row_count} rows per thread are no pieces of {PIECE} bytes of {pool}"
            )
        self.pieces = self.row_count * self.columns // self.piece

    def enter(self, lane: Any) -> None:
        """Take the thread index that the following operations belong to."""
        super().enter(lane)
        self.thread = lane

    def state(self) -> Any:
        """The block's memory for states: neighbouring threads have neighbouring pieces."""
        return T.alloc_buffer((self.pieces, self.warp * self.group, self.piece), self.pool, scope="shared.dyn")

    def load(self, W: Any, view: Any) -> None:
        """Ask for this thread's share of a state tile."""

        def copy(vector: bool) -> None:
            for number, (_, at, count) in enumerate(self._vectors(view)):
                if vector:
                    to = T.address_of(W[number, self.thread, 0])
                    T.evaluate(T.call_extern("int32", "tvm_gdn_copy", to, T.address_of(view[at(0)]), 1))
                    continue
                with T.serial(count) as lane:
                    T.buffer_store(W, view[at(lane)], [number, self.thread, lane])

        either(self._fits(view), copy)

    def store(self, view: Any, W: Any) -> None:
        """Write this thread's share of a state tile."""

        def copy(vector: bool) -> None:
            for number, (_, at, count) in enumerate(self._vectors(view)):
                if vector:
                    move(T.address_of(view[at(0)]), T.address_of(W[number, self.thread, 0]), count * itemsize(view))
                    continue
                with T.serial(count) as lane:
                    T.buffer_store(view, W[number, self.thread, lane], list(at(lane)))

        either(self._fits(view), copy)

    def _zero(self) -> Any:
        def zero(W: Any) -> None:
            with T.serial(self.pieces) as number, T.serial(self.piece) as lane:
                T.buffer_store(W, T.Cast(self.pool, T.float32(0)), [number, self.thread, lane])

        return zero

    def _over(self, W: Any, function: Any, *, write: bool) -> None:
        """Call ``function(i, j, w)`` for every element, w in fp32; with `write` what it returns is the element from now on."""
        raw = T.alloc_buffer((self.piece,), self.pool, scope="local")
        for number, (place, _, count) in enumerate(self._vectors(W)):
            shared = T.address_of(W[number, self.thread, 0])
            move(T.address_of(raw[0]), shared, PIECE)
            for lane in range(count):
                i, j = place(lane)
                new = function(i, j, T.Cast("float32", raw[lane]))
                if write:
                    T.buffer_store(raw, T.Cast(self.pool, new), [lane])
            if write:
                move(shared, T.address_of(raw[0]), PIECE)

    def _gemv(self) -> Any:
        return self._product

    def _ger_gemv(self) -> Any:
        return self._update

    def _product(self, acc: Any, W: Any, x: Any) -> None:
        """Product acc = W^T x, when the state is here."""
        T.evaluate(T.call_extern("int32", "tvm_gdn_copied"))
        for j in range(self.columns):
            T.buffer_store(acc, T.float32(0), [j])
        self._over(W, lambda i, j, w: T.buffer_store(acc, acc[j] + w * x[i], [j]), write=False)
        for j in range(self.columns):
            self.sum_rows(acc, j)

    def _update(self, acc: Any, W: Any, d: Any, x: Any, u: Any, y: Any) -> None:
        """W = diag(d) W + x u^T; acc = W^T y."""
        new = self.scalars(1)

        def update(i: int, j: int, w: Any) -> Any:
            T.buffer_store(new, w * d[i] + x[i] * u[j], [0])
            T.buffer_store(acc, acc[j] + new[0] * y[i], [j])
            return new[0]

        for j in range(self.columns):
            T.buffer_store(acc, T.float32(0), [j])
        self._over(W, update, write=True)
        for j in range(self.columns):
            self.sum_rows(acc, j)
