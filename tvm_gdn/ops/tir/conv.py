"""Causal depthwise convolution over tokens in TensorIR, with its state of the last inputs: prefill and decode.

    o[c, t] = act(bias[c] + sum_k weight[c, k] * x[c, t - (W-1) + k])          in fp32

Before a sequence's first token x continues into its state, which holds the last L >= W-1 inputs, or into zeros. A worker computes
`tiles.tokens` tokens of `tiles.channels` channels of one sequence. The one with a sequence's first tokens reads the state and
then writes it: no other worker touches it, since blocks are counted from the sequence's own start.

x and o may have any strides. Where channels are contiguous (the usual layout of engines: ``[tokens, channels]`` seen transposed)
vectors run along channels, where tokens are contiguous along tokens, else element by element; the kernel looks at the strides.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.slots import find_shared
from tvm_gdn.spec import Geometry


def conv(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes W (width) and L (length of a state), dtypes of the tensors present, ``activation``; ``update`` for decode,
        where every sequence has a state.
    tiles : object
        The target's loops: `workers`, `tokens` and `channels` of one, `vector` elements at once, `integers`, and
        `columns_in` and `columns_out` for the small matrices that taps and states are in memory.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    has, W, L = geometry.dtype, geometry.axis["W"], geometry.axis["L"]
    data, silu = has["x"], geometry.attr["activation"] == "silu"
    varlen, biased, flags = "query_start_loc" in has, "bias" in has, "has_initial_state" in has
    update = bool(geometry.attr.get("update", False))
    stateful = "conv_states" in has or "conv_state" in has
    slots_given = "cache_indices" in has or "conv_state_indices" in has
    state_dtype = has.get("conv_states", has.get("conv_state", data))
    slot_dtype = has.get("cache_indices", has.get("conv_state_indices", "int64"))
    block, strip, lanes = max(tiles.tokens, W - 1), tiles.channels, tiles.vector
    one = T.int64(1)  # here, not in the kernel: TVMScript would make a variable of it, and of every stride a product
    sigmoids = {width: tiles.sigmoid(width) for width in (1, lanes)}

    def pick(condition: bool, yes: Any, no: Any) -> Any:
        """A choice made while the function is parsed."""
        return yes if condition else no

    def of_batch(batch: Any, *rest: Any) -> tuple[Any, ...]:
        """Packed sequences have no batch axis."""
        return rest if varlen else (batch, *rest)

    def int64(buffer: Any, *index: Any) -> Any:
        """Element of an index tensor."""
        return T.Cast("int64", buffer[index])

    def slot_of(n: Any, *indices: Any) -> Any:
        """Slot of a sequence."""
        return int64(indices[update], n) if stateful and slots_given else n

    def reach(own: Any, stride: Any, size: Any) -> Any:
        """Elements that an axis spans if its stride is no longer than `own`."""
        return T.Select(T.And(size > 1, stride <= own), stride * (size - 1), T.int64(0))

    @T.prim_func(s_tir=True)
    def kernel(
        x_: T.handle,
        weight_: T.handle,
        bias_: T.handle,
        conv_states_: T.handle,
        conv_state_: T.handle,
        bounds_: T.handle,
        cache_indices_: T.handle,
        conv_state_indices_: T.handle,
        has_initial_state_: T.handle,
        o_: T.handle,
        pad_slot_id: T.int64,
    ):
        T.func_attr({"global_symbol": "kernel"})
        B, D, TT, N1, NC, NF, S = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        xb, xc, xt, ob, oc, ot = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        s0, s1, s2, w0, w1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_, of_batch(B, D, TT), data, strides=of_batch(xb, xc, xt), align=2)
        weight = T.match_buffer(weight_, (D, T.int64(W)), has["weight"], strides=(w0, w1), align=2)
        bias = T.match_buffer(bias_, (D,), has.get("bias", data), align=2)
        conv_states = T.match_buffer(conv_states_, (S, D, T.int64(L)), state_dtype, strides=(s0, s1, s2), align=2)
        conv_state = T.match_buffer(conv_state_, (S, D, T.int64(L)), state_dtype, strides=(s0, s1, s2), align=2)
        query_start_loc = T.match_buffer(bounds_, (N1,), has.get("query_start_loc", "int64"), align=4)
        cache_indices = T.match_buffer(cache_indices_, (NC,), slot_dtype, align=4)
        conv_state_indices = T.match_buffer(conv_state_indices_, (NC,), slot_dtype, align=4)
        has_initial_state = T.match_buffer(has_initial_state_, (NF,), "bool", align=1)
        o = T.match_buffer(o_, of_batch(B, D, TT), data, strides=of_batch(ob, oc, ot), align=2)

        weight_flat = T.decl_buffer((D * W,), has["weight"], data=weight.data)
        x_rows = T.decl_buffer(of_batch(B, D, TT), data, data=x.data, strides=of_batch(xb, one, xt))
        o_rows = T.decl_buffer(of_batch(B, D, TT), data, data=o.data, strides=of_batch(ob, one, ot))
        x_columns = T.decl_buffer(of_batch(B, D, TT), data, data=x.data, strides=of_batch(xb, xc, one))
        o_columns = T.decl_buffer(of_batch(B, D, TT), data, data=o.data, strides=of_batch(ob, oc, one))
        if stateful:
            pool = pick(update, conv_state.data, conv_states.data)
            states = T.decl_buffer((S, D, T.int64(L)), state_dtype, data=pool, strides=(s0, s1, s2))
            states_flat = T.decl_buffer((S * s0,), state_dtype, data=pool)
        sequences: T.let[T.int64] = pick(varlen, N1 - 1, B)

        if tiles.host_checks:
            if varlen:
                assert N1 > 0, ("ValueError", ["query_start_loc: empty"])
                assert int64(query_start_loc, 0) == 0 and int64(query_start_loc, N1 - 1) == TT, (
                    "ValueError",
                    ["query_start_loc: first, last"],
                )
                for n in T.serial(sequences):
                    assert query_start_loc[n] <= query_start_loc[n + 1], ("ValueError", ["query_start_loc: decreasing"])
            if stateful:
                if slots_given:
                    assert NC == sequences, ("ValueError", ["slots: length"])
                    for n in T.serial(sequences):
                        wanted: T.let[T.int64] = slot_of(n, cache_indices, conv_state_indices)
                        assert wanted == pad_slot_id or (wanted >= 0 and wanted < S), ("ValueError", ["slots: slot"])
                    shared = tiles.scalars(1)
                    find_shared(shared, pick(update, conv_state_indices, cache_indices), sequences, S, pad_slot_id)
                    assert shared[0] == T.float32(0), ("ValueError", ["slots: shared"])
                else:
                    assert S >= sequences, ("ValueError", ["conv states: fewer slots than sequences"])
                # Written to: every element needs memory of its own. Each axis steps over what the finer ones span.
                assert (
                    (S <= 1 or s0 > reach(s0, s1, D) + reach(s0, s2, T.int64(L)))
                    and (D <= 1 or s1 > reach(s1, s0, S) + reach(s1, s2, T.int64(L)))
                    and (L <= 1 or s2 > reach(s2, s0, S) + reach(s2, s1, D))
                ), ("ValueError", ["conv states: overlapping"])
                if flags:
                    assert NF == sequences, ("ValueError", ["has_initial_state: length"])

        strips: T.let[T.int64] = (D + strip - 1) // strip
        # Block ids of packed sequences: sequence n has those from start // block + n on, more than it needs at times.
        blocks: T.let[T.int64] = pick(varlen, TT // block + sequences, sequences * ((TT + block - 1) // block))
        for w in tiles.workers(blocks * strips):
            c0: T.let[T.int64] = w % strips * strip
            c1: T.let[T.int64] = T.min(c0 + strip, D)
            found = tiles.integers(2)
            if varlen:
                # The last sequence whose ids start at or before this one.
                found[0] = T.int64(0)
                found[1] = sequences
                while found[1] - found[0] > 1:
                    middle: T.let[T.int64] = (found[0] + found[1]) // 2
                    if int64(query_start_loc, middle) // block + middle <= w // strips:
                        found[0] = middle
                    else:
                        found[1] = middle
            else:
                found[0] = w // strips // T.max((TT + block - 1) // block, one)
            n: T.let[T.int64] = found[0]
            start: T.let[T.int64] = pick(varlen, int64(query_start_loc, n), T.int64(0))
            end: T.let[T.int64] = pick(varlen, int64(query_start_loc, n + 1), TT)
            before: T.let[T.int64] = pick(varlen, start // block + n, n * ((TT + block - 1) // block))
            first: T.let[T.int64] = start + (w // strips - before) * block
            last: T.let[T.int64] = T.min(first + block, end)
            given: T.let[T.int64] = slot_of(n, cache_indices, conv_state_indices)
            usable: T.let[T.bool] = pick(stateful, given >= 0 and given < S and given != pad_slot_id, T.bool(False))
            slot: T.let[T.int64] = T.Select(usable, given, T.int64(0))
            starts_from: T.let[T.bool] = pick(
                stateful and update, usable, pick(stateful and flags, usable and has_initial_state[n], T.bool(False))
            )

            @T.inline
            def finish(acc, out, c, t, width, along, sigmoid):
                """Activation, and o[c, t] = acc, on `width` channels or tokens."""
                if silu:
                    gate = tiles.scalars(width)
                    for lane in T.vectorized(width):
                        gate[lane] = acc[lane]
                    sigmoid(gate)
                    for lane in T.vectorized(width):
                        acc[lane] = acc[lane] * gate[lane]
                for lane in T.vectorized(width):
                    out[of_batch(n, c + lane * along, t + lane * (1 - along))] = T.Cast(data, acc[lane])

            @T.inline
            def begin(acc, taps, c, width, along):
                """Start sums of `width` channels (along = 1) or tokens (0) from channel c; its bias is behind its taps."""
                for lane in T.vectorized(width):
                    acc[lane] = taps[W * strip + c - c0 + lane * along]

            @T.inline
            def interior(taps, source, out, c, t, width, along, sigmoid):
                """Tokens that have all their inputs in x."""
                acc = tiles.scalars(width)
                begin(acc, taps, c, width, along)
                for k in T.unroll(W):
                    for lane in T.vectorized(width):
                        acc[lane] = acc[lane] + taps[k * strip + c - c0 + lane * along] * T.Cast(
                            "float32", source[of_batch(n, c + lane * along, t + lane * (1 - along) - (W - 1) + k)]
                        )
                finish(acc, out, c, t, width, along, sigmoid)

            @T.inline
            def head(taps, old, source, out, c, t, width, sigmoid):
                """A token whose inputs reach back before the sequence's first: channels from c on."""
                acc = tiles.scalars(width)
                begin(acc, taps, c, width, 1)
                for k in T.unroll(W):
                    at: T.let[T.int64] = t - (W - 1) + k
                    if at >= start:
                        for lane in T.vectorized(width):
                            acc[lane] = acc[lane] + taps[k * strip + c - c0 + lane] * T.Cast(
                                "float32", source[of_batch(n, c + lane, at)]
                            )
                    elif stateful:
                        for lane in T.vectorized(width):
                            acc[lane] = (
                                acc[lane] + taps[k * strip + c - c0 + lane] * old[(L + at - start) * strip + c - c0 + lane]
                            )
                finish(acc, out, c, t, width, 1, sigmoid)

            @T.inline
            def load_taps(taps, c, width):
                """Taps and bias of channels in fp32, one row of channels per tap."""
                if w1 == 1 and w0 == W:
                    tiles.columns_in(taps, c - c0, weight_flat, c * W, W, strip, width)
                else:
                    for k in T.unroll(W):
                        for lane in T.vectorized(width):
                            taps[k * strip + c - c0 + lane] = T.Cast("float32", weight[c + lane, k])
                for lane in T.vectorized(width):
                    taps[W * strip + c - c0 + lane] = pick(biased, T.Cast("float32", bias[c + lane]), T.float32(0))

            @T.inline
            def load_state(old, c, width):
                """The state that the sequence starts from in fp32, one row of channels per input."""
                if not starts_from:
                    for j in T.unroll(L):
                        for lane in T.vectorized(width):
                            old[j * strip + c - c0 + lane] = T.float32(0)
                elif s2 == 1 and s1 == L:
                    tiles.columns_in(old, c - c0, states_flat, slot * s0 + c * L, L, strip, width)
                else:
                    for j in T.unroll(L):
                        for lane in T.vectorized(width):
                            old[j * strip + c - c0 + lane] = T.Cast("float32", states[slot, c + lane, j])

            @T.inline
            def keep(old, source, c, width):
                """The state becomes the last L inputs; what stays of it moves towards index 0."""
                for j in T.unroll(L):
                    at: T.let[T.int64] = end - L + j
                    if at >= start:
                        for lane in T.vectorized(width):
                            old[j * strip + c - c0 + lane] = T.Cast("float32", source[of_batch(n, c + lane, at)])
                    else:
                        for lane in T.vectorized(width):
                            old[j * strip + c - c0 + lane] = old[(L + at - start) * strip + c - c0 + lane]
                if s2 == 1 and s1 == L:
                    tiles.columns_out(states_flat, slot * s0 + c * L, old, c - c0, L, strip, width)
                else:
                    for j in T.unroll(L):
                        for lane in T.vectorized(width):
                            states[slot, c + lane, j] = T.Cast(state_dtype, old[j * strip + c - c0 + lane])

            @T.inline
            def by_channels(taps, old, source, out, width):
                """All tokens of the block, vectors along channels; the channels that fill no vector one by one."""
                full: T.let[T.int64] = (c1 - c0) // width
                for t in T.serial(first, last):
                    if t - start >= W - 1:
                        for i in T.serial(full):
                            interior(taps, source, out, c0 + i * width, t, width, 1, sigmoids[width])
                        for i in T.serial(c1 - c0 - full * width):
                            interior(taps, source, out, c0 + full * width + i, t, 1, 1, sigmoids[1])
                    else:
                        for i in T.serial(full):
                            head(taps, old, source, out, c0 + i * width, t, width, sigmoids[width])
                        for i in T.serial(c1 - c0 - full * width):
                            head(taps, old, source, out, c0 + full * width + i, t, 1, sigmoids[1])

            @T.inline
            def by_tokens(taps, old, source, out):
                """All channels of the strip, vectors along tokens."""
                for c in T.serial(c0, c1):
                    ready: T.let[T.int64] = T.min(T.max(first, start + (W - 1)), last)
                    full: T.let[T.int64] = (last - ready) // lanes
                    for t in T.serial(first, ready):
                        head(taps, old, source, out, c, t, 1, sigmoids[1])
                    for i in T.serial(full):
                        interior(taps, source, out, c, ready + i * lanes, lanes, 0, sigmoids[lanes])
                    for t in T.serial(ready + full * lanes, last):
                        interior(taps, source, out, c, t, 1, 0, sigmoids[1])

            @T.inline
            def each(width, operation):
                """Run an operation on all channels of the strip."""
                full: T.let[T.int64] = (c1 - c0) // width
                for i in T.serial(full):
                    operation(c0 + i * width, width)
                for i in T.serial(c1 - c0 - full * width):
                    operation(c0 + full * width + i, 1)

            if first < last:
                taps, old = tiles.scalars((W + 1) * strip), tiles.scalars(max(L, 1) * strip)

                @T.inline
                def prepare(c, width):
                    load_taps(taps, c, width)
                    if stateful:
                        if first == start:
                            load_state(old, c, width)

                @T.inline
                def keep_rows(c, width):
                    keep(old, x_rows, c, width)

                @T.inline
                def keep_any(c, width):
                    keep(old, x, c, width)

                each(lanes, prepare)
                if xc == 1 and oc == 1:
                    by_channels(taps, old, x_rows, o_rows, lanes)
                elif xt == 1 and ot == 1:
                    by_tokens(taps, old, x_columns, o_columns)
                else:
                    by_channels(taps, old, x, o, 1)
                if stateful:
                    if first == start and usable:
                        if xc == 1:
                            each(lanes, keep_rows)
                        else:
                            each(lanes, keep_any)

    return kernel
