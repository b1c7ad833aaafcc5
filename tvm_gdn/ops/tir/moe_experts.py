"""The experts of a mixture in TensorIR: sort the routed rows by expert, two grouped products, weighted sum."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.spec import Geometry

#: Rows that the products may read past an expert's last one.
SLACK = 32


def moe_experts(geometry: Geometry, tiles: Any) -> Any:
    axis, dtype = geometry.axis, geometry.dtype
    D, G, KD, N, KI = axis["D"], axis["G"], axis["KD"], axis["ND"], axis["KI"]
    DP, IP = KD * tiles.k_step, KI * tiles.k_step
    MB, P, SN = tiles.block, tiles.pieces, tiles.columns // 32
    LN = 16

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, w13_: T.handle, w2_: T.handle, topk_weights_: T.handle, topk_ids_: T.handle, out_: T.handle):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E, x0 = T.int64(), T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_, (tokens, D), dtype["x"], strides=(x0, 1), align=2)
        w13 = T.match_buffer(w13_, (E, G, KD, 512), "int32", align=4)
        w2 = T.match_buffer(w2_, (E, N, KI, 512), "int32", align=4)
        weights = T.match_buffer(topk_weights_, (tokens, top_k), dtype["topk_weights"], align=2)
        ids = T.match_buffer(topk_ids_, (tokens, top_k), dtype["topk_ids"], align=4)
        out = T.match_buffer(out_, (tokens, D), dtype["x"], align=2)

        offsets = T.alloc_buffer((E + 1,), "int64")
        cursor = T.alloc_buffer((E + 1,), "int64")
        active = T.alloc_buffer((E + 1,), "int64")
        cost = T.alloc_buffer((E + 1,), "int64")
        order = T.alloc_buffer((tokens * top_k,), "int64")
        hidden = tiles.rows(tokens * top_k + SLACK, IP)

        @T.inline
        def sort():
            for e in T.serial(E + 1):
                offsets[e] = T.int64(0)
            for t in T.serial(tokens):
                for j in T.serial(top_k):
                    if ids[t, j] >= 0 and T.Cast("int64", ids[t, j]) < E:
                        offsets[T.Cast("int64", ids[t, j]) + 1] = offsets[T.Cast("int64", ids[t, j]) + 1] + T.int64(1)
            active[E] = T.int64(0)
            cost[0] = T.int64(0)
            for e in T.serial(E):
                if offsets[e + 1] > 0:
                    active[active[E]] = e
                    cost[active[E] + 1] = cost[active[E]] + G * T.max(T.int64(tiles.floor), (offsets[e + 1] + 15) // 16)
                    active[E] = active[E] + T.int64(1)
                cursor[e] = offsets[e]
                offsets[e + 1] = offsets[e + 1] + offsets[e]
            for t in T.serial(tokens):
                for j in T.serial(top_k):
                    if ids[t, j] >= 0 and T.Cast("int64", ids[t, j]) < E:
                        order[cursor[T.Cast("int64", ids[t, j])]] = t * top_k + j
                        cursor[T.Cast("int64", ids[t, j])] = cursor[T.Cast("int64", ids[t, j])] + T.int64(1)

        @T.inline
        def stage(A, r, t):
            for c in T.serial(D // LN):
                for lane in T.vectorized(LN):
                    A[r, c * LN + lane] = T.Cast(tiles.operand, x[t, c * LN + lane])
            for c in T.serial(DP - D // LN * LN):
                A[r, D // LN * LN + c] = T.Cast(tiles.operand, T.if_then_else(D // LN * LN + c < D, x[t, D // LN * LN + c], T.Cast(dtype["x"], 0)))

        sort()
        with T.attr(0, "pragma_import_llvm", tiles.prelude):
            for p in tiles.workers(T.int64(P)):
                tiles.begin()
                A = tiles.rows(MB, DP)
                total = cost[active[E]]
                for a in T.serial(active[E]):
                    e = active[a]
                    each = (cost[a + 1] - cost[a]) // G
                    g0 = T.max(T.int64(0), T.min(T.int64(G), (total * p // P - cost[a] + each - 1) // each))
                    g1 = T.max(T.int64(0), T.min(T.int64(G), (total * (p + 1) // P - cost[a] + each - 1) // each))
                    if g1 > g0:
                        for b in T.serial((offsets[e + 1] - offsets[e] + MB - 1) // MB):
                            m = T.min(T.int64(MB), offsets[e + 1] - offsets[e] - b * MB)
                            for r in T.serial(m):
                                stage(A, r, order[offsets[e] + b * MB + r] // top_k)
                            for n in T.serial(g1 - g0):

                                @T.inline
                                def gate_up(C, r0, rows):
                                    for r in T.serial(rows):
                                        for lane in T.vectorized(LN):
                                            hidden[offsets[e] + b * MB + r0 + r, (g0 + n) * LN + lane] = T.Cast(
                                                tiles.operand,
                                                C[r, lane] / (T.float32(1) + tiles.exp(-C[r, lane])) * C[r, LN + lane],
                                            )

                                tiles.product(A, T.int64(0), m, w13, e, g0 + n, KD, gate_up)
                tiles.end()

            for s in tiles.workers(T.int64((N + SN - 1) // SN)):
                tiles.begin()
                total_ = T.alloc_buffer((tokens, SN * 32), "float32")
                for t in T.serial(tokens):
                    for c in T.serial(SN * 2):
                        for lane in T.vectorized(LN):
                            total_[t, c * LN + lane] = T.float32(0)
                for a in T.serial(active[E]):
                    e = active[a]
                    for n in T.serial(T.min(T.int64(SN), N - s * SN)):

                        @T.inline
                        def down(C, r0, rows):
                            for r in T.serial(rows):
                                pair = order[offsets[e] + r0 + r]
                                for c in T.serial(2):
                                    for lane in T.vectorized(LN):
                                        total_[pair // top_k, n * 32 + c * LN + lane] = (
                                            total_[pair // top_k, n * 32 + c * LN + lane]
                                            + T.Cast("float32", weights[pair // top_k, pair % top_k]) * C[r, c * LN + lane]
                                        )

                        tiles.product(hidden, offsets[e], offsets[e + 1] - offsets[e], w2, e, s * SN + n, KI, down)
                tiles.end()
                for t in T.serial(tokens):
                    for c in T.serial(T.min(T.int64(SN * 32), D - s * SN * 32)):
                        out[t, s * SN * 32 + c] = T.Cast(dtype["x"], total_[t, c])

    return kernel
