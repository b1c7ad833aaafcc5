"""A token's step of the delta rule, and the steps of a sequence (`delta_rule.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.delta_rule_form import Form, Vectors, Worker
from tvm_gdn.ops.tir.delta_rule_states import StateMacros, state_macros, unbranched
from tvm_gdn.ops.tir.gates import gate_macros
from tvm_gdn.ops.tir.parsing import pick

NORM_EPS = 1e-6


def gate_dims(form: Form, batch: Any, token: Any, head: Any) -> tuple[Any, ...]:
    """The packed decode step has one token and so no token axis on a and b."""
    return (batch, head) if form.packed else (batch, token, head)


@dataclass(frozen=True, eq=False)
class TokenMacros:
    """Macros on one token `t`, value head `hv`, value columns from `j0`.

    ``normalize_qk()``, ``ask(t, hv, j0)``, ``prepare(t, hv)``, ``fetch(t, hv, j0)`` both of them, ``apply(W, t, hv, j0)`` to a
    tile of the state.
    """

    normalize_qk: Any
    ask: Any
    prepare: Any
    fetch: Any
    apply: Any


def token_macros(worker: Worker, vectors: Vectors) -> TokenMacros:
    """Macros of one worker.

    Parameters
    ----------
    worker : Worker
        The worker.
    vectors : Vectors
        The worker's; k, q and v are there already if they are convolved here.

    Returns
    -------
    TokenMacros
    """
    form, tiles, call = worker.form, worker.tiles, worker.call
    K, V, packed, convolved, channel_gate = form.K, form.V, form.packed, form.convolved, form.channel_gate
    n, row, first, h, heads = worker.n, worker.row, worker.first, worker.h, call.heads
    x, y, d, dx, u, z, m = vectors.x, vectors.y, vectors.d, vectors.dx, vectors.u, vectors.z, vectors.m
    mixed_qkv, g, scale = call.mixed_qkv, call.g, call.scale
    gate, rate = vectors.gates or (None, None)
    log_decay, sigmoid = gate_macros(tiles, 1)

    def gate_at(buffer: Any, batch: Any, token: Any, head: Any) -> Any:
        """Element of a gate tensor in fp32."""
        return T.Cast("float32", buffer[gate_dims(form, batch, token, head)])

    @T.inline
    def load_qk(t):
        if packed:
            tiles.read_all((x, mixed_qkv, n, (heads + h) * K), (y, mixed_qkv, n, h * K))
        else:
            tiles.read_all((x, call.k, row, first + t, h, T.int64(0)), (y, call.q, row, first + t, h, T.int64(0)))

    @T.inline
    def normalize_qk():
        m[3] = T.float32(1)
        m[4] = scale
        if call.use_qk_l2norm_in_kernel != 0:
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
        if form.fused_gate:
            m[0] = gate_at(call.a, row, first + t, hv) + T.Cast("float32", call.dt_bias[hv])
            rate[0] = T.Cast("float32", call.A_log[hv])
            m[1] = gate_at(call.b, row, first + t, hv)
        else:
            if form.gated and not channel_gate:
                m[0] = T.Cast("float32", g[row, first + t, hv])
            m[1] = T.Cast("float32", call.beta[row, first + t, hv])

    @T.inline
    def make_gates(t, hv):
        """D = exp(g) for every row of the state, m[1] = beta."""
        if form.fused_gate:
            gate[0] = m[0]
            rate[0] = tiles.exp(rate[0])
            log_decay(gate, rate, call.softplus_beta, call.softplus_threshold)
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
                    z[j] = T.Cast("float32", call.v[row, first + t, hv, j0 + tiles.col(j)])
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
            u[j] = (vectors.v[j] - u[j]) * m[1]
        tiles.ger_gemv(z, W, d, x, u, y)
        for j in tiles.cols(tiles.v_tile):
            call.o[row, first + t, hv, j0 + tiles.col(j)] = T.Cast(form.data, z[j])

    return TokenMacros(normalize_qk, ask, prepare, fetch, apply)


@dataclass(frozen=True, eq=False)
class StepMacros:
    """A worker's macros on tokens and on states in memory, and ``sequence(hv, j0)`` of both: all steps on a tile of its state."""

    token: TokenMacros
    memory: StateMacros
    sequence: Any


def step_macros(worker: Worker, vectors: Vectors) -> StepMacros:
    """Macros of one worker.

    Parameters
    ----------
    worker : Worker
        The worker.
    vectors : Vectors
        The worker's.

    Returns
    -------
    StepMacros
    """
    token, memory = token_macros(worker, vectors), state_macros(worker)
    return StepMacros(token, memory, sequence_macro(worker, token, memory))


def sequence_macro(worker: Worker, token: TokenMacros, memory: StateMacros) -> Any:
    """A sequence's steps on a tile of its state, from the state in memory and back.

    Parameters
    ----------
    worker : Worker
        The worker.
    token : TokenMacros
        The worker's.
    memory : StateMacros
        The worker's.

    Returns
    -------
    macro ``(hv, j0)``
    """
    form, tiles, call = worker.form, worker.tiles, worker.call
    K, V, n, h, heads, slot, length = form.K, form.V, worker.n, worker.h, call.heads, worker.slot, worker.length
    source = call.initial_state_source
    S, s0 = source.shape[0], source.strides[0]
    # A low-precision state must not be rounded between the tokens of one call, so only one-token calls may use it in place.
    direct_pool = tiles.direct and form.pool and not form.tree and not form.final
    direct_any_length = form.dtype_of("initial_state_source") == "float32"

    @T.inline
    def steps(W, hv, j0):
        for t in T.serial(length):
            if form.tree:
                if t > 0:
                    memory.load_parent(W, t, hv, j0)
            token.fetch(t, hv, j0)
            token.apply(W, t, hv, j0)
            if form.buffered:
                memory.keep(W, t, hv, j0)

    @T.inline
    def through_local(hv, j0):
        if form.packed:

            @T.inline
            def step():
                """One token, whose loads need not wait for the slot's number as the state's do."""
                local = tiles.state()
                if tiles.state_first:
                    memory.load_initial(local, hv, j0)
                token.ask(0, hv, j0)
                if not (tiles.state_first or tiles.state_last):
                    memory.load_initial(local, hv, j0)
                token.prepare(0, hv)
                if tiles.state_last:
                    memory.load_initial(local, hv, j0)
                if unbranched(form, tiles):
                    tiles.take_state(local)
                token.apply(local, 0, hv, j0)
                memory.store_final(local, hv, j0)

            tiles.settled(
                pick(form.convolved, (), ((call.mixed_qkv, n, (heads + h) * K), (call.mixed_qkv, n, h * K))),
                tiles.view(source, hv * (K * V), j0), s0, step,
            )  # fmt: skip
        else:
            local = tiles.state()
            if tiles.state_first:
                # Without tokens nothing waits for what would be asked for, and the state stays as it is.
                if length > 0:
                    memory.load_initial(local, hv, j0)
                    steps(local, hv, j0)
                    memory.store_final(local, hv, j0)
            else:
                memory.load_initial(local, hv, j0)
                steps(local, hv, j0)
                memory.store_final(local, hv, j0)

    @T.inline
    def over_states(hv, j0):
        if direct_pool:
            if slot >= 0 and slot < S and call.disable_state_update == 0 and (direct_any_length or length <= 1):
                steps(tiles.view(source, slot * s0 + hv * (K * V), j0), hv, j0)
            else:
                through_local(hv, j0)
        else:
            through_local(hv, j0)

    return over_states
