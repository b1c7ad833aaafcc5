"""Whole sequences as an engine uses them: prefill then decode, splits, packed neighbours, extreme gates, published references."""

import pytest
import torch

import tvm_gdn
from tvm_gdn import cases, parity, reference
from tvm_gdn.ops import OPS
from tvm_gdn.parity import limit, rms_ratio

H, HV, K, V = 2, 4, 64, 32
STATE = ("initial_state",)
SHAPE = {"H": H, "HV": HV, "K": K, "V": V, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
CHUNK = "chunk_gated_delta_rule"
CHUNKED = [CHUNK, "chunk_kda", "chunk_delta_rule"]
FAMILY = [f"{form}_{rule}" for rule in ("gated_delta_rule", "kda", "delta_rule") for form in ("chunk", "fused_recurrent")]
LAYOUTS = [(False, "float32"), (True, "bfloat16")]


def pooled_case(v_first, dtype):
    pool = ("initial_state_source", "initial_state_indices", "cu_seqlens", "final_state")
    return {
        "lengths": (63, 0, 1, 7), **SHAPE, "S": 9, "state_v_first": v_first, "dtype": dtype, "state_dtype": dtype, "with": pool,
    }  # fmt: skip


KERNELS = [
    (CHUNK, {"B": 1, "T": 4, **SHAPE, "with": STATE}),
    (CHUNK, {"B": 1, "T": 4, **SHAPE, "with": ()}),
    (CHUNK, {"lengths": (2, 2), **SHAPE, "with": (*STATE, "cu_seqlens")}),
    (CHUNK, {"lengths": (2, 2), **SHAPE, "with": ("cu_seqlens",)}),
    (
        CHUNK + "_update",
        {"lengths": (2, 2), **SHAPE, "S": 5, "with": ("initial_state_source", "initial_state_indices", "cu_seqlens")},
    ),
    (
        "fused_recurrent_gated_delta_rule_update",
        {"B": 2, "T": 1, **SHAPE, "S": 5, "with": ("initial_state_source", "initial_state_indices")},
    ),
    *(("fused_recurrent_gated_delta_rule", {"B": 1, "T": 4, **SHAPE, "with": given}) for given in (STATE, ())),
    *((op, {"B": 1, "T": 4, **SHAPE, "with": given}) for op in CHUNKED[1:] for given in (STATE, ())),
    *((op, {"lengths": (2, 2), **SHAPE, "with": ("cu_seqlens",)}) for op in CHUNKED[1:]),
    (CHUNK + "_update", pooled_case(False, "float32")),
]


def drawn(T, B=1, seed=0, op=CHUNK, **more):
    arguments = cases.draw(OPS[op], {"B": B, "T": T, **SHAPE, "with": (), **more}, seed)
    return [arguments[name] for name in ("q", "k", "v", "g", "beta") if name in arguments]


def exact(tensors, initial=None, op=CHUNK, **options):
    return getattr(reference, op)(
        *tensors, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True, exact=True, **options
    )


def chunk(tensors, initial=None, op=CHUNK, **options):
    return getattr(tvm_gdn, op)(*tensors, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True, **options)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 500, 1000])
def test_odd_lengths(T):
    tensors = drawn(T, B=2)
    o, state = chunk(tensors)
    want_o, want_state = exact(tensors)
    assert rms_ratio(o, want_o) < 1e-5
    assert rms_ratio(state, want_state) < 1e-5
    assert torch.count_nonzero(o) == o.numel()


@pytest.mark.parametrize("cuts", [(64,), (1, 2, 3), (63, 129), (100, 164, 165)])
@pytest.mark.parametrize("op", CHUNKED)
def test_any_split_equals_the_whole(op, cuts):
    tensors = drawn(200, op=op)
    whole, state = chunk(tensors, op=op)
    assert rms_ratio(whole, exact(tensors, op=op)[0]) < 1e-5
    parts, carried = [], torch.zeros(1, HV, K, V)
    for first, last in zip((0, *cuts), (*cuts, 200), strict=True):
        part, carried = chunk([x[:, first:last] for x in tensors], carried, op)
        parts.append(part)
    assert rms_ratio(torch.cat(parts, 1), whole) < 1e-5
    assert rms_ratio(carried, state) < 1e-5


