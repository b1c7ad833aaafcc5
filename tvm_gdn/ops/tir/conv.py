"""Causal depthwise convolution over tokens in TensorIR, with its state of the last inputs: prefill and decode.

    o[c, t] = act(bias[c] + sum_k weight[c, k] * x[c, t - (W-1) + k])          in fp32

Before a sequence's first token x continues into its state, which holds the last L >= W-1 inputs, or into zeros. A worker computes
`tiles.tokens` tokens of `tiles.channels` channels of one sequence. The one with a sequence's first tokens reads the state and
then writes it: no other worker touches it, since blocks are counted from the sequence's own start.

x and o may have any strides. Where channels are contiguous (the usual layout of engines: ``[tokens, channels]`` seen transposed)
vectors run along channels, where tokens are contiguous along tokens, else element by element; the kernel looks at the strides.
Where reading an input again costs (`tiles.ahead`), the inputs of a strip of channels pass through registers token by token.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.conv_step import ConvStep
from tvm_gdn.ops.tir.integers import int64, quotient
from tvm_gdn.ops.tir.parsing import pick
from tvm_gdn.spec import Geometry


def conv(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes W (width) and L (length of a state), dtypes of the tensors present, ``activation``; ``update`` for decode,
        where every sequence has a state.
    tiles : object
        The target's loops: `workers`, `tokens` and `channels` of one, `vector` elements at once, `array` for scratch, and
        `columns_in` and `columns_out` for the small matrices that taps and states are in memory. With `ahead` a worker has one
        strip of `vector` channels, whose inputs it reads once, `ahead` tokens at a time, by `ask` (or `take`, in fp32); `give`
        writes. `fit` and `fit_rows` say whether strips and dense rows move as vectors.

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
    ahead, windowed = tiles.ahead, tiles.ahead > 0

    def of_batch(batch: Any, *rest: Any) -> tuple[Any, ...]:
        """Packed sequences have no batch axis."""
        return rest if varlen else (batch, *rest)

    def slot_of(n: Any, *indices: Any) -> Any:
        """Slot of a sequence."""
        return int64(indices[update], n) if stateful and slots_given else n

    def in_memory(source: Any, n: Any, c: Any, t: Any, along: int) -> Any:
        """Inputs of token t and the W - 1 before it."""
        return lambda k, lane: T.Cast(
            "float32", source[of_batch(n, c + lane * along, t + lane * (1 - along) - (W - 1) + k)]
        )  # fmt: skip

    def in_registers(near: Any, j: int, width: int) -> Any:
        """The same of the j-th token in a window."""
        return lambda k, lane: near[(j + k) * width + lane]

    step = ConvStep(tiles, W=W, L=L, state=state_dtype, biased=biased, silu=silu, index=of_batch)

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
        else:
            states_flat = weight_flat  # a name that choices made while the function is parsed mention
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
                    step.check_slots(pick(update, conv_state_indices, cache_indices), NC, sequences, S, pad_slot_id)
                else:
                    assert S >= sequences, ("ValueError", ["conv states: fewer slots than sequences"])
                step.check_strides(S, D, s0, s1, s2)
                if flags:
                    assert NF == sequences, ("ValueError", ["has_initial_state: length"])

        strips: T.let[T.int64] = (D + strip - 1) // strip
        # Block ids of packed sequences: sequence n has those from start // block + n on, more than it needs at times.
        blocks: T.let[T.int64] = pick(varlen, TT // block + sequences, sequences * ((TT + block - 1) // block))
        for w in tiles.workers(blocks * strips):
            # In an array, which is computed once: a name would be a quotient at every place that has it.
            found = tiles.array(3, "int64")
            found[2] = quotient(w, strips, blocks * strips)
            number: T.let[T.int64] = found[2]
            c0: T.let[T.int64] = (w - number * strips) * strip
            c1: T.let[T.int64] = T.min(c0 + strip, D)
            if varlen:
                # The last sequence whose ids start at or before this one.
                found[0] = T.int64(0)
                found[1] = sequences
                while found[1] - found[0] > 1:
                    middle: T.let[T.int64] = (found[0] + found[1]) // 2
                    if int64(query_start_loc, middle) // block + middle <= number:
                        found[0] = middle
                    else:
                        found[1] = middle
            else:
                found[0] = quotient(number, T.max((TT + block - 1) // block, one), blocks)
            n: T.let[T.int64] = found[0]
            start: T.let[T.int64] = pick(varlen, int64(query_start_loc, n), T.int64(0))
            end: T.let[T.int64] = pick(varlen, int64(query_start_loc, n + 1), TT)
            before: T.let[T.int64] = pick(varlen, start // block + n, n * ((TT + block - 1) // block))
            first: T.let[T.int64] = start + (number - before) * block
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
                step.activate(acc, width, sigmoid)
                for lane in T.vectorized(width):
                    out[of_batch(n, c + lane * along, t + lane * (1 - along))] = T.Cast(data, acc[lane])

            @T.inline
            def interior(taps, source, out, c, t, width, along, sigmoid):
                """Tokens that have all their inputs in x."""
                acc = tiles.scalars(width)
                step.products(acc, taps, c - c0, strip, width, along, in_memory(source, n, c, t, along))
                finish(acc, out, c, t, width, along, sigmoid)

            @T.inline
            def token(taps, old, source, out, c, t, width, sigmoid):
                """A token whose inputs reach back before the sequence's first: channels from c on."""
                acc = tiles.scalars(width)
                step.head(acc, taps, c - c0, strip, old, stateful, source, n, c, t, start, width)
                finish(acc, out, c, t, width, 1, sigmoid)

            @T.inline
            def keep(old, source, c, until, width):
                """The state after the token before `until`."""
                step.keep(old, source, n, c, start, until, width)
                step.store_state(old, states, states_flat, s2 == 1 and s1 == L, slot * s0 + c * L, slot, c, width)

            @T.inline
            def opening(taps, source, out, c, width, sigmoid):
                """The tokens whose inputs reach back before the sequence's first, and the state: `width` channels from c on."""
                old = tiles.array(max(L, 1) * width, state_dtype)
                if stateful:
                    step.load_state(old, states, states_flat, s2 == 1 and s1 == L, slot * s0 + c * L, slot, starts_from, c, width)
                if update and TT == 1:
                    # Decode: without a loop over tokens the state stays in registers.
                    token(taps, old, source, out, c, start, width, sigmoid)
                    if usable:
                        keep(old, source, c, start + 1, width)
                else:
                    for t in T.serial(start, T.min(start + (W - 1), last)):
                        token(taps, old, source, out, c, t, width, sigmoid)
                    if stateful:
                        if usable:
                            keep(old, source, c, end, width)

            @T.inline
            def by_channels(taps, source, out, width):
                """All tokens of the block, vectors along channels; the channels that fill no vector one by one."""
                full: T.let[T.int64] = (c1 - c0) // width
                if first == start:
                    for i in T.serial(full):
                        opening(taps, source, out, c0 + i * width, width, sigmoids[width])
                    for i in T.serial(c1 - c0 - full * width):
                        opening(taps, source, out, c0 + full * width + i, 1, sigmoids[1])
                for t in T.serial(T.max(first, start + (W - 1)), last):
                    for i in T.serial(full):
                        interior(taps, source, out, c0 + i * width, t, width, 1, sigmoids[width])
                    for i in T.serial(c1 - c0 - full * width):
                        interior(taps, source, out, c0 + full * width + i, t, 1, 1, sigmoids[1])

            @T.inline
            def by_tokens(taps, source, out):
                """All channels of the strip, vectors along tokens."""
                for c in T.serial(c0, c1):
                    if first == start:
                        opening(taps, source, out, c, 1, sigmoids[1])
                    ready: T.let[T.int64] = T.min(T.max(first, start + (W - 1)), last)
                    full: T.let[T.int64] = (last - ready) // lanes
                    for i in T.serial(full):
                        interior(taps, source, out, c, ready + i * lanes, lanes, 0, sigmoids[lanes])
                    for t in T.serial(ready + full * lanes, last):
                        interior(taps, source, out, c, t, 1, 0, sigmoids[1])

            @T.inline
            def ask(raw, source, c, t, count, width):
                """Ask for the inputs of `count` tokens from t on."""
                for j in T.unroll(count):
                    tiles.ask(raw, j * width, source, of_batch(n, c, t + j), width)

            @T.inline
            def arrive(near, raw, count, width):
                """What was asked for comes behind the W - 1 inputs that a window has."""
                for i in T.unroll(count * width):
                    near[(W - 1) * width + i] = T.Cast("float32", raw[i])

            @T.inline
            def advance(near, taps, out, c, t, count, width, sigmoid):
                """The next `count` tokens of a window, whose inputs are there; its last W - 1 stay."""
                for j in T.unroll(count):
                    acc = tiles.scalars(width)
                    step.products(acc, taps, 0, width, width, 1, in_registers(near, j, width))
                    step.activate(acc, width, sigmoid)
                    tiles.give(out, of_batch(n, c, t + j), acc, width)
                for i in T.unroll((W - 1) * width):
                    near[i] = near[count * width + i]

            @T.inline
            def one_token(near, raw, taps, source, out, c, t, width, sigmoid):
                ask(raw, source, c, t, 1, width)
                arrive(near, raw, 1, width)
                advance(near, taps, out, c, t, 1, width, sigmoid)

            @T.inline
            def to_state(old, near, c, width, regular):
                """The state of a sequence that ends here, whose last inputs are at hand."""
                for i in T.unroll(L * width):
                    old[i] = T.Cast(state_dtype, near[i])
                step.store_state(
                    old, states, states_flat, pick(regular, True, s2 == 1 and s1 == L), slot * s0 + c * L, slot, c, width
                )

            @T.inline
            def from_state(old, near, source, c, width, regular):
                """A window before the sequence's first token, from the state; and the state, where the end is not here."""
                if stateful:
                    step.load_state(
                        old, states, states_flat, pick(regular, True, s2 == 1 and s1 == L), slot * s0 + c * L, slot,
                        starts_from, c, width,
                    )  # fmt: skip
                for k in T.unroll(W - 1):
                    for lane in T.unroll(width):
                        if stateful:
                            near[k * width + lane] = T.Cast("float32", old[(L - (W - 1) + k) * width + lane])
                        else:
                            near[k * width + lane] = T.float32(0)
                if stateful and L > W - 1:
                    if usable:
                        keep(old, source, c, end, width)
                elif stateful:
                    if usable and last < end:
                        # The sequence is longer than a block, and so than a state.
                        late = tiles.scalars(L * width)
                        for j in T.unroll(L):
                            tiles.take(late, j * width, source, of_batch(n, c, end - L + j), width)
                        to_state(old, late, c, width, regular)

            @T.inline
            def window(source, out, c, width, sigmoid, regular, single):
                """All tokens of the block on `width` channels from c on, whose inputs stay in registers while they are needed.

                `regular`: taps and states are dense, and move as vectors. `single`: sequences have one token.
                """
                taps, near = tiles.scalars((W + 1) * width), tiles.scalars((W - 1 + ahead) * width)
                old = tiles.array(max(L, 1) * width, state_dtype)
                raw = tiles.array(ahead * width, data)
                full: T.let[T.int64] = (last - first) // ahead
                dense: T.let[T.bool] = w1 == 1 and w0 == W
                if not single and ahead > 1:
                    if full > 0:
                        ask(raw, source, c, first, ahead, width)
                step.load_taps(taps, 0, width, weight, weight_flat, pick(regular, True, dense), bias, c, width)
                if single:
                    from_state(old, near, source, c, width, regular)
                    one_token(near, raw, taps, source, out, c, start, width, sigmoid)
                else:
                    if first == start:
                        from_state(old, near, source, c, width, regular)
                    else:
                        for k in T.unroll(W - 1):
                            tiles.take(near, k * width, source, of_batch(n, c, first - (W - 1) + k), width)
                    if ahead > 1:
                        for i in T.serial(full):
                            arrive(near, raw, ahead, width)
                            # The next tokens are on their way while these are computed.
                            if i + 1 < full:
                                ask(raw, source, c, first + (i + 1) * ahead, ahead, width)
                            advance(near, taps, out, c, first + i * ahead, ahead, width, sigmoid)
                        for t in T.serial(first + full * ahead, last):
                            one_token(near, raw, taps, source, out, c, t, width, sigmoid)
                    else:
                        for t in T.serial(first, last):
                            one_token(near, raw, taps, source, out, c, t, width, sigmoid)
                if stateful and L == W - 1:
                    if usable and pick(single, T.bool(True), first == start and last == end):
                        to_state(old, near, c, width, regular)

            if windowed:
                if first < last:
                    if (
                        c1 - c0 == strip and xc == 1 and oc == 1 and w1 == 1 and w0 == W
                        and pick(stateful, s2 == 1 and s1 == L, T.bool(True))
                        and tiles.fit((x_rows, xt), (o_rows, ot), of_batch(n, c0, first), TT)
                        and tiles.fit_rows(
                            (weight_flat, c0 * W, W, T.int64(0)), *pick(stateful, ((states_flat, c0 * L, L, s0),), ())
                        )
                    ):  # fmt: skip
                        if update:
                            if TT == 1:
                                window(x_rows, o_rows, c0, strip, sigmoids[lanes], True, True)
                            else:
                                window(x_rows, o_rows, c0, strip, sigmoids[lanes], True, False)
                        else:
                            window(x_rows, o_rows, c0, strip, sigmoids[lanes], True, False)
                    else:
                        for c in T.serial(c0, c1):
                            window(x, o, c, 1, sigmoids[1], False, False)
            elif first < last:
                taps = tiles.scalars((W + 1) * strip)
                for i in T.serial((c1 - c0) // lanes):
                    step.load_taps(taps, i * lanes, strip, weight, weight_flat, w1 == 1 and w0 == W, bias, c0 + i * lanes, lanes)
                for i in T.serial((c1 - c0) % lanes):
                    last_ones: T.let[T.int64] = c1 - (c1 - c0) % lanes + i
                    step.load_taps(taps, last_ones - c0, strip, weight, weight_flat, w1 == 1 and w0 == W, bias, last_ones, 1)
                if xc == 1 and oc == 1:
                    by_channels(taps, x_rows, o_rows, lanes)
                elif xt == 1 and ot == 1:
                    by_tokens(taps, x_columns, o_columns)
                else:
                    by_channels(taps, x, o, 1)

    return kernel
