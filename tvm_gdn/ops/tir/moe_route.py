"""Choosing experts in TensorIR: scores, groups, the k largest with a fixed rule for ties, weights; all in fp32.

Experts are compared by a 32-bit integer made of the number that decides (see `_key`): an order without exceptions, so that
NaN and infinities need no care anywhere, and every choice is of an expert not chosen before. Without a bias the logit decides,
of which the score is a growing function: two logits never tie because their scores round to one number.
"""

from __future__ import annotations

import operator
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.spec import Geometry

#: Keys of what is out of the question (below -inf), and of NaN (above inf).
OUT, NAN = -(2**31), 2**31 - 1


def _key(x: Any, lanes: int) -> Any:
    """Integer of the same order as fp32 numbers: -0 equals 0, NaN is the largest."""
    kind = "int32" if lanes == 1 else f"int32x{lanes}"

    def all_lanes(value: Any) -> Any:
        return value if lanes == 1 else T.broadcast(value, lanes)

    bits = T.reinterpret(kind, T.Select(x == all_lanes(T.float32(0)), all_lanes(T.float32(0)), x))
    ordered = T.bitwise_xor(bits, T.bitwise_and(T.shift_right(bits, all_lanes(T.int32(31))), all_lanes(T.int32(0x7FFFFFFF))))
    # By its bits: `x == x` is simplified to true where x is a sum.
    is_nan = T.bitwise_and(bits, all_lanes(T.int32(0x7FFFFFFF))) > all_lanes(T.int32(0x7F800000))
    return T.Select(is_nan, all_lanes(T.int32(NAN)), ordered)