def test_continuous_batching_with_a_pool():
    """Mixed prompts are prefilled into slots, then decoded together; a slot that is not named stays bit-identical."""
    lengths, slots = (37, 0, 130, 1), torch.tensor([4, 2, 0, 1])
    tensors = drawn(sum(lengths))
    bounds = torch.tensor([0, 37, 37, 167, 168])
    pool = torch.randn(6, HV, K, V)
    before = pool.clone()
    o, none = tvm_gdn.chunk_gated_delta_rule(
        *tensors, initial_state=pool, cu_seqlens=bounds, use_qk_l2norm_in_kernel=True, initial_state_indices=slots
    )
    assert none is None
    want_o, want = exact(tensors, before[slots], cu_seqlens=bounds)
    assert rms_ratio(o, want_o) < 1e-5
    assert rms_ratio(pool[slots], want) < 1e-5
    assert torch.equal(pool[[3, 5]], before[[3, 5]])
    assert torch.equal(pool[2], before[2])
    step = drawn(1, B=4, seed=1)
    decoded = tvm_gdn.fused_recurrent_gated_delta_rule_update(
        *step, initial_state_source=pool, initial_state_indices=slots, use_qk_l2norm_in_kernel=True
    )
    want_step, want = exact(step, want)
    assert rms_ratio(decoded, want_step) < 1e-5
    assert rms_ratio(pool[slots], want) < 1e-5


@pytest.mark.parametrize("op", CHUNKED)
def test_a_poisoned_neighbour_changes_nothing(op):
    bounds = torch.tensor([0, 70, 140, 210])
    tensors = drawn(210, op=op)
    clean, state = chunk(tensors, op=op, cu_seqlens=bounds)
    assert rms_ratio(clean, exact(tensors, op=op, cu_seqlens=bounds)[0]) < 1e-5
    for x in tensors:
        x[:, 70:140] = float("nan")
    o, poisoned = chunk(tensors, op=op, cu_seqlens=bounds)
    for part in (slice(0, 70), slice(140, 210)):
        assert torch.equal(o[:, part], clean[:, part])
    assert torch.equal(poisoned[[0, 2]], state[[0, 2]])
    assert o[:, 70:140].isnan().all()


