"""Bad input of every kind: the error's class, the argument that it names, what it says is allowed, and nothing written."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from calls import BUFFER, GATING, PACKED, POOL, RECURRENT, SIGMOID, UPDATE, bits, call, draw, function
from processes import environment
from torch import tensor

import tvm_gdn
from tvm_gdn import cases, dispatch, parity
from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops import OPS

POOLED = {"B": 3, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 6, "with": POOL}
MANY = {**POOLED, "B": 40, "S": 50}
VARLEN = {
    "lengths": (5, 0, 3, 1), "H": 2, "HV": 4, "K": 32, "V": 64, "S": 9, "with": (*POOL, "cu_seqlens"),
    "index_dtype": "int32",
}  # fmt: skip
VERIFY = {"B": 2, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 3, "with": (*POOL, *BUFFER)}
TREE = {"B": 2, "T": 4, "H": 1, "HV": 2, "K": 32, "V": 48, "S": 3, "with": (*POOL, *BUFFER, "retrieve_parent_token")}
DEFAULT_BUFFER_SLOTS = {
    "lengths": (3, 4), "H": 2, "HV": 2, "K": 20, "V": 12, "S": 2, "with": (*POOL, "cu_seqlens", BUFFER[0]),
}  # fmt: skip
DEFAULT_SLOTS = {"B": 4, "T": 1, "H": 1, "HV": 3, "K": 8, "V": 8, "S": 4, "with": POOL[:1]}
SEPARATE = {"B": 2, "T": 7, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
SEPARATE_VARLEN = {
    "lengths": (3, 0, 4), "H": 2, "HV": 4, "K": 32, "V": 256, "with": ("initial_state", "cu_seqlens"),
    "output_final_state": True,
}  # fmt: skip
PACKED_STEP = {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": POOL}
GATES = {"M": 9, "HV": 6, "dtype": "bfloat16", "dtypes": {"A_log": "float32", "dt_bias": "bfloat16"}}

KERNELS = [
    *((op, case) for op in (UPDATE, SIGMOID) for case in (POOLED, VARLEN, VERIFY, TREE, DEFAULT_BUFFER_SLOTS)),
    (UPDATE, DEFAULT_SLOTS), (RECURRENT, SEPARATE), (RECURRENT, SEPARATE_VARLEN), (PACKED, PACKED_STEP), (GATING, GATES),
    *((UPDATE, {**case, "state_v_first": True}) for case in (POOLED, VERIFY)),
]  # fmt: skip


def parameters(op):
    """Arguments of an operator's public function; none of operators that are called through another's."""
    return inspect.signature(getattr(tvm_gdn, op)).parameters if hasattr(tvm_gdn, op) else {}


def on(name, change):
    return lambda a: {name: change(a[name])}


def give(**values):
    return lambda _: values


def bounds(*values):
    return give(cu_seqlens=tensor(values, dtype=torch.int32))


def slots(*values):
    return give(initial_state_indices=tensor(values))


def shared(first, second):
    def change(a):
        indices = a["initial_state_indices"].clone()
        indices[second] = indices[first]
        return {"initial_state_indices": indices}

    return change


def step_slots(*values):
    return give(intermediate_state_indices=tensor(values))


def heads(count):
    return lambda a: {name: a[name][:, :, :1].repeat(1, 1, count, 1) for name in ("q", "k")}


def twice(a):
    """Batches of two."""
    return {n: a[n].expand(2, *a[n].shape[1:]) for n in ("q", "k", "v", "g", "beta", "a", "b") if n in a}


def turned(x):
    """Two middle axes swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def columns(x):
    """The last two axes swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def overlapping(pool):
    """Each slot starts on the last element of the one before."""
    return pool.reshape(-1).as_strided((6, 4, 64, 32), (8191, 2048, 32, 1))


def parent(n, t, value):
    def change(a):
        parents = a["retrieve_parent_token"].clone()
        parents[n, t] = value
        return {"retrieve_parent_token": parents}

    return change


def expanded(axis):
    def change(pool):
        index = [slice(None)] * pool.ndim
        index[axis] = slice(0, 1)
        return pool[tuple(index)].expand(pool.shape)

    return change


BOTH = (UPDATE, SIGMOID)
STATES, SLOTS, STEPS, STEP_SLOTS = *POOL, *BUFFER
PARENTS, BOUNDS = "retrieve_parent_token", "cu_seqlens"

#: (operators, case, what is wrong, argument named, what the message must say)
WRONG_TYPE = {
    # dtypes
    "q-fp64": (BOTH, POOLED, on("q", torch.Tensor.double), "q", "torch.float32, torch.bfloat16, torch.float16"),
    "q-int": (BOTH, POOLED, on("q", torch.Tensor.int), "q", "torch.float32"),
    "q-complex": (BOTH, POOLED, on("q", lambda x: x.to(torch.complex64)), "q", "torch.float32"),
    "k-other-dtype": (BOTH, POOLED, on("k", torch.Tensor.half), "k", "must be the same"),
    "v-other-dtype": (BOTH, POOLED, on("v", torch.Tensor.bfloat16), "v", "must be the same"),
    "g-fp64": ((UPDATE,), POOLED, on("g", torch.Tensor.double), "g", "torch.float32"),
    "beta-bool": ((UPDATE,), POOLED, on("beta", torch.Tensor.bool), "beta", "torch.float32"),
    "A_log-int": ((SIGMOID,), POOLED, on("A_log", torch.Tensor.int), "A_log", "torch.float32"),
    "pool-fp64": (BOTH, POOLED, on(STATES, torch.Tensor.double), STATES, "torch.bfloat16"),
    "buffer-other-dtype": (BOTH, VERIFY, on(STEPS, torch.Tensor.half), STEPS, "must be the same"),
    "slots-int16": (BOTH, POOLED, on(SLOTS, torch.Tensor.short), SLOTS, "torch.int32, torch.int64"),
    "slots-float": (BOTH, POOLED, on(SLOTS, torch.Tensor.float), SLOTS, "torch.int32, torch.int64"),
    "cu-float": (BOTH, VARLEN, on(BOUNDS, torch.Tensor.float), BOUNDS, "torch.int32, torch.int64"),
    "parents-uint8": (BOTH, TREE, on(PARENTS, lambda x: x.clamp(min=0).byte()), PARENTS, "torch.int32"),
    # devices and absent tensors
    "q-on-meta": (BOTH, POOLED, on("q", lambda x: x.to("meta")), "on meta", "cpu"),
    "k-on-meta": (BOTH, POOLED, on("k", lambda x: x.to("meta")), "k is on meta", "cpu"),
    "pool-on-meta": (BOTH, POOLED, on(STATES, lambda x: x.to("meta")), "initial_state_source is on meta", "cpu"),
    "slots-on-meta": (BOTH, POOLED, on(SLOTS, lambda x: x.to("meta")), "initial_state_indices is on meta", "cpu"),
    "q-none": (BOTH, POOLED, give(q=None), "q", "pass a tensor"),
    # the other operators
    "packed-no-pool": ((PACKED,), PACKED_STEP, give(initial_state_source=None), STATES, "pass a tensor"),
    "gating-dtypes": ((GATING,), GATES, on("b", torch.Tensor.float), "b", "must be the same"),
    "gating-fp64": ((GATING,), GATES, on("A_log", torch.Tensor.double), "A_log", "torch.float32"),
    "gating-device": ((GATING,), GATES, on("dt_bias", lambda x: x.to("meta")), "dt_bias is on meta", "cpu"),
}  # fmt: skip
WRONG_VALUE = {
    # ranks and sizes
    "q-rank": (BOTH, POOLED, on("q", lambda x: x[0]), "q", "4, [B, T, H, K]"),
    "v-rank": (BOTH, POOLED, on("v", lambda x: x[None]), "v", "4, [B, T, HV, V]"),
    "g-rank": ((UPDATE,), POOLED, on("g", lambda x: x[..., None]), "g", "3, [B, T, HV]"),
    "a-without-batch": ((SIGMOID,), POOLED, on("a", lambda x: x[0]), "a", "B = 3"),
    "pool-rank": (BOTH, POOLED, on(STATES, lambda x: x[0]), STATES, "4, [S, HV, K, V]"),
    "slots-shared": (BOTH, POOLED, slots(5, -1, 5), "initial_state_indices[0] and initial_state_indices[2] are both 5", "-1"),
    "slots-shared-by-many": (BOTH, MANY, shared(3, 39), "initial_state_indices[3] and initial_state_indices[39] are both", "-1"),
    "step-slots-shared": (BOTH, VERIFY, step_slots(1, 1), STEP_SLOTS + "[0] and " + STEP_SLOTS + "[1] are both 1", "-1"),
    "slots-rank": (BOTH, POOLED, on(SLOTS, lambda x: x[:, None]), SLOTS, "1, [N]"),
    "k-tokens": (BOTH, POOLED, on("k", lambda x: x[:, :3]), "k", "T = 4"),
    "k-batch": (BOTH, POOLED, on("k", lambda x: x[:2]), "k", "B = 3"),
    "k-head-size": (BOTH, POOLED, on("k", lambda x: x[..., :32]), "k", "K = 64"),
    "k-heads": (BOTH, POOLED, on("k", lambda x: x[:, :, :1]), "k", "H = 2"),
    "v-tokens": (BOTH, POOLED, on("v", lambda x: x[:, :3]), "v", "T = 4"),
    "beta-heads": ((UPDATE,), POOLED, on("beta", lambda x: x[..., :2]), "beta", "HV = 4"),
    "A_log-heads": ((SIGMOID,), POOLED, on("A_log", lambda x: x[:2]), "A_log", "HV = 4"),
    "pool-heads": (BOTH, POOLED, on(STATES, lambda x: x[:, :2]), STATES, "HV = 4"),
    "pool-layout": (BOTH, POOLED, give(state_v_first=True), STATES, "V = 32"),
    "pool-head-size": (BOTH, POOLED, on(STATES, lambda x: x[..., :16].contiguous()), STATES, "V = 32"),
    "heads-not-multiple": (BOTH, POOLED, heads(3), "v", "multiple of H"),
    "no-key-columns": (BOTH, POOLED, lambda a: {**{n: a[n][..., :0] for n in "qk"}, STATES: a[STATES][:, :, :0]}, "q has K = 0", "at least 1"),
    "no-value-columns": (BOTH, POOLED, lambda a: {n: a[n][..., :0] for n in ("v", STATES)}, "v has V = 0", "at least 1"),
    "no-heads": (BOTH, POOLED, heads(0), "v", "multiple of H"),
    # sequence bounds
    "cu-first": (BOTH, VARLEN, bounds(1, 5, 5, 8, 9), BOUNDS, "start with 0"),
    "cu-short": (BOTH, VARLEN, bounds(0, 5, 5, 8, 8), BOUNDS, "end with the number of tokens, 9"),
    "cu-long": (BOTH, VARLEN, bounds(0, 5, 5, 8, 10), BOUNDS, "end with the number of tokens, 9"),
    "cu-far": (BOTH, VARLEN, bounds(0, 5, 5, 8, 2**31 - 1), BOUNDS, "end with the number of tokens, 9"),
    "cu-decreasing": (BOTH, VARLEN, bounds(0, 5, 4, 8, 9), BOUNDS, "never decrease; entries 1 and 2 are 5 and 4"),
    "cu-inside-far": (BOTH, VARLEN, bounds(0, 10**9, 5, 8, 9), BOUNDS, "never decrease"),
    "cu-negative": (BOTH, VARLEN, bounds(0, -3, 5, 8, 9), BOUNDS, "never decrease"),
    "cu-empty": (BOTH, VARLEN, bounds(), BOUNDS, "[N+1]"),
    "cu-other-count": (BOTH, VARLEN, bounds(0, 5, 9), "", "4"),
    "cu-rank": (BOTH, VARLEN, on(BOUNDS, lambda x: x[None]), BOUNDS, "1, [N+1]"),
    "cu-with-batch": (BOTH, VARLEN, twice, BOUNDS, "batch size 1"),
    # slots
    "slot-high": (BOTH, POOLED, slots(0, 6, 1), "initial_state_indices[1] = 6", "0 to 5"),
    "slot-low": (BOTH, POOLED, slots(0, 1, -2), "initial_state_indices[2] = -2", "-1 for padding"),
    "slot-far": (BOTH, POOLED, slots(0, 1, 2**40), "initial_state_indices[2]", "0 to 5"),
    "slot-32-bit-wrap": (BOTH, POOLED, slots(0, 1, 2**32), "initial_state_indices[2]", "0 to 5"),
    "slots-short": (BOTH, POOLED, slots(0, 1), SLOTS, "one per sequence"),
    "slots-long": (BOTH, POOLED, slots(0, 1, 2, 3), SLOTS, "one per sequence"),
    "slots-without-pool": (BOTH, POOLED, give(initial_state_source=None), SLOTS, STATES),
    "pool-too-small": ((UPDATE,), DEFAULT_SLOTS, on(STATES, lambda x: x[:3]), STATES, "3 slots for 4 sequences"),
    "pool-empty": (BOTH, POOLED, on(STATES, lambda x: x[:0]), SLOTS, "-1 for padding"),
    "buffer-slot-high": (BOTH, VERIFY, step_slots(0, 3), "intermediate_state_indices[1] = 3", "0 to 2"),
    "buffer-slot-low": (BOTH, VERIFY, step_slots(-5, 0), "intermediate_state_indices[0] = -5", "-1 for padding"),
    "buffer-slots-short": (BOTH, VERIFY, step_slots(0), STEP_SLOTS, "N = 2"),
    "buffer-slots-without-buffer": (BOTH, VERIFY, give(intermediate_states_buffer=None), STEP_SLOTS, STEPS),
    "buffer-too-small": (BOTH, DEFAULT_BUFFER_SLOTS, on(STEPS, lambda x: x[:1]), STEPS, "1 slots for 2 sequences"),
    # verification
    "too-many-steps": (BOTH, VERIFY, on(STEPS, lambda x: x[:, :3]), STEPS, "holds 3 steps, a sequence has 4 tokens"),
    "too-many-steps-packed": (BOTH, DEFAULT_BUFFER_SLOTS, on(STEPS, lambda x: x[:, :3]), STEPS, "a sequence has 4 tokens"),
    "cache-steps": (BOTH, VERIFY, give(cache_steps=4), "cache_steps", "5 steps"),
    "parent-itself": (BOTH, TREE, parent(1, 2, 2), "retrieve_parent_token[1, 2] = 2", "0 to 1"),
    "parent-later": (BOTH, TREE, parent(0, 1, 3), "retrieve_parent_token[0, 1] = 3", "an earlier step"),
    "parent-low": (BOTH, TREE, parent(0, 3, -2), "retrieve_parent_token[0, 3] = -2", "-1 for none"),
    "parents-short": (BOTH, TREE, on(PARENTS, lambda x: x[:, :3]), PARENTS, "at least 4"),
    "parents-rows": (BOTH, TREE, on(PARENTS, lambda x: x[:1]), PARENTS, "2"),
    "parents-without-buffer": (BOTH, TREE, give(**{STEPS: None, STEP_SLOTS: None}), PARENTS, STEPS),
    # memory
    "q-last-axis-strided": (BOTH, POOLED, on("q", lambda x: x.repeat(1, 1, 1, 2)[..., ::2]), "q", "q.contiguous()"),
    "v-last-axis-strided": (BOTH, POOLED, on("v", columns), "v", "v.contiguous()"),
    "pool-strided": (BOTH, POOLED, on(STATES, turned), STATES, "contiguous"),
    "pool-expanded": (BOTH, POOLED, on(STATES, expanded(0)), STATES, "overlapping"),
    "pool-heads-expanded": (BOTH, POOLED, on(STATES, expanded(1)), STATES, "contiguous"),
    "pool-overlapping": (BOTH, POOLED, on(STATES, overlapping), STATES, "overlapping"),
    "buffer-steps-expanded": (BOTH, VERIFY, on(STEPS, expanded(1)), STEPS, "overlapping"),
    "buffer-slots-expanded": (BOTH, VERIFY, on(STEPS, expanded(0)), STEPS, "overlapping"),
    "slots-strided": (BOTH, POOLED, give(initial_state_indices=tensor([0, 9, 1, 9, 2, 9])[::2]), SLOTS, "contiguous()"),
    "pool-requires-grad": (BOTH, POOLED, on(STATES, lambda x: x.requires_grad_()), STATES, ".detach()"),
    # the other operators
    "states-count": ((RECURRENT,), SEPARATE, on("initial_state", lambda x: x[:1]), "initial_state", "2 sequences"),
    "states-count-packed": ((RECURRENT,), SEPARATE_VARLEN, on("initial_state", lambda x: x[:2]), "", "N = 2"),
    "states-layout": ((RECURRENT,), SEPARATE, give(state_v_first=True), "initial_state", "V = 128"),
    "states-strided": ((RECURRENT,), SEPARATE, on("initial_state", turned), "initial_state", "contiguous"),
    "recurrent-cu-decreasing": ((RECURRENT,), SEPARATE_VARLEN, give(cu_seqlens=tensor([0, 5, 3, 7])), BOUNDS, "decrease"),
    "packed-row-short": ((PACKED,), PACKED_STEP, on("mixed_qkv", lambda x: x[:, :-1]), "mixed_qkv", "2*H*K + HV*V"),
    "packed-row-of-v-alone": ((PACKED,), PACKED_STEP, on("mixed_qkv", lambda x: x[:, :256]), "mixed_qkv", "2*H*K + HV*V"),
    "packed-row-long": ((PACKED,), PACKED_STEP, on("mixed_qkv", lambda x: x.repeat(1, 2)[:, :1024]), "mixed_qkv", "multiple"),
    "packed-strided": ((PACKED,), PACKED_STEP, on("mixed_qkv", columns), "mixed_qkv", "contiguous()"),
    "packed-slot": ((PACKED,), PACKED_STEP, slots(0, 1, 2, 3, 7), "initial_state_indices[4] = 7", "0 to 6"),
    "packed-pool-expanded": ((PACKED,), PACKED_STEP, on(STATES, expanded(0)), STATES, "overlapping"),
    "packed-gates": ((PACKED,), PACKED_STEP, on("a", lambda x: x[:4]), "a", "B = 5"),
    "gating-shapes": ((GATING,), GATES, on("b", lambda x: x[:5]), "b", "M = 9"),
    "gating-ranks": ((GATING,), GATES, on("b", lambda x: x[None]), "b", "a has (9, 6); they must be the same"),
    "gating-heads": ((GATING,), GATES, on("dt_bias", lambda x: x[:5]), "dt_bias", "HV = 6"),
    "gating-rank": ((GATING,), GATES, on("A_log", lambda x: x[None]), "A_log", "1, [HV]"),
    "gating-strided": ((GATING,), GATES, on("A_log", lambda x: x.repeat(2)[::2]), "A_log", "contiguous()"),
    "gating-scalar": ((GATING,), GATES, lambda a: {n: a[n][0, 0] for n in "ab"}, "a", "2, [M, HV]"),
}  # fmt: skip
BAD = {name: (row, ArgumentTypeError) for name, row in WRONG_TYPE.items()}
BAD |= {name: (row, ArgumentError) for name, row in WRONG_VALUE.items()}
EACH = [pytest.param(op, name, id=f"{name} {op}") for name, (row, _) in BAD.items() for op in row[0]]


@pytest.mark.parametrize("warm", [False, True], ids=["first-call", "later-call"])
@pytest.mark.parametrize(("op", "name"), EACH)
def test_bad_argument(op, name, warm):
    (_, case, change, argument, allowed), error = BAD[name]
    if warm:
        call(op, draw(op, case))
    else:
        dispatch.reset()
    good = draw(op, case)
    bad = {**good, **change(good)}
    before = {key: bits(x.detach()).clone() for key, x in good.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        function(op)(**bad)
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.search(rf"(?<!\w){re.escape(argument)}", message.partition(": ")[2]), message
    assert allowed in message, message
    assert "the kernel refused" not in message
    for key, value in before.items():
        assert torch.equal(bits(good[key].detach()), value), f"{key} was written to"
    # The refusal leaves nothing behind: the right call still works.
    call(op, draw(op, case))


@pytest.fixture
def reference_only(monkeypatch):
    """Every call runs on the torch reference, as where no compiler and no pack are at hand."""
    dispatch.reset()
    monkeypatch.setattr(dispatch, "lookup", lambda *_: dispatch.Served(None, "reference", "none", "a test"))
    yield
    dispatch.reset()


@pytest.mark.parametrize(("op", "name"), EACH)
def test_bad_argument_of_the_fallback(op, name, reference_only):
    (_, case, change, _, allowed), error = BAD[name]
    function(op)(**draw(op, case))
    good = draw(op, case)
    before = {key: bits(x.detach()).clone() for key, x in good.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error, match=re.escape(allowed)):
        function(op)(**{**good, **change(good)})
    assert all(torch.equal(bits(good[key].detach()), value) for key, value in before.items())


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_is_refused_by_name(op):
    a = draw(op, OPS[op].cases[0])
    for spec in OPS[op].tensors:
        if a[spec.name] is None:
            continue
        for value in (1.5, "text", [1.0], object()):
            # Of operators without a function of their own torch checks types before any code of ours runs.
            with pytest.raises(ArgumentTypeError if hasattr(tvm_gdn, op) else RuntimeError, match=rf"\b{spec.name}\b"):
                function(op)(**{**a, spec.name: value})


SCALARS = [(op, scalar) for op, spec in OPS.items() for scalar in spec.scalars if scalar.name in parameters(op)]


@pytest.mark.parametrize(("op", "scalar"), SCALARS, ids=[f"{op} {scalar.name}" for op, scalar in SCALARS])
def test_a_scalar_of_another_type_is_refused_by_name(op, scalar):
    a = {name: value for name, value in draw(op, OPS[op].cases[0]).items() if name in parameters(op)}
    for value in (["text"], "text"):
        if scalar.type == "str" and isinstance(value, str):
            continue
        with pytest.raises(ArgumentTypeError, match=rf"^{op}: {scalar.name} is .*; pass "):
            function(op)(**{**a, scalar.name: value})
    if scalar.type == "int":
        with pytest.raises(ArgumentError, match=rf"^{op}: {scalar.name} is {2**70}; "):
            function(op)(**{**a, scalar.name: 2**70})


def test_a_pool_that_requires_grad_is_fine_where_no_graph_is_built():
    a = draw(UPDATE, POOLED)
    a["initial_state_source"].requires_grad_()
    with torch.no_grad():
        call(UPDATE, a)
    with pytest.raises(ArgumentError, match="initial_state_source"):
        function(UPDATE)(**a)


def test_fake_kernels_refuse_mixed_devices():
    for op, case in ((UPDATE, POOLED), (PACKED, PACKED_STEP), (RECURRENT, SEPARATE)):
        a = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in draw(op, case).items()}
        last = [name for name, x in a.items() if isinstance(x, torch.Tensor)][-1]
        with pytest.raises(ArgumentTypeError, match=last):
            function(op)(**{**a, last: torch.empty_like(a[last], device="cpu")})


READ_ONLY = """
    import sys, tempfile, warnings
    import numpy as np, torch
    sys.path.insert(0, {tests!r})
    from calls import UPDATE, draw
    import tvm_gdn
    warnings.simplefilter("ignore")
    case = {case!r}
    good = draw(UPDATE, case)
    if {warm}:
        tvm_gdn.fused_recurrent_gated_delta_rule_update(**draw(UPDATE, case))
    with tempfile.NamedTemporaryFile() as file:
        good["initial_state_source"].numpy().tofile(file.name)
        mapped = np.memmap(file.name, dtype=np.float32, mode="r", shape=tuple(good["initial_state_source"].shape))
        good["initial_state_source"] = torch.from_numpy(mapped)
        try:
            tvm_gdn.fused_recurrent_gated_delta_rule_update(**good)
        except tvm_gdn.errors.ArgumentError as error:
            assert "initial_state_source" in str(error) and "read-only" in str(error), error
            print("refused")
        private = np.memmap(file.name, dtype=np.float32, mode="c", shape=mapped.shape)
        good["initial_state_source"] = torch.from_numpy(private)
        tvm_gdn.fused_recurrent_gated_delta_rule_update(**good)
        print("written" if not np.array_equal(private, mapped) else "not written")
