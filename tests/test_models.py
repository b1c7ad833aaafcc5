"""The kernels that `tvm_gdn build --model` packs are those that a patched model calls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers.models.qwen3_next")

import test_moe_transformers as mixtures
import test_transformers as hybrids

from tvm_gdn import dispatch, env, models
from tvm_gdn.commands import aot
from tvm_gdn.integrations.transformers import patch
from tvm_gdn.models import Experts, Model
from tvm_gdn.target import concrete, resolve

GDN = {"H": 2, "HV": 4, "K": 32, "V": 48}
BOUNDS = torch.tensor([0, 3, 4, 14])
HYBRIDS = {
    "Qwen3Next": Experts({"D": 64, "I": 32, "E": 8}, shared=32),
    "Qwen3_5": None,
    "Qwen3_5Moe": Experts({"D": 64, "I": 32, "E": 8}, shared=32),
    "OlmoHybrid": None,
}
GROUPS = {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "with": ("correction_bias",)}
MIXTURES = {
    "qwen3-moe": Experts({"D": 64, "I": 48, "E": 10}),
    "deepseek-v3": Experts({"D": 64, "I": 48, "E": 16}, 48, GROUPS, "float32"),
}


def facts_of(name: str, dtype: str) -> Model:
    facts = Model(name, GDN if name in HYBRIDS else {}, (HYBRIDS | MIXTURES)[name], dtype)
    if facts.experts and facts.experts.logits != "float32":
        facts = dataclasses.replace(facts, experts=dataclasses.replace(facts.experts, logits=dtype))
    return facts


def built(name: str, dtype: str) -> torch.nn.Module:
    model = (hybrids.build(name) if name in HYBRIDS else mixtures.build(name)).to(getattr(torch, dtype))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.float()  # as transformers reads it from a checkpoint: its router is kept in fp32
    return model


@torch.no_grad()
def served(model: torch.nn.Module) -> None:
    """Everything a server does with a model: packed prompts, prompts in parts, decode, with and without a cache."""
    ids = torch.arange(28).reshape(2, 14) * 17 % 250 + 3
    model(ids[:1], use_cache=False)
    for rows in (ids, ids[:1]):
        hybrids.greedy(model, rows, torch.ones_like(rows), steps=2)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    model(ids[:, 9:], past_key_values=cache)
    if model.model.layers[0].__class__.__name__.startswith(("Qwen3Next", "Qwen3_5", "Olmo")):
        model(ids[:1], cu_seq_lens_q=BOUNDS.int())
        model(ids[:1], cu_seq_lens_q=BOUNDS)


@pytest.fixture
def asked(monkeypatch):
    """Kernels that calls look up; the torch reference serves them, so that nothing is compiled."""
    found = {}

    def lookup(spec, geometry, device):
        found[spec.name, geometry.key] = (spec, geometry)
        return dispatch.Served(None, "reference", "none", "a test")

    monkeypatch.setattr(dispatch, "lookup", lookup)
    dispatch.reset()
    yield found
    monkeypatch.undo()
    dispatch.reset()


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in (*HYBRIDS, *MIXTURES)), ("Qwen3Next", "float32")])
def test_a_models_pack_has_every_kernel_that_it_calls(name, dtype, asked):
    model, facts = built(name, dtype), facts_of(name, dtype)
    listed = {(spec.name, geometry.key) for spec, geometry in models.kernels(facts)}
    with patch(model):
        served(model)
    if facts.experts:
        for pack in ("int8", "int4", "int4_kgroup", "bf16" if dtype == "bfloat16" else "fp32"):
            with torch.no_grad(), patch(model, operators=["fused_experts"], pack=pack):
                model(torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    operators = {op for op, _ in asked}
    wanted = {"moe_route", "moe_sort", "fused_experts", "fused_experts_quantized"} if facts.experts else set()
    if facts.axes:
        wanted |= {"causal_conv1d_fn", "causal_conv1d_update", "rms_norm_gated", "chunk_gated_delta_rule", "fused_gdn_gating"}
        # Olmo-Hybrid doubles its write strength, which no decode step with gates inside does.
        wanted |= set() if name == "OlmoHybrid" else {"fused_conv_gated_delta_rule_update"}
    assert operators >= wanted - {"moe_sort"}
    assert set(asked) <= listed, sorted(set(asked) - listed)


def test_published_models_name_their_layers():
    for name, facts in models.MODELS.items():
        found = {spec.name for spec, _ in models.kernels(name)}
        assert bool(facts.axes) == ("causal_conv1d_update" in found) == ("rms_norm_gated" in found)
        assert (facts.experts is not None) == ("moe_route" in found) == ("fused_experts_quantized" in found)


@torch.no_grad()
def test_a_pack_serves_a_patched_model_without_a_compiler(asked, monkeypatch, tmp_path):
    model = built("Qwen3Next", "float32")
    ids, mask = hybrids.prompt(2)
    with patch(model):
        for rows in (ids, ids[:1]):
            hybrids.greedy(model, rows, torch.ones_like(rows), steps=2)
    wanted = list(asked.values())
    monkeypatch.undo()
    aot.build_pack(wanted, concrete(resolve(env.target_name())), tmp_path / "pack")
    whole = [hybrids.greedy(model, *given, steps=8) for given in ((ids, mask), (ids[:1], mask[:1]))]
    for variable, value in (("PACK_PATH", tmp_path / "pack"), ("CACHE_DIR", tmp_path / "empty"), ("DISABLE_JIT", 1)):
        monkeypatch.setenv(f"TVM_GDN_{variable}", str(value))
    dispatch.reset()
    with patch(model):
        found = [hybrids.greedy(model, *given, steps=8) for given in ((ids, mask), (ids[:1], mask[:1]))]
    assert {dispatch.served_by(op).split()[0] for op, _ in asked} == {"compiled"}
    assert not (tmp_path / "empty" / "kernels").exists()
    for (tokens, logits), (patched_tokens, patched_logits) in zip(whole, found, strict=True):
        assert torch.equal(patched_tokens, tokens)
        assert 0 < (patched_logits - logits).abs().max() < 1e-5
