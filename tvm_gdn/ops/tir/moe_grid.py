"""The experts of a mixture on devices: the same sums as `moe_experts.py`, as a grid of blocks in phases.

A phase is a kernel; all of them go to the stream at once, and what one leaves to the next stays on the device: offsets, order,
h and the rows before their sum are scratch memory. The host knows T, k and E, which are shapes. From the mean number of rows
per expert it takes one of the target's plans (few rows: bound by memory; many: by products), and a bound of the number of
tiles.

1. sort: one block. Counts per expert by atomic additions, offsets by a scan, then the map of tiles: a tile has up to
   `plan.rows` rows of one expert. Where a pair stands among its expert's rows may change from run to run; its numbers do not.
2. gate and up: a block per tile and `plan.columns` columns of h. A thread holds the same columns of both products, so the SiLU
   product is the epilogue. Blocks of one tile are neighbours, then come the other tiles of that expert: a weight comes from
   memory once, and from the L2 cache for further tiles.
3. down: the same over h, into one row per pair, in the target's `partial` dtype.
4. sum: a thread per four columns of a token adds up its choices in order, in fp32.

No two blocks write to one place and every sum has a fixed order: results are deterministic.

How a target plugs in. Its tiles object states `plans` (the last one for all that is more), `sorters` and `adders` (threads of
those blocks, multiples of `warp`, at most `warp` squared), `warp` and `partial` (dtype of rows to be summed), and supplies
`blocks(count)`, `lanes(threads)`, `enter(lane)`, `sync()`, `before(buffer, lane)` (the sum of buffer[0] up to this thread of a
warp), `of(buffer, lane)` (buffer[0] of another), `next(buffer, index)` (the number there, which becomes one more),
`store_pair(buffer, index, values)` (two neighbours from an even column on), and

- `product(plan, A, row_of, m, W, e, n, shift, sink)`: rows row_of(0) to row_of(m - 1) of A times `plan.columns` columns of W[e]
  and as many others (raw: rows from n on, and those `shift` further on; packed: both halves of groups from n on), given to
  ``sink(r, c, first, second)``: of row r and columns c and c + 1, the pair of values of either half.

Quantized weights: rows of x, and of h, are made int8 by a kernel of their own before either product, which then takes
``scales=(row scales, row sums, weight scales)``. The tiles object states `quantized`, `k_step` and `zero`, and supplies
`reduce(buffer, function)`: buffer[0] of all threads of a warp as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_elements import magnitude, per_step, silu_product, step_of, to_int8
from tvm_gdn.spec import Geometry

#: Experts that a sort has room to count, in the 48 KiB of shared memory that every kernel may have.
MOST_EXPERTS = 8192
#: Pairs whose experts a thread of the sort asks for at once.
BATCH = 4

#: Choices of a token that are read before the first of them is added.
AT_ONCE = 4

#: Elements to whose multiple rows of scratch memory are rounded up, so that they begin where vectors may begin.
ALIGNED = 16


def _padded(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Routing:
    """What the sort leaves, and the sizes of a call."""

    offsets: Any
    order: Any
    owner: Any
    start: Any
    top_k: Any
    pairs: Any
    experts: Any


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
    """Macro ``sort(ids, k, pairs, E, limit, rows, offsets, order, place, owner, start)``, one block's work.

    Afterwards the pairs of expert e are ``order[offsets[e]:offsets[e + 1]]``; ``place[pair]`` is where a pair stands, -1 for
    padding; tile i of `limit` has rows from ``start[i]`` on, of expert ``owner[i]`` (-1: no tile).
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
    def look(ids, k, pairs, E, first, chosen):
        """Experts of BATCH pairs, S apart: all are asked for before one is needed. -1: padding, or no pair."""
        for b in T.unroll(BATCH):
            pair = T.min(first + b * S, T.Cast("int32", pairs) - 1)
            e = T.Cast("int64", ids[T.truncdiv(pair, k), T.truncmod(pair, k)])
            there = T.And(T.Cast("int64", first + b * S) < pairs, T.And(e >= 0, e < E))
            chosen[b] = T.Select(there, T.Cast("int32", e), T.int32(-1))

    @T.inline
    def sort(ids, k, pairs, E, limit, rows, offsets, order, place, owner, start):
        for _ in tiles.blocks(T.int64(1)):
            for lane in tiles.lanes(S):
                tiles.enter(lane)
                counts = T.alloc_buffer((MOST_EXPERTS,), "int32", scope="shared")
                sums = T.alloc_buffer((2 * S // warp,), "int32", scope="shared")
                both = T.alloc_buffer((2,), "int32", scope="local")
                totals = T.alloc_buffer((2,), "int32", scope="local")
                chosen = T.alloc_buffer((BATCH,), "int32", scope="local")
                ranks = T.alloc_buffer((BATCH,), "int32", scope="local")
                for i in T.serial((E + S - 1) // S):
                    if i * S + lane < E:
                        counts[i * S + lane] = 0
                tiles.sync()
                for i in T.serial((pairs + S * BATCH - 1) // (S * BATCH)):
                    first = T.Cast("int32", i) * (S * BATCH) + lane
                    look(ids, k, pairs, E, first, chosen)
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
                            owner[both[1] + tile] = T.Cast("int32", e)
                            start[both[1] + tile] = both[0] + tile * rows
                        both[0] = both[0] + ranks[0]
                        both[1] = both[1] + T.truncdiv(ranks[0] + (rows - 1), rows)
                if lane == 0:
                    offsets[E] = totals[0]
                for i in T.serial((limit + S - 1) // S):
                    if i * S + lane < limit and i * S + lane >= T.Cast("int64", totals[1]):
                        owner[i * S + lane] = -1
                tiles.sync()
                for i in T.serial((pairs + S * BATCH - 1) // (S * BATCH)):
                    first = T.Cast("int32", i) * (S * BATCH) + lane
                    look(ids, k, pairs, E, first, chosen)
                    for b in T.unroll(BATCH):
                        ranks[b] = place[T.min(first + b * S, T.Cast("int32", pairs) - 1)]
                    for b in T.unroll(BATCH):
                        if chosen[b] >= 0:
                            place[first + b * S] = ranks[b] + counts[chosen[b]]
                            order[ranks[b] + counts[chosen[b]]] = first + b * S

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
    IP, DP = _padded(inner), _padded(D)
    quantized, data = tiles.quantized, "float32" if tiles.quantized else dtype["x"]
    S13, S2 = max(1, axis.get("S13", 0)), max(1, axis.get("S2", 0))
    XP = axis["KD"] * tiles.k_step if quantized else 0
    sort = sort_macro(tiles)

    @T.prim_func(s_tir=True)
    def kernel(
        x_: T.handle,
        w13_: T.handle,
        w2_: T.handle,
        topk_weights_: T.handle,
        topk_ids_: T.handle,
        w13_scale_: T.handle,
        w2_scale_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E = T.int64(), T.int64(), T.int64()
        x0, t0, t1, i0, i1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_, (tokens, D), dtype["x"], strides=(x0, 1), align=2)
        w13 = T.match_buffer(w13_, (E, *shape13), words[0], align=2 if words[0] != "int32" else 4)
        w2 = T.match_buffer(w2_, (E, *shape2), words[1], align=2 if words[1] != "int32" else 4)
        topk_weights = T.match_buffer(topk_weights_, (tokens, top_k), dtype["topk_weights"], strides=(t0, t1), align=2)
        topk_ids = T.match_buffer(topk_ids_, (tokens, top_k), dtype["topk_ids"], strides=(i0, i1), align=4)
        if quantized:
            w13_scale = T.match_buffer(w13_scale_, (E, axis["G"], S13, 32), dtype["w13_scale"], align=2)
            w2_scale = T.match_buffer(w2_scale_, (E, axis["ND"], S2, 32), dtype["w2_scale"], align=2)
        out = T.match_buffer(out_, (tokens, D), dtype["x"], align=2)

        offsets = T.alloc_buffer((E + 1,), "int32")
        order = T.alloc_buffer((tokens * top_k,), "int32")
        place = T.alloc_buffer((tokens * top_k,), "int32")
        owner = T.alloc_buffer((tokens * top_k,), "int32")
        start = T.alloc_buffer((tokens * top_k,), "int32")
        hidden = T.alloc_buffer((tokens * top_k, IP), data)
        partial = T.alloc_buffer((tokens * top_k, DP), tiles.partial)

        if quantized:
            x_q = T.alloc_buffer((tokens, XP), "int8")
            x_scale = T.alloc_buffer((tokens,), "float32")
            x_sums = T.alloc_buffer((tokens, S13), "int32")
            hidden_q = T.alloc_buffer((tokens * top_k, inner), "int8")
            hidden_scale = T.alloc_buffer((tokens * top_k,), "float32")
            hidden_sums = T.alloc_buffer((tokens * top_k, S2), "int32")

        @T.inline
        def first(plan):
            if quantized:
                gate_up(
                    plan, tiles, sizes, x_q, w13, hidden, Routing(offsets, order, owner, start, top_k, tokens * top_k, E),
                    scales=(x_scale, x_sums, w13_scale),
                )  # fmt: skip
            else:
                gate_up(plan, tiles, sizes, x, w13, hidden, Routing(offsets, order, owner, start, top_k, tokens * top_k, E))

        @T.inline
        def second(plan):
            if quantized:
                down(
                    plan, tiles, sizes, hidden_q, w2, partial, Routing(offsets, order, owner, start, top_k, tokens * top_k, E),
                    scales=(hidden_scale, hidden_sums, w2_scale),
                )  # fmt: skip
            else:
                down(plan, tiles, sizes, hidden, w2, partial, Routing(offsets, order, owner, start, top_k, tokens * top_k, E))

        assert E <= MOST_EXPERTS, ("ValueError", [f"w13: at most {MOST_EXPERTS} experts on devices"])
        # No names for what is passed on: a variable of the host is memory that the device does not see.
        sort(
            topk_ids, T.Cast("int32", top_k), tokens * top_k, E, _most_tiles(tiles.plans, tokens * top_k, E),
            _rows_of_tiles(tiles.plans, tokens * top_k, E), offsets, order, place, owner, start,
        )  # fmt: skip
        if quantized:
            quantize(tiles, x, tokens, x_q, x_scale, x_sums)
        _choose(tiles.plans, tokens * top_k, E, first)
        if quantized:
            quantize(tiles, hidden, tokens * top_k, hidden_q, hidden_scale, hidden_sums)
        _choose(tiles.plans, tokens * top_k, E, second)
        add_up(tiles, D, place, topk_weights, partial, out, tokens, top_k)

    return kernel


def _is_for(plan: Any, pairs: Any, E: Any) -> Any:
    """Whether experts have no more rows, on average, than the plan is for."""
    most = Fraction(plan.most)
    return pairs * most.denominator <= E * most.numerator


def _rows_of_tiles(plans: tuple[Any, ...], pairs: Any, E: Any) -> Any:
    """Rows of a tile in the plan that is taken."""
    *few, last = plans
    found = T.int32(last.rows)
    for plan in reversed(few):
        found = T.Select(_is_for(plan, pairs, E), T.int32(plan.rows), found)
    return found


def _most_tiles(plans: tuple[Any, ...], pairs: Any, E: Any) -> Any:
    """A bound of the number of tiles: every expert with rows has at most one that is not full."""
    *few, last = plans
    found = _most_of(last, pairs, E)
    for plan in reversed(few):
        found = T.Select(_is_for(plan, pairs, E), _most_of(plan, pairs, E), found)
    return found


def _most_of(plan: Any, pairs: Any, E: Any) -> Any:
    return T.min(pairs, pairs // plan.rows + T.min(E, pairs))


def _choose(plans: tuple[Any, ...], pairs: Any, E: Any, products: Callable[[Any], None]) -> None:
    """Emit the products of every plan, and on the host the choice between them."""
    plan, *more = plans
    if not more:
        products(plan)
        return
    with T.If(_is_for(plan, pairs, E)):
        with T.Then():
            products(plan)
        with T.Else():
            _choose(tuple(more), pairs, E, products)


def _tiles_of(plan: Any, tiles: Any, columns: int, routing: Routing, body: Callable[..., None]) -> None:
    """A block per tile and group of columns: calls ``body(n, e, first, m)`` where there is a tile."""
    across = -(-columns // plan.columns)
    with (
        tiles.blocks(_most_of(plan, routing.pairs, routing.experts) * across) as block,
        tiles.lanes(plan.threads) as lane,
    ):
        tiles.enter(lane)
        tile, n = T.Bind(block // across), T.Bind(T.Cast("int32", block % across))
        e = T.Bind(T.Cast("int64", routing.owner[tile]))
        with T.If(e >= 0), T.Then():
            first = T.Bind(routing.start[tile])
            body(n, e, first, T.Bind(T.min(T.int32(plan.rows), routing.offsets[e + 1] - first)))


def gate_up(plan: Any, tiles: Any, sizes: Sizes, x: Any, W: Any, hidden: Any, routing: Routing, **more: Any) -> None:
    """Compute h = silu(W1 x) * (W3 x) for every pair."""

    def body(n: Any, e: Any, first: Any, m: Any) -> None:
        def sink(r: Any, c: Any, gate: list[Any], up: list[Any]) -> None:
            column = T.Bind(n * plan.columns + c)
            # Weights beyond the last column are zeros, and so is what is stored in the columns that pad a row.
            with T.If(column < hidden.shape[1]), T.Then():
                values = [silu_product(T.Bind(gate[i]), up[i], tiles.exp) for i in range(2)]
                tiles.store_pair(hidden, [T.Cast("int64", first + r), column], values)

        def token(r: Any) -> Any:
            return T.Cast("int64", T.truncdiv(routing.order[first + r], T.Cast("int32", routing.top_k)))

        base = n * (plan.columns // 16 if sizes.packed else plan.columns)
        tiles.product(plan, x, token, m, W, e, base, sizes.inner, sink, **more)

    _tiles_of(plan, tiles, sizes.inner, routing, body)


def down(plan: Any, tiles: Any, sizes: Sizes, hidden: Any, W: Any, partial: Any, routing: Routing, **more: Any) -> None:
    """Compute W2 h for every pair, in fp32."""

    def body(n: Any, e: Any, first: Any, m: Any) -> None:
        def sink(r: Any, c: Any, *halves: list[Any]) -> None:
            for half, values in enumerate(halves):
                column = T.Bind(sizes.columns(n, half, c, plan.columns))
                with T.If(column < partial.shape[1]), T.Then():
                    tiles.store_pair(partial, [T.Cast("int64", first + r), column], values)

        base = n * (plan.columns // 16 if sizes.packed else 2 * plan.columns)
        tiles.product(plan, hidden, lambda r: T.Cast("int64", first + r), m, W, e, base, plan.columns, sink, **more)

    _tiles_of(plan, tiles, -(-sizes.hidden // 2), routing, body)


def quantize(tiles: Any, source: Any, count: Any, target: Any, scale: Any, sums: Any) -> None:
    """Rows of `source` in steps of their largest elements / 127, a warp each, and `zero` times the sum of every group."""
    warp, warps, used, groups = tiles.warp, tiles.adders // tiles.warp, int(source.shape[1]), int(sums.shape[1])
    size = int(target.shape[1]) // groups
    with tiles.blocks((count + warps - 1) // warps) as block, tiles.lanes(tiles.adders) as thread:
        lane = T.Bind(T.Cast("int32", thread) % warp)
        row = T.Bind(T.Cast("int64", block) * warps + T.Cast("int64", thread) // warp)
        # Rows that are not there are computed too: all threads of a warp take part in shuffles.
        at = T.Bind(T.min(row, count - 1))
        largest, part = (T.alloc_buffer((1,), "int32", scope="local") for _ in range(2))
        T.buffer_store(largest, T.int32(0), [0])
        with T.serial(-(-used // warp)) as step:
            k = T.Bind(T.Cast("int32", step) * warp + lane)
            with T.If(k < used), T.Then():
                T.buffer_store(largest, T.max(largest[0], magnitude(T.Cast("float32", source[at, k]))), [0])
        tiles.reduce(largest, T.max)
        factor = T.Bind(per_step(largest[0]))
        with T.serial(groups) as g:
            T.buffer_store(part, T.int32(0), [0])
            with T.serial(size // warp) as step:
                k = T.Bind(T.Cast("int32", g) * size + T.Cast("int32", step) * warp + lane)
                value = T.if_then_else(k < used, T.Cast("float32", source[at, T.min(k, used - 1)]) * factor, T.float32(0))
                number = T.Bind(to_int8(value))
                with T.If(row < count), T.Then():
                    T.buffer_store(target, number, [at, k])
                T.buffer_store(part, part[0] + T.Cast("int32", number), [0])
            tiles.reduce(part, lambda a, b: a + b)
            with T.If(T.And(lane == 0, row < count)), T.Then():
                T.buffer_store(sums, part[0] * tiles.zero, [at, g])
        with T.If(T.And(lane == 0, row < count)), T.Then():
            T.buffer_store(scale, step_of(largest[0]), [at])


def add_up(tiles: Any, hidden: int, place: Any, weights: Any, partial: Any, out: Any, tokens: Any, top_k: Any) -> None:
    """Weighted sum of a token's choices, in their order."""
    lanes = 4 if hidden % 4 == 0 else 1
    count, A = tokens * (hidden // lanes), tiles.adders
    with tiles.blocks((count + A - 1) // A) as block, tiles.lanes(A) as lane:
        index = T.Bind(T.Cast("int64", block) * A + lane)
        total, part, shares = (T.alloc_buffer((n,), "float32", scope="local") for n in (lanes, AT_ONCE * lanes, AT_ONCE))
        rows = T.alloc_buffer((AT_ONCE,), "int32", scope="local")
        with T.If(index < count), T.Then():
            t, c = T.Bind(index // (hidden // lanes)), T.Bind(index % (hidden // lanes) * lanes)
            for i in range(lanes):
                T.buffer_store(total, T.float32(0), [i])
            with T.serial((top_k + AT_ONCE - 1) // AT_ONCE) as group:
                # Rows that are not there, or padding, are read as row 0: a load waits for no branch.
                for u in range(AT_ONCE):
                    j = T.Bind(group * AT_ONCE + u)
                    row = T.Bind(T.Select(j < top_k, place[t * top_k + T.min(j, top_k - 1)], T.int32(-1)))
                    T.buffer_store(rows, row, [u])
                    with T.vectorized(lanes) as i:
                        value = partial[T.Cast("int64", T.max(row, 0)), c + i]
                        T.buffer_store(part, T.Cast("float32", value), [u * lanes + i])
                    T.buffer_store(shares, T.Cast("float32", weights[t, T.min(j, top_k - 1)]), [u])
                for u in range(AT_ONCE):
                    with T.If(rows[u] >= 0), T.Then():
                        for i in range(lanes):
                            T.buffer_store(total, total[i] + shares[u] * part[u * lanes + i], [i])
            for i in range(lanes):
                T.buffer_store(out, T.Cast(out.dtype, total[i]), [t, c + i])
