"""The functions of flash-linear-attention and SGLang under their own signatures.

Calls are written as in the neighbours' own tests and call sites (the scenarios of SGLang's gated-delta-rule suite), so that a
test file of theirs runs here once its imports are changed. Numbers are held against the float64 reference.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calls import GATING, PACKED, POOL, RECURRENT, SIGMOID, UPDATE

from tvm_gdn import reference
from tvm_gdn.errors import ArgumentError
from tvm_gdn.integrations import fla, sglang, sglang_k_first

CHUNK = "chunk_gated_delta_rule"
_SEQ = {"dtype": "bfloat16", "H": 2, "HV": 4, "B": 1, "T": 3, "index_dtype": "int32"}
_K64, _K128 = {**_SEQ, "K": 64, "V": 64}, {**_SEQ, "K": 128, "V": 128}
_VAR = {"lengths": (3,)}
_FP32 = {**_K64, "dtype": "float32", "V": 128, "output_final_state": True, "with": ("initial_state",)}
KERNELS = [
    (GATING, {"M": 3, "HV": 4, "dtype": "float32", "dtypes": {"dt_bias": "bfloat16"}}),
    (GATING, {"M": 3, "HV": 4, "dtype": "bfloat16"}),
    (CHUNK, {**_K64, **_VAR, "with": ("initial_state", "cu_seqlens"), "output_final_state": True}),
    (CHUNK, {**_K64, "with": ("initial_state",), "output_final_state": True}),
    (CHUNK, {**_K64, "with": (), "output_final_state": True}),
    (f"{CHUNK}_update", {**_K64, **_VAR, "with": (*POOL, "cu_seqlens"), "state_v_first": True}),
    (f"{CHUNK}_update", {**_K64, **_VAR, "with": (*POOL, "cu_seqlens")}),
    (CHUNK, {**_K64, **_VAR, "with": ("initial_state", "cu_seqlens"), "state_v_first": True}),
    (SIGMOID, {**_K64, **_VAR, "with": (*POOL, "cu_seqlens")}),
    (SIGMOID, {**_K64, **_VAR, "with": (*POOL, "cu_seqlens"), "state_v_first": True}),
    (SIGMOID, {**_K64, **_VAR, "with": (*POOL, "cu_seqlens", "intermediate_states_buffer", "intermediate_state_indices",
                                        "retrieve_parent_token"), "state_v_first": True}),
    (UPDATE, {**_K64, **_VAR, "with": (*POOL, "cu_seqlens")}),
    (UPDATE, {**_K64, **_VAR, "with": (*POOL, "cu_seqlens"), "state_v_first": True}),
    (PACKED, {**_K64, "with": POOL, "state_v_first": True}),
    (RECURRENT, {**_FP32, "state_v_first": True}),
    *((op, _FP32) for op in (CHUNK, RECURRENT, "chunk_kda", "fused_recurrent_kda", "chunk_delta_rule", "fused_recurrent_delta_rule")),
]  # fmt: skip

BF16 = 5e-3
FP32 = 1e-5

# What sglang 0.5.23 publishes; compared with the installed package too where there is one.
SGLANG = {
    "kernels/ops/attention/linear/fused_gdn_gating.py": {
        "fused_gdn_gating": "A_log, a, b, dt_bias, beta=1.0, threshold=20.0",
    },
    "kernels/ops/attention/fla/chunk.py": {
        "chunk_gated_delta_rule": "q, k, v, g, beta, scale=None, initial_state=None, initial_state_indices=None, cu_seqlens=None, "
        "head_first=False, use_qk_l2norm_in_kernel=False, inplace_update=True",
    },
    "kernels/ops/attention/fla/fused_recurrent.py": {
        "fused_recurrent_gated_delta_rule": "q, k, v, g, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "cu_seqlens=None, use_qk_l2norm_in_kernel=False",
        "fused_recurrent_gated_delta_rule_update": "q, k, v, g, beta=None, scale=None, initial_state_source=None, "
        "initial_state_indices=None, cu_seqlens=None, use_qk_l2norm_in_kernel=False, disable_state_update=False, "
        "disable_output_calculation=False, intermediate_states_buffer=None, intermediate_state_indices=None, cache_steps=None, "
        "retrieve_parent_token=None",
        "fused_recurrent_gated_delta_rule_packed_decode": "mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, "
        "ssm_state_indices, use_qk_l2norm_in_kernel=False",
    },
    "kernels/ops/attention/linear/fused_sigmoid_gating_recurrent.py": {
        "fused_sigmoid_gating_delta_rule_update": "A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, "
        "initial_state_source, initial_state_indices, scale=None, use_qk_l2norm_in_kernel=False, cu_seqlens=None, is_kda=False, "
        "lower_bound=None, disable_state_update=False, intermediate_states_buffer=None, intermediate_state_indices=None, "
        "cache_steps=None, retrieve_parent_token=None, cache_ring=False, replayssm_rawv=None, replayssm_rawk=None, "
        "replayssm_g=None, replayssm_beta=None, match_cutedsl_decode=False",
    },
}
# What SGLang published in autumn 2025, before states became V-first (sglang.srt.layers.attention.fla, models.qwen3_next), and its CPU
# kernels, whose schema stands in sgl_kernel's C++.
SGLANG_2025 = {
    "fused_gdn_gating_g": "A_log, a, dt_bias, beta=1.0, threshold=20.0",
    "fused_gdn_gating": "A_log, a, b, dt_bias, beta=1.0, threshold=20.0",
    "chunk_gated_delta_rule": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
    "head_first=False, use_qk_l2norm_in_kernel=False",
    "fused_recurrent_gated_delta_rule_update": "q, k, v, g, beta=None, scale=None, initial_state_source=None, "
    "initial_state_indices=None, cu_seqlens=None, use_qk_l2norm_in_kernel=False, disable_state_update=False, "
    "disable_output_calculation=False, intermediate_states_buffer=None, cache_steps=None, retrieve_parent_token=None",
    "fused_sigmoid_gating_delta_rule_update": "A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, "
    "initial_state_source, initial_state_indices, scale=None, use_qk_l2norm_in_kernel=False, cu_seqlens=None",
    "fused_gdn_gating_cpu": "A_log, a, b, dt_bias",
    "chunk_gated_delta_rule_cpu": "query, key, value, g, beta, initial_state, output_final_state, cu_seqlens, head_first, "
    "use_qk_l2norm_in_kernel, initial_state_indices=None, eps=1e-06",
    "fused_sigmoid_gating_delta_rule_update_cpu": "A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, "
    "cu_seqlens, use_qk_l2norm_in_kernel, softplus_beta=1.0, softplus_threshold=20.0",
}
FLA = {
    "ops/gated_delta_rule/chunk.py": {
        "chunk_gated_delta_rule": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, "
        "cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs",
    },
    "ops/gated_delta_rule/fused_recurrent.py": {
        "fused_recurrent_gated_delta_rule": "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **kwargs",
    },
    "ops/kda/chunk.py": {
        "chunk_kda": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, "
        "use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, lower_bound=None, "
        "disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, "
        "cp_context=None, use_graph=False, max_num_seqs=None, **kwargs",
    },
    "ops/kda/fused_recurrent.py": {
        "fused_recurrent_kda": "q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
        "allow_neg_eigval=False, lower_bound=None, state_v_first=False, cu_seqlens=None, **kwargs",
    },
    "ops/delta_rule/chunk.py": {
        "chunk_delta_rule": "q, k, v, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs",
    },
    "ops/delta_rule/fused_recurrent.py": {
        "fused_recurrent_delta_rule": "q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None",
    },
}


def bare(text):
    """A signature without annotations: names, kinds, order, defaults."""
    return ast.unparse(ast.parse(f"def f({text}): pass").body[0].args)


def ours(function):
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return bare(str(inspect.Signature(parameters))[1:-1])


def published(package, path, name):
    """A function's signature as the installed package's source states it, read without importing it (it needs a GPU's tools)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / path).read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    for argument in (*function.args.args, function.args.kwarg):
        if argument is not None:
            argument.annotation = None
    return ast.unparse(function.args)


TABLE = [
    pytest.param(package, module, path, name, text, id=f"{package}-{name}")
    for package, module, table in (("fla", fla, FLA), ("sglang", sglang, SGLANG))
    for path, functions in table.items()
    for name, text in functions.items()
]


@pytest.mark.parametrize(("package", "module", "path", "name", "text"), TABLE)
def test_signatures_are_the_published_ones(package, module, path, name, text):
    assert ours(getattr(module, name)) == bare(text)


def test_signatures_of_2025_are_the_published_ones():
    assert set(sglang_k_first.__all__) == set(SGLANG_2025)
    for name, text in SGLANG_2025.items():
        assert ours(getattr(sglang_k_first, name)) == bare(text), name


@pytest.mark.parametrize(("package", "module", "path", "name", "text"), TABLE)
def test_signatures_are_those_of_the_installed_package(package, module, path, name, text):
    assert ours(getattr(module, name)) == published(package, path, name)


def rms(out, ref):
    error = (out.double() - ref.double()).pow(2).mean().sqrt()
    return (error / ref.double().pow(2).mean().sqrt()).item()


def rand(*shape, dtype=torch.bfloat16, seed=0, factor=0.05):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.rand(shape, generator=generator) * factor).to(dtype)


