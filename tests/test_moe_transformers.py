"""Mixture models of transformers with their experts on tvm_gdn, against the same models unpatched."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import kernels_of_a_model, kernels_of_experts

pytest.importorskip("transformers.models.qwen3_next")

import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tvm_gdn
from tvm_gdn.errors import ArgumentError
from tvm_gdn.integrations import experts
from tvm_gdn.integrations import transformers as integration
from tvm_gdn.integrations.transformers import patch

#: What the tests call of a gated-delta-net layer: in bf16 a prompt alone.
LAYER = {"bfloat16": ("chunk_gated_delta_rule", "rms_norm_gated")}
LAYER["float32"] = (*LAYER["bfloat16"], "fused_sigmoid_gating_delta_rule_update")

GROUPS = {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "with": ("correction_bias",)}
PACKS = {"T": 1, "k": 1, "E": 2, "D": 64, "I": 48}
KERNELS = [
    *kernels_of_experts(10, 64, 48), *kernels_of_experts(10, 64, 48, "bfloat16"),
    # DeepSeek's router is kept in fp32.
    *kernels_of_experts(16, 64, 48, **GROUPS), kernels_of_experts(16, 64, 48, "bfloat16", "float32")[1],
    kernels_of_experts(16, 64, 48, **GROUPS, dtypes={"correction_bias": "bfloat16"})[0],
    ("fused_experts_packed", {**PACKS, "scheme": "fp32"}),
    ("fused_experts_quantized", {**PACKS, "scheme": "int8", "scale_dtype": "float32"}),
    # The layer around them is that of test_transformers.
    *(kernel for dtype, ops in LAYER.items() for kernel in kernels_of_a_model(32, 48, dtype) if kernel[0] in ops),
]  # fmt: skip
COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def build(name, **options):
    torch.manual_seed(0)
    common = {**COMMON, **options}
    if name == "qwen3-moe":
        config = transformers.Qwen3MoeConfig(**common, head_dim=16, num_experts=10)
    elif name == "qwen3-next":
        config = transformers.Qwen3NextConfig(
            **common, head_dim=16, num_experts=10, shared_expert_intermediate_size=48, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=48,
            layer_types=["linear_attention", "full_attention"],
        )  # fmt: skip
    else:
        config = transformers.DeepseekV3Config(
            **{**common, "num_key_value_heads": 4}, n_routed_experts=16, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["qwen3-moe", "qwen3-next", "deepseek-v3"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1))


def generate(model, prompt):
    return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


def count_calls(monkeypatch, name="fused_experts"):
    """Calls of an operator while a test runs: equality alone would also hold if nothing were patched."""
    calls = []
    original = getattr(tvm_gdn, name)
    monkeypatch.setattr(tvm_gdn, name, lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs))
    return calls


@torch.no_grad()
def test_same_logits_and_tokens(model, prompt, monkeypatch):
    logits, tokens = model(prompt).logits, generate(model, prompt)
    before = model.config._experts_implementation
    calls, routed = count_calls(monkeypatch), count_calls(monkeypatch, "moe_route")
    with patch(model) as patched:
        assert patched.experts and len(patched.routers) == len(patched.experts)
        ours, ours_tokens = model(prompt).logits, generate(model, prompt)
        assert len(routed) == len(calls) >= 13 * len(patched.experts)
    assert ((ours - logits).square().mean().sqrt() / logits.square().mean().sqrt()) < 1e-5
    assert torch.equal(ours_tokens, tokens)
    assert model.config._experts_implementation == before
    made = len(calls)
    assert torch.equal(model(prompt).logits, logits)
    assert len(calls) == made
    permanent = patch(model)
    assert torch.equal(generate(model, prompt), tokens)
    assert len(calls) > made
    permanent.unpatch()
    assert torch.equal(model(prompt).logits, logits)


@torch.no_grad()
def test_routers_of_every_kind(prompt, monkeypatch):
    """The choice and the weights of each router equal those of transformers, with a bias and without renormalization too."""
    routed = count_calls(monkeypatch, "moe_route")
    for name, options in (
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("qwen3-next", {"norm_topk_prob": True}),
        ("deepseek-v3", {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
        ("deepseek-v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ):
        model = build(name, **options)
        gates = routers(model)
        rows = torch.randn(65, 64, generator=torch.Generator().manual_seed(2))
        for gate in gates:
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)) / 4)
        stock = [gate(rows) for gate in gates]
        tokens = generate(model, prompt)
        with patch(model, operators=["moe_route"]) as patched:
            assert len(patched.routers) == len(gates) > 0 and not patched.experts
            ours = [gate(rows) for gate in gates]
            assert torch.equal(generate(model, prompt), tokens)
        for (logits, weights, ids), (own_logits, own_weights, own_ids) in zip(ours, stock, strict=True):
            assert torch.equal(logits, own_logits) and (ids.dtype, weights.dtype) == (own_ids.dtype, own_weights.dtype)
            order, own_order = ids.argsort(-1), own_ids.argsort(-1)
            assert torch.equal(ids.gather(1, order), own_ids.gather(1, own_order))
            assert (weights.gather(1, order) - own_weights.gather(1, own_order)).abs().max() < 1e-6
    assert routed[-1]["scoring"] == "sigmoid" and routed[-1]["num_expert_group"] == 4


@torch.no_grad()
def test_bf16(model, prompt):
    """Ours are as near to the fp32 model as transformers' own, on the experts that transformers chose."""
    own_choice = [name for name in integration.SUPPORTED_OPERATORS if name != "moe_route"]
    exact = model(prompt).logits.double()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    stock = rounded(prompt).logits.double()
    with patch(rounded, operators=own_choice):
        ours = rounded(prompt).logits.double()
    with patch(rounded):
        routed = rounded(prompt).logits.double()
    scale = exact.square().mean().sqrt()
    errors = [((found - exact).square().mean().sqrt() / scale).item() for found in (stock, ours, routed)]
    assert 0 < errors[1] < 1.25 * errors[0] and 0 < errors[2] < 1.25 * errors[0], errors