"""


@pytest.mark.parametrize("warm", [False, True], ids=["first-call", "later-call"])
def test_a_read_only_pool_is_refused(warm):
    code = textwrap.dedent(READ_ONLY).format(tests=str(Path(__file__).parent), case=POOLED, warm=warm)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.stdout.split() == ["refused", "written"], (done.returncode, done.stderr[-2000:])


def test_clone_shares_nothing():
    """The comparison above relies on it."""
    a = draw(UPDATE, POOLED)
    copy = cases.clone(a)
    copy["initial_state_source"].zero_()
    assert a["initial_state_source"].abs().max() > 0


ROUTED = {"T": 3, "k": 2, "num_experts": 8, "E": 8}


@pytest.mark.parametrize(("op", "arguments", "text"), [
    ("expert_stats", (None, 4), "topk_ids is None; pass a tensor"),
    ("moe_sort", (torch.zeros(2, 2, dtype=torch.int64).to_sparse(), 4), r"topk_ids has layout torch.sparse_coo; .*to_dense\(\)"),
    ("moe_sort", (torch.zeros(2, 2, dtype=torch.int64), 0), "num_experts is 0; it must be at least 1"),
    ("expert_stats", (torch.zeros(2, 2, dtype=torch.int64), 0), "num_experts is 0; it must be at least 1"),
    ("moe_route", (torch.zeros(2, 8), 0), "top_k is 0; allowed: 1 to 8"),
])  # fmt: skip
def test_calls_that_no_kernel_sees_or_that_one_once_took(op, arguments, text):
    function(op)(*((draw("moe_sort", ROUTED)["topk_ids"], 8) if op != "moe_route" else (torch.zeros(2, 8), 2)))
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{op}: {text}"):
        function(op)(*arguments)


@pytest.mark.parametrize(("op", "arguments", "text"), [
    ("rms_norm_gated", (torch.zeros(3, 0), torch.zeros(0)), "x has D = 0"),
    ("causal_conv1d_fn", (torch.zeros(4, 9), torch.zeros(4, 4)), r"x has 2 axes .*or \[D, T\] with query_start_loc"),
    ("causal_conv1d_fn", (torch.zeros(2, 4, 9), torch.zeros(4, 4), None, None, torch.tensor([0, 9])),
     r"x has 3 axes .*or \[B, D, T\] without query_start_loc"),
])  # fmt: skip
def test_shapes_that_no_kernel_is_made_for(op, arguments, text):
    with pytest.raises(ArgumentError, match=f"^{op}: {text}"):
        function(op)(*arguments)


@pytest.mark.parametrize(("op", "case"), [
    (RECURRENT, {**SEPARATE, "HV": 0}), ("moe_sort", {**ROUTED, "k": 0}), ("expert_stats", {**ROUTED, "T": 0}),
    ("fused_experts_quantized", {"T": 2, "k": 0, "E": 0, "D": 36, "I": 200, "dtype": "bfloat16", "scheme": "int4_kgroup"}),
])  # fmt: skip
def test_an_axis_of_length_zero(op, case):
    """Torch gives tensors without elements strides that no kernel takes."""
    spec, arguments = OPS[op], cases.draw(OPS[op], case)
    want = parity.expected(spec, arguments)
    got = parity.run(spec, arguments)
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in want.items()}
    assert all(parity.rms_ratio(got[name], want[name]) == 0 for name in want)
