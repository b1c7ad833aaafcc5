"""Sorting routed tokens by expert, and load statistics, on devices: the results of `moe_sort.py` and `moe_stats.py`, in blocks.

The sort is stable without a scan over experts: a block per expert counts the pairs of its own and of all experts before it, a
part of them in each warp, and then writes its own in ascending order. E passes over the ids are E reads from a cache.

How a target plugs in: `blocks(count)`, `lanes(threads)`, `sync()`, `next(buffer, index)` (the number there, which becomes one
more), `reduce(buffer, function)` (buffer[0] of all threads of a warp as one), `before(buffer, lane)` (the sum of buffer[0] up to
this thread) and `warp`, the threads of one.
"""

from __future__ import annotations

import operator
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.spec import Geometry

#: Warps of a block of the sort, pairs that a thread reads at once, threads of the statistics' block.
WARPS, EACH, THREADS = 8, 4, 1024


def moe_sort_grid(geometry: Geometry, tiles: Any) -> Any:
    """Build the sort of one geometry; parameters as `moe_sort.moe_sort` has them.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    warp = tiles.warp
    step = warp * EACH

    @T.prim_func(s_tir=True)
    def kernel(topk_ids_: T.handle, counts_: T.handle, offsets_: T.handle, order_: T.handle):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E, s0, s1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        topk_ids = T.match_buffer(topk_ids_, (tokens, top_k), geometry.dtype["topk_ids"], strides=(s0, s1), align=4)
        counts = T.match_buffer(counts_, (E,), "int32", align=4)
        offsets = T.match_buffer(offsets_, (E + 1,), "int32", align=4)
        order = T.match_buffer(order_, (tokens, top_k), "int32", align=4)
        flat = T.decl_buffer((tokens * top_k,), "int32", data=order.data)

        @T.inline
        def look(first, chosen):
            """Experts of EACH pairs from `first` on; -1: padding, or no pair."""
            for b in T.unroll(EACH):
                chosen[b] = -1
                if first + b < tokens * top_k:
                    e = T.Cast("int64", topk_ids[(first + b) // top_k, (first + b) % top_k])
                    chosen[b] = T.Select(T.And(e >= 0, e < E), T.Cast("int32", e), T.int32(-1))

        assert E > 0, ("ValueError", ["num_experts: none"])
        for block in tiles.blocks(E + 1):
            for thread in tiles.lanes(WARPS * warp):
                own = T.alloc_buffer((WARPS,), "int32", scope="shared")
                below = T.alloc_buffer((WARPS,), "int32", scope="shared")
                chosen = T.alloc_buffer((EACH,), "int32", scope="local")
                mine = T.alloc_buffer((1,), "int32", scope="local")
                less = T.alloc_buffer((1,), "int32", scope="local")
                place = T.alloc_buffer((1,), "int32", scope="local")
                steps = (tokens * top_k + WARPS * step - 1) // (WARPS * step)
                start = T.Cast("int64", thread // warp) * (steps * step) + T.Cast("int64", thread % warp) * EACH
                mine[0] = 0
                less[0] = 0
                for i in T.serial(steps):
                    look(start + i * step, chosen)
                    for b in T.unroll(EACH):
                        mine[0] = mine[0] + T.Select(T.Cast("int64", chosen[b]) == block, 1, 0)
                        less[0] = less[0] + T.Select(T.And(chosen[b] >= 0, T.Cast("int64", chosen[b]) < block), 1, 0)
                tiles.reduce(mine, operator.add)
                tiles.reduce(less, operator.add)
                if thread % warp == 0:
                    own[thread // warp] = mine[0]
                    below[thread // warp] = less[0]
                tiles.sync()
                mine[0] = 0
                less[0] = 0
                place[0] = 0
                for w in T.serial(WARPS):
                    mine[0] = mine[0] + own[w]
                    less[0] = less[0] + below[w]
                    place[0] = place[0] + T.Select(w < thread // warp, own[w], 0)
                place[0] = place[0] + less[0]
                if thread == 0:
                    offsets[block] = less[0]
                    if block < E:
                        counts[block] = mine[0]
                if block == E:
                    # Padding goes nowhere.
                    for i in T.serial((tokens * top_k - T.Cast("int64", less[0]) + WARPS * warp - 1) // (WARPS * warp)):
                        if T.Cast("int64", less[0]) + i * (WARPS * warp) + thread < tokens * top_k:
                            flat[T.Cast("int64", less[0]) + i * (WARPS * warp) + thread] = -1
                elif mine[0] > 0:
                    for i in T.serial(steps):
                        look(start + i * step, chosen)
                        mine[0] = 0
                        for b in T.unroll(EACH):
                            mine[0] = mine[0] + T.Select(T.Cast("int64", chosen[b]) == block, 1, 0)
                        less[0] = mine[0]
                        tiles.before(mine, thread % warp)
                        mine[0] = place[0] + mine[0] - less[0]
                        for b in T.unroll(EACH):
                            if T.Cast("int64", chosen[b]) == block:
                                flat[mine[0]] = T.Cast("int32", start + i * step + b)
                                mine[0] = mine[0] + 1
                        tiles.reduce(less, operator.add)
                        place[0] = place[0] + less[0]

    return kernel


def moe_stats_grid(geometry: Geometry, tiles: Any) -> Any:
    """Build the statistics of one geometry; parameters as `moe_stats.moe_stats` has them.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    S = THREADS

    @T.inline
    def whole(sums, lane, function):
        """All threads' sums[lane] as one, in sums[0]."""
        for bit in T.unroll(S.bit_length() - 1):
            tiles.sync()
            if lane < T.shift_right(S // 2, bit):
                sums[lane] = function(sums[lane], sums[lane + T.shift_right(S // 2, bit)])
        tiles.sync()

    @T.prim_func(s_tir=True)
    def kernel(topk_ids_: T.handle, counts_: T.handle, imbalance_: T.handle, entropy_: T.handle):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E, s0, s1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        topk_ids = T.match_buffer(topk_ids_, (tokens, top_k), geometry.dtype["topk_ids"], strides=(s0, s1), align=4)
        counts = T.match_buffer(counts_, (E,), "int32", align=4)
        imbalance = T.match_buffer(imbalance_, (), "float32", align=4)
        entropy = T.match_buffer(entropy_, (), "float32", align=4)

        assert E > 0, ("ValueError", ["num_experts: none"])
        for _ in tiles.blocks(T.int64(1)):
            for lane in tiles.lanes(S):
                sums = T.alloc_buffer((S,), "float32", scope="shared")
                most = T.alloc_buffer((S,), "float32", scope="shared")
                part = T.alloc_buffer((1,), "float32", scope="local")
                for i in T.serial((E + S - 1) // S):
                    if i * S + lane < E:
                        counts[i * S + lane] = 0
                tiles.sync()
                for i in T.serial((tokens * top_k + S - 1) // S):
                    if i * S + lane < tokens * top_k:
                        e = T.Cast("int64", topk_ids[(i * S + lane) // top_k, (i * S + lane) % top_k])
                        if e >= 0 and e < E:
                            T.evaluate(tiles.next(counts, e))
                tiles.sync()
                sums[lane] = T.float32(0)
                most[lane] = T.float32(0)
                for i in T.serial((E + S - 1) // S):
                    if i * S + lane < E:
                        sums[lane] = sums[lane] + T.Cast("float32", counts[i * S + lane])
                        most[lane] = T.max(most[lane], T.Cast("float32", counts[i * S + lane]))
                whole(sums, lane, operator.add)
                whole(most, lane, T.max)
                part[0] = sums[0]
                tiles.sync()
                sums[lane] = T.float32(0)
                for i in T.serial((E + S - 1) // S):
                    if i * S + lane < E:
                        if counts[i * S + lane] > 0:
                            share = T.Cast("float32", counts[i * S + lane]) / part[0]
                            sums[lane] = sums[lane] - share * tiles.log(share)
                whole(sums, lane, operator.add)
                if lane == 0:
                    entropy[()] = sums[0]
                    imbalance[()] = T.Select(
                        part[0] > T.float32(0), most[0] * T.Cast("float32", E) / T.max(part[0], T.float32(1)), T.float32(1)
                    )

    return kernel
