"""The experts of a mixture on devices: the same sums as `moe_experts.py`, as a grid of blocks in phases.

A phase is a kernel; all of them go to the stream at once, and what one leaves to the next stays on the device: offsets, order,
h and the rows before their sum are scratch memory. The host knows T, k and E, which are shapes. From the mean number of rows
per expert it takes one of the target's plans (few rows: bound by memory; many: by products), and a bound of the number of
tiles.

1. sort: one block. Counts per expert by atomic additions, offsets by a scan, then the map of tiles: a tile has up to
   `plan.rows` rows of one expert. Where a pair stands among its expert's rows may change from run to run; its numbers do not.
   Few pairs of the first plan are not sorted: blocks look for their rows in the ids (`moe_grid_rows.py`). Of many pairs a
   kernel of many blocks does the last part.
2. gate and up: a block per tile and `plan.columns` columns of h. A thread holds the same columns of both products, so the SiLU
   product is the epilogue. Blocks of one tile are neighbours, then come the other tiles of that expert: a weight comes from
   memory once, and from the L2 cache for further tiles.
3. down: the same over h, into one row per pair, in the target's `partial` dtype.
4. sum: a thread per four columns of a token adds up its choices in order, in fp32.

No two blocks write to one place and every sum has a fixed order: results are deterministic.

How a target plugs in. Its tiles object states `plans` (the last one for all that is more), `sorters` and `adders` (threads of
those blocks, multiples of `warp`, at most `warp` squared), `warp` and `partial` (dtype of rows to be summed), and supplies
`blocks(count)`, `lanes(threads)`, `enter(lane)`, `follow()` (what earlier kernels wrote is there; only then may the next
kernel's blocks begin), `sync()`, `before(buffer, lane)` (the sum of buffer[0] up to this thread of a
warp), `of(buffer, lane)` (buffer[0] of another), `next(buffer, index)` (the number there, which becomes one more),
`store_some(buffer, index, values)` (two or four neighbours from a multiple of their number on), and

- `product(plan, A, row_of, m, W, e, n, shift, sink, follow=False)`: rows row_of(0) to row_of(m - 1) of A times `plan.columns`
  columns of W[e] and as many others (raw: rows from n on, and those `shift` further on; packed: both halves of groups from n
  on), given to ``sink(r, c, first, second)``: of row r and two or four columns from c on, the values of either half. With
  `follow` it calls `follow` itself, before it reads A.

Quantized weights: rows of x, and of h, are made int8 by a kernel of their own before either product, which then takes
``scales=(row scales, row sums, weight scales)``. The tiles object states `quantized`, `k_step` and `zero`, and supplies
`reduce(buffer, function)`: buffer[0] of all threads of a warp as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_elements import magnitude, per_step, silu_product, step_of, to_int8
from tvm_gdn.ops.tir.moe_grid_rows import (
    MOST_ALONE,
    MOST_EXPERTS,
    MOST_SEEN,
    Rows,
    Seen,
    Sorted,
    most_tiles,
    sort_macro,
)
from tvm_gdn.ops.tir.plans import emit_plans
from tvm_gdn.spec import Geometry

#: Choices of a token that are read before the first of them is added.
AT_ONCE = 4

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
    sort, sort_counted = sort_macro(tiles, False), sort_macro(tiles, True)

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
        def first(plan, routing):
            if quantized:
                gate_up(plan, tiles, sizes, x_q, w13, hidden, routing, scales=(x_scale, x_sums, w13_scale))
            else:
                gate_up(plan, tiles, sizes, x, w13, hidden, routing)

        @T.inline
        def second(plan, routing):
            if quantized:
                down(plan, tiles, sizes, hidden_q, w2, partial, routing, scales=(hidden_scale, hidden_sums, w2_scale))
            else:
                down(plan, tiles, sizes, hidden, w2, partial, routing)

        @T.inline
        def experts(plans, routing):
            if quantized:
                quantize(tiles, x, tokens, x_q, x_scale, x_sums)
            emit_plans(plans, lambda plan: _is_for(plan, tokens * top_k, E), lambda plan: first(plan, routing))
            if quantized:
                quantize(tiles, hidden, tokens * top_k, hidden_q, hidden_scale, hidden_sums)
            emit_plans(plans, lambda plan: _is_for(plan, tokens * top_k, E), lambda plan: second(plan, routing))
            add_up(tiles, D, routing, topk_weights, partial, out, tokens, top_k)

        @T.inline
        def in_order(sort, routing):
            sort(
                topk_ids, routing, _most_tiles(tiles.plans, routing.pairs, E),
                _of_plan(tiles.plans, "rows", routing.pairs, E), _of_plan(tiles.plans, "step", routing.pairs, E),
            )  # fmt: skip

        assert E <= MOST_EXPERTS, ("ValueError", [f"w13: at most {MOST_EXPERTS} experts on devices"])
        # No names for what is passed on: a variable of the host is memory that the device does not see.
        if T.And(tokens * top_k <= MOST_SEEN, _is_for(tiles.plans[0], tokens * top_k, E)):
            experts(tiles.plans[:1], Seen(topk_ids, top_k, tokens * top_k, E))
        else:
            offsets = T.alloc_buffer((E + 2,), "int32")
            order = T.alloc_buffer((tokens * top_k,), "int32")
            place = T.alloc_buffer((tokens * top_k,), "int32")
            owner = T.alloc_buffer((tokens * top_k,), "int32")
            start = T.alloc_buffer((tokens * top_k,), "int32")
            routing = T.meta_var(Sorted(offsets, order, place, owner, start, top_k, tokens * top_k, E))
            if tokens * top_k > MOST_ALONE:
                routing.count(tiles, topk_ids)
                in_order(sort_counted, routing)
                routing.arrange(tiles, topk_ids)
            else:
                in_order(sort, routing)
            experts(tiles.plans, routing)

    return kernel


def _is_for(plan: Any, pairs: Any, E: Any) -> Any:
    """Whether experts have no more rows, on average, than the plan is for."""
    most = Fraction(plan.most)
    return pairs * most.denominator <= E * most.numerator


def _of_plan(plans: tuple[Any, ...], name: str, pairs: Any, E: Any) -> Any:
    """A number of the plan that is taken."""
    *few, last = plans
    found = T.int32(getattr(last, name))
    for plan in reversed(few):
        found = T.Select(_is_for(plan, pairs, E), T.int32(getattr(plan, name)), found)
    return found


def _most_tiles(plans: tuple[Any, ...], pairs: Any, E: Any) -> Any:
    """A bound of the number of tiles: every expert with rows has at most one that is not full."""
    *few, last = plans
    found = most_tiles(last, pairs, E)
    for plan in reversed(few):
        found = T.Select(_is_for(plan, pairs, E), most_tiles(plan, pairs, E), found)
    return found


def gate_up(plan: Any, tiles: Any, sizes: Sizes, x: Any, W: Any, hidden: Any, routing: Any, **more: Any) -> None:
    """Compute h = silu(W1 x) * (W3 x) for every pair."""

    def body(n: Any, rows: Rows) -> None:
        def sink(r: Any, c: Any, gate: list[Any], up: list[Any]) -> None:
            column = T.Bind(n * plan.columns + c)
            # Weights beyond the last column are zeros, and so is what is stored in the columns that pad a row.
            with T.If(column < hidden.shape[1]), T.Then():
                values = [silu_product(T.Bind(one), other, tiles.exp) for one, other in zip(gate, up, strict=True)]
                tiles.store_some(hidden, [T.Cast("int64", rows.place(r)), column], values)

        def token(r: Any) -> Any:
            return T.Cast("int64", T.truncdiv(rows.pair(r), T.Cast("int32", routing.top_k)))

        base = n * (plan.columns // 16 if sizes.packed else plan.columns)
        tiles.product(plan, x, token, rows.count, W, rows.expert, base, sizes.inner, sink, **more)

    routing.each(plan, tiles, -(-sizes.inner // plan.columns), body)


def down(plan: Any, tiles: Any, sizes: Sizes, hidden: Any, W: Any, partial: Any, routing: Any, **more: Any) -> None:
    """Compute W2 h for every pair, in fp32."""

    def body(n: Any, rows: Rows) -> None:
        def place(r: Any) -> Any:
            return T.Cast("int64", rows.place(r))

        def sink(r: Any, c: Any, *halves: list[Any]) -> None:
            for half, values in enumerate(halves):
                column = T.Bind(sizes.columns(n, half, c, plan.columns))
                with T.If(column < partial.shape[1]), T.Then():
                    tiles.store_some(partial, [place(r), column], values)

        base = n * (plan.columns // 16 if sizes.packed else 2 * plan.columns)
        tiles.product(plan, hidden, place, rows.count, W, rows.expert, base, plan.columns, sink, follow=True, **more)

    # What the routing left is there since the kernel before began.
    routing.each(plan, tiles, -(-sizes.hidden // (2 * plan.columns)), body, follow=False)


def quantize(tiles: Any, source: Any, count: Any, target: Any, scale: Any, sums: Any) -> None:
    """Rows of `source` in steps of their largest elements / 127, a warp each, and `zero` times the sum of every group."""
    warp, warps, used, groups = tiles.warp, tiles.adders // tiles.warp, int(source.shape[1]), int(sums.shape[1])
    size = int(target.shape[1]) // groups
    with tiles.blocks((count + warps - 1) // warps) as block, tiles.lanes(tiles.adders) as thread:
        tiles.follow()
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


def add_up(tiles: Any, hidden: int, routing: Any, weights: Any, partial: Any, out: Any, tokens: Any, top_k: Any) -> None:
    """Weighted sum of a token's choices, in their order."""
    lanes = 4 if hidden % 4 == 0 else 1
    count, A = tokens * (hidden // lanes), tiles.adders
    with tiles.blocks((count + A - 1) // A) as block, tiles.lanes(A) as lane:
        tiles.follow()
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
                    row = T.Bind(T.Select(j < top_k, routing.position(t, T.min(j, top_k - 1)), T.int32(-1)))
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
