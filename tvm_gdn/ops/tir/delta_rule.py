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
`tiles` (`step_tiles.py` lists it): how workers map to threads or blocks, where the state tile lives, and the two matrix-vector
operations.

Here stand the arguments, and how sequences and heads become workers. `delta_rule_step.py` has a token's step and the steps of a
sequence, `delta_rule_states.py` where states are in memory, `delta_rule_conv.py` the convolution ahead of a step,
`delta_rule_checks.py` what the host checks, and `delta_rule_form.py` what these share. Their macros are made while the function
is parsed, from the arguments and the worker's place.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.delta_rule_checks import check_call
from tvm_gdn.ops.tir.delta_rule_conv import Convolution, Row, convolved_steps
from tvm_gdn.ops.tir.delta_rule_form import Arguments, Form, Vectors, Worker
from tvm_gdn.ops.tir.delta_rule_states import state_macros
from tvm_gdn.ops.tir.delta_rule_step import gate_dims, step_macros
from tvm_gdn.ops.tir.integers import int64
from tvm_gdn.ops.tir.parsing import pick
from tvm_gdn.spec import Geometry


def delta_rule(geometry: Geometry, tiles: Any, advance: Any = None) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes K and V, dtypes of the tensors present, ``state_v_first`` and ``output_final_state``.
    tiles : StepTiles, ConvolvedStepTiles or ChunkTiles
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
    form, checks, chunked = Form(geometry), tiles.host_checks, advance is not None
    K, V, packed, convolved, varlen, pool, separate, final = (
        form.K, form.V, form.packed, form.convolved, form.varlen, form.pool, form.separate, form.final,
    )  # fmt: skip
    dtype_of, data = form.dtype_of, form.data
    v_first = bool(geometry.attr.get("state_v_first", False))
    state_shape = (V, K) if v_first else (K, V)
    # TVM 0.27 wants a stride literal in the dtype of its axis: int64 where the axis is a symbol (heads).
    head_strides = (T.int64(K * V), state_shape[1], 1)
    per_channel, unit = ((K,), (1,)) if form.channel_gate else ((), ())
    initial_dtype = dtype_of("initial_state")
    W, L = (geometry.axis["W"], geometry.axis["L"]) if convolved else (0, 0)
    # Value heads of one q/k head that a worker takes; a token step has nothing to share between them.
    span = tiles.span if chunked else 1
    ahead = chunked and advance.ahead
    size, together = (tiles.chunk, tiles.together) if ahead else (1, 1)
    conv = Convolution(form, geometry, tiles) if convolved else None

    def workers() -> int:
        """Workers per head, or heads."""
        return 1 if convolved else V // tiles.v_tile

    def kept_states(given: tuple[Any, Any], kept: tuple[Any, Any], own: Any, step: Any) -> tuple[tuple[Any, Any, bool], ...]:
        """Where states in memory will be read and written next, with whether written: the next worker's, and this one's."""
        reads = [(given[0], given[1] + own + step, False)] if pool or separate else []
        return (*reads, *([(kept[0], kept[1] + own, True)] if final else []))

    def div(x: Any, y: Any) -> Any:
        """Quotient of small non-negative integers."""
        return T.Cast("int64", T.truncdiv(T.Cast("int32", x), T.Cast("int32", y)))

    def mod(x: Any, y: Any) -> Any:
        """Remainder of small non-negative integers."""
        return T.Cast("int64", T.truncmod(T.Cast("int32", x), T.Cast("int32", y)))

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
        a = T.match_buffer(a_, gate_dims(form, B, TK, HV), dtype_of("a"), strides=gate_dims(form, a0, a1, a2), align=2)
        dt_bias = T.match_buffer(dt_bias_, (HV,), dtype_of("dt_bias"), align=2)
        b = T.match_buffer(b_, gate_dims(form, B, TK, HV), dtype_of("b"), strides=gate_dims(form, b0, b1, b2), align=2)
        cu_seqlens = T.match_buffer(cu_, (N1,), dtype_of("cu_seqlens", "int64"), align=4)
        initial_state_source = T.match_buffer(
            source_, (S, HV, *state_shape), dtype_of("initial_state_source"), strides=(s0, *head_strides), align=2
        )
        initial_state_indices = T.match_buffer(slots_, (NI,), dtype_of("initial_state_indices", "int64"), align=4)
        initial_state = T.match_buffer(initial_, (NS, HV, *state_shape), initial_dtype, strides=(i0, *head_strides), align=2)
        final_state = T.match_buffer(final_, (NF, HV, *state_shape), dtype_of("final_state", initial_dtype), align=2)
        intermediate_states_buffer = T.match_buffer(
            buffer_, (C, P, HV, *state_shape), dtype_of("intermediate_states_buffer"), strides=(c0, c1, *head_strides), align=2
        )
        intermediate_state_indices = T.match_buffer(
            buffer_slots_, (NB,), dtype_of("intermediate_state_indices", "int64"), align=4
        )
        # These two have strides of their own: without tokens torch's strides do not count as contiguous here.
        retrieve_parent_token = T.match_buffer(
            parents_, (NP, PT), dtype_of("retrieve_parent_token", "int64"), strides=(p0, T.int64(1)), align=4
        )
        conv_state = T.match_buffer(conv_state_, (SC, R, T.int64(L)), dtype_of("conv_state"), strides=(h0, h1, h2), align=2)
        conv_weight = T.match_buffer(conv_weight_, (R, T.int64(W)), dtype_of("conv_weight"), strides=(w0, w1), align=2)
        conv_bias = T.match_buffer(conv_bias_, (R,), dtype_of("conv_bias"), align=2)
        conv_state_indices = T.match_buffer(conv_slots_, (NC,), dtype_of("conv_state_indices", "int64"), align=4)
        o = T.match_buffer(o_, (B, TK, HV, V), data, strides=(o0, o1, o2, 1), align=2)
        if convolved:
            conv_state_flat = T.decl_buffer((SC * h0,), dtype_of("conv_state"), data=conv_state.data)
            conv_weight_flat = T.decl_buffer((R * W,), dtype_of("conv_weight"), data=conv_weight.data)

        n_seq: T.let[T.int64] = pick(varlen, N1 - 1, B)
        heads: T.let[T.int64] = pick(packed, (R - HV * V) // (2 * K), H)

        call = T.meta_var(
            Arguments(
                q, k, v, mixed_qkv, g, beta, A_log, a, dt_bias, b, cu_seqlens, initial_state_source, initial_state_indices,
                initial_state, final_state, intermediate_states_buffer, intermediate_state_indices, retrieve_parent_token,
                conv_state, conv_weight, conv_bias, conv_state_indices, o, scale, softplus_beta, softplus_threshold,
                use_qk_l2norm_in_kernel, disable_state_update, cache_steps, pad_slot_id, heads, n_seq,
            )
        )  # fmt: skip

        if checks:
            check_call(form, tiles, call, conv.step if convolved else None)

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
                    slot: T.let[T.int64] = pick(form.slots_given, int64(initial_state_indices, n), n)
                    buffer_slot: T.let[T.int64] = pick(form.buffer_slots_given, int64(intermediate_state_indices, n), n)

                    if not chunked:
                        x, y, d, dx = tiles.k_vector(), tiles.k_vector(), tiles.k_vector(), tiles.k_vector()
                        u, z = tiles.v_vector(), tiles.v_vector()
                        m = tiles.scalars(5)
                        if form.fused_gate:
                            gate, rate = tiles.scalars(1), tiles.scalars(1)

                    if convolved:
                        value = tiles.v_vector()
                        # What the worker's threads convolve for one another; on CPUs the vectors themselves.
                        line_x, line_y = tiles.line(x, K), tiles.line(y, K)
                        line_v = tiles.line(value, tiles.beside * tiles.v_tile)
                        conv_slot: T.let[T.int64] = pick(form.conv_slots_given, int64(conv_state_indices, n), n)
                        conv_usable: T.let[T.bool] = conv_slot >= 0 and conv_slot < SC and conv_slot != pad_slot_id
                        conv_from: T.let[T.int64] = T.Select(conv_usable, conv_slot, T.int64(0))

                    this_worker = T.meta_var(Worker(form, tiles, call, n, row, first, length, h, hv, slot, buffer_slot))
                    if chunked:
                        memory = T.meta_var(state_macros(this_worker))
                        for i in T.serial(count):
                            memory.load_initial(tiles.state(i), hv + i, j0)
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
                            memory.store_final(tiles.state(i), hv + i, j0)
                        tiles.leave()
                    else:
                        vectors = T.meta_var(
                            Vectors(x, y, d, dx, u, z, value if convolved else z, m, (gate, rate) if form.fused_gate else ())
                        )
                        macros = T.meta_var(step_macros(this_worker, vectors))
                        if convolved:
                            line = T.meta_var(
                                Row(per_key, conv_state_flat, conv_weight_flat, conv_usable, conv_from, line_x, line_y, line_v)
                            )
                            convolved_steps(this_worker, conv, line, vectors, macros)
                        else:
                            macros.sequence(hv, j0)

        tiles.plan(n_seq * HV, pick(varlen, T.int64(-1), TK), over_sequences)

    return kernel
