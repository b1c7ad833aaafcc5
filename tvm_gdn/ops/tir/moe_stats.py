"""Load statistics of a routing in TensorIR: tokens per expert, largest over mean, entropy."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_sort_grid import moe_stats_grid
from tvm_gdn.spec import Geometry


def moe_stats(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Dtype of topk_ids.
    tiles : object
        The target's `alone`, `log` and `scalars`.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    if tiles.grid:
        return moe_stats_grid(geometry, tiles)

    @T.prim_func(s_tir=True)
    def kernel(topk_ids_: T.handle, counts_: T.handle, imbalance_: T.handle, entropy_: T.handle):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, E, s0, s1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        topk_ids = T.match_buffer(topk_ids_, (tokens, top_k), geometry.dtype["topk_ids"], strides=(s0, s1), align=4)
        counts = T.match_buffer(counts_, (E,), "int32", align=4)
        imbalance = T.match_buffer(imbalance_, (), "float32", align=4)
        entropy = T.match_buffer(entropy_, (), "float32", align=4)

        assert E > 0, ("ValueError", ["num_experts: none"])
        tiles.alone()
        total, largest, share = tiles.scalars(1), tiles.scalars(1), tiles.scalars(1)
        for e in T.serial(E):
            counts[e] = 0
        for t in T.serial(tokens):
            for j in T.serial(top_k):
                if topk_ids[t, j] >= 0 and T.Cast("int64", topk_ids[t, j]) < E:
                    counts[T.Cast("int64", topk_ids[t, j])] = counts[T.Cast("int64", topk_ids[t, j])] + 1
        total[0] = T.float32(0)
        largest[0] = T.float32(0)
        entropy[()] = T.float32(0)
        for e in T.serial(E):
            total[0] = total[0] + T.Cast("float32", counts[e])
            largest[0] = T.max(largest[0], T.Cast("float32", counts[e]))
        for e in T.serial(E):
            if counts[e] > 0:
                share[0] = T.Cast("float32", counts[e]) / total[0]
                entropy[()] = entropy[()] - share[0] * tiles.log(share[0])
        # Nobody routed: as even as can be, and nothing to be uncertain about.
        imbalance[()] = T.Select(
            total[0] > T.float32(0), largest[0] * T.Cast("float32", E) / T.max(total[0], T.float32(1)), T.float32(1)
        )

    return kernel