def packed(lengths, heads, v_heads, dim, batch=1):
    """q, k, v, g (fp32), beta, bounds, as SGLang's suite draws them: uniform, times 0.05, positive log-decays."""
    tokens = sum(lengths)
    shape = (batch, tokens)
    q, k, v = rand(*shape, heads, dim, seed=1), rand(*shape, heads, dim, seed=2), rand(*shape, v_heads, dim, seed=3)
    g, beta = rand(*shape, v_heads, dtype=torch.float32, seed=4), rand(*shape, v_heads, seed=5, factor=1.0)
    return q, k, v, g, beta, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("heads", [6, 32])
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_sglang_gating(heads, rows):
    A_log, dt_bias = rand(heads, dtype=torch.float32, factor=1), rand(heads, factor=1)
    a, b = rand(rows, heads, seed=1, factor=1), rand(rows, heads, seed=2, factor=1)
    g, beta = sglang.fused_gdn_gating(A_log, a, b, dt_bias)
    assert g.shape == beta.shape == (1, rows, heads) and g.dtype == beta.dtype == torch.float32
    want = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    assert rms(g[0], want) < 1e-6 and rms(beta[0], b.double().sigmoid()) < 1e-6
    assert rms(sglang_k_first.fused_gdn_gating_g(A_log, a, dt_bias), want) < 1e-6
    g, beta = sglang_k_first.fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    assert g.shape == beta.shape == (1, rows, heads) and beta.dtype == torch.bfloat16
    assert rms(g[0], want) < 1e-6 and rms(beta[0], b.double().sigmoid()) < BF16


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("function", [sglang_k_first.chunk_gated_delta_rule, sglang_k_first.chunk_gated_delta_rule_cpu])
def test_sglang_prefill_of_2025(function, l2norm):
    q, k, v, g, beta, cu_seqlens = packed((31, 96, 5, 64), 3, 6, 64)
    state = rand(4, 6, 64, 64, dtype=torch.float32)
    before = state.clone()
    names = ("query", "key", "value") if function is sglang_k_first.chunk_gated_delta_rule_cpu else ("q", "k", "v")
    out, last = function(
        **dict(zip(names, (q, k, v), strict=True)), g=g, beta=beta, initial_state=state, output_final_state=True,
        cu_seqlens=cu_seqlens, head_first=False, use_qk_l2norm_in_kernel=l2norm,
    )  # fmt: skip
    want, want_last = reference.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=l2norm,
        exact=True,
    )  # fmt: skip
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert rms(out, want) < BF16 and rms(last, want_last) < FP32 and torch.equal(state, before)


