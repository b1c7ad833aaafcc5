"""What the host part of a delta-rule kernel checks before anything is written (`delta_rule.py`)."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.rules import NO_STEPS
from tvm_gdn.ops.tir.conv_step import ConvStep
from tvm_gdn.ops.tir.delta_rule_form import Arguments, Form
from tvm_gdn.ops.tir.integers import int64
from tvm_gdn.ops.tir.parsing import pick
from tvm_gdn.ops.tir.slots import find_shared

#: Slot of padding sequences.
NOBODY = -1


def check_call(form: Form, tiles: Any, call: Arguments, conv: ConvStep | None) -> None:
    """Emit the checks of heads, sequences, slots and lengths.

    Parameters
    ----------
    form : Form
        Of the kernel.
    tiles : object
        Supplies ``scalars``.
    call : Arguments
        The kernel's arguments.
    conv : ConvStep or None
        Of a row that is convolved here.
    """
    K, V, packed, varlen, convolved, heads, n_seq = (
        form.K, form.V, form.packed, form.varlen, form.convolved, call.heads, call.n_seq,
    )  # fmt: skip
    B, TK, HV, _ = call.o.shape
    R, N1 = call.mixed_qkv.shape[1], call.cu_seqlens.shape[0]
    S, s0 = call.initial_state_source.shape[0], call.initial_state_source.strides[0]
    SC, h0, h1, h2 = call.conv_state.shape[0], *call.conv_state.strides
    C, P = call.intermediate_states_buffer.shape[:2]
    c0, c1 = call.intermediate_states_buffer.strides[:2]
    NP, PT = call.retrieve_parent_token.shape
    NI, NB, NC = (
        slots.shape[0] for slots in (call.initial_state_indices, call.intermediate_state_indices, call.conv_state_indices)
    )
    NS, NF = call.initial_state.shape[0], call.final_state.shape[0]
    cu_seqlens, parents = call.cu_seqlens, call.retrieve_parent_token

    @T.inline
    def check():
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
        if form.pool:
            assert S <= 1 or s0 >= HV * K * V, ("ValueError", ["initial_state_source: slots overlap"])
            if form.slots_given:
                assert NI == n_seq, ("ValueError", ["initial_state_indices: length"])
                for n in T.serial(n_seq):
                    assert int64(call.initial_state_indices, n) >= -1 and int64(call.initial_state_indices, n) < S, (
                        "ValueError",
                        ["initial_state_indices: slot"],
                    )
                shared_slots = tiles.scalars(1)
                if call.disable_state_update == 0:
                    find_shared(shared_slots, call.initial_state_indices, n_seq, S, NOBODY)
                    assert shared_slots[0] == T.float32(0), ("ValueError", ["initial_state_indices: shared slot"])
            else:
                assert S >= n_seq, ("ValueError", ["initial_state_source: fewer slots than sequences"])
        if convolved:
            if form.conv_slots_given:
                conv.check_slots(call.conv_state_indices, NC, n_seq, SC, call.pad_slot_id)
            else:
                assert SC >= n_seq, ("ValueError", ["conv_state: fewer slots than sequences"])
            conv.check_strides(SC, R, h0, h1, h2)
        if form.separate:
            assert NS == n_seq, ("ValueError", ["initial_state: length"])
        if form.final:
            assert NF == n_seq, ("ValueError", ["final_state: length"])
        if form.buffered:
            assert (C <= 1 or c0 >= P * HV * K * V) and (P <= 1 or c1 >= HV * K * V), (
                "ValueError",
                ["intermediate_states_buffer: slots overlap"],
            )
            assert call.cache_steps == NO_STEPS or call.cache_steps == P, (  # noqa: PLR1714 - no `in` in TVMScript
                "ValueError",
                ["cache_steps: not the buffer's"],
            )
            if form.buffer_slots_given:
                assert NB == n_seq, ("ValueError", ["intermediate_state_indices: length"])
                for n in T.serial(n_seq):
                    assert int64(call.intermediate_state_indices, n) >= -1 and int64(call.intermediate_state_indices, n) < C, (
                        "ValueError",
                        ["intermediate_state_indices: slot"],
                    )
                shared_steps = tiles.scalars(1)
                find_shared(shared_steps, call.intermediate_state_indices, n_seq, C, NOBODY)
                assert shared_steps[0] == T.float32(0), ("ValueError", ["intermediate_state_indices: shared slot"])
            else:
                assert C >= n_seq, ("ValueError", ["intermediate_states_buffer: fewer slots than sequences"])
            for n in T.serial(n_seq):
                assert pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK) <= P, (
                    "ValueError",
                    ["intermediate_states_buffer: steps"],
                )
        if form.tree:
            assert NP == n_seq, ("ValueError", ["retrieve_parent_token: length"])
            for n in T.serial(n_seq):
                assert pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK) <= PT, (
                    "ValueError",
                    ["retrieve_parent_token: steps"],
                )
                for t in T.serial(1, pick(varlen, int64(cu_seqlens, n + 1) - int64(cu_seqlens, n), TK)):
                    assert int64(parents, n, t) >= -1 and int64(parents, n, t) < t, (
                        "ValueError",
                        ["retrieve_parent_token: parent"],
                    )

    check()
