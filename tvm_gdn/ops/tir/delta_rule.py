"""The token-recurrent gated delta rule in TensorIR: one definition for every operator that steps token by token.

Per worker: one sequence, one value head, `v_tile` value columns, the state as a ``[K, v_tile]`` tile W. Per token, in fp32::

    x, y = k, q (l2-normalized if asked, q scaled)        d = exp(g), per head or per channel
    u    = beta * (v - W^T (d*x))                         tiles.gemv
    W    = d * W + x u^T ;  o = W^T y                     tiles.ger_gemv

which is the contract's ``S *= exp(g); u = (v - S^T k) * beta; S += k u^T; o = S^T q`` with the decay moved onto the K vectors,
so that a step passes over the state twice and writes it once. Source of the maths: Yang et al., Gated Delta Networks
(arXiv:2412.06464).

What differs between the operators (gates given or computed, separate or packed q/k/v, convolved before or here, pool or separate
states, verification) is decided here, while the function is parsed, from the geometry. What differs between targets comes from
`tiles` (see `schedules/cpu.py`): how workers map to threads or blocks, where the state tile lives, and the two matrix-vector
operations. `tiles.direct` says that a state may be updated in the pool's own memory instead of in a local copy, and
`tiles.state_first` that a one-token step asks for its state before the token's data. Tiles that have several plans supply
``plan(heads, tokens, emit)``: it calls ``emit()`` for each, behind the host's choice by the number of sequences times value
heads, and of a sequence's tokens (-1 where the host does not know it).
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.rules import NO_STEPS
from tvm_gdn.ops.tir.conv_step import ConvStep
from tvm_gdn.ops.tir.gates import gate_macros
from tvm_gdn.ops.tir.slots import find_shared
from tvm_gdn.spec import Geometry

NORM_EPS = 1e-6
#: Slot of padding sequences.
NOBODY = -1


def delta_rule(geometry: Geometry, tiles: Any, advance: Any = None) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes K and V, dtypes of the tensors present, ``state_v_first`` and ``output_final_state``.
    tiles : object
        The target's tile operations.
    advance : object, optional
        ``advance(...)`` emits code that advances a worker's states over a whole sequence (`chunk.py`); by default they step
        token by token. With ``advance.ahead`` what does not depend on states is computed first, chunks side by side, and kept
        in memory: ``advance.keep(units)`` allocates it and ``advance.prepare(...)`` emits one chunk of a few value heads.

    Returns
    -------
    tvm.tirx.PrimFunc
        With every parameter that any operator of the family has; `tvm_gdn.build` keeps those that the operator's SPEC names.
    """
    has = geometry.dtype
    dtype_of = lambda name, default="float32": has.get(name, default)  # noqa: E731
    K, V = geometry.axis["K"], geometry.axis["V"]
    v_first = bool(geometry.attr.get("state_v_first", False))
    state_shape = (V, K) if v_first else (K, V)
    # TVM 0.27 wants a stride literal in the dtype of its axis: int64 where the axis is a symbol (heads).
    head_strides = (T.int64(K * V), state_shape[1], 1)

    packed = "mixed_qkv" in has
    # The packed row is convolved here. A worker then takes all value heads of a q/k head: its q and k are convolved once, and
    # their convolution states have one reader and writer.
    convolved = "conv_state" in has
    gated = "g" in has
    channel_gate = bool(geometry.attr.get("channel_gate", False))
    per_channel, unit = ((K,), (1,)) if channel_gate else ((), ())
    fused_gate = "A_log" in has
    varlen = "cu_seqlens" in has
    pool = "initial_state_source" in has
    slots_given = "initial_state_indices" in has
    separate = "initial_state" in has
    final = bool(geometry.attr.get("output_final_state", False)) or "final_state" in has
    buffered = "intermediate_states_buffer" in has
    buffer_slots_given = "intermediate_state_indices" in has
    tree = "retrieve_parent_token" in has
    data = dtype_of("mixed_qkv" if packed else "q")
    pool_dtype = dtype_of("initial_state_source")
    initial_dtype = dtype_of("initial_state")
    final_dtype = dtype_of("final_state", initial_dtype)
    buffer_dtype = dtype_of("intermediate_states_buffer")
    # A low-precision state must not be rounded between the tokens of one call, so only one-token calls may use it in place.
    chunked = advance is not None
    direct_pool = not chunked and tiles.direct and pool and not tree and not final
    direct_any_length = pool_dtype == "float32"
    checks = tiles.host_checks
    # Value heads of one q/k head that a worker takes; a token step has nothing to share between them.
    span = tiles.span if chunked else 1
    ahead = chunked and advance.ahead
    size, together = (tiles.chunk, tiles.together) if ahead else (1, 1)
    # Tiles of value columns that such a worker has at the same time.
    beside = tiles.beside if convolved else 1

    def workers() -> int:
        """Workers per head, or heads."""
        return 1 if convolved else V // tiles.v_tile

    def gate_dims(batch: Any, token: Any, head: Any) -> tuple[Any, ...]:
        """The packed decode step has one token and so no token axis on a and b."""
        return (batch, head) if packed else (batch, token, head)

    def pick(condition: bool, yes: Any, no: Any) -> Any:
        """A choice made while the function is parsed."""
        return yes if condition else no

    def kept_states(given: tuple[Any, Any], kept: tuple[Any, Any], own: Any, step: Any) -> tuple[tuple[Any, Any, bool], ...]:
        """Where states in memory will be read and written next, with whether written: the next worker's, and this one's."""
        reads = [(given[0], given[1] + own + step, False)] if pool or separate else []
        return (*reads, *([(kept[0], kept[1] + own, True)] if final else []))

    def int64(buffer: Any, *index: Any) -> Any:
        """Element of an index tensor."""
        return T.Cast("int64", buffer[index])

    def div(x: Any, y: Any) -> Any:
        """Quotient of small non-negative integers."""
        return T.Cast("int64", T.truncdiv(T.Cast("int32", x), T.Cast("int32", y)))

    def mod(x: Any, y: Any) -> Any:
        """Remainder of small non-negative integers."""
        return T.Cast("int64", T.truncmod(T.Cast("int32", x), T.Cast("int32", y)))

    def gate_at(buffer: Any, batch: Any, token: Any, head: Any) -> Any:
        """Element of a gate tensor in fp32."""
        return T.Cast("float32", buffer[gate_dims(batch, token, head)])

    def read_qk(*reads: tuple[Any, ...]) -> None:
        """Read k and q: each on its own, or together where the target asks memory for both before it waits."""
        if hasattr(tiles, "read_all"):
            tiles.read_all(*reads)
        else:
            for arguments in reads:
                tiles.read(*arguments)

    def unbranched() -> bool:
        """Whether a state, or zeros, is asked for without a branch, behind which it would be waited for."""
        return packed and not tiles.state_first and bool(getattr(tiles, "fits", False))

    def settled(rows: tuple[Any, ...], view: Any, stride: Any, step: Any) -> None:
        """A step's code, for addresses that are tested before it where the target has it so."""
        if hasattr(tiles, "settled"):
            tiles.settled(rows, view, stride, step)
        else:
            step()

    plan = getattr(tiles, "plan", lambda _heads, _tokens, emit: emit())
    log_decay, sigmoid = gate_macros(tiles, 1)
    if convolved:
        W, L, conv_dtype = geometry.axis["W"], geometry.axis["L"], dtype_of("conv_state")
        conv = ConvStep(
            tiles,
            W=W,
            L=L,
            state=conv_dtype,
            biased="conv_bias" in has,
            silu=geometry.attr["activation"] == "silu",
            index=lambda n, c, _token: (n, c),
        )
        # Neighbouring channels that a thread convolves where all that they need moves as vectors; 0 where vectors are loops.
        strip = getattr(tiles, "strip", 0)
        silus = {width: tiles.sigmoid(width) for width in (1, tiles.vector, *([strip] if strip else []))}
    else:
        W, L, conv_dtype, conv, silus, strip = 0, 0, "float32", None, {}, 0
    # A worker's threads show each other what they convolve: states are on their way meanwhile.
    early = convolved and tiles.lines_shared and tiles.state_first

    @T.prim_func(s_tir=True)
    def kernel(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        mixed_: T.handle,
        g_: T.handle,
        beta_: T.handle,
        A_log_: T.handle,
        a_: T.handle,
        dt_bias_: T.handle,
        b_: T.handle,
        cu_: T.handle,
        source_: T.handle,
        slots_: T.handle,
        initial_: T.handle,
        final_: T.handle,
        buffer_: T.handle,
        buffer_slots_: T.handle,
        parents_: T.handle,
        conv_state_: T.handle,
        conv_weight_: T.handle,
        conv_bias_: T.handle,
        conv_slots_: T.handle,
        o_: T.handle,
        scale: T.float32,
        softplus_beta: T.float32,
        softplus_threshold: T.float32,
        use_qk_l2norm_in_kernel: T.int32,
        disable_state_update: T.int32,
        cache_steps: T.int64,
        pad_slot_id: T.int64,
    ):
        T.func_attr({"global_symbol": "kernel"})
        B, TK, H, HV = T.int64(), T.int64(), T.int64(), T.int64()
        q0, q1, q2 = T.int64(), T.int64(), T.int64()
        k0, k1, k2 = T.int64(), T.int64(), T.int64()
        v0s, v1, v2 = T.int64(), T.int64(), T.int64()
        o0, o1, o2, p0 = T.int64(), T.int64(), T.int64(), T.int64()
        g0, g1, g2 = T.int64(), T.int64(), T.int64()
        e0, e1, e2 = T.int64(), T.int64(), T.int64()
        a0, a1, a2 = T.int64(), T.int64(), T.int64()
        b0, b1, b2 = T.int64(), T.int64(), T.int64()
        N1, NI, NB, NP, NS, NF, R = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        S, C, P, PT = T.int64(), T.int64(), T.int64(), T.int64()
        m0, s0, i0, c0, c1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        SC, NC, h0, h1, h2, w0, w1 = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_, (B, TK, H, K), data, strides=(q0, q1, q2, 1), align=2)
        k = T.match_buffer(k_, (B, TK, H, K), data, strides=(k0, k1, k2, 1), align=2)
        v = T.match_buffer(v_, (B, TK, HV, V), data, strides=(v0s, v1, v2, 1), align=2)
        mixed_qkv = T.match_buffer(mixed_, (B, R), data, strides=(m0, T.int64(1)), align=2)
        g = T.match_buffer(g_, (B, TK, HV, *per_channel), dtype_of("g"), strides=(g0, g1, g2, *unit), align=2)
        beta = T.match_buffer(beta_, (B, TK, HV), dtype_of("beta"), strides=(e0, e1, e2), align=2)
        A_log = T.match_buffer(A_log_, (HV,), dtype_of("A_log"), align=2)
        a = T.match_buffer(a_, gate_dims(B, TK, HV), dtype_of("a"), strides=gate_dims(a0, a1, a2), align=2)
        dt_bias = T.match_buffer(dt_bias_, (HV,), dtype_of("dt_bias"), align=2)
        b = T.match_buffer(b_, gate_dims(B, TK, HV), dtype_of("b"), strides=gate_dims(b0, b1, b2), align=2)
        cu_seqlens = T.match_buffer(cu_, (N1,), dtype_of("cu_seqlens", "int64"), align=4)
        initial_state_source = T.match_buffer(source_, (S, HV, *state_shape), pool_dtype, strides=(s0, *head_strides), align=2)
        initial_state_indices = T.match_buffer(slots_, (NI,), dtype_of("initial_state_indices", "int64"), align=4)
        initial_state = T.match_buffer(initial_, (NS, HV, *state_shape), initial_dtype, strides=(i0, *head_strides), align=2)
        final_state = T.match_buffer(final_, (NF, HV, *state_shape), final_dtype, align=2)
        intermediate_states_buffer = T.match_buffer(
            buffer_, (C, P, HV, *state_shape), buffer_dtype, strides=(c0, c1, *head_strides), align=2
        )
        intermediate_state_indices = T.match_buffer(
            buffer_slots_, (NB,), dtype_of("intermediate_state_indices", "int64"), align=4
        )
        # These two have strides of their own: without tokens torch's strides do not count as contiguous here.
        retrieve_parent_token = T.match_buffer(
            parents_, (NP, PT), dtype_of("retrieve_parent_token", "int64"), strides=(p0, T.int64(1)), align=4
        )
        conv_state = T.match_buffer(conv_state_, (SC, R, T.int64(L)), conv_dtype, strides=(h0, h1, h2), align=2)
        conv_weight = T.match_buffer(conv_weight_, (R, T.int64(W)), dtype_of("conv_weight"), strides=(w0, w1), align=2)
        conv_bias = T.match_buffer(conv_bias_, (R,), dtype_of("conv_bias"), align=2)
        conv_state_indices = T.match_buffer(conv_slots_, (NC,), dtype_of("conv_state_indices", "int64"), align=4)
        o = T.match_buffer(o_, (B, TK, HV, V), data, strides=(o0, o1, o2, 1), align=2)
        if convolved:
            conv_state_flat = T.decl_buffer((SC * h0,), conv_dtype, data=conv_state.data)
            conv_weight_flat = T.decl_buffer((R * W,), dtype_of("conv_weight"), data=conv_weight.data)

        n_seq: T.let[T.int64] = pick(varlen, N1 - 1, B)
        heads: T.let[T.int64] = pick(packed, (R - HV * V) // (2 * K), H)

        if checks:
            # On its own: both sides of an `and` are evaluated, and a division by zero kills the process.
            assert heads > 0, ("ValueError", ["q: no heads"])
            assert HV % heads == 0, ("ValueError", ["v: heads must be a multiple of q's"])
            if packed:
                assert 2 * heads * K + HV * V == R, ("ValueError", ["mixed_qkv: row length"])
                assert TK == 1, ("ValueError", ["o: one token"])
            if varlen:
                assert B == 1 and N1 > 0, ("ValueError", ["cu_seqlens: needs q of batch 1"])
                assert int64(cu_seqlens, 0) == 0 and int64(cu_seqlens, N1 - 1) == TK, ("ValueError", ["cu_seqlens: first, last"])
                for n in T.serial(n_seq):
                    assert cu_seqlens[n] <= cu_seqlens[n + 1], ("ValueError", ["cu_seqlens: decreasing"])
            if pool:
                assert S <= 1 or s0 >= HV * K * V, ("ValueError", ["initial_state_source: slots overlap"])
                if slots_given:
                    assert NI == n_seq, ("ValueError", ["initial_state_indices: length"])
                    for n in T.serial(n_seq):
                        assert int64(initial_state_indices, n) >= -1 and int64(initial_state_indices, n) < S, (
                            "ValueError",
                            ["initial_state_indices: slot"],
                        )
                    shared_slots = tiles.scalars(1)
                    if disable_state_update == 0:
                        find_shared(shared_slots, initial_state_indices, n_seq, S, NOBODY)
                        assert shared_slots[0] == T.float32(0), ("ValueError", ["initial_state_indices: shared slot"])
                else:
                    assert S >= n_seq, ("ValueError", ["initial_state_source: fewer slots than sequences"])
            if convolved:
                if "conv_state_indices" in has:
                    conv.check_slots(conv_state_indices, NC, n_seq, SC, pad_slot_id)
                else:
                    assert SC >= n_seq, ("ValueError", ["conv_state: fewer slots than sequences"])
                conv.check_strides(SC, R, h0, h1, h2)
            if separate:
                assert NS == n_seq, ("ValueError", ["initial_state: length"])
            if final:
                assert NF == n_seq, ("ValueError", ["final_state: length"])
            if buffered:
                assert (C <= 1 or c0 >= P * HV * K * V) and (P <= 1 or c1 >= HV * K * V), (
                    "ValueError",
                    ["intermediate_states_buffer: slots overlap"],
                )
                assert cache_steps == NO_STEPS or cache_steps == P, (  # noqa: PLR1714 - no `in` in TVMScript
                    "ValueError",
                    ["cache_steps: not the buffer's"],
                )
                if buffer_slots_given:
                    assert NB == n_seq, ("ValueError", ["intermediate_state_indices: length"])
                    for n in T.serial(n_seq):
                        assert int64(intermediate_state_indices, n) >= -1 and int64(intermediate_state_indices, n) < C, (
                            "ValueError",
                            ["intermediate_state_indices: slot"],
                        )
                    shared_steps = tiles.scalars(1)
                    find_shared(shared_steps, intermediate_state_indices, n_seq, C, NOBODY)
                    assert shared_steps[0] == T.float32(0), ("ValueError", ["intermediate_state_indices: shared slot"])
                else:
                    assert C >= n_seq, ("ValueError", ["intermediate_states_buffer: fewer slots than sequences"])
                for n in T.serial(n_seq):
                    assert pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK) <= P, (
                        "ValueError",
                        ["intermediate_states_buffer: steps"],
                    )
            if tree:
                assert NP == n_seq, ("ValueError", ["retrieve_parent_token: length"])
                for n in T.serial(n_seq):
                    assert pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK) <= PT, (
                        "ValueError",
                        ["retrieve_parent_token: steps"],
                    )
                    for t in T.serial(1, pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK)):
                        assert int64(retrieve_parent_token, n, t) >= -1 and int64(retrieve_parent_token, n, t) < t, (
                            "ValueError",
                            ["retrieve_parent_token: parent"],
                        )

        if chunked and checks:
            tiles.outputs((o, B * TK * HV * V), *pick(final, ((final_state, NF * HV * (K * V)),), ()))

        # Chunks of packed sequences are numbered from first // size + n on: more numbers than chunks, but none twice.
        per_row: T.let[T.int64] = (TK + (size - 1)) // size
        if ahead:
            chunks: T.let[T.int64] = pick(varlen, TK // size + n_seq, n_seq * per_row)
            advance.keep(chunks * HV)
            # Workers of a chunk: one per `together` value heads of a q/k head (the last may have fewer).
            of_key: T.let[T.int64] = HV // T.max(heads, T.int64(1))
            sets: T.let[T.int64] = (of_key + together - 1) // together
            for block in tiles.workers(chunks * heads * sets):
                for lane in tiles.lanes(states=False):
                    tiles.enter(lane)
                    piece: T.let[T.int64] = T.Cast("int64", tiles.worker(block, lane))
                    number: T.let[T.int64] = div(piece, heads * sets)
                    found = tiles.integers(2)
                    found[0] = T.int64(0)
                    if varlen:
                        # The last sequence whose numbers start at or before this one.
                        found[1] = n_seq
                        while found[1] - found[0] > 1:
                            middle: T.let[T.int64] = (found[0] + found[1]) // 2
                            if int64(cu_seqlens, middle) // size + middle <= number:
                                found[0] = middle
                            else:
                                found[1] = middle
                    else:
                        found[0] = div(number, per_row)
                    owner: T.let[T.int64] = found[0]
                    begin: T.let[T.int64] = pick(varlen, int64(cu_seqlens, owner), T.int64(0))
                    tokens: T.let[T.int64] = pick(varlen, int64(cu_seqlens, owner + 1) - begin, TK)
                    at: T.let[T.int64] = (number - pick(varlen, begin // size + owner, owner * per_row)) * size
                    key: T.let[T.int64] = div(mod(piece, heads * sets), sets)
                    head: T.let[T.int64] = key * of_key + mod(piece, sets) * together
                    if at < tokens:
                        advance.prepare(
                            q, k, v, g, beta, o, pick(varlen, T.int64(0), owner), begin, tokens, key, head,
                            T.min(T.int64(together), (key + 1) * of_key - head), T.int64(0), scale, use_qk_l2norm_in_kernel,
                            T.bool(False), number * HV + head, at,
                        )  # fmt: skip

        @T.inline
        def over_sequences():
            # Workers of a sequence: one per v tile of every `span` value heads (the last of a q/k head may have fewer).
            per_key: T.let[T.int64] = pick(span > 1 or convolved, HV // T.max(heads, T.int64(1)), T.int64(1))
            per_head: T.let[T.int64] = (per_key + span - 1) // span
            units: T.let[T.int64] = pick(convolved, heads, pick(span > 1, heads * per_head, HV))
            for block in tiles.workers(n_seq * units * workers()):
                for lane in tiles.lanes():
                    tiles.enter(lane)
                    w: T.let[T.int64] = T.Cast("int64", tiles.worker(block, lane))
                    # Workers fit in 32 bits, where a division is several times cheaper than in 64, above all on GPUs.
                    n: T.let[T.int64] = div(w, units * workers())
                    place: T.let[T.int64] = mod(div(w, workers()), units)
                    j0: T.let[T.int64] = mod(w, workers()) * tiles.v_tile
                    h: T.let[T.int64] = pick(convolved, place, pick(span > 1, div(place, per_head), div(place, div(HV, heads))))
                    hv: T.let[T.int64] = pick(
                        convolved, h * per_key, pick(span > 1, h * per_key + mod(place, per_head) * span, place)
                    )
                    count: T.let[T.int64] = pick(span > 1, T.min(T.int64(span), (h + 1) * per_key - hv), T.int64(1))
                    row: T.let[T.int64] = pick(varlen, T.int64(0), n)
                    first: T.let[T.int64] = pick(varlen, int64(cu_seqlens, n), T.int64(0))
                    length: T.let[T.int64] = pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK)
                    slot: T.let[T.int64] = pick(slots_given, int64(initial_state_indices, n), n)
                    buffer_slot: T.let[T.int64] = pick(buffer_slots_given, int64(intermediate_state_indices, n), n)

                    if not chunked:
                        x, y, d, dx = tiles.k_vector(), tiles.k_vector(), tiles.k_vector(), tiles.k_vector()
                        u, z = tiles.v_vector(), tiles.v_vector()
                        m = tiles.scalars(5)
                        if fused_gate:
                            gate, rate = tiles.scalars(1), tiles.scalars(1)

                    if convolved:
                        value = tiles.v_vector()
                        # What the worker's threads convolve for one another; on CPUs the vectors themselves.
                        line_x, line_y, line_v = tiles.line(x, K), tiles.line(y, K), tiles.line(value, beside * tiles.v_tile)
                        conv_slot: T.let[T.int64] = pick("conv_state_indices" in has, int64(conv_state_indices, n), n)
                        conv_usable: T.let[T.bool] = conv_slot >= 0 and conv_slot < SC and conv_slot != pad_slot_id
                        conv_from: T.let[T.int64] = T.Select(conv_usable, conv_slot, T.int64(0))

                    @T.inline
                    def convolve_lanes(to, at, c, width, regular):
                        taps, old = tiles.scalars((W + 1) * width), tiles.array(max(L, 1) * width, conv_dtype)
                        acc = tiles.scalars(width)
                        dense: T.let[T.bool] = h2 == 1 and h1 == L
                        conv.load_taps(
                            taps, 0, width, conv_weight, conv_weight_flat, pick(regular, True, w1 == 1 and w0 == W), conv_bias, c,
                            width,
                        )  # fmt: skip
                        conv.load_state(
                            old, conv_state, conv_state_flat, pick(regular, True, dense), conv_from * h0 + c * L, conv_from,
                            conv_usable, c, width,
                        )  # fmt: skip
                        conv.head(acc, taps, 0, width, old, True, mixed_qkv, n, c, T.int64(0), T.int64(0), width)
                        conv.activate(acc, width, silus[width])
                        for lane in conv.loop(width):
                            to[at + lane] = acc[lane]
                        if conv_usable:
                            conv.keep(old, mixed_qkv, n, c, T.int64(0), T.int64(1), width)
                            conv.store_state(
                                old, conv_state, conv_state_flat, pick(regular, True, dense), conv_from * h0 + c * L, conv_from,
                                c, width,
                            )  # fmt: skip

                    @T.inline
                    def convolve_strips(skipped, c, size):
                        """The next output of `size` value columns from channel c on, and of q and k unless those are skipped."""
                        for i in tiles.channels((size + (2 * K - skipped)) // strip):
                            at: T.let[T.int64] = skipped + tiles.channel(i) * strip
                            own = tiles.scalars(strip)
                            of_q: T.let[T.int64] = h * K + at - K
                            convolve_lanes(
                                own,
                                0,
                                T.Select(at < K, (heads + h) * K + at, T.Select(at < 2 * K, of_q, c + at - 2 * K)),
                                strip,
                                True,
                            )
                            for lane in T.unroll(strip):
                                if at < K:
                                    line_x[at + lane] = own[lane]
                                elif at < 2 * K:
                                    line_y[at - K + lane] = own[lane]
                                else:
                                    line_v[at - 2 * K + lane] = own[lane]

                    @T.inline
                    def convolve(to, c, size):
                        """The next output of `size` channels of the packed row from c on, in fp32; their state moves by one."""
                        for i in tiles.channels(size // tiles.vector):
                            convolve_lanes(
                                to, tiles.channel(i) * tiles.vector, c + tiles.channel(i) * tiles.vector, tiles.vector, False
                            )
                        if tiles.vector > 1:
                            for i in T.serial(size % tiles.vector):
                                convolve_lanes(to, size - size % tiles.vector + i, c + size - size % tiles.vector + i, 1, False)

                    @T.inline
                    def load_qk(t):
                        if packed:
                            read_qk((x, mixed_qkv, n, (heads + h) * K), (y, mixed_qkv, n, h * K))
                        else:
                            read_qk((x, k, row, first + t, h, T.int64(0)), (y, q, row, first + t, h, T.int64(0)))

                    @T.inline
                    def normalize_qk():
                        m[3] = T.float32(1)
                        m[4] = scale
                        if use_qk_l2norm_in_kernel != 0:
                            tiles.dot(m, 2, x, x)
                            m[3] = T.float32(1) / T.sqrt(m[2] + T.float32(NORM_EPS))
                            tiles.dot(m, 2, y, y)
                            m[4] = scale / T.sqrt(m[2] + T.float32(NORM_EPS))
                        for i in tiles.rows(K):
                            x[i] = x[i] * m[3]
                            y[i] = y[i] * m[4]

                    @T.inline
                    def ask_gates(t, hv):
                        """What gates are made of, as it is in memory: m[0], rate[0] and m[1]."""
                        m[0] = T.float32(0)
                        if fused_gate:
                            m[0] = gate_at(a, row, first + t, hv) + T.Cast("float32", dt_bias[hv])
                            rate[0] = T.Cast("float32", A_log[hv])
                            m[1] = gate_at(b, row, first + t, hv)
                        else:
                            if gated and not channel_gate:
                                m[0] = T.Cast("float32", g[row, first + t, hv])
                            m[1] = T.Cast("float32", beta[row, first + t, hv])

                    @T.inline
                    def make_gates(t, hv):
                        """D = exp(g) for every row of the state, m[1] = beta."""
                        if fused_gate:
                            gate[0] = m[0]
                            rate[0] = tiles.exp(rate[0])
                            log_decay(gate, rate, softplus_beta, softplus_threshold)
                            m[0] = gate[0]
                            gate[0] = m[1]
                            sigmoid(gate)
                            m[1] = gate[0]
                        if channel_gate:
                            for i in tiles.rows(K):
                                d[i] = tiles.exp(T.Cast("float32", g[row, first + t, hv, tiles.row(i)]))
                        else:
                            m[0] = tiles.exp(m[0])
                            for i in tiles.rows(K):
                                d[i] = m[0]

                    @T.inline
                    def ask(t, hv, j0):
                        """All of a token, v in z: nothing is computed, so that everything is under way at the same time."""
                        if not convolved:
                            load_qk(t)
                            for j in tiles.cols(tiles.v_tile):
                                if packed:
                                    z[j] = T.Cast("float32", mixed_qkv[n, 2 * heads * K + hv * V + j0 + tiles.col(j)])
                                else:
                                    z[j] = T.Cast("float32", v[row, first + t, hv, j0 + tiles.col(j)])
                        ask_gates(t, hv)

                    @T.inline
                    def prepare(t, hv):
                        """What does not depend on the state."""
                        make_gates(t, hv)
                        if not convolved:
                            normalize_qk()
                        for i in tiles.rows(K):
                            dx[i] = d[i] * x[i]

                    @T.inline
                    def fetch(t, hv, j0):
                        ask(t, hv, j0)
                        prepare(t, hv)

                    @T.inline
                    def apply(W, t, hv, j0):
                        tiles.gemv(u, W, dx)
                        for j in tiles.cols(tiles.v_tile):
                            if convolved:
                                u[j] = (value[j] - u[j]) * m[1]
                            else:
                                u[j] = (z[j] - u[j]) * m[1]
                        tiles.ger_gemv(z, W, d, x, u, y)
                        for j in tiles.cols(tiles.v_tile):
                            o[row, first + t, hv, j0 + tiles.col(j)] = T.Cast(data, z[j])

                    @T.inline
                    def load_initial(W, hv, j0):
                        if unbranched():
                            usable: T.let[T.bool] = slot >= 0 and slot < S
                            from_slot: T.let[T.int64] = T.Select(usable, slot, T.int64(0))
                            tiles.ask_state(tiles.view(initial_state_source, from_slot * s0 + hv * (K * V), j0), usable)
                        elif pool:
                            if slot >= 0 and slot < S:
                                tiles.load(W, tiles.view(initial_state_source, slot * s0 + hv * (K * V), j0))
                            else:
                                tiles.zero(W)
                        elif separate:
                            tiles.load(W, tiles.view(initial_state, n * i0 + hv * (K * V), j0))
                        else:
                            tiles.zero(W)

                    @T.inline
                    def load_parent(W, t, hv, j0):
                        """The state after the parent's step; the initial state where there is no parent."""
                        parent: T.let[T.int64] = int64(retrieve_parent_token, n, t)
                        if parent < 0:
                            load_initial(W, hv, j0)
                        elif buffer_slot >= 0 and buffer_slot < C and parent < P:
                            tiles.load(
                                W, tiles.view(intermediate_states_buffer, buffer_slot * c0 + parent * c1 + hv * (K * V), j0)
                            )
                        else:
                            tiles.zero(W)

                    @T.inline
                    def steps(W, hv, j0):
                        for t in T.serial(length):
                            if tree:
                                if t > 0:
                                    load_parent(W, t, hv, j0)
                            fetch(t, hv, j0)
                            apply(W, t, hv, j0)
                            if buffered:
                                if buffer_slot >= 0 and buffer_slot < C and t < P:
                                    tiles.store(
                                        tiles.view(intermediate_states_buffer, buffer_slot * c0 + t * c1 + hv * (K * V), j0), W
                                    )

                    @T.inline
                    def store_final(W, hv, j0):
                        if pool:
                            if slot >= 0 and slot < S and disable_state_update == 0:
                                tiles.store(tiles.view(initial_state_source, slot * s0 + hv * (K * V), j0), W)
                        if final:
                            tiles.store(tiles.view(final_state, (n * HV + hv) * (K * V), j0), W)

                    @T.inline
                    def through_local(hv, j0):
                        if packed:

                            @T.inline
                            def step():
                                """One token, whose loads need not wait for the slot's number as the state's do."""
                                local = tiles.state()
                                if tiles.state_first:
                                    load_initial(local, hv, j0)
                                ask(0, hv, j0)
                                if not tiles.state_first:
                                    load_initial(local, hv, j0)
                                prepare(0, hv)
                                if unbranched():
                                    tiles.take_state(local)
                                apply(local, 0, hv, j0)
                                store_final(local, hv, j0)

                            settled(
                                pick(convolved, (), ((mixed_qkv, n, (heads + h) * K), (mixed_qkv, n, h * K))),
                                tiles.view(initial_state_source, hv * (K * V), j0), s0, step,
                            )  # fmt: skip
                        else:
                            local = tiles.state()
                            if tiles.state_first:
                                # Without tokens nothing waits for what would be asked for, and the state stays as it is.
                                if length > 0:
                                    load_initial(local, hv, j0)
                                    steps(local, hv, j0)
                                    store_final(local, hv, j0)
                            else:
                                load_initial(local, hv, j0)
                                steps(local, hv, j0)
                                store_final(local, hv, j0)

                    @T.inline
                    def over_states(hv, j0):
                        if direct_pool:
                            if slot >= 0 and slot < S and disable_state_update == 0 and (direct_any_length or length <= 1):
                                steps(tiles.view(initial_state_source, slot * s0 + hv * (K * V), j0), hv, j0)
                            else:
                                through_local(hv, j0)
                        else:
                            through_local(hv, j0)

                    @T.inline
                    def load_piece(W, piece):
                        """The state of one of the worker's tiles of value columns."""
                        load_initial(W, hv + piece // (V // tiles.v_tile), piece % (V // tiles.v_tile) * tiles.v_tile)

                    @T.inline
                    def step_piece(W, piece):
                        """A tile's token, and its state back to the pool."""
                        own_head: T.let[T.int64] = hv + piece // (V // tiles.v_tile)
                        own_column: T.let[T.int64] = piece % (V // tiles.v_tile) * tiles.v_tile
                        fetch(0, own_head, own_column)
                        apply(W, 0, own_head, own_column)
                        store_final(W, own_head, own_column)

                    if chunked:
                        for i in T.serial(count):
                            load_initial(tiles.state(i), hv + i, j0)
                        advance(
                            q, k, v, g, beta, o, row, first, length, h, hv, count, j0, scale, use_qk_l2norm_in_kernel,
                            pick(pool, slot < 0 or slot >= S, T.bool(not separate)),
                            kept_states(
                                pick(pool, (initial_state_source, slot * s0), (initial_state, n * i0)),
                                (final_state, n * HV * (K * V)), hv * (K * V), count * (K * V),
                            ),
                            pick(varlen, first // size + n, n * per_row) * HV + hv, HV,
                        )  # fmt: skip
                        tiles.sync()
                        for i in T.serial(count):
                            store_final(tiles.state(i), hv + i, j0)
                        tiles.leave()
                    elif convolved:
                        pieces: T.let[T.int64] = per_key * (V // tiles.v_tile)
                        if early:
                            states = tiles.state()
                            if tiles.mate() < pieces:
                                load_piece(states, tiles.mate())
                        if strip == 0:
                            convolve(line_x, (heads + h) * K, K)
                            convolve(line_y, h * K, K)
                        if not tiles.lines_shared:
                            normalize_qk()
                        for turn in T.serial((pieces + (beside - 1)) // beside):
                            width: T.let[T.int64] = pick(
                                beside == 1, T.int64(tiles.v_tile), T.min(pieces - turn * beside, beside) * tiles.v_tile
                            )
                            columns: T.let[T.int64] = 2 * heads * K + hv * V + turn * (beside * tiles.v_tile)
                            if strip > 0:
                                if (
                                    h2 == 1
                                    and h1 == L
                                    and w1 == 1
                                    and w0 == W
                                    and tiles.fit_rows((conv_weight_flat, 0, W, T.int64(0)), (conv_state_flat, 0, L, h0))
                                ):
                                    if turn == 0:
                                        convolve_strips(0, columns, width)
                                    else:
                                        convolve_strips(2 * K, columns, width)
                                else:
                                    if turn == 0:
                                        convolve(line_x, (heads + h) * K, K)
                                        convolve(line_y, h * K, K)
                                    convolve(line_v, columns, width)
                            else:
                                convolve(line_v, columns, pick(beside == 1, tiles.v_tile, width))
                            tiles.sync()
                            if tiles.lines_shared:
                                if turn == 0:
                                    tiles.take_rows(x, line_x)
                                    tiles.take_rows(y, line_y)
                                    normalize_qk()
                            piece: T.let[T.int64] = turn * beside + tiles.mate()
                            if piece < pieces:
                                tiles.take_columns(value, line_v)
                                if early:
                                    step_piece(states, piece)
                                    if piece + beside < pieces:
                                        load_piece(states, piece + beside)
                                else:
                                    over_states(hv + piece // (V // tiles.v_tile), piece % (V // tiles.v_tile) * tiles.v_tile)
                            tiles.sync()
                    else:
                        over_states(hv, j0)

        plan(n_seq * HV, pick(varlen, T.int64(-1), TK), over_sequences)

    return kernel