@pytest.mark.parametrize("inplace", [True, False])
def test_sglang_prefill_on_a_pool(inplace):
    q, k, v, g, beta, cu_seqlens = packed((31, 1, 64, 7), 2, 4, 64)
    pool = rand(9, 4, 64, 64, dtype=torch.float32)
    before, slots = pool.clone(), torch.tensor([5, -1, 0, 8], dtype=torch.int32)
    out, nothing, h = sglang.chunk_gated_delta_rule(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=pool, initial_state_indices=slots, cu_seqlens=cu_seqlens, head_first=False,
        use_qk_l2norm_in_kernel=True, inplace_update=inplace,
    )  # fmt: skip
    want_pool = before.double()
    want, _ = reference.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=want_pool, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True,
        initial_state_indices=slots, state_v_first=True, exact=True,
    )  # fmt: skip
    assert nothing is None and h is None and rms(out, want) < BF16
    if inplace:
        assert rms(pool, want_pool) < FP32 and not torch.equal(pool[5], before[5])
        assert torch.equal(pool[[1, 2, 3, 4, 6, 7]], before[[1, 2, 3, 4, 6, 7]])
    else:
        assert torch.equal(pool, before)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("module", "v_first"), [(sglang, True), (sglang_k_first, False)])
def test_sglang_decode(module, v_first, batch):
    heads, v_heads = 8, 16
    q, k, v = rand(batch, 1, heads, 64, seed=1), rand(batch, 1, heads, 64, seed=2), rand(batch, 1, v_heads, 64, seed=3)
    A_log, dt_bias = rand(v_heads, dtype=torch.float32, factor=1), rand(v_heads, factor=1)
    a, b = rand(batch, v_heads, seed=4, factor=1), rand(batch, v_heads, seed=5, factor=1)
    pool = rand(20, v_heads, 64, 64, dtype=torch.float32)
    before, slots = pool.clone(), torch.randperm(20, generator=torch.Generator().manual_seed(0))[:batch].to(torch.int32)
    arguments = {
        "q": q, "k": k, "v": v, "A_log": A_log, "dt_bias": dt_bias, "a": a, "b": b, "initial_state_indices": slots,
        "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32), "use_qk_l2norm_in_kernel": True, "softplus_beta": 1.0,
        "softplus_threshold": 20.0,
    }  # fmt: skip
    out = module.fused_sigmoid_gating_delta_rule_update(**arguments, initial_state_source=pool)
    g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    start = before.transpose(-1, -2) if v_first else before
    want, last = reference.fused_recurrent_gated_delta_rule(
        q, k, v, g[:, None], b.double().sigmoid()[:, None], initial_state=start[slots.long()], output_final_state=True,
        use_qk_l2norm_in_kernel=True, exact=True,
    )  # fmt: skip
    assert out.shape == (batch, 1, v_heads, 64) and out.dtype == torch.bfloat16 and rms(out, want) < BF16
    assert rms(pool[slots.long()], last.transpose(-1, -2) if v_first else last) < FP32
    if not v_first:
        one_row = {**arguments, **{name: arguments[name].transpose(0, 1) for name in ("q", "k", "v")}}
        pool = before.clone()
        out = module.fused_sigmoid_gating_delta_rule_update_cpu(**one_row, initial_state_source=pool)
        assert out.shape == (batch, 1, v_heads, 64) and rms(out, want) < BF16
        return
    row = torch.cat([x.reshape(batch, -1) for x in (q, k, v)], 1)
    o, again = torch.empty(batch, 1, v_heads, 64, dtype=torch.bfloat16), before.clone()
    result = sglang.fused_recurrent_gated_delta_rule_packed_decode(
        mixed_qkv=row, a=a, b=b, A_log=A_log, dt_bias=dt_bias, scale=64**-0.5, initial_state=again, out=o,
        ssm_state_indices=slots, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert result[0] is o and result[1] is again and rms(o, want) < BF16 and rms(again, pool) < 1e-6


@pytest.mark.parametrize(("module", "v_first"), [(sglang, True), (sglang_k_first, False)])
def test_sglang_speculative_verification(module, v_first):
    q, k, v, g, beta, cu_seqlens = packed((4, 4), 8, 8, 64)
    pool, slots = rand(10, 8, 64, 64, dtype=torch.float32), torch.tensor([0, 5], dtype=torch.int32)
    before, want_pool = pool.clone(), pool.double()
    for disable in (True, False):
        out = module.fused_recurrent_gated_delta_rule_update(
            q, k, v, g, beta, initial_state_source=pool, initial_state_indices=slots, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, disable_state_update=disable,
        )  # fmt: skip
        assert torch.equal(pool, before) == disable
    want = reference.fused_recurrent_gated_delta_rule_update(
        q, k, v, g, beta, initial_state_source=want_pool, initial_state_indices=slots, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=True, state_v_first=v_first, exact=True,
    )  # fmt: skip
    assert rms(out, want) < BF16 and rms(pool, want_pool) < FP32
    nothing = module.fused_recurrent_gated_delta_rule_update(
        q, k, v, g, beta, None, pool, slots, cu_seqlens, disable_output_calculation=True
    )
    assert nothing.shape == (1, 1, 1, 1)


def test_sglang_target_verify_of_a_tree():
    heads = 4
    q, k, v, _, _, cu_seqlens = packed((4, 4), 2, heads, 64)
    A_log, dt_bias = rand(heads, dtype=torch.float32, factor=1), rand(heads, factor=1)
    a, b = rand(8, heads, seed=4, factor=1), rand(8, heads, seed=5, factor=1)
    pool, slots = rand(6, heads, 64, 64, dtype=torch.float32), torch.tensor([4, 1], dtype=torch.int32)
    buffer, rows = torch.zeros(3, 4, heads, 64, 64), torch.tensor([2, 0], dtype=torch.int32)
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]], dtype=torch.int32)
    before, want_buffer = pool.clone(), buffer.double()
    out = sglang.fused_sigmoid_gating_delta_rule_update(
        A_log=A_log, dt_bias=dt_bias, q=q, k=k, v=v, a=a, b=b, initial_state_source=pool, initial_state_indices=slots,
        cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True, softplus_beta=1.0, softplus_threshold=20.0, is_kda=False,
        disable_state_update=True, intermediate_states_buffer=buffer, intermediate_state_indices=rows, cache_steps=4,
        retrieve_parent_token=parents,
    )  # fmt: skip
    want = reference.fused_sigmoid_gating_delta_rule_update(
        A_log, a, dt_bias, 1.0, 20.0, q, k, v, b, before.double(), slots, None, True, cu_seqlens, True, want_buffer, rows, 4,
        parents, state_v_first=True, exact=True,
    )  # fmt: skip
    assert torch.equal(pool, before) and rms(out, want) < BF16 and rms(buffer, want_buffer) < FP32


