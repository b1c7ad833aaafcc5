"""Which rows of one expert a block of the experts' products has (`moe_grid.py`).

Many (token, choice) pairs are sorted by one block before the products begin. Few pairs are not: every block of the products
looks at all ids itself, which takes less time than a kernel between the routing and the first weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

#: Experts that a sort has room to count, in the 48 KiB of shared memory that every kernel may have.
MOST_EXPERTS = 8192
#: Pairs whose experts a thread of the sort asks for at once.
BATCH = 4
#: Pairs up to which blocks look for their rows themselves; their number takes half of an int32 there.
MOST_SEEN = 128
#: Pairs up to which one block counts them and puts them in order; additions and stores all over memory are slow from one block.
MOST_ALONE = 4096


@dataclass(frozen=True)
class Rows:
    """Rows of one expert.

    Attributes
    ----------
    expert, count : expression
        The expert, and how many rows there are.
    pair : callable
        ``pair(r)``: the pair that row r belongs to.
    place : callable
        ``place(r)``: where row r stands in scratch memory.
    """

    expert: Any
    count: Any
    pair: Callable[[Any], Any]
    place: Callable[[Any], Any]


Body = Callable[[Any, Rows], None]


def most_tiles(plan: Any, pairs: Any, E: Any) -> Any:
    """A bound of the number of tiles: every expert with rows has at most one that is not full."""
    return T.min(pairs, pairs // plan.rows + T.min(E, pairs))


def even_rows(count: Any, rows: Any, step: Any) -> Any:
    """Rows of each of an expert's tiles: as few tiles as can be, of about as many rows, a multiple of `step`."""
    tiles = T.max(T.truncdiv(count + (rows - 1), rows), 1)
    return T.truncdiv(T.truncdiv(count + (tiles - 1), tiles) + (step - 1), step) * step


def _follow_at_last(tiles: Any, followed: bool) -> None:
    """Where there is no tile: blocks that never wait would let the next kernel begin before what this one waits for is done."""
    if not followed:
        with T.Else():
            tiles.follow()


