"""States of the delta-rule kernel in memory (`delta_rule.py`): in a pool or separate, after every token, of a token's parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.delta_rule_form import Form, Worker
from tvm_gdn.ops.tir.integers import int64


@dataclass(frozen=True, eq=False)
class StateMacros:
    """Macros on a tile W of a state: value head `hv`, columns from `j0`.

    ``load_initial(W, hv, j0)`` and ``store_final(W, hv, j0)`` before and after the sequence, ``load_parent(W, t, hv, j0)`` before
    token t of a tree, ``keep(W, t, hv, j0)`` after token t for one who goes back to it.
    """

    load_initial: Any
    load_parent: Any
    keep: Any
    store_final: Any


def unbranched(form: Form, tiles: Any) -> bool:
    """Whether a state, or zeros, is asked for without a branch, behind which it would be waited for."""
    return form.packed and not tiles.state_first and bool(tiles.fits)


def state_macros(worker: Worker) -> StateMacros:
    """Macros of one worker.

    Parameters
    ----------
    worker : Worker
        With the target's ``view``, ``load``, ``store``, ``zero``; ``ask_state`` if its ``fits`` is ever true.

    Returns
    -------
    StateMacros
    """
    form, tiles, call = worker.form, worker.tiles, worker.call
    K, V, HV = form.K, form.V, call.o.shape[2]
    n, slot, buffer_slot = worker.n, worker.slot, worker.buffer_slot
    initial_state_source, initial_state, final_state = call.initial_state_source, call.initial_state, call.final_state
    intermediate_states_buffer = call.intermediate_states_buffer
    S, s0, i0 = initial_state_source.shape[0], initial_state_source.strides[0], initial_state.strides[0]
    C, P = intermediate_states_buffer.shape[:2]
    c0, c1 = intermediate_states_buffer.strides[:2]

    @T.inline
    def load_initial(W, hv, j0):
        if unbranched(form, tiles):
            usable: T.let[T.bool] = slot >= 0 and slot < S
            from_slot: T.let[T.int64] = T.Select(usable, slot, T.int64(0))
            tiles.ask_state(tiles.view(initial_state_source, from_slot * s0 + hv * (K * V), j0), usable)
        elif form.pool:
            if slot >= 0 and slot < S:
                tiles.load(W, tiles.view(initial_state_source, slot * s0 + hv * (K * V), j0))
            else:
                tiles.zero(W)
        elif form.separate:
            tiles.load(W, tiles.view(initial_state, n * i0 + hv * (K * V), j0))
        else:
            tiles.zero(W)

    @T.inline
    def load_parent(W, t, hv, j0):
        """The state after the parent's step; the initial state where there is no parent."""
        parent: T.let[T.int64] = int64(call.retrieve_parent_token, n, t)
        if parent < 0:
            load_initial(W, hv, j0)
        elif buffer_slot >= 0 and buffer_slot < C and parent < P:
            tiles.load(W, tiles.view(intermediate_states_buffer, buffer_slot * c0 + parent * c1 + hv * (K * V), j0))
        else:
            tiles.zero(W)

    @T.inline
    def keep(W, t, hv, j0):
        if buffer_slot >= 0 and buffer_slot < C and t < P:
            tiles.store(tiles.view(intermediate_states_buffer, buffer_slot * c0 + t * c1 + hv * (K * V), j0), W)

    @T.inline
    def store_final(W, hv, j0):
        if form.pool:
            if slot >= 0 and slot < S and call.disable_state_update == 0:
                tiles.store(tiles.view(initial_state_source, slot * s0 + hv * (K * V), j0), W)
        if form.final:
            tiles.store(tiles.view(final_state, (n * HV + hv) * (K * V), j0), W)

    return StateMacros(load_initial, load_parent, keep, store_final)
