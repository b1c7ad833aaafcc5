"""The experts of a mixture on devices: the same sums as `moe_experts.py`, as a grid of blocks in phases.

A phase is a kernel; all of them go to the stream at once, and what one leaves to the next stays on the device (offsets, order,
h and the rows before their sum are scratch memory). The host knows T, k and E, which are shapes: from the mean number of rows
per expert it takes one of the target's plans (few rows: memory-bound; many: compute-bound) and a bound of the number of tiles.

1. sort: one block. Counts per expert by atomic additions, offsets by a scan, then the map of tiles: `plan.rows` rows of one
   expert each. Where a pair stands among its expert's rows may change from run to run; what is computed for it does not depend
   on that.
2. gate and up: a block per tile and `plan.columns` columns of h; its threads hold the same columns of both products, so the
   SiLU product is the epilogue. Blocks of one tile are neighbours, then come the tiles of the same expert: every weight comes
   from memory once, and from the L2 cache for an expert's further tiles.
3. down: the same over h, into one fp32 row per pair.
4. sum: a thread per four columns of a token adds up its choices in order, in fp32.

No two blocks write to one place and every sum has a fixed order: results are deterministic.

How a target plugs in. Its tiles object states `plans` (the last one for all that is more), `sorters` and `adders` (threads of
those blocks, powers of two) and supplies `blocks(count)`, `lanes(threads)`, `enter(lane)`, `sync()`, `next(buffer, index)` (the
number there, which becomes one more), and

- `product(plan, A, row_of, m, depth, W, e, n, shift, sink)`: rows row_of(0) to row_of(m - 1) of A times two times
  `plan.columns` columns of W[e] (raw: rows from n on, and those `shift` further on; packed: groups from n on), given to
  ``sink(r, c, first, second)``: columns c and c + 1 of row r, pairs of values of either half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_elements import silu_product
from tvm_gdn.spec import Geometry

#: Elements to whose multiple rows of scratch memory are rounded up, so that they begin where vectors may begin.
ALIGNED = 16


def _padded(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Sizes:
    """Static sizes of a geometry: columns of h and of the output; whether weights are packed, in groups of 16 + 16 columns."""

    hidden: int
    inner: int
    packed: bool

    def columns(self, n: Any, half: int, c: Any, columns: int) -> Any:
        """Output column that column c of a half of block n stands for."""
        if self.packed:
            return (n * (columns // 16) + c // 16) * 32 + half * 16 + c % 16
        return (n * 2 + half) * columns + c


def sort_macro(tiles: Any) -> Any:
    """Macro ``sort(ids, top_k, pairs, E, limit, rows, offsets, order, place, owner, start)``, one block's work.

    Afterwards the pairs of expert e are ``order[offsets[e]:offsets[e + 1]]``; ``place[pair]`` is where a pair stands, -1 for
    padding; tile i of `limit` has rows from ``start[i]`` on, of expert ``owner[i]`` (-1: no tile).
    """
    S = tiles.sorters
    bits = S.bit_length() - 1

    @T.inline
    def scan(sums, both, lane):
        """Two inclusive sums over the block's threads, in sums[0:S] and sums[S:2S]."""
        sums[lane] = both[0]
        sums[S + lane] = both[1]
        for bit in T.unroll(bits):
            tiles.sync()
            both[0] = sums[lane]
            both[1] = sums[S + lane]
            if lane >= T.shift_left(1, bit):
                both[0] = both[0] + sums[lane - T.shift_left(1, bit)]
                both[1] = both[1] + sums[S + lane - T.shift_left(1, bit)]
            tiles.sync()
            sums[lane] = both[0]
            sums[S + lane] = both[1]
        tiles.sync()

    @T.inline
    def sort(ids, top_k, pairs, E, limit, rows, offsets, order, place, owner, start):
        for _ in tiles.blocks(T.int64(1)):
            for lane in tiles.lanes(S):
                tiles.enter(lane)
                sums = T.alloc_buffer((2 * S,), "int32", scope="shared")
                both = T.alloc_buffer((2,), "int32", scope="local")
                for i in T.serial((E + S) // S):
                    if i * S + lane <= E:
                        offsets[i * S + lane] = 0
                tiles.sync()
                for i in T.serial((pairs + S - 1) // S):
                    pair = i * S + lane
                    if pair < pairs:
                        place[pair] = -1
                        if ids[pair // top_k, pair % top_k] >= 0 and T.Cast("int64", ids[pair // top_k, pair % top_k]) < E:
                            place[pair] = tiles.next(offsets, T.Cast("int64", ids[pair // top_k, pair % top_k]))
                tiles.sync()
                # Every thread has a run of experts; offsets hold their counts.
                both[0] = 0
                both[1] = 0
                for i in T.serial((E + S - 1) // S):
                    e = lane * ((E + S - 1) // S) + i
                    if e < E:
                        both[0] = both[0] + offsets[e]
                        both[1] = both[1] + (offsets[e] + (rows - 1)) // rows
                scan(sums, both, lane)
                both[0] = 0
                both[1] = 0
                if lane > 0:
                    both[0] = sums[lane - 1]
                    both[1] = sums[S + lane - 1]
                for i in T.serial((E + S - 1) // S):
                    e = lane * ((E + S - 1) // S) + i
                    if e < E:
                        count = T.alloc_buffer((1,), "int32", scope="local")
                        count[0] = offsets[e]
                        offsets[e] = both[0]
                        for tile in T.serial((count[0] + (rows - 1)) // rows):
                            owner[both[1] + tile] = T.Cast("int32", e)
                            start[both[1] + tile] = both[0] + tile * rows
                        both[0] = both[0] + count[0]
                        both[1] = both[1] + (count[0] + (rows - 1)) // rows
                if lane == 0:
                    offsets[E] = sums[S - 1]
                for i in T.serial((limit + S - 1) // S):
                    if i * S + lane < limit and i * S + lane >= T.Cast("int64", sums[2 * S - 1]):
                        owner[i * S + lane] = -1
                tiles.sync()
                for i in T.serial((pairs + S - 1) // S):
                    pair = i * S + lane
                    if pair < pairs:
                        if place[pair] >= 0:
                            place[pair] = place[pair] + offsets[T.Cast("int64", ids[pair // top_k, pair % top_k])]
                            order[place[pair]] = T.Cast("int32", pair)

    return sort


def moe_grid(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernels of one geometry; parameters as `moe_experts.moe_experts` has them.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    axis, dtype = geometry.axis, geometry.dtype
    D, packed = axis["D"], "G" in axis
    if packed:
        inner, words = axis["G"] * 16, ("int32", "int32")
        shape13, shape2 = (axis["G"], axis["KD"], 512), (axis["ND"], axis["KI"], 512)
    else:
        inner, words = axis["I"], (dtype["w13"], dtype["w2"])
        shape13, shape2 = (2 * inner, D), (D, inner)
    sizes = Sizes(D, inner, packed)
    IP, DP, A = _padded(inner), _padded(D), tiles.adders
    lanes = 4 if D % 4 == 0 else 1
    sort = sort_macro(tiles)

    @T.prim_func(s_tir=True)
    def kernel(
        x_: T.handle, w13_: T.handle, w2_: T.handle, topk_weights_: T.handle, topk_ids_: T.handle, out_: T.handle
    ):  # fmt: skip
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E = T.int64(), T.int64(), T.int64()
        x0, t0, t1, i0, i1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_, (tokens, D), dtype["x"], strides=(x0, 1), align=2)
        w13 = T.match_buffer(w13_, (E, *shape13), words[0], align=2 if words[0] != "int32" else 4)
        w2 = T.match_buffer(w2_, (E, *shape2), words[1], align=2 if words[1] != "int32" else 4)
        topk_weights = T.match_buffer(topk_weights_, (tokens, top_k), dtype["topk_weights"], strides=(t0, t1), align=2)
        topk_ids = T.match_buffer(topk_ids_, (tokens, top_k), dtype["topk_ids"], strides=(i0, i1), align=4)
        out = T.match_buffer(out_, (tokens, D), dtype["x"], align=2)

        offsets = T.alloc_buffer((E + 1,), "int32")
        order = T.alloc_buffer((tokens * top_k,), "int32")
        place = T.alloc_buffer((tokens * top_k,), "int32")
        owner = T.alloc_buffer((tokens * top_k,), "int32")
        start = T.alloc_buffer((tokens * top_k,), "int32")
        hidden = T.alloc_buffer((tokens * top_k, IP), dtype["x"])
        partial = T.alloc_buffer((tokens * top_k, DP), "float32")

        @T.inline
        def phases(plan):
            sort(
                topk_ids, top_k, tokens * top_k, E, _most_tiles(tokens * top_k, E, plan.rows), plan.rows,
                offsets, order, place, owner, start,
            )  # fmt: skip
            gate_up(plan, tiles, sizes, x, w13, hidden, (offsets, owner, start, order), tokens, top_k, E)
            down(plan, tiles, sizes, hidden, w2, partial, (offsets, owner, start), tokens, top_k, E)

        _choose(tiles.plans, tokens * top_k, E, phases)
        for block in tiles.blocks((tokens * (D // lanes) + A - 1) // A):
            for lane in tiles.lanes(A):
                total = T.alloc_buffer((lanes,), "float32", scope="local")
                index = T.Cast("int64", block) * A + lane
                if index < tokens * (D // lanes):
                    t = index // (D // lanes)
                    c = index % (D // lanes) * lanes
                    for i in T.vectorized(lanes):
                        total[i] = T.float32(0)
                    for j in T.serial(top_k):
                        row = T.Cast("int64", place[t * top_k + j])
                        if row >= 0:
                            for i in T.vectorized(lanes):
                                total[i] = total[i] + T.Cast("float32", topk_weights[t, j]) * partial[row, c + i]
                    for i in T.serial(lanes):
                        out[t, c + i] = T.Cast(out.dtype, total[i])

    return kernel


def _most_tiles(pairs: Any, E: Any, rows: int) -> Any:
    """A bound of the number of tiles: every expert with rows has at most one that is not full."""
    return T.min(pairs, pairs // rows + T.min(E, pairs))


def _choose(plans: tuple[Any, ...], pairs: Any, E: Any, phases: Callable[[Any], None]) -> None:
    """Emit the phases of every plan, and on the host the choice between them."""
    plan, *more = plans
    if not more:
        phases(plan)
        return
    with T.If(pairs <= E * plan.most):
        with T.Then():
            phases(plan)
        with T.Else():
            _choose(tuple(more), pairs, E, phases)


def _tiles_of(plan: Any, tiles: Any, columns: int, pairs: Any, E: Any, found: tuple[Any, ...], body: Any) -> None:
    """A block per tile and group of columns: calls ``body(n, e, first, m)`` where there is a tile."""
    offsets, owner, start = found
    across = -(-columns // plan.columns)
    with tiles.blocks(_most_tiles(pairs, E, plan.rows) * across) as block, tiles.lanes(plan.threads) as lane:
        tiles.enter(lane)
        tile, n = T.Bind(T.Cast("int32", block // across)), T.Bind(T.Cast("int32", block % across))
        e = T.Bind(T.Cast("int64", owner[tile]))
        with T.If(e >= 0), T.Then():
            first = T.Bind(start[tile])
            body(n, e, first, T.Bind(T.min(T.int32(plan.rows), offsets[e + 1] - first)))


def gate_up(
    plan: Any, tiles: Any, sizes: Sizes, x: Any, W: Any, hidden: Any, found: Any, tokens: Any, top_k: Any, E: Any
) -> None:
    """Compute h = silu(W1 x) * (W3 x), for every pair."""
    *rest, order = found

    def body(n: Any, e: Any, first: Any, m: Any) -> None:
        def sink(r: Any, c: Any, gate: list[Any], up: list[Any]) -> None:
            column = T.Bind(n * plan.columns + c)
            # Weights beyond the last column are zeros, and so is what is stored in the columns that pad a row.
            with T.If(column < hidden.shape[1]), T.Then():
                for i in range(2):
                    value = silu_product(T.Bind(gate[i]), up[i], tiles.exp)
                    T.buffer_store(hidden, T.Cast(hidden.dtype, value), [T.Cast("int64", first + r), column + i])

        row_of = lambda r: T.Cast("int64", order[first + r]) // top_k  # noqa: E731
        base = n * (plan.columns // 16 if sizes.packed else plan.columns)
        tiles.product(plan, x, row_of, m, sizes.hidden, W, e, base, sizes.inner, sink)

    _tiles_of(plan, tiles, sizes.inner, tokens * top_k, E, tuple(rest), body)


def down(
    plan: Any, tiles: Any, sizes: Sizes, hidden: Any, W: Any, partial: Any, found: Any, tokens: Any, top_k: Any, E: Any
) -> None:
    """W2 h for every pair, in fp32."""

    def body(n: Any, e: Any, first: Any, m: Any) -> None:
        def sink(r: Any, c: Any, *halves: list[Any]) -> None:
            for half, values in enumerate(halves):
                column = T.Bind(sizes.columns(n, half, c, plan.columns))
                with T.If(column < partial.shape[1]), T.Then():
                    for i in range(2):
                        T.buffer_store(partial, values[i], [T.Cast("int64", first + r), column + i])

        base = n * (plan.columns // 16 if sizes.packed else 2 * plan.columns)
        tiles.product(plan, hidden, lambda r: T.Cast("int64", first + r), m, sizes.inner, W, e, base, plan.columns, sink)

    _tiles_of(plan, tiles, -(-sizes.hidden // 2), tokens * top_k, E, found, body)