@dataclass(frozen=True)
class Sorted:
    """What the sort leaves, and the sizes of a call."""

    offsets: Any
    order: Any
    positions: Any
    owner: Any
    start: Any
    top_k: Any
    pairs: Any
    experts: Any

    def position(self, t: Any, j: Any) -> Any:
        """Where the row of a token's choice stands; -1 for padding."""
        return self.positions[t * self.top_k + j]

    def each(self, plan: Any, tiles: Any, across: int, body: Body, follow: bool = True) -> None:
        """Calls ``body(n, rows)`` where there is a tile: a block per tile and group of columns, or some that go through all."""
        most = most_tiles(plan, self.pairs, self.experts) * across
        with tiles.blocks(T.min(most, plan.blocks) if plan.blocks else most) as block, tiles.lanes(plan.threads) as lane:
            tiles.enter(lane)
            if follow:
                tiles.follow()
            if plan.blocks:
                tiles.parts(plan, lambda: self._all(plan, tiles, across, block, body, follow))
                return
            tile, n = T.Bind(block // across), T.Bind(T.Cast("int32", block % across))
            e = T.Bind(T.Cast("int64", self.owner[tile]))
            with T.If(e >= 0):
                with T.Then():
                    first = T.Bind(self.start[tile])
                    count = T.Bind(T.min(T.int32(plan.rows), self.offsets[e + 1] - first))
                    body(n, Rows(e, count, lambda r: self.order[first + r], lambda r: first + r))
                _follow_at_last(tiles, follow)

    def _all(self, plan: Any, tiles: Any, across: int, block: Any, body: Body, followed: bool) -> None:
        """Every so many tiles, from the block's number on."""
        number = T.Bind(self.offsets[self.experts + 1] * across - T.Cast("int32", block))
        with T.serial(T.truncdiv(T.max(number, 0) + (plan.blocks - 1), plan.blocks)) as turn:
            at = T.Bind(T.Cast("int32", turn) * plan.blocks + T.Cast("int32", block))
            tile = T.Bind(at // across)
            e, first = T.Bind(T.Cast("int64", self.owner[tile])), T.Bind(self.start[tile])
            end = T.Bind(self.offsets[e + 1])
            each = T.Bind(even_rows(end - self.offsets[e], plan.rows, plan.step))
            count = T.Bind(T.min(each, end - first))
            body(at % across, Rows(e, count, lambda r: self.order[first + r], lambda r: first + r))
        if not followed:
            with T.If(number <= 0), T.Then():
                tiles.follow()

    def count(self, tiles: Any, ids: Any) -> None:
        """Count many pairs, a thread each: how many every expert has, in `offsets`, and every pair's place among its expert's."""
        A, E = tiles.adders, self.experts
        with tiles.blocks((E + (A - 1)) // A) as block, tiles.lanes(A) as lane:
            tiles.follow()
            e = T.Bind(T.Cast("int32", block) * A + T.Cast("int32", lane))
            with T.If(T.Cast("int64", e) < E), T.Then():
                T.buffer_store(self.offsets, T.int32(0), [e])
        with tiles.blocks((self.pairs + (A - 1)) // A) as block, tiles.lanes(A) as lane:
            tiles.follow()
            pair, k = T.Bind(T.Cast("int32", block) * A + T.Cast("int32", lane)), T.Cast("int32", self.top_k)
            with T.If(T.Cast("int64", pair) < self.pairs), T.Then():
                e = T.Bind(T.Cast("int64", ids[T.truncdiv(pair, k), T.truncmod(pair, k)]))
                with T.If(T.And(e >= 0, e < E)):
                    with T.Then():
                        T.buffer_store(self.positions, tiles.next(self.offsets, e), [pair])
                    with T.Else():
                        T.buffer_store(self.positions, T.int32(-1), [pair])

    def arrange(self, tiles: Any, ids: Any) -> None:
        """Put many pairs in order, a thread each, behind the sort."""
        A = tiles.adders
        with tiles.blocks((self.pairs + (A - 1)) // A) as block, tiles.lanes(A) as lane:
            tiles.follow()
            pair = T.Bind(T.Cast("int32", block) * A + T.Cast("int32", lane))
            with T.If(T.Cast("int64", pair) < self.pairs), T.Then():
                rank, k = T.Bind(self.positions[pair]), T.Cast("int32", self.top_k)
                with T.If(rank >= 0), T.Then():
                    at = T.Bind(rank + self.offsets[ids[T.truncdiv(pair, k), T.truncmod(pair, k)]])
                    T.buffer_store(self.positions, at, [pair])
                    T.buffer_store(self.order, pair, [at])


@dataclass(frozen=True)
class Seen:
    """Few pairs, whose rows stand where the pairs do: an expert's first pair has a tile, and the first behind each full tile."""

    ids: Any
    top_k: Any
    pairs: Any
    experts: Any

    def _expert(self, pair: Any) -> Any:
        k = T.Cast("int32", self.top_k)
        return T.Cast("int64", self.ids[T.truncdiv(pair, k), T.truncmod(pair, k)])

    def position(self, t: Any, j: Any) -> Any:
        """Where the row of a token's choice stands; -1 for padding."""
        e = T.Bind(T.Cast("int64", self.ids[t, j]))
        return T.Select(T.And(e >= 0, e < self.experts), T.Cast("int32", t * self.top_k + j), T.int32(-1))

    def each(self, plan: Any, tiles: Any, across: int, body: Body, follow: bool = True) -> None:
        """A block per pair and group of columns: calls ``body(n, rows)`` where the pair has a tile."""
        warp, half = tiles.warp, 1 << 16
        with tiles.blocks(self.pairs * across) as block, tiles.lanes(plan.threads) as lane:
            tiles.enter(lane)
            if follow:
                tiles.follow()
            own, n = T.Bind(T.Cast("int32", block // across)), T.Bind(T.Cast("int32", block % across))
            members = T.alloc_buffer((plan.rows,), "int32", scope="shared")
            # Pairs of this expert: below, those from this one on; above, those before it.
            counts, found = (T.alloc_buffer((1,), "int32", scope="local") for _ in range(2))
            e, mine, last = T.Bind(self._expert(own)), T.Bind(lane % warp), T.Cast("int32", self.pairs) - 1
            T.buffer_store(found, T.int32(0), [0])
            with T.serial((self.pairs + (warp - 1)) // warp) as step:
                pair = T.Bind(T.Cast("int32", step) * warp + mine)
                same = T.Bind(T.And(pair <= last, self._expert(T.min(pair, last)) == e))
                T.buffer_store(counts, T.Select(same, T.Select(pair < own, T.int32(half), T.int32(1)), T.int32(0)), [0])
                tiles.before(counts, mine)
                at = T.Bind((found[0] + counts[0]) % half - 1)
                # All warps find the same; one writes it down.
                with T.If(T.And(T.And(same, pair >= own), T.And(at < plan.rows, lane < warp))), T.Then():
                    T.buffer_store(members, pair, [at])
                T.buffer_store(found, found[0] + tiles.of(counts, warp - 1), [0])
            tiles.sync()
            here = T.And(T.And(e >= 0, e < self.experts), found[0] // half % plan.rows == 0)
            with T.If(here):
                with T.Then():
                    count = T.Bind(T.min(T.int32(plan.rows), found[0] % half))
                    body(n, Rows(e, count, lambda r: members[r], lambda r: members[r]))
                _follow_at_last(tiles, follow)


def sort_macro(tiles: Any, counted: bool) -> Any:
    """Macro ``sort(ids, routing, limit, rows, step)``, one block's work: it fills a `Sorted`.

    Afterwards the pairs of expert e are ``order[offsets[e]:offsets[e + 1]]``; ``positions[pair]`` is where a pair stands, -1
    for padding; tile i of `limit` has rows from ``start[i]`` on, of expert ``owner[i]`` (-1: no tile), ``offsets[E + 1]`` is
    the number of tiles. An expert's tiles have ``even_rows(count, rows, step)`` rows. `counted`: it goes on from what
    `Sorted.count` left, and `Sorted.arrange` from there.
    """
    S, warp = tiles.sorters, tiles.warp

    @T.inline
    def scan(sums, both, totals, lane):
        """Sums of two numbers over the threads before this one, in place, and over all of the block's."""
        one = T.alloc_buffer((1,), "int32", scope="local")
        for which in T.unroll(2):
            one[0] = both[which]
            tiles.before(one, lane % warp)
            both[which] = one[0] - both[which]
            if lane % warp == warp - 1:
                sums[which * (S // warp) + lane // warp] = one[0]
        tiles.sync()
        for which in T.unroll(2):
            one[0] = T.Select(lane % warp < S // warp, sums[which * (S // warp) + T.min(lane % warp, S // warp - 1)], 0)
            tiles.before(one, lane % warp)
            totals[which] = tiles.of(one, warp - 1)
            one[0] = tiles.of(one, T.max(lane // warp - 1, 0))
            both[which] = both[which] + T.Select(lane >= warp, one[0], 0)

    @T.inline
    def look(ids, routing, first, chosen):
        """Experts of BATCH pairs, S apart: all are asked for before one is needed. -1: padding, or no pair."""
        k = T.meta_var(T.Cast("int32", routing.top_k))
        for b in T.unroll(BATCH):
            pair = T.min(first + b * S, T.Cast("int32", routing.pairs) - 1)
            e = T.Cast("int64", ids[T.truncdiv(pair, k), T.truncmod(pair, k)])
            there = T.And(T.Cast("int64", first + b * S) < routing.pairs, T.And(e >= 0, e < routing.experts))
            chosen[b] = T.Select(there, T.Cast("int32", e), T.int32(-1))

    @T.inline
    def sort(ids, routing, limit, rows, step):
        pairs, E = T.meta_var(routing.pairs), T.meta_var(routing.experts)
        offsets, place = T.meta_var(routing.offsets), T.meta_var(routing.positions)
        for _ in tiles.blocks(T.int64(1)):
            for lane in tiles.lanes(S):
                tiles.enter(lane)
                tiles.follow()
                counts = T.alloc_buffer((MOST_EXPERTS,), "int32", scope="shared")
                sums = T.alloc_buffer((2 * S // warp,), "int32", scope="shared")
                both = T.alloc_buffer((2,), "int32", scope="local")
                totals = T.alloc_buffer((2,), "int32", scope="local")
                chosen = T.alloc_buffer((BATCH,), "int32", scope="local")
                ranks = T.alloc_buffer((BATCH,), "int32", scope="local")
                for i in T.serial((E + S - 1) // S):
                    if i * S + lane < E:
                        if counted:
                            counts[i * S + lane] = offsets[i * S + lane]
                        else:
                            counts[i * S + lane] = 0
                tiles.sync()
                for i in T.serial(T.int64(0) if counted else (pairs + S * BATCH - 1) // (S * BATCH)):
                    first = T.Cast("int32", i) * (S * BATCH) + lane
                    look(ids, routing, first, chosen)
                    for b in T.unroll(BATCH):
                        ranks[b] = -1
                        if chosen[b] >= 0:
                            ranks[b] = tiles.next(counts, chosen[b])
                    for b in T.unroll(BATCH):
                        if T.Cast("int64", first + b * S) < pairs:
                            place[first + b * S] = ranks[b]
                tiles.sync()
                # Every thread has a run of experts.
                both[0] = 0
                both[1] = 0
                for i in T.serial((E + S - 1) // S):
                    e = lane * ((E + S - 1) // S) + i
                    if e < E:
                        both[0] = both[0] + counts[e]
                        both[1] = both[1] + T.truncdiv(counts[e] + (rows - 1), rows)
                scan(sums, both, totals, lane)
                for i in T.serial((E + S - 1) // S):
                    e = lane * ((E + S - 1) // S) + i
                    if e < E:
                        ranks[0] = counts[e]
                        counts[e] = both[0]
                        offsets[e] = both[0]
                        for tile in T.serial(T.truncdiv(ranks[0] + (rows - 1), rows)):
                            routing.owner[both[1] + tile] = T.Cast("int32", e)
                            routing.start[both[1] + tile] = both[0] + tile * even_rows(ranks[0], rows, step)
                        both[0] = both[0] + ranks[0]
                        both[1] = both[1] + T.truncdiv(ranks[0] + (rows - 1), rows)
                if lane == 0:
                    offsets[E] = totals[0]
                    offsets[E + 1] = totals[1]
                for i in T.serial((limit + S - 1) // S):
                    if i * S + lane < limit and i * S + lane >= T.Cast("int64", totals[1]):
                        routing.owner[i * S + lane] = -1
                tiles.sync()
                for i in T.serial(T.int64(0) if counted else (pairs + S * BATCH - 1) // (S * BATCH)):
                    first = T.Cast("int32", i) * (S * BATCH) + lane
                    look(ids, routing, first, chosen)
                    for b in T.unroll(BATCH):
                        ranks[b] = place[T.min(first + b * S, T.Cast("int32", pairs) - 1)]
                    for b in T.unroll(BATCH):
                        if chosen[b] >= 0:
                            place[first + b * S] = ranks[b] + counts[chosen[b]]
                            routing.order[ranks[b] + counts[chosen[b]]] = first + b * S

    return sort