@pytest.mark.parametrize("gate", [-20.0, -100.0, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("op", [CHUNK, "chunk_kda"])
def test_extreme_gates(gate, op):
    tensors = drawn(130, op=op)
    tensors[3].fill_(gate)
    tensors[3][:, ::7] = 0.0
    o, state = getattr(tvm_gdn, op)(*tensors, output_final_state=True, use_qk_l2norm_in_kernel=True)
    want_o, want_state = exact(tensors)
    assert o.isfinite().all()
    assert rms_ratio(o, want_o) < 1e-5
    assert rms_ratio(state, want_state) < 1e-5


def test_no_gate_is_the_delta_rule():
    q, k, v, _, beta = drawn(65)
    without = tvm_gdn.chunk_delta_rule(q, k, v, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    routed = tvm_gdn.chunk_gated_delta_rule(q, k, v, None, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    want = exact((q, k, v, torch.zeros_like(beta), beta))
    for o, other, wanted in zip(without, routed, want, strict=True):
        assert torch.equal(o, other)
        assert rms_ratio(o, wanted) < 1e-5


@pytest.mark.parametrize("theirs", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("op", [CHUNK, "fused_recurrent_gated_delta_rule"])
def test_against_transformers(op, given, theirs):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, g, beta = drawn(500, B=2)
    initial = torch.randn(2, HV, K, V, generator=torch.Generator().manual_seed(1)) if given else None
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    o, state = getattr(tvm_gdn, op)(q, k, v, g, beta, initial_state=initial, **options)
    repeated = [x.repeat_interleave(HV // H, 2) for x in (q, k)]
    want, want_state = getattr(modeling, theirs)(*repeated, v, g, beta, initial_state=initial, **options)
    assert rms_ratio(o, want) < 1e-5
    assert rms_ratio(state, want_state) < 1e-5


ONE = {"B": 2, "T": 65, "H": 2, "HV": 4, "K": 1, "V": 1, "output_final_state": True}


@pytest.mark.parametrize(
    ("op", "given"), [(CHUNK, STATE), (CHUNK, ()), ("fused_recurrent_gated_delta_rule", STATE), ("chunk_kda", STATE)]
)
def test_heads_of_one_channel(op, given):
    """K = V = 1 is compiled like any other size."""
    result = parity.check_case(OPS[op], {**ONE, "with": given})
    assert result.served.startswith("compiled")
    assert result.passed, (result.errors, result.limits)


def test_backward_is_an_error_not_silence():
    tensors = drawn(4)
    tensors[2].requires_grad_()
    o, _ = chunk(tensors)
    with pytest.raises(NotImplementedError, match="chunk_gated_delta_rule has no backward yet"):
        o.sum().backward()


@pytest.mark.sampled
@pytest.mark.parametrize(
    "kernel",
    [pytest.param((f"{op}_update", pooled_case(*layout)), id=f"{op} {layout[1]}") for op in FAMILY for layout in LAYOUTS],
)
def test_final_states_beside_a_pool(kernel):
    """The pool is updated in place and the final states come back as well, those of padding sequences too."""
    spec, case = OPS[kernel[0]], kernel[1]
    op, v_first = spec.name.removesuffix("_update"), case["state_v_first"]
    a = cases.draw(spec, case)
    tensors = [a[name] for name in ("q", "k", "v", "g", "beta") if name in a]
    slots, pool = torch.tensor([4, -1, 7, -1]), a["initial_state_source"]
    before = pool.clone()
    options = {"cu_seqlens": a["cu_seqlens"], "initial_state_indices": slots, "state_v_first": v_first}
    options |= {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    wanted_pool = before.double()
    want_o, want = getattr(reference, op)(*tensors, initial_state=wanted_pool, **options, exact=True)
    o, final = getattr(tvm_gdn, op)(*tensors, initial_state=pool, **options)
    assert (final.shape, final.dtype) == ((4, *pool.shape[1:]), pool.dtype)
    assert rms_ratio(o, want_o) <= limit(spec, "o", o.dtype)
    for got, wanted in ((final, want), (pool, wanted_pool)):
        assert rms_ratio(got, wanted) <= limit(spec, "final_state", got.dtype)
    assert torch.equal(pool[[4, 7]], final[[0, 2]])
    assert torch.equal(pool[[0, 1, 2, 3, 5, 6, 8]], before[[0, 1, 2, 3, 5, 6, 8]])
    assert torch.equal(final[1], torch.zeros_like(final[1])) and final[3].abs().max() > 0
    with pytest.raises(ValueError, match=r"initial_state_indices\[0\] and initial_state_indices\[2\] are both 4"):
        getattr(tvm_gdn, op)(*tensors, initial_state=pool, **{**options, "initial_state_indices": torch.tensor([4, -1, 4, 0])})


def test_final_states_beside_a_pool_when_compiled_and_in_one_token_batches():
    a = cases.draw(OPS[CHUNK + "_update"], {**pooled_case(False, "float32"), "lengths": (1,) * 4})
    tensors = [a[name].transpose(0, 1) for name in ("q", "k", "v", "g", "beta")]
    pool = a["initial_state_source"].clone()

    def layer(pool):
        return chunk(tensors, pool, cu_seqlens=a["cu_seqlens"], initial_state_indices=torch.tensor([2, -1, 0, 5]))

    o, final = layer(pool)
    assert o.shape == (4, 1, HV, V)
    torch._dynamo.reset()
    other = a["initial_state_source"].clone()
    compiled_o, compiled_final = torch.compile(layer, fullgraph=True, backend="aot_eager")(other)
    for left, right in ((o, compiled_o), (final, compiled_final), (pool, other)):
        assert torch.equal(left, right)


def test_malformed_pools_are_named_where_final_states_are_asked_for():
    tensors = drawn(4, B=2)
    slots = torch.tensor([0, 1])
    for pool, indices, named in (
        (None, slots, "^chunk_gated_delta_rule: initial_state_indices needs initial_state$"),
        (torch.zeros(3, K, V), slots, "^chunk_gated_delta_rule: initial_state has 3 axes"),
        (torch.zeros(3, HV, K, V), slots[:, None], "initial_state_indices"),
        (torch.zeros(3, HV, K, V), torch.tensor([0, 1, 2]), "initial_state_indices"),
        (torch.zeros(3, HV, K, V), torch.tensor([0, 3]), "initial_state_indices"),
    ):
        with pytest.raises(ValueError, match=named):
            chunk(tensors, pool, initial_state_indices=indices)


SQUARE = [
    pytest.param((CHUNK, {**SHAPE, "B": 1, "T": 7, "K": size, "V": size, "with": STATE, "state_v_first": True}), id=str(size))
    for size in (32, 64)
] + [
    pytest.param(
        (CHUNK, {**SHAPE, "B": 1, "T": 7, "K": 128, "V": 128, "with": STATE, "state_v_first": True}),
        id="128",
        marks=pytest.mark.slow,
    )
]  # fmt: skip


@pytest.mark.parametrize("kernel", SQUARE)
def test_a_chunk_of_as_many_tokens_as_K_is_no_state(kernel):
    """A window of values ``[chunk, V]`` has the shape of a V-first state where the chunk is K tokens; it is not read as one."""
    op, case = kernel
    arguments = cases.draw(OPS[op], case)
    behind = torch.full((1, 7 + 128, 4, case["V"]), 7.0)
    arguments["v"] = behind[:, :7].copy_(arguments["v"])
    o, final = getattr(tvm_gdn, op)(**arguments)
    want, last = reference.chunk_gated_delta_rule(**arguments, exact=True)
    assert rms_ratio(o, want) < 1e-5 and rms_ratio(final, last) < 1e-5
    assert (behind[:, 7:] == 7).all()