def moe_route(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes E and top_k, the dtypes of logits and correction_bias, the attributes ``scoring``, ``num_expert_group``,
        ``topk_group``.
    tiles : object
        The target's loops: `workers` over blocks of `rows_per_worker` rows; `across` over the `vector` lanes of a worker, which
        are elements of a vector or threads; `every` over elements and `each` over pieces of work that lanes share out. `fold`
        and `best` of what lanes have; `strike`, an element that its own lane writes; `sync` before one lane reads what another
        wrote; `mine`, whether a lane writes choice j of a row. Scratch: `spread` of all lanes, `scalars` and `integers` of one.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    E, dtype, attr = geometry.axis["E"], geometry.dtype, geometry.attr
    softmax, groups, kept = attr["scoring"] == "softmax", attr["num_expert_group"], attr["topk_group"]
    biased, grouped, size = "correction_bias" in dtype, groups > 1, E // groups
    lanes, rows = tiles.vector, tiles.rows_per_worker
    EP = (E + lanes - 1) // lanes * lanes
    infinity = float("inf")

    @T.prim_func(s_tir=True)
    def kernel(
        logits_: T.handle,
        correction_bias_: T.handle,
        weights_: T.handle,
        ids_: T.handle,
        renormalize: T.int32,
        routed_scaling_factor: T.float32,
    ):
        T.func_attr({"global_symbol": "kernel"})
        tokens, top_k, s0 = T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(logits_, (tokens, E), dtype["logits"], strides=(s0, 1), align=2)
        if biased:
            correction_bias = T.match_buffer(correction_bias_, (E,), dtype["correction_bias"], align=2)
        weights = T.match_buffer(weights_, (tokens, top_k), "float32", align=4)
        ids = T.match_buffer(ids_, (tokens, top_k), "int32", align=4)

        assert top_k > 0 and top_k <= E // groups * kept, "choices: none, or more than experts to choose from"

        @T.inline
        def scores_of(t, score, choice, part, total):
            """score: of every expert; choice: what decides before groups, -inf beyond the last expert."""
            for e in tiles.every(EP):
                score[e] = T.float32(-infinity)
            for e in tiles.every(E):
                score[e] = T.Cast("float32", logits[t, e])
            for e in tiles.every(EP):
                choice[e] = score[e]
            if softmax:
                for lane in tiles.across(lanes):
                    part[lane] = T.float32(-infinity)
                for c in T.serial(EP // lanes):
                    for lane in tiles.across(lanes):
                        part[lane] = T.Select(score[c * lanes + lane] > part[lane], score[c * lanes + lane], part[lane])
                tiles.fold(total, part, T.max)
                for lane in tiles.across(lanes):
                    part[lane] = T.float32(0)
                for c in T.serial(EP // lanes):
                    for lane in tiles.across(lanes):
                        # Lanes beyond the last expert add nothing, also where every logit is -inf and the sum is NaN anyway.
                        score[c * lanes + lane] = tiles.exp(score[c * lanes + lane] - total[0])
                    for lane in tiles.across(lanes):
                        part[lane] = part[lane] + T.Select(c * lanes + lane < E, score[c * lanes + lane], T.float32(0))
                tiles.fold(total, part, operator.add)
                for e in tiles.every(EP):
                    score[e] = score[e] / total[0]
            else:
                for c in T.serial(EP // lanes):
                    for lane in tiles.across(lanes):
                        score[c * lanes + lane] = T.float32(1) / (T.float32(1) + tiles.exp(-score[c * lanes + lane]))
            if biased:
                for e in tiles.every(E):
                    choice[e] = score[e] + T.Cast("float32", correction_bias[e])

        @T.inline
        def exclude_groups(score, choice, key, group_key, best, two):
            """Keys of all but the groups with the largest sums of their two largest scores (biased, if there is a bias)."""
            for g in tiles.each(groups):
                best[0] = T.float32(-infinity)
                best[1] = T.float32(-infinity)
                # Keys of the two. The numbers themselves say nothing about NaN: TVM makes `b < a` of `not a <= b`.
                two[0] = OUT
                two[1] = OUT
                for i in T.serial(size):
                    best[2] = choice[g * size + i] if biased else score[g * size + i]
                    if key[g * size + i] > two[0]:
                        best[1] = best[0]
                        two[1] = two[0]
                        best[0] = best[2]
                        two[0] = key[g * size + i]
                    elif key[g * size + i] > two[1]:
                        best[1] = best[2]
                        two[1] = key[g * size + i]
                group_key[g] = _key(best[0] + best[1], 1)
            for _ in T.serial(groups - kept):
                # Drop the least group, of equals the last.
                two[0] = NAN
                two[1] = -1
                tiles.sync()
                for g in T.serial(groups):
                    if group_key[g] != OUT and group_key[g] <= two[0]:
                        two[0] = group_key[g]
                        two[1] = g
                tiles.sync()
                group_key[two[1]] = OUT
                for i in tiles.every(size):
                    key[two[1] * size + i] = OUT

        @T.inline
        def take(t, j, score, key, best, where, winner, total):
            """The largest key that is left, the lowest expert of equals."""
            for lane in tiles.across(lanes):
                best[lane] = key[lane]
            for lane in tiles.across(lanes):
                where[lane] = lane
            for c in T.serial(1, EP // lanes):
                for lane in tiles.across(lanes):
                    where[lane] = T.Select(key[c * lanes + lane] > best[lane], c * lanes + lane, where[lane])
                for lane in tiles.across(lanes):
                    best[lane] = T.max(key[c * lanes + lane], best[lane])
            tiles.best(winner, best, where)
            total[0] = total[0] + score[winner[0]]
            if tiles.mine(j):
                ids[t, j] = winner[0]
                weights[t, j] = score[winner[0]]
            tiles.strike(key, winner, OUT)

        for w in tiles.workers((tokens + rows - 1) // rows):
            score, choice, part = tiles.spread(EP), tiles.spread(EP), tiles.spread(lanes)
            key, best, where = tiles.spread(EP, "int32"), tiles.spread(lanes, "int32"), tiles.spread(lanes, "int32")
            group_key = tiles.spread(groups, "int32")
            total, top_two, two, winner = tiles.scalars(1), tiles.scalars(3), tiles.integers(2), tiles.integers(1)
            for r in T.serial(T.min(T.int64(rows), tokens - w * rows)):
                t = w * rows + r
                scores_of(t, score, choice, part, total)
                tiles.sync()
                for c in T.serial(EP // lanes):
                    for lane in tiles.across(lanes):
                        key[c * lanes + lane] = _key(choice[c * lanes + lane], 1)
                for e in T.serial(EP - E):
                    key[E + e] = OUT
                tiles.sync()
                if grouped:
                    exclude_groups(score, choice, key, group_key, top_two, two)
                    tiles.sync()
                total[0] = T.float32(0)
                for j in T.serial(top_k):
                    take(t, j, score, key, best, where, winner, total)
                # 1e-20 as DeepSeek-V3 has it: weights that are all zero stay zero.
                total[0] = T.Select(
                    renormalize != 0, routed_scaling_factor / (total[0] + T.float32(1e-20)), routed_scaling_factor
                )
                for j in T.serial(top_k):
                    if tiles.mine(j):
                        weights[t, j] = weights[t, j] * total[0]

    return kernel
