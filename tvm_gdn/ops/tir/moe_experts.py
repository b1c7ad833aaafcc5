"""The experts of a mixture in TensorIR: sort by expert, two grouped products, weighted sum.

For every pair (token t, choice j) of an expert e, with weights W1, W3 (gate, up) and W2 (down) of the expert::

    h = silu(W1 x_t) * (W3 x_t)                      first loop: shares of equal cost of (expert, 16 columns of h)
    out_t = sum_j topk_weights[t, j] * (W2 h)        second loop: shares of the output columns, experts in ascending order

Rows of one expert stand together after the sort, so every weight is read once, for all rows of its expert, and experts without
rows cost nothing. No two workers write to the same place, and a sum's order does not depend on their number: results are
deterministic. Sums over the reduction axis and over the choices are fp32.

With quantized weights the rows of the left operand are quantized too, each by its own largest element (``amax / 127``), before
either product; see `tiles.quantized`.

How a target plugs in. Its tiles object states `operand` (dtype of the left operand), `k_step` (elements of a step of packed
weights), `block` (rows staged at once), `columns` (summed up at once) and `floor` (a cost), and supplies

- `team()`, `share(count)`: the workers, and which of `count` pieces are a worker's own;
- `rows(count, columns)`: memory for staged rows; `begin(steps)`, `end()`: around a worker's products;
- `product(A, sums, first, m, W, scale, e, n, steps, shift, after, sink)`: rows first to first + m of A times the 32 columns of
  group n of W[e] (packed: group n; raw: rows n * 16 to n * 16 + 16, and those `shift` further on), given to ``sink(C, r, rows)``
  in blocks, C[i, 0:32] being row r + i. Rows after the last one, up to `SLACK`, may be read. `after`: the expert and the group
  whose weights come next: what memory can be asked for.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_elements import magnitude, per_step, silu_product, step_of, to_int8
from tvm_gdn.ops.tir.moe_grid import moe_grid
from tvm_gdn.ops.tir.moe_sort import sort_macro
from tvm_gdn.spec import Geometry

#: Rows that the products may read past an expert's last one.
SLACK = 32
#: Elements of a row that are converted at once.
LANES = 16
#: Parts of the first loop's cost that workers share: a worker's share is exact to a thousandth of the whole.
PARTS = 960


def moe_experts(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes D, and I (raw weights) or G, KD, ND, KI (packed), S13 and S2 (groups of a quantized reduction axis);
        dtypes of the tensors.
    tiles : object
        The target's tile operations.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    if tiles.grid:
        return moe_grid(geometry, tiles)
    axis, dtype = geometry.axis, geometry.dtype
    D, k_step = axis["D"], tiles.k_step
    packed = "G" in axis
    if packed:
        G, KD, N, KI = axis["G"], axis["KD"], axis["ND"], axis["KI"]
        inner, shape13, shape2, words = G * 16, (G, KD, 512), (N, KI, 512), ("int32", "int32")
    else:
        inner = axis["I"]
        G, KD, N, KI = -(-inner // 16), -(-D // k_step), -(-D // 32), -(-inner // k_step)
        shape13, shape2, words = (2 * inner, D), (D, inner), (dtype["w13"], dtype["w2"])
    DP, IP = KD * k_step, KI * k_step
    quantized = tiles.quantized
    S13, S2 = max(1, axis.get("S13", 0)), max(1, axis.get("S2", 0))
    block = tiles.block

    sort = sort_macro()
    staged = "float32" if quantized else tiles.operand
    # Shares of the first loop end where cache lines of h do, so that no two workers write to one line.
    line = 2 if staged == "bfloat16" else 1

    def cut(part: Any, whole: Any, before: Any, each: Any) -> Any:
        """Groups of an expert before part `part`: `whole` is the cost of all, `before` of earlier experts, `each` of a group."""
        groups = (whole * part // PARTS - before + each - 1) // each
        return T.max(T.int64(0), T.min(T.int64(G), (groups + line - 1) // line * line))

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
            w13_scale = T.match_buffer(w13_scale_, (E, G, S13, 32), dtype["w13_scale"], align=2)
            w2_scale = T.match_buffer(w2_scale_, (E, N, S2, 32), dtype["w2_scale"], align=2)
        out = T.match_buffer(out_, (tokens, D), dtype["x"], align=2)

        offsets = T.alloc_buffer((E + 1,), "int64")
        cursor = T.alloc_buffer((E + 1,), "int64")
        active = T.alloc_buffer((E + 1,), "int64")  # experts that have rows; their number at the end
        cost = T.alloc_buffer((E + 1,), "int64")  # cumulated over them
        order = T.alloc_buffer((tokens * top_k,), "int64")  # tokens of the pairs by expert
        shares = T.alloc_buffer((tokens * top_k,), "float32")  # their weights
        hidden = T.alloc_buffer((tokens * top_k + SLACK, IP + tiles.pad), staged)
        if quantized:
            tokens_q = tiles.rows(tokens, DP)
            tokens_scale = T.alloc_buffer((tokens,), "float32")
            tokens_sums = T.alloc_buffer((tokens, S13), "int32")
            hidden_q = tiles.rows(tokens * top_k + SLACK, IP)
            hidden_scale = T.alloc_buffer((tokens * top_k,), "float32")
            hidden_sums = T.alloc_buffer((tokens * top_k + SLACK, S2), "int32")

        @T.inline
        def costs():
            active[E] = T.int64(0)
            cost[0] = T.int64(0)
            for e in T.serial(E):
                if offsets[e + 1] > offsets[e]:
                    active[active[E]] = e
                    # Reading the weights takes as long as multiplying them with `floor` blocks of 16 rows.
                    cost[active[E] + 1] = cost[active[E]] + G * T.max(
                        T.int64(tiles.floor), (offsets[e + 1] - offsets[e] + 15) // 16
                    )
                    active[E] = active[E] + T.int64(1)

        @T.inline
        def place(at, t, j):
            """What is known of a sorted pair, and that its row of h is not quantized yet: scales are never negative."""
            order[at] = t
            shares[at] = T.Cast("float32", topk_weights[t, j])
            if quantized:
                hidden_scale[at] = T.float32(-1)

        @T.inline
        def convert(dst, r, src, row, used, padded):
            """dst[r, :] = src[row, :], zero from `used` on."""
            for c in T.serial(used // LANES):
                for lane in T.vectorized(LANES):
                    dst[r, c * LANES + lane] = T.Cast(dst.dtype, src[row, c * LANES + lane])
            for c in T.serial(used % LANES):
                dst[r, used // LANES * LANES + c] = T.Cast(dst.dtype, src[row, used // LANES * LANES + c])
            for c in T.serial(padded - used):
                dst[r, used + c] = T.Cast(dst.dtype, 0)

        @T.inline
        def quantize(dst, scale, sums, r, src, row, used, padded, groups):
            """Row r of dst = `row` of src in steps of its largest element / 127, and `zero` times the sums of its groups."""
            part, count, number = tiles.integers(LANES), tiles.integers(1), tiles.scalars(1)
            for lane in T.vectorized(LANES):
                part[lane] = 0
            for c in T.serial(used // LANES):
                for lane in T.vectorized(LANES):
                    part[lane] = T.max(part[lane], magnitude(T.Cast("float32", src[row, c * LANES + lane])))
            for c in T.serial(used % LANES):
                part[0] = T.max(part[0], magnitude(T.Cast("float32", src[row, used // LANES * LANES + c])))
            count[0] = part[0]
            for lane in T.serial(LANES - 1):
                count[0] = T.max(count[0], part[lane + 1])
            number[0] = per_step(count[0])
            scale[r] = step_of(count[0])
            for c in T.serial(used // LANES):
                for lane in T.vectorized(LANES):
                    dst[r, c * LANES + lane] = to_int8(T.Cast("float32", src[row, c * LANES + lane]) * number[0])
            for c in T.serial(used % LANES):
                dst[r, used // LANES * LANES + c] = to_int8(T.Cast("float32", src[row, used // LANES * LANES + c]) * number[0])
            for c in T.serial(padded - used):
                dst[r, used + c] = T.int8(0)
            for g in T.serial(groups):
                for lane in T.vectorized(LANES):
                    part[lane] = 0
                for c in T.serial(padded // groups // LANES):
                    for lane in T.vectorized(LANES):
                        part[lane] = part[lane] + T.Cast("int32", dst[r, g * (padded // groups) + c * LANES + lane])
                count[0] = 0
                for lane in T.serial(LANES):
                    count[0] = count[0] + part[lane]
                sums[r, g] = count[0] * tiles.zero

        @T.inline
        def hidden_columns(first, n, C, r0, rows, scale):
            """Elements of h of a block of pairs, from row `first` on; C has 16 columns of W1 x and then as many of W3 x."""
            gate, up = tiles.scalars(LANES), tiles.scalars(LANES)
            for r in T.serial(rows):
                for lane in T.vectorized(LANES):
                    gate[lane] = C[r, lane]
                for lane in T.vectorized(LANES):
                    up[lane] = C[r, LANES + lane]
                if quantized:
                    for lane in T.vectorized(LANES):
                        gate[lane] = gate[lane] * scale[r0 + r]
                    for lane in T.vectorized(LANES):
                        up[lane] = up[lane] * scale[r0 + r]
                for lane in T.vectorized(LANES):
                    gate[lane] = silu_product(gate[lane], up[lane], tiles.exp)
                if inner % LANES == 0:
                    for lane in T.vectorized(LANES):
                        hidden[first + r0 + r, n * LANES + lane] = T.Cast(staged, gate[lane])
                else:
                    for lane in T.serial(LANES):
                        if n * LANES + lane < inner:
                            hidden[first + r0 + r, n * LANES + lane] = T.Cast(staged, gate[lane])

        @T.inline
        def add_columns(total, pair0, n, C, r0, rows):
            """total[t, 32 columns of group n] += topk_weights * C."""
            weight = tiles.scalars(1)
            for r in T.serial(rows):
                t: T.let[T.int64] = order[pair0 + r0 + r]
                weight[0] = shares[pair0 + r0 + r]
                if quantized:
                    weight[0] = weight[0] * hidden_scale[pair0 + r0 + r]
                for c in T.serial(2):
                    for lane in T.vectorized(LANES):
                        total[t, n * 32 + c * LANES + lane] = (
                            total[t, n * 32 + c * LANES + lane] + weight[0] * C[r, c * LANES + lane]
                        )

        @T.inline
        def write(total, n0, n1):
            """Write the sums of groups n0 to n1; of the last group, D may cut some off."""
            for t in T.serial(tokens):
                for c in T.serial((T.min(n1 * 32, T.int64(D)) - n0 * 32) // LANES):
                    for lane in T.vectorized(LANES):
                        out[t, n0 * 32 + c * LANES + lane] = T.Cast(out.dtype, total[t, c * LANES + lane])
                if D % LANES != 0:
                    if n1 * 32 > D:
                        for c in T.serial(D % LANES):
                            out[t, D - D % LANES + c] = T.Cast(out.dtype, total[t, D - D % LANES - n0 * 32 + c])

        sort(topk_ids, tokens, top_k, E, offsets, cursor, place)
        costs()
        with T.attr(0, "pragma_import_llvm", tiles.prelude):
            if quantized:
                for t in tiles.workers(tokens):
                    quantize(tokens_q, tokens_scale, tokens_sums, t, x, t, D, DP, S13)

            with tiles.team():
                parts = tiles.share(PARTS)
                tiles.begin(KD)
                A = tiles.rows(block + SLACK, DP)
                if quantized:
                    sums = T.alloc_buffer((block + SLACK, S13), "int32")
                    scale = T.alloc_buffer((block,), "float32")
                    home = T.alloc_buffer((1,), "int64")
                    home[0] = T.int64(-1)
                for a in T.serial(active[E]):
                    e = active[a]
                    each: T.let[T.int64] = (cost[a + 1] - cost[a]) // G
                    g0: T.let[T.int64] = cut(parts[0], cost[active[E]], cost[a], each)
                    g1: T.let[T.int64] = cut(parts[1], cost[active[E]], cost[a], each)
                    if g1 > g0:
                        for b in T.serial((offsets[e + 1] - offsets[e] + block - 1) // block):
                            pair0 = offsets[e] + b * block
                            m = T.min(T.int64(block), offsets[e + 1] - pair0)
                            if quantized:
                                if home[0] < 0:
                                    if g1 - g0 == G:
                                        home[0] = pair0
                            for r in T.serial(m):
                                t: T.let[T.int64] = order[pair0 + r]
                                if quantized:
                                    convert(A, r, tokens_q, t, DP, DP)
                                    scale[r] = tokens_scale[t]
                                    for g in T.serial(S13):
                                        sums[r, g] = tokens_sums[t, g]
                                else:
                                    convert(A, r, x, t, D, DP)
                            # Rows of h that are one worker's whole are quantized at once: it keeps them where the first ones
                            # were, in its cache.
                            first: T.let[T.int64] = T.Select(g1 - g0 == G, home[0], pair0) if quantized else pair0
                            for g in T.serial(g1 - g0):

                                @T.inline
                                def gate_up(C, r0, rows):
                                    if quantized:
                                        hidden_columns(first, g0 + g, C, r0, rows, scale)
                                    else:
                                        hidden_columns(pair0, g0 + g, C, r0, rows, None)

                                # Next come this block's next group, the expert's next block, the next expert.
                                same: T.let[T.bool] = T.Or(g + 1 < g1 - g0, pair0 + m < offsets[e + 1])
                                group: T.let[T.int64] = T.Select(g + 1 < g1 - g0, g0 + g + 1, T.Select(same, g0, T.int64(0)))
                                after: T.let[T.int64] = T.Select(same, e, active[a + 1])
                                if quantized:
                                    tiles.product(
                                        A, sums, T.int64(0), m, w13, w13_scale, e, g0 + g, KD, inner,
                                        (after, group), gate_up,
                                    )  # fmt: skip
                                else:
                                    tiles.product(
                                        A, None, T.int64(0), m, w13, None, e, g0 + g, KD, inner,
                                        (after, group), gate_up,
                                    )  # fmt: skip
                            if quantized:
                                if g1 - g0 == G:
                                    for r in T.serial(m):
                                        quantize(hidden_q, hidden_scale, hidden_sums, pair0 + r, hidden, first + r, IP, IP, S2)
                tiles.end()

            if quantized:
                for i in tiles.workers(offsets[E]):
                    if hidden_scale[i] < T.float32(0):
                        quantize(hidden_q, hidden_scale, hidden_sums, i, hidden, i, IP, IP, S2)
            elif inner < IP:
                for i in tiles.workers(offsets[E]):
                    for c in T.serial(IP - inner):
                        hidden[i, inner + c] = T.Cast(staged, 0)

            with tiles.team():
                own = tiles.share(N)
                width: T.let[T.int64] = T.min(own[1] - own[0], T.int64(tiles.columns // 32)) * 32
                if width > 0:
                    tiles.begin(KI)
                    total = T.alloc_buffer((tokens, width), "float32")
                    for s in T.serial(((own[1] - own[0]) * 32 + width - 1) // width):
                        n0: T.let[T.int64] = own[0] + s * (width // 32)
                        n1: T.let[T.int64] = T.min(n0 + width // 32, own[1])
                        for t in T.serial(tokens):
                            for c in T.serial(width // LANES):
                                for lane in T.vectorized(LANES):
                                    total[t, c * LANES + lane] = T.float32(0)
                        for a in T.serial(active[E]):
                            e = active[a]
                            m2 = offsets[e + 1] - offsets[e]
                            for n in T.serial(n1 - n0):

                                @T.inline
                                def down(C, r0, rows):
                                    add_columns(total, offsets[e], n, C, r0, rows)

                                # Raw weights: 32 columns are rows n * 32 to n * 32 + 32, two runs of 16.
                                n2 = n0 + n if packed else (n0 + n) * 2
                                # Next come this expert's next group, the next expert's first one.
                                group: T.let[T.int64] = T.Select(n0 + n + 1 < n1, n0 + n + 1, n0)
                                after: T.let[T.int64] = T.Select(n0 + n + 1 < n1, e, active[a + 1])
                                if quantized:
                                    tiles.product(
                                        hidden_q, hidden_sums, offsets[e], m2, w2, w2_scale, e, n2, KI, 16,
                                        (after, group), down,
                                    )  # fmt: skip
                                else:
                                    tiles.product(hidden, None, offsets[e], m2, w2, None, e, n2, KI, 16, (after, group), down)
                        write(total, n0, n1)
                    tiles.end()

    return kernel