def routers(model):
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


@torch.no_grad()
def test_bf16_on_the_same_choices(model, prompt):
    """With the fp32 model's choices given to both, our experts are as near to it as transformers' own, which round more often.

    Free choices differ from those of the fp32 model for some tokens (its logits are rounded too), and one other expert outweighs
    all rounding: which of two bf16 models is nearer then is chance.
    """
    chosen, handles = [], [gate.register_forward_hook(lambda gate, args, out: chosen.append(out)) for gate in routers(model)]
    exact = model(prompt).logits.double()
    for handle in handles:
        handle.remove()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    for gate, (logits, weights, ids) in zip(routers(rounded), chosen, strict=True):
        given = logits.bfloat16(), weights.bfloat16(), ids
        gate.register_forward_hook(lambda gate, args, out, given=given: given)
    stock = rounded(prompt).logits.double()
    with patch(rounded, operators=["fused_experts"]) as patched:
        ours = rounded(prompt).logits.double()
        assert patched.experts
    errors = [((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item() for found in (stock, ours)]
    assert not torch.equal(ours, stock)
    assert 0 < errors[1] < 1.04 * errors[0], errors


@torch.no_grad()
def test_packed_copies(model, prompt):
    logits = model(prompt).logits
    scale = logits.square().mean().sqrt()
    for scheme, limit in (("fp32", 1e-5), ("int8", 0.06)):
        with patch(model, operators=["fused_experts"], pack=scheme) as patched:
            assert patched.layers == ()
            found = ((model(prompt).logits - logits).square().mean().sqrt() / scale).item()
        assert found < limit
        assert scheme == "fp32" or found > 1e-5
    assert not experts._packs


def test_an_error_inside_restores(model, prompt):
    before = model.config._experts_implementation
    with pytest.raises(RuntimeError, match="stop"), patch(model, operators=["fused_experts"]):
        with pytest.raises(ArgumentError, match="is patched already"):
            patch(model, operators=["fused_experts"])
        raise RuntimeError("stop")
    assert model.config._experts_implementation == before


def test_gradients_run_on_transformers(model, prompt, monkeypatch):
    calls = count_calls(monkeypatch)
    with patch(model, operators=["fused_experts"]):
        model(prompt).logits.sum().backward()
    assert not calls
    assert all(module.gate_up_proj.grad is not None for module in experts.find(model).values())
    model.zero_grad()


@torch.no_grad()
def test_by_name(prompt):
    """The name that transformers itself knows."""
    experts.register()
    assert "tvm_gdn" in ALL_EXPERTS_FUNCTIONS
    model = build("qwen3-moe")
    logits = model(prompt).logits
    model.set_experts_implementation("tvm_gdn")
    assert torch.allclose(model(prompt).logits, logits, atol=1e-4)
    assert not torch.equal(model(prompt).logits, logits)