def test_sglang_prefill_then_decode_and_chunked_prefill():
    """256 tokens at once equal 4 times 64 with the state carried over, and decode goes on from the final state."""
    q, k, v, g, beta, _ = packed((256,), 4, 4, 64, batch=2)
    _, state = sglang_k_first.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    part = None
    for first in range(0, 256, 64):
        piece = [x[:, first : first + 64] for x in (q, k, v, g, beta)]
        _, part = sglang_k_first.chunk_gated_delta_rule(
            *piece, initial_state=part, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    _, want = reference.chunk_gated_delta_rule(
        q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True, exact=True
    )
    assert rms(state, want) < FP32 and rms(part, want) < FP32
    pool = torch.zeros(10, 4, 64, 64)
    pool[:2] = state
    A_log, dt_bias = rand(4, dtype=torch.float32, factor=1), rand(4, factor=1)
    a, b = rand(2, 4, seed=4, factor=1), rand(2, 4, seed=5, factor=1)
    step = [x[:, 255:].contiguous() for x in (q, k, v)]
    out = sglang_k_first.fused_sigmoid_gating_delta_rule_update(
        A_log, a, dt_bias, 1.0, 20.0, *step, b, pool, torch.arange(2, dtype=torch.int32), use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.arange(3, dtype=torch.int32),
    )  # fmt: skip
    expected = reference.fused_sigmoid_gating_delta_rule_update(
        A_log, a[:, None], dt_bias, 1.0, 20.0, *step, b[:, None], want.clone(), torch.arange(2), None, True, exact=True
    )
    assert rms(out, expected) < BF16 and not torch.equal(pool[:2], state) and (pool[2:] == 0).all()


def small(**more):
    heads, v_heads, K, V = 2, 4, 64, 128
    q, k = (rand(2, 65, heads, K, dtype=torch.float32, seed=s, factor=1) for s in (1, 2))
    v = rand(2, 65, v_heads, V, dtype=torch.float32, seed=3, factor=1) - 0.5
    state = rand(2, v_heads, K, V, dtype=torch.float32, factor=1)
    return {"q": q, "k": k / 6, "v": v, "initial_state": state, "output_final_state": True, **more}


def agree(function, reference_function, arguments, **gates):
    """fla's function against the reference, which gets the gates that fla computes inside."""
    before = arguments["initial_state"].clone()
    out, last = function(**arguments)
    keep = {name: value for name, value in arguments.items() if name in ("q", "k", "v", "initial_state", "output_final_state")}
    if arguments.get("state_v_first"):
        keep["initial_state"] = keep["initial_state"].transpose(-1, -2)
    want, want_last = reference_function(**keep, **gates, exact=True)
    want_last = want_last.transpose(-1, -2) if arguments.get("state_v_first") else want_last
    assert rms(out, want) < FP32 and rms(last, want_last) < FP32 and last.dtype == torch.float32
    assert torch.equal(arguments["initial_state"], before)


@pytest.mark.parametrize("function", [fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule])
def test_fla_gated_delta_rule(function):
    raw, logits = rand(2, 65, 4, dtype=torch.float32, seed=4, factor=2), rand(2, 65, 4, dtype=torch.float32, seed=5, factor=4)
    A_log, dt_bias = rand(4, dtype=torch.float32, factor=1), rand(4, dtype=torch.float32, seed=6, factor=1)
    oracle = reference.chunk_gated_delta_rule
    agree(function, oracle, small(g=-raw, beta=logits.sigmoid()), g=-raw, beta=logits.sigmoid())
    decay = -A_log.double().exp() * F.softplus(raw.double() + dt_bias.double())
    inside = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "use_beta_sigmoid_in_kernel": True}
    agree(function, oracle, small(g=raw, beta=logits, **inside), g=decay, beta=logits.double().sigmoid())
    inside["allow_neg_eigval"] = True
    agree(function, oracle, small(g=raw, beta=logits, **inside), g=decay, beta=2 * logits.double().sigmoid())


