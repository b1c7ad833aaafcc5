"""Sorting routed tokens by expert in TensorIR: counts, offsets, and the pairs (token, choice) in order of their experts."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.moe_sort_grid import moe_sort_grid
from tvm_gdn.spec import Geometry


def sort_macro() -> Any:
    """Macro of a stable counting sort.

    ``sort(ids, tokens, top_k, E, offsets, cursor, place)``: pair (t, j) goes to expert ``ids[t, j]``; an id outside [0, E) is
    padding and goes nowhere. ``place(at, t, j)`` notes that it is the sorted pair number `at`; those of expert e are numbers
    ``offsets[e]`` to ``offsets[e + 1]``, in the order of (t, j). `cursor` ([E]) is scratch. Serial: 8 pairs take some 20 ns,
    their experts' products a thousand times longer.
    """

    @T.inline
    def sort(ids, tokens, top_k, E, offsets, cursor, place):
        for e in T.serial(E + 1):
            offsets[e] = T.Cast(offsets.dtype, 0)
        for t in T.serial(tokens):
            for j in T.serial(top_k):
                if ids[t, j] >= 0 and T.Cast("int64", ids[t, j]) < E:
                    offsets[T.Cast("int64", ids[t, j]) + 1] = offsets[T.Cast("int64", ids[t, j]) + 1] + T.Cast(offsets.dtype, 1)
        for e in T.serial(E):
            cursor[e] = offsets[e]
            offsets[e + 1] = offsets[e + 1] + offsets[e]
        for t in T.serial(tokens):
            for j in T.serial(top_k):
                if ids[t, j] >= 0 and T.Cast("int64", ids[t, j]) < E:
                    place(T.Cast("int64", cursor[T.Cast("int64", ids[t, j])]), t, j)
                    cursor[T.Cast("int64", ids[t, j])] = cursor[T.Cast("int64", ids[t, j])] + T.Cast(offsets.dtype, 1)

    return sort


def moe_sort(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Dtype of topk_ids.
    tiles : object
        The target's `alone`: the sort is serial.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    if tiles.grid:
        return moe_sort_grid(geometry, tiles)
    sort = sort_macro()

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
        def place(at, t, j):
            flat[at] = T.Cast("int32", t * top_k + j)

        assert E > 0, ("ValueError", ["num_experts: none"])
        tiles.alone()
        for i in T.serial(tokens * top_k):
            flat[i] = -1
        # The counts serve as the sort's cursors and are made from the offsets afterwards.
        sort(topk_ids, tokens, top_k, E, offsets, counts, place)
        for e in T.serial(E):
            counts[e] = offsets[e + 1] - offsets[e]

    return kernel
