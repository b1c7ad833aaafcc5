"""Choosing experts in TensorIR: scores, groups, the k largest with a fixed rule for ties, weights; all in fp32.

Experts are compared by a 32-bit integer made of the number that decides (see `_key`): an order without exceptions, so that
NaN and infinities need no care anywhere, and every choice is of an expert not chosen before. Without a bias the logit decides,
of which the score is a growing function: two logits never tie because their scores round to one number.
"""

from __future__ import annotations

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
        The target's loops: `workers` over blocks of `rows_per_worker` rows, `vector` experts at once, `every`
        for all of them, `integers` for scratch.

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
            for e in T.serial(EP):
                score[e] = T.float32(-infinity)
            for e in tiles.every(E):
                score[e] = T.Cast("float32", logits[t, e])
            for e in tiles.every(EP):
                choice[e] = score[e]
            if softmax:
                for lane in T.vectorized(lanes):
                    part[lane] = T.float32(-infinity)
                for c in T.serial(EP // lanes):
                    for lane in T.vectorized(lanes):
                        part[lane] = T.Select(score[c * lanes + lane] > part[lane], score[c * lanes + lane], part[lane])
                total[0] = part[0]
                for lane in T.serial(lanes - 1):
                    total[0] = T.max(total[0], part[lane + 1])
                for lane in T.vectorized(lanes):
                    part[lane] = T.float32(0)
                for c in T.serial(EP // lanes):
                    for lane in T.vectorized(lanes):
                        # Lanes beyond the last expert add nothing, also where every logit is -inf and the sum is NaN anyway.
                        score[c * lanes + lane] = tiles.exp(score[c * lanes + lane] - total[0])
                    for lane in T.vectorized(lanes):
                        part[lane] = part[lane] + T.Select(c * lanes + lane < E, score[c * lanes + lane], T.float32(0))
                total[0] = T.float32(0)
                for lane in T.serial(lanes):
                    total[0] = total[0] + part[lane]
                for e in tiles.every(EP):
                    score[e] = score[e] / total[0]
            else:
                for c in T.serial(EP // lanes):
                    for lane in T.vectorized(lanes):
                        score[c * lanes + lane] = T.float32(1) / (T.float32(1) + tiles.exp(-score[c * lanes + lane]))
            if biased:
                for e in tiles.every(E):
                    choice[e] = score[e] + T.Cast("float32", correction_bias[e])

        @T.inline
        def exclude_groups(score, choice, key, group_key, best):
            """Keys of all but the groups with the largest sums of their two largest scores (biased, if there is a bias)."""
            for g in T.serial(groups):
                best[0] = T.float32(-infinity)
                best[1] = T.float32(-infinity)
                # Keys of the two. The numbers themselves say nothing about NaN: TVM makes `b < a` of `not a <= b`.
                group_key[groups] = OUT
                group_key[groups + 1] = OUT
                for i in T.serial(size):
                    best[2] = choice[g * size + i] if biased else score[g * size + i]
                    if key[g * size + i] > group_key[groups]:
                        best[1] = best[0]
                        group_key[groups + 1] = group_key[groups]
                        best[0] = best[2]
                        group_key[groups] = key[g * size + i]
                    elif key[g * size + i] > group_key[groups + 1]:
                        best[1] = best[2]
                        group_key[groups + 1] = key[g * size + i]
                group_key[g] = _key(best[0] + best[1], 1)
            for _ in T.serial(groups - kept):
                # Drop the least group, of equals the last.
                group_key[groups] = NAN
                group_key[groups + 1] = -1
                for g in T.serial(groups):
                    if group_key[g] != OUT and group_key[g] <= group_key[groups]:
                        group_key[groups] = group_key[g]
                        group_key[groups + 1] = g
                group_key[group_key[groups + 1]] = OUT
                for i in T.serial(size):
                    key[group_key[groups + 1] * size + i] = OUT

        @T.inline
        def take(t, j, score, key, best, where):
            """The largest key that is left, the lowest expert of equals."""
            for lane in T.vectorized(lanes):
                best[lane] = key[lane]
            for lane in T.vectorized(lanes):
                where[lane] = lane
            for c in T.serial(1, EP // lanes):
                for lane in T.vectorized(lanes):
                    where[lane] = T.Select(key[c * lanes + lane] > best[lane], c * lanes + lane, where[lane])
                for lane in T.vectorized(lanes):
                    best[lane] = T.max(key[c * lanes + lane], best[lane])
            for lane in T.serial(lanes - 1):
                if best[lane + 1] > best[0] or (best[lane + 1] == best[0] and where[lane + 1] < where[0]):
                    best[0] = best[lane + 1]
                    where[0] = where[lane + 1]
            ids[t, j] = where[0]
            weights[t, j] = score[where[0]]
            key[where[0]] = OUT

        for w in tiles.workers((tokens + rows - 1) // rows):
            score, choice, part = tiles.scalars(EP), tiles.scalars(EP), tiles.scalars(lanes)
            key, best, where = tiles.integers(EP), tiles.integers(lanes), tiles.integers(lanes)
            total, top_two, group_key = tiles.scalars(1), tiles.scalars(3), tiles.integers(groups + 2)
            for r in T.serial(T.min(T.int64(rows), tokens - w * rows)):
                t = w * rows + r
                scores_of(t, score, choice, part, total)
                for c in T.serial(EP // lanes):
                    for lane in T.vectorized(lanes):
                        key[c * lanes + lane] = _key(choice[c * lanes + lane], 1)
                for e in T.serial(EP - E):
                    key[E + e] = OUT
                if grouped:
                    exclude_groups(score, choice, key, group_key, top_two)
                for j in T.serial(top_k):
                    take(t, j, score, key, best, where)
                total[0] = T.float32(0)
                for j in T.serial(top_k):
                    total[0] = total[0] + weights[t, j]
                # 1e-20 as DeepSeek-V3 has it: weights that are all zero stay zero.
                total[0] = T.Select(
                    renormalize != 0, routed_scaling_factor / (total[0] + T.float32(1e-20)), routed_scaling_factor
                )
                for j in T.serial(top_k):
                    weights[t, j] = weights[t, j] * total[0]

    return kernel