def test_fla_recurrent_forms():
    g, beta = -rand(2, 65, 4, dtype=torch.float32, seed=4, factor=1), rand(2, 65, 4, dtype=torch.float32, seed=5, factor=1)
    gk = -rand(2, 65, 4, 64, dtype=torch.float32, seed=6, factor=1)
    function, oracle = fla.fused_recurrent_gated_delta_rule, reference.chunk_gated_delta_rule
    agree(function, reference.chunk_kda, small(g=g, gk=gk, beta=beta), g=g.double()[..., None] + gk.double(), beta=beta)
    agree(function, oracle, small(beta=beta), g=torch.zeros_like(beta), beta=beta)
    agree(function, oracle, small(g=g), g=g, beta=torch.ones_like(g))
    v_first = small(g=g, beta=beta, state_v_first=True)
    v_first["initial_state"] = v_first["initial_state"].transpose(-1, -2).contiguous()
    agree(function, oracle, v_first, g=g, beta=beta)
    v_first["transpose_state_layout"] = v_first.pop("state_v_first")
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        out, _ = function(**v_first)
    assert out.abs().max() > 0


@pytest.mark.parametrize("function", [fla.chunk_kda, fla.fused_recurrent_kda])
def test_fla_kda(function):
    raw, beta = rand(2, 65, 4, 64, dtype=torch.float32, seed=4, factor=2), rand(2, 65, 4, dtype=torch.float32, seed=5, factor=1)
    A_log, dt_bias = rand(4, dtype=torch.float32, factor=1), rand(4 * 64, dtype=torch.float32, seed=6, factor=1)
    agree(function, reference.chunk_kda, small(g=-raw, beta=beta), g=-raw, beta=beta)
    x, rate = raw.double() + dt_bias.double().view(4, 64), A_log.double().exp()[:, None]
    inside = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    agree(function, reference.chunk_kda, small(g=raw, beta=beta, **inside), g=-rate * F.softplus(x), beta=beta)
    bounded = {**inside, "lower_bound": -5.0}
    agree(function, reference.chunk_kda, small(g=raw, beta=beta, **bounded), g=-5.0 * (rate * x).sigmoid(), beta=beta)


