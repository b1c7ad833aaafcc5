"""Tile operations of one-token steps on GPUs whose copy engine moves whole states between memory and shared memory (sm_90).

A block takes a head. One thread asks for its state, which lies in the pool as a whole, and an mbarrier says when a part of it has
arrived: lines are read and written whole and in their order, and no register and no issue slot goes into it. What belongs to a
row of the state (k, q) or to a column (v, u, o) belongs to one thread each, and is shown to the others in shared memory.

In shared memory the state lies as in the pool. A thread computes on pieces of 16 bytes, which neighbours have side by side, so
that there are no bank conflicts: K-first, on the same columns of some rows, and the partial sums of a product meet in shared
memory; V-first, on the same rows of some columns, and they meet in shuffles that leave every thread the sum of its own column.

A state that does not begin at a multiple of 16 bytes is moved by element, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles, aligned, either, itemsize, move

#: Threads of a warp; elements of fp32 that move at once, which are also the rows of a thread that are neighbours.
WARP, FOUR = 32, 4
#: Bytes that move at once; bytes of shared memory of a block, two of which share a multiprocessor.
PIECE, MEMORY = 16, 113 * 1024


class BulkTiles(WarpTiles):
    """Tile operations of a head.

    Parameters
    ----------
    K, V : int
        State rows and columns.
    pool : str
        Dtype of the states.
    threads : int
        Threads of a block, whole warps; divides K and V.
    pieces : int
        Copies of a state, each with a barrier of its own: a product begins when the first is here.
    channel_gate : bool
        Whether every row has a gate of its own.
    """

    direct = False
    #: Copies that nobody waits for go first.
    state_first = True

    def __init__(self, K: int, V: int, *, pool: str, threads: int, pieces: int, channel_gate: bool) -> None:
        super().__init__(threads)
        if threads % WARP or K % threads or V % threads:
            raise ValueError(f"{threads} threads do not divide {K} rows and {V} columns, or are no whole warps")
        self.K, self.V, self.v_tile = K, V, V
        self.pool, self.threads, self.pieces, self.channel_gate = pool, threads, pieces, channel_gate
        self.piece = PIECE // (4 if pool == "float32" else 2)
        self._map()
        # What threads show each other is one allocation: TVM lets those share memory of which it sees that one is read for the
        # last time before the other is written, and it does not see that other threads read later.
        sizes = {"dx": K, "x": K, "y": K, "u": V, **self._more()}
        self.begin, self.sums, self.turn = {}, 0, 0
        for name, size in sizes.items():
            self.begin[name], self.sums = self.sums, self.sums + size
        self.shared = self.sums + 2 * threads // WARP
        needed = K * V * PIECE // self.piece + 4 * self.shared + 8 * pieces
        if needed > MEMORY:
            raise ValueError(f"a state of {K} x {V} {pool} needs {needed} bytes of shared memory, a block has {MEMORY}")

    def _map(self) -> None:
        """Who computes on what."""
        #: Threads side by side on a row, and threads one below the other.
        self.across = self.V // self.piece
        self.teams = self.threads // self.across
        if not self.teams or self.threads % self.across or self.K % (self.teams * FOUR * self.pieces):
            raise ValueError(f"{self.threads} threads cannot share {self.K} rows in {self.pieces} pieces")
        #: Teams of a warp, whose sums meet in shuffles, and sums that meet in shared memory.
        self.beside = max(1, WARP // self.across)
        self.parts = self.teams // self.beside

    def rows(self, count: int) -> Any:
        """Loop over the rows that are this thread's."""
        return T.unroll(count // self.threads)

    cols = rows

    def row(self, i: Any) -> Any:
        """Index on the K axis of the thread's row i."""
        return i * self.threads + self.lane

    col = row

    def read(self, dst: Any, buffer: Any, *index: Any) -> None:
        """This thread's rows of K elements of a tensor from `index` on."""
        *outer, first = index
        for i in range(self.K // self.threads):
            T.buffer_store(dst, T.Cast("float32", buffer[(*outer, first + self.row(i))]), [i])

    def k_vector(self) -> Any:
        """This thread's rows of an fp32 vector."""
        return self.scalars(self.K // self.threads)

    def v_vector(self) -> Any:
        """This thread's columns of an fp32 vector."""
        return self.scalars(self.V // self.threads)

    def view(self, buffer: Any, offset: Any, j0: Any) -> Any:
        """One head's state in a larger tensor, `offset` elements in, as it lies in memory."""
        del j0
        return T.decl_buffer((self.K * self.V,), buffer.dtype, data=buffer.data, elem_offset=offset)

    def state(self) -> Any:
        """The block's memory: the state, barriers of its copies, and what threads show each other."""
        self.arrivals = T.alloc_buffer((self.pieces,), "uint64", scope="shared")
        self.shown = T.alloc_buffer((self.shared,), "float32", scope="shared")
        self._each(lambda piece: T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_open", self._arrival(piece))))
        return T.alloc_buffer((self.K * self.V,), self.pool, scope="shared.dyn")

    def _more(self) -> dict[str, int]:
        """Further memory, by name."""
        return {"parts": self.parts * self.V, **({"d": self.K} if self.channel_gate else {})}

    def _arrival(self, piece: int) -> Any:
        return T.address_of(self.arrivals[piece])

    def _each(self, function: Callable[[int], None]) -> None:
        """Call ``function(piece)`` for every copy, on the thread that asks for them."""
        with T.If(self.lane == 0), T.Then():
            for piece in range(self.pieces):
                function(piece)

    @staticmethod
    def _meet() -> None:
        T.evaluate(T.tvm_storage_sync("shared"))

    def _own(self) -> Iterator[Any]:
        """Where in memory the pieces of 16 bytes begin that this thread computes on, in the order of their arrival."""
        for i in range(self.K // self.teams):
            yield self._row(i) * self.V + self.lane % self.across * self.piece

    def _row(self, i: int) -> Any:
        """Row of the state that is the thread's i-th to compute on."""
        return (i // FOUR * self.teams + self.lane // self.across) * FOUR + i % FOUR

    def load(self, W: Any, view: Any) -> None:
        """Ask for the state."""
        step = self.K * self.V // self.pieces

        def ask(piece: int) -> None:
            to, source = T.address_of(W[piece * step]), T.address_of(view[piece * step])
            size = step * itemsize(view)
            T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_read", to, source, size, self._arrival(piece)))

        def copy(vector: bool) -> None:
            if vector:
                self._each(ask)
            else:
                self._elements(lambda at: T.buffer_store(W, view[at], [at]))
                self._without()

        either(aligned(view, 0, elements=self.piece), copy)

    def store(self, view: Any, W: Any) -> None:
        """Write the state back."""
        size = self.K * self.V * itemsize(view)

        def copy(vector: bool) -> None:
            if not vector:
                self._elements(lambda at: T.buffer_store(view, W[at], [at]))
                return
            T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_publish"))
            self._meet()
            with T.If(self.lane == 0), T.Then():
                T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_write", T.address_of(view[0]), T.address_of(W[0]), size))

        either(aligned(view, 0, elements=self.piece), copy)

    def zero(self, W: Any) -> None:
        """State of zeros."""
        self._elements(lambda at: T.buffer_store(W, T.Cast(self.pool, T.float32(0)), [at]))
        self._without()

    def _elements(self, function: Callable[[Any], None]) -> None:
        """Call ``function(index)`` for every element that this thread computes on."""
        for first in self._own():
            with T.serial(self.piece) as n:
                function(first + n)

    def _without(self) -> None:
        """Nothing is copied, and nobody waits for it."""
        self._each(lambda piece: T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_skip", self._arrival(piece))))

    def _wait(self, number: int, count: int) -> None:
        """Wait for the copy that the thread's piece of a number, of `count`, is the first of."""
        if number % (count // self.pieces) == 0:
            T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_wait", self._arrival(number // (count // self.pieces))))

    def _show(self, count: int, **vectors: Any) -> None:
        """Show the others what this thread has of vectors."""
        for name, vector in vectors.items():
            for i in range(count // self.threads):
                T.buffer_store(self.shown, vector[i], [self.begin[name] + self.row(i)])

    def _take_four(self, name: str, first: Any) -> Any:
        """Four neighbours of a shown vector."""
        found = self.scalars(FOUR)
        move(T.address_of(found[0]), T.address_of(self.shown[self.begin[name] + first]), PIECE)
        return found

    def dot(self, m: Any, at: int, x: Any, y: Any) -> None:
        """Product m[at] = x . y; what two in a row show lies in different places."""
        first = self.sums + self.turn * (self.threads // WARP)
        self.turn = 1 - self.turn
        T.buffer_store(m, T.float32(0), [at])
        for i in range(self.K // self.threads):
            T.buffer_store(m, m[at] + x[i] * y[i], [at])
        self._sum_warp(m, [at], 1, WARP)
        with T.If(self.lane % WARP == 0), T.Then():
            T.buffer_store(self.shown, m[at], [first + self.lane // WARP])
        self._meet()
        T.buffer_store(m, self.shown[first], [at])
        for n in range(1, self.threads // WARP):
            T.buffer_store(m, m[at] + self.shown[first + n], [at])

    @staticmethod
    def _other(value: Any, distance: int) -> Any:
        return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, distance, WARP, WARP)

    def _sum_warp(self, acc: Any, places: Any, first: int, end: int) -> None:
        """Sum elements over threads whose numbers differ in the bits from `first` up to `end`."""
        while first < end:
            for n in places:
                T.buffer_store(acc, acc[n] + self._other(acc[n], first), [n])
            first *= 2

    def _zeros(self, count: int) -> Any:
        acc = self.scalars(count)
        for n in range(count):
            T.buffer_store(acc, T.float32(0), [n])
        return acc

    def gemv(self, acc: Any, W: Any, x: Any) -> None:
        """Product acc = W^T x, of each piece of the state when it is here."""
        self._show(self.K, dx=x)
        self._meet()
        sums = self._zeros(self.piece)
        raw = T.alloc_buffer((self.piece,), self.pool, scope="local")
        count = self.K // self.teams
        for i, place in enumerate(self._own()):
            self._wait(i, count)
            if i % FOUR == 0:
                four = self._take_four("dx", self._row(i))
            move(T.address_of(raw[0]), T.address_of(W[place]), PIECE)
            for n in range(self.piece):
                T.buffer_store(sums, sums[n] + T.Cast("float32", raw[n]) * four[i % FOUR], [n])
        self._gather(acc, sums)

    def ger_gemv(self, acc: Any, W: Any, d: Any, x: Any, u: Any, y: Any) -> None:
        """W = diag(d) W + x u^T; acc = W^T y."""
        self._show(self.K, x=x, y=y, **({"d": d} if self.channel_gate else {}))
        self._show(self.V, u=u)
        self._meet()
        sums, new = self._zeros(self.piece), self.scalars(1)
        raw = T.alloc_buffer((self.piece,), self.pool, scope="local")
        us = [self._take_four("u", self.lane % self.across * self.piece + n) for n in range(0, self.piece, FOUR)]
        for i, place in enumerate(self._own()):
            if i % FOUR == 0:
                names = ("x", "y", "d") if self.channel_gate else ("x", "y")
                four = {name: self._take_four(name, self._row(i)) for name in names}
            move(T.address_of(raw[0]), T.address_of(W[place]), PIECE)
            gate = four["d"][i % FOUR] if self.channel_gate else d[0]
            for n in range(self.piece):
                T.buffer_store(new, T.Cast("float32", raw[n]) * gate + four["x"][i % FOUR] * us[n // FOUR][n % FOUR], [0])
                T.buffer_store(sums, sums[n] + new[0] * four["y"][i % FOUR], [n])
                T.buffer_store(raw, T.Cast(self.pool, new[0]), [n])
            move(T.address_of(W[place]), T.address_of(raw[0]), PIECE)
        self._gather(acc, sums)

    def _gather(self, acc: Any, sums: Any) -> None:
        """Sum of this thread's columns, from the sums of all threads that computed on them."""
        self._sum_warp(sums, range(self.piece), self.across, WARP)
        parts = self.begin["parts"]
        part = self.lane // max(WARP, self.across)
        with T.If(self.lane % WARP < self.across), T.Then():
            for n in range(0, self.piece, FOUR):
                to = self.shown[parts + part * self.V + self.lane % self.across * self.piece + n]
                move(T.address_of(to), T.address_of(sums[n]), PIECE)
        self._meet()
        for j in range(self.V // self.threads):
            T.buffer_store(acc, self.shown[parts + self.col(j)], [j])
            for n in range(1, self.parts):
                T.buffer_store(acc, acc[j] + self.shown[parts + n * self.V + self.col(j)], [j])


class BulkColumnTiles(BulkTiles):
    """The same of V-first states."""

    def _map(self) -> None:
        #: Threads side by side on a column; columns that a thread computes on.
        self.across = self.K // self.piece
        self.count = self.V * self.across // self.threads
        if (
            self.V != self.threads
            or self.across > WARP
            or self.across & (self.across - 1)
            or self.V % (self.across * self.pieces)
        ):
            raise ValueError(f"{self.threads} threads cannot share {self.V} columns of {self.K} rows in {self.pieces} pieces")

    def _more(self) -> dict[str, int]:
        return {"d": self.K} if self.channel_gate else {}

    def _own(self) -> Iterator[Any]:
        for j in range(self.count):
            yield self._column(j) * self.K + self._rows()

    def _column(self, j: int) -> Any:
        """Column that is the thread's j-th to compute on: those of threads side by side are each other's."""
        return self.lane // self.across * self.across + j

    def _rows(self) -> Any:
        return self.lane % self.across * self.piece

    def _wait(self, number: int, count: int) -> None:
        """Wait for the copy that all columns which the thread computes on come with."""
        del count
        if number == 0:
            piece = T.Cast("int32", self._column(0)) // (self.V // self.pieces)
            T.evaluate(T.call_extern("int32", "tvm_gdn_bulk_wait", T.address_of(self.arrivals[piece])))

    def _vector(self, name: str) -> list[Any]:
        """A shown vector on this thread's rows."""
        fours = [self._take_four(name, self._rows() + n) for n in range(0, self.piece, FOUR)]
        return [four[n] for four in fours for n in range(FOUR)]

    def gemv(self, acc: Any, W: Any, x: Any) -> None:
        """Product acc = W^T x."""
        self._show(self.K, dx=x)
        self._meet()
        sums, xs = self._zeros(self.count), self._vector("dx")
        raw = T.alloc_buffer((self.piece,), self.pool, scope="local")
        for j, place in enumerate(self._own()):
            self._wait(j, self.count)
            move(T.address_of(raw[0]), T.address_of(W[place]), PIECE)
            for n in range(self.piece):
                T.buffer_store(sums, sums[j] + T.Cast("float32", raw[n]) * xs[n], [j])
        self._gather(acc, sums)

    def ger_gemv(self, acc: Any, W: Any, d: Any, x: Any, u: Any, y: Any) -> None:
        """W = diag(d) W + x u^T; acc = W^T y."""
        self._show(self.K, x=x, y=y, **({"d": d} if self.channel_gate else {}))
        self._show(self.V, u=u)
        self._meet()
        sums, new = self._zeros(self.count), self.scalars(1)
        raw = T.alloc_buffer((self.piece,), self.pool, scope="local")
        xs, ys = self._vector("x"), self._vector("y")
        gates = self._vector("d") if self.channel_gate else [d[0]] * self.piece
        for j, place in enumerate(self._own()):
            if j % FOUR == 0:
                us = self._take_four("u", self._column(j))
            move(T.address_of(raw[0]), T.address_of(W[place]), PIECE)
            for n in range(self.piece):
                T.buffer_store(new, T.Cast("float32", raw[n]) * gates[n] + xs[n] * us[j % FOUR], [0])
                T.buffer_store(sums, sums[j] + new[0] * ys[n], [j])
                T.buffer_store(raw, T.Cast(self.pool, new[0]), [n])
            move(T.address_of(W[place]), T.address_of(raw[0]), PIECE)
        self._gather(acc, sums)

    def _gather(self, acc: Any, sums: Any) -> None:
        """Sum of this thread's column: each turn halves the columns that a thread has sums of, and the threads that have them."""
        count = self.count
        kept, given = self.scalars(1), self.scalars(1)
        while count > 1:
            count //= 2
            upper = T.bitwise_and(T.Cast("int32", self.lane), count) != 0
            for n in range(count):
                T.buffer_store(kept, T.Select(upper, sums[n + count], sums[n]), [0])
                T.buffer_store(given, T.Select(upper, sums[n], sums[n + count]), [0])
                T.buffer_store(sums, kept[0] + self._other(given[0], count), [n])
        T.buffer_store(acc, sums[0], [0])