@pytest.mark.parametrize("function", [fla.chunk_delta_rule, fla.fused_recurrent_delta_rule])
def test_fla_delta_rule(function):
    beta = rand(2, 65, 4, dtype=torch.float32, seed=5, factor=1)
    agree(function, reference.chunk_delta_rule, small(beta=beta), beta=beta)


def test_what_is_not_built_is_refused_by_name():
    a = small(g=torch.zeros(2, 65, 4), beta=torch.ones(2, 65, 4))
    with pytest.raises(ArgumentError, match="cp_context"):
        fla.chunk_gated_delta_rule(**a, cp_context=object())
    with pytest.raises(ArgumentError, match="gv"):
        fla.fused_recurrent_gated_delta_rule(**a, gv=a["v"])
    with pytest.raises(ArgumentError, match="A_log"):
        fla.chunk_gated_delta_rule(**a, use_gate_in_kernel=True)
    with pytest.raises(ArgumentError, match="use_beta_sigmoid_in_kernel"):
        fla.chunk_gated_delta_rule(**a, allow_neg_eigval=True)
    with pytest.raises(ArgumentError, match="unknown argument gama"):
        fla.chunk_gated_delta_rule(**a, gama=1)
    with pytest.raises(ArgumentError, match="batch size 2"):
        fla.chunk_gated_delta_rule(**a, cu_seqlens=torch.tensor([0, 65]))
    with pytest.raises(ArgumentError, match="head_first"):
        sglang.chunk_gated_delta_rule(a["q"], a["k"], a["v"], a["g"], a["beta"], head_first=True)
    with pytest.raises(ArgumentError, match="is_kda"):
        sglang.fused_sigmoid_gating_delta_rule_update(
            a["g"], a["g"], a["g"], 1.0, 20.0, a["q"], a["k"], a["v"], a["g"], None, None, is_kda=True
        )
    with pytest.raises(ArgumentError, match=r"eps = 1e-05"):
        sglang_k_first.chunk_gated_delta_rule_cpu(
            a["q"], a["k"], a["v"], a["g"], a["beta"], a["initial_state"], True, None, False, True, eps=1e-5
        )
