"""Patched Gated DeltaNet models of transformers, against the same models unpatched."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers.models.qwen3_next")

import transformers
from calls import kernels_of_a_model, kernels_of_experts
from compilers import needs_cxx
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next import modeling_qwen3_next

import tvm_gdn
from tvm_gdn import logs
from tvm_gdn.commands import demo
from tvm_gdn.errors import ArgumentError, ArgumentTypeError, TvmGdnError
from tvm_gdn.integrations.transformers import patch

STEPS = 24
DECODE = "fused_sigmoid_gating_delta_rule_update"  # with its gates
FUSED = "fused_conv_gated_delta_rule_update"  # with its convolution too: one sequence
UPDATE = "fused_recurrent_gated_delta_rule_update"
FUNCTIONAL = "fused_recurrent_gated_delta_rule"
AROUND = ("causal_conv1d_fn", "causal_conv1d_update", "fused_gdn_gating", "chunk_gated_delta_rule", "rms_norm_gated", "moe_route")

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "eos_token_id": None,
}
STATES = {"B": 1, "T": 1, "H": 1, "HV": 1, "K": 32, "V": 48, "S": 2, "state_dtype": "float32"}
WHOLE_BF16 = {"dtype": "bfloat16", "dtypes": {"A_log": "bfloat16", "dt_bias": "bfloat16"}}
KERNELS = [
    *kernels_of_a_model(32, 48), *kernels_of_a_model(32, 48, "bfloat16"), *kernels_of_experts(8, 64, 32),
    kernels_of_experts(8, 128, 64)[1],  # the demo's
    *((UPDATE, {**STATES, "dtype": dtype, "with": ("initial_state_source",)}) for dtype in ("float32", "bfloat16")),
    *((op, {**STATES, "output_final_state": True, "with": ("initial_state",)}) for op in ("chunk_gated_delta_rule", FUNCTIONAL)),
    ("fused_gdn_gating", {"M": 1, "HV": 1, **WHOLE_BF16}),
]  # fmt: skip
MLP = {"intermediate_size": 96}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
FAMILIES = {
    "Qwen3Next": ("Qwen3NextConfig", {**MLP, **MOE}),
    "Qwen3_5": ("Qwen3_5TextConfig", MLP),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", MOE),
    "Qwen4Exp": ("Qwen4ExpTextConfig", {**MOE, **INDEXER}),
    "OlmoHybrid": ("OlmoHybridConfig", MLP),
}


def build(family: str = "Qwen3Next", seed: int = 0) -> torch.nn.Module:
    config_name, extra = FAMILIES[family]
    if not hasattr(transformers, config_name):
        pytest.skip(f"this transformers has no {config_name}")
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**COMMON, **extra)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build()


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Count the calls of the operators that a patched decode step may use, and of those around them."""
    counts = dict.fromkeys((DECODE, FUSED, UPDATE, FUNCTIONAL, *AROUND), 0)

    def counted(name):
        operator = getattr(tvm_gdn, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return operator(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(tvm_gdn, name, counted(name))
    return counts


def prompt(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch, 7] and a mask that leaves item n of the batch with 7 - 2n tokens, padded on the left."""
    ids = torch.arange(batch * 7).reshape(batch, 7) * 13 % 500 + 3
    mask = torch.ones_like(ids)
    for item in range(batch):
        mask[item, : 2 * item] = 0
    return ids.where(mask.bool(), 0), mask


@torch.no_grad()
def greedy(model, ids, mask, steps=STEPS, cache=None):
    """Tokens [batch, steps + 1] and the logits [steps, batch, vocabulary] of the decode steps."""
    output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    tokens, logits = [output.logits[:, -1].argmax(-1, keepdim=True)], []
    for _ in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(tokens[-1], attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
        tokens.append(logits[-1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1), torch.stack(logits)


def snapshot(model) -> list[dict]:
    """Every attribute of the model's modules and of the modeling module; hook dictionaries by content."""
    owners = [vars(m) for m in model.modules()]
    states = [{k: dict(v) if isinstance(v, dict) else v for k, v in owner.items()} for owner in owners]
    return [*states, dict(vars(modeling_qwen3_next))]


def same(left: list[dict], right: list[dict]) -> bool:
    def equal(a, b):
        return a is b or (isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys() and all(a[k] is b[k] for k in a))

    return all(a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_same_tokens_and_logits(model, calls, batch):
    ids, mask = prompt(batch)
    tokens, logits = greedy(model, ids, mask)
    assert not any(calls.values())
    with patch(model) as patched:
        patched_tokens, patched_logits = greedy(model, ids, mask)
    # Three Gated DeltaNet layers and four mixtures: every step between the projections ran compiled.
    assert calls == {
        "causal_conv1d_fn": 3, "fused_gdn_gating": 3, "chunk_gated_delta_rule": 3,
        FUSED: 3 * STEPS * (batch == 1), "causal_conv1d_update": 3 * STEPS * (batch > 1), DECODE: 3 * STEPS * (batch > 1),
        UPDATE: 0, FUNCTIONAL: 0,
        "rms_norm_gated": 3 * (STEPS + 1), "moe_route": 4 * (STEPS + 1),
    }  # fmt: skip
    assert patched.layers == tuple(f"model.layers.{i}.linear_attn" for i in range(3))
    assert torch.equal(patched_tokens, tokens)
    assert logits.std() > 0.1
    assert (patched_logits - logits).abs().max() < 1e-5


@pytest.mark.parametrize(("operator", "batch"), [(DECODE, 3), (FUSED, 1)])
def test_a_wrong_operator_is_noticed(model, monkeypatch, operator, batch):
    ids, mask = prompt(batch)
    tokens, logits = greedy(model, ids, mask)
    right = getattr(tvm_gdn, operator)
    monkeypatch.setattr(tvm_gdn, operator, lambda *args, **kwargs: torch.zeros_like(right(*args, **kwargs)))
    with patch(model):
        wrong_tokens, wrong_logits = greedy(model, ids, mask)
    assert not torch.equal(wrong_tokens, tokens)
    assert (wrong_logits - logits).abs().max() > 0.1


@pytest.mark.sampled
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Qwen3Next"])
def test_other_families(calls, family, batch):
    model = build(family)
    ids, mask = prompt(batch)
    tokens, logits = greedy(model, ids, mask)
    with patch(model):
        patched_tokens, patched_logits = greedy(model, ids, mask)
    # Olmo-Hybrid doubles its write strength, which decode steps with gates inside do not.
    assert calls[UPDATE if family == "OlmoHybrid" else FUSED if batch == 1 else DECODE] == 3 * STEPS
    assert torch.equal(patched_tokens, tokens)
    assert (patched_logits - logits).abs().max() < 1e-5


@torch.no_grad()
def forced(model, ids, mask, steps=8):
    """Logits of a prompt's last token and of steps with given tokens."""
    output = model(ids, attention_mask=mask, use_cache=True)
    logits = [output.logits[:, -1].float()]
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        tokens = torch.full((len(ids), 1), 5 * step + 9)
        output = model(tokens, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1].float())
    return torch.stack(logits)


@pytest.mark.parametrize("batch", [1, 3])
def test_bf16(calls, batch):
    def error(left, right):
        return ((left - right).pow(2).mean().sqrt() / right.pow(2).mean().sqrt()).item()

    model = build("Qwen3_5").to(torch.bfloat16)  # without experts, whose choice jumps on a rounding
    ids, mask = prompt(batch)
    exact = forced(copy.deepcopy(model).float(), ids, mask)
    own = forced(model, ids, mask)
    with patch(model, operators=("chunk_gated_delta_rule", FUNCTIONAL)):
        assert error(forced(model, ids, mask), own) < 5e-3
    with patch(model):
        patched = forced(model, ids, mask)
    assert calls[UPDATE] == calls[FUSED if batch == 1 else DECODE] == 3 * 8
    # Transformers rounds the norm before it multiplies, tvm_gdn does not: the logits of both are off, ours not further.
    assert error(patched, exact) < 1.05 * error(own, exact) < 0.05


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}, {"cache_implementation": "static"}]
)
def test_generate(model, calls, options):
    ids, mask = prompt(3)
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True, **options}
    expected = model.generate(ids, attention_mask=mask, **options)
    with patch(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    assert calls[DECODE] > 0
    assert calls[UPDATE] == calls[FUNCTIONAL] == 0


@pytest.mark.parametrize("operators", [None, (FUNCTIONAL,)])
def test_prefill_in_parts_continues_a_cache(model, calls, operators):
    ids, _ = prompt(1)

    @torch.no_grad()
    def run():
        cache = DynamicCache(config=model.config)
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
            output = model(part, past_key_values=cache, use_cache=True)
        return output.logits, [cache.layers[i].recurrent_states[0] for i in range(3)]

    logits, states = run()
    with patch(model, operators=operators):
        patched_logits, patched_states = run()
    assert calls[UPDATE if operators else FUSED] == 3
    assert calls["chunk_gated_delta_rule"] == (0 if operators else 6)
    assert (patched_logits - logits).abs().max() < 1e-5
    for state, patched_state in zip(states, patched_states, strict=True):
        assert (patched_state - state).abs().max() < 1e-5


@torch.no_grad()
def test_the_state_is_updated_in_the_tensor_of_the_cache(model):
    ids, _ = prompt(1)
    with patch(model):
        cache = model(ids, use_cache=True).past_key_values
        states = cache.layers[0].recurrent_states[0], cache.layers[0].conv_states[0]
        before, addresses = [state.clone() for state in states], [state.data_ptr() for state in states]
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert cache.layers[0].recurrent_states[0] is states[0] and cache.layers[0].conv_states[0] is states[1]
    assert [state.data_ptr() for state in states] == addresses
    assert not any(torch.equal(state, old) for state, old in zip(states, before, strict=True))


class KeepingCache(DynamicCache):
    """Hands out states that it keeps, as a cache with a history or a shared prefix does."""

    def __init__(self, config):
        super().__init__(config=config)
        self.history = []

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        self.history.append((recurrent_states, recurrent_states.clone()))
        self.layers[layer_idx].recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def test_the_states_of_another_cache_class_are_not_modified(model, calls):
    ids, mask = prompt(1)
    tokens, _ = greedy(model, ids, mask)
    cache = KeepingCache(model.config)
    with patch(model):
        patched_tokens, _ = greedy(model, ids, mask, cache=cache)
    assert (calls[FUSED], calls[DECODE], calls[UPDATE], calls[FUNCTIONAL]) == (0, 0, 0, 3 * STEPS)
    assert torch.equal(patched_tokens, tokens)
    assert len(cache.history) == 3 * (STEPS + 1)
    assert all(torch.equal(state, copied) for state, copied in cache.history)


def test_only_the_patched_model_is_affected(model, calls):
    other = build(seed=1)
    ids, mask = prompt(1)
    with patch(model):
        greedy(other, ids, mask, steps=2)
        assert calls[FUSED] == 0
        first = patch(other)
        greedy(other, ids, mask, steps=2)
        assert calls[FUSED] == 6
    greedy(model, ids, mask, steps=2)
    assert calls[FUSED] == 6
    greedy(other, ids, mask, steps=2)
    assert calls[FUSED] == 12
    first.unpatch()
    greedy(other, ids, mask, steps=2)
    assert calls[FUSED] == 12


def test_everything_is_restored(model):
    ids, mask = prompt(1)
    greedy(model, ids, mask, steps=1)
    before = snapshot(model)
    with patch(model):
        assert not same(snapshot(model), before)
        assert same(snapshot(model)[-1:], before[-1:])  # transformers itself stays as it is
        greedy(model, ids, mask, steps=1)
    assert same(snapshot(model), before)

    with pytest.raises(KeyError, match="inside"), patch(model):
        raise KeyError("inside")
    assert same(snapshot(model), before)

    other = build(seed=1)
    first, second = patch(model), patch(other)
    first.unpatch()
    second.unpatch()
    second.unpatch()
    assert not first.active
    assert same(snapshot(model), before)


def test_patches_do_not_nest(model):
    before = snapshot(model)
    with patch(model) as outer:
        with pytest.raises(ArgumentError, match=r"model\.layers\.0\.linear_attn.*patched already.*unpatch"):
            patch(model)
        with pytest.raises(ArgumentError, match="patched already"):
            patch(model.model.layers[2])
        assert outer.active
    assert same(snapshot(model), before)
    with pytest.raises(ArgumentError, match="unpatched"), outer:
        pass


@torch.no_grad()
def test_a_forward_wrapped_by_somebody_else_stays(model, calls):
    layer, (ids, mask) = model.model.layers[0].linear_attn, prompt(1)
    expected, _ = greedy(model, ids, mask, steps=1)
    patched = patch(model)
    inner = layer.forward
    layer.forward = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
    greedy(model, ids, mask, steps=1)
    assert calls[FUSED] == 3
    patched.unpatch()
    assert layer.forward is wrapper
    assert torch.equal(greedy(model, ids, mask, steps=1)[0], expected)
    assert calls[FUSED] == 3
    with pytest.raises(ArgumentError, match=r"'model\.layers\.0\.linear_attn'.*forward of its own.*accelerate"):
        patch(model)
    del layer.forward, layer._tvm_gdn


def test_copies_of_a_patched_model_end_with_its_patch(model, calls, tmp_path):
    ids, mask = prompt(1)
    expected, _ = greedy(model, ids, mask, steps=2)
    with patch(model):
        copied = copy.deepcopy(model)
        assert torch.equal(greedy(copied, ids, mask, steps=2)[0], expected)
        assert calls[FUSED] == 6
        torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(greedy(other, ids, mask, steps=2)[0], expected)
    assert calls[FUSED] == 6
    with patch(loaded):
        assert torch.equal(greedy(loaded, ids, mask, steps=2)[0], expected)
    assert calls[FUSED] == 12


@pytest.mark.parametrize("family", ["Qwen3_5", "OlmoHybrid"])
def test_saved_and_reloaded(calls, family, tmp_path):
    """Weights written from a patched model are those of the model; what is read from them is patched anew."""
    model = build(family)
    ids, mask = prompt(2)
    tokens, logits = greedy(model, ids, mask, steps=4)
    with patch(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(greedy(loaded, ids, mask, steps=4)[1], logits)
    permanent = patch(loaded)
    patched_tokens, patched_logits = greedy(loaded, ids, mask, steps=4)
    assert calls[UPDATE if family == "OlmoHybrid" else DECODE] == 3 * 4
    assert torch.equal(patched_tokens, tokens)
    assert 0 < (patched_logits - logits).abs().max() < 1e-5
    permanent.unpatch()
    assert torch.equal(greedy(loaded, ids, mask, steps=4)[1], logits)


def test_gradients_keep_the_function_of_transformers(model, calls, monkeypatch):
    messages = []
    monkeypatch.setattr(logging.getLogger("tvm_gdn"), "warning", messages.append)
    logs.warn_once.cache_clear()
    ids, _ = prompt(1)
    with patch(model):
        cache = model(ids, use_cache=True).past_key_values
        output = model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert output.logits.requires_grad
    assert not any(calls.values())
    assert sum("DeltaNet" in message for message in messages) == 1
    assert "no_grad" in messages[0]


def test_packed_length_of_one_token(model, calls):
    ids, _ = prompt(1)
    with torch.no_grad(), patch(model):
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        logits = model(ids[:, :1], past_key_values=cache, use_cache=True, cu_seq_lens_q=bounds).logits
    assert calls[FUSED] == 6  # bounds of one token say nothing
    assert (logits - expected).abs().max() < 1e-6


@needs_cxx
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_layer_compiles_without_graph_breaks(model, batch):
    ids, _ = prompt(batch)
    layer = model.model.layers[0].linear_attn
    hidden = torch.randn(batch, 1, 64, generator=torch.Generator().manual_seed(0))
    with patch(model):
        cache = model(ids, use_cache=True).past_key_values
        compiled_cache = copy.deepcopy(cache)
        expected = layer(hidden, cache_params=cache)
        torch.compiler.reset()
        compiled = torch.compile(lambda x, c: layer(x, cache_params=c), backend="aot_eager", fullgraph=True)
        assert (compiled(hidden, compiled_cache) - expected).abs().max() < 1e-6
    for kind in ("recurrent_states", "conv_states"):
        state, compiled_state = (getattr(c.layers[0], kind)[0] for c in (cache, compiled_cache))
        assert (compiled_state - state).abs().max() < 1e-6


def test_a_model_without_such_layers():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ArgumentError, match=r"supported layer classes.*Qwen3NextGatedDeltaNet.*found LlamaAttention"):
        patch(transformers.LlamaForCausalLM(config))
    with pytest.raises(ArgumentError, match="no numbered transformers layer"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentTypeError, match="model"):
        patch("Qwen/Qwen3-Next-80B-A3B-Instruct")


def test_a_forward_that_calls_other_functions(model):
    class Own(modeling_qwen3_next.Qwen3NextGatedDeltaNet):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"Own.*torch_recurrent_gated_delta_rule.*transformers"):
        patch(torch.nn.ModuleList([model, Own(model.config, 0)]))
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("operators", "error"),
    [(["chunk"], ArgumentError), ([], ArgumentError), (FUNCTIONAL, ArgumentTypeError)],
)
def test_bad_operators(model, operators, error):
    with pytest.raises(error, match=r"^operators: .*fused_recurrent_gated_delta_rule"):
        patch(model, operators=operators)


def test_operators_by_name(model, calls):
    ids, mask = prompt(1)
    with patch(model, operators=[FUNCTIONAL]) as patched:
        greedy(model, ids, mask, steps=1)
    assert patched.operators == (FUNCTIONAL,)
    assert calls[UPDATE] == 3


def test_importing_the_integration_imports_nothing_else():
    code = (
        "import sys, tvm_gdn.integrations.transformers, tvm_gdn.commands.demo;"
        " print(sorted({'transformers', 'fla', 'tvm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_fake_package(model):
    known = "fla" in sys.modules
    ids, mask = prompt(1)
    with patch(model):
        greedy(model, ids, mask, steps=1)
        assert ("fla" in sys.modules) == known


def demo_args(**options) -> argparse.Namespace:
    return argparse.Namespace(**{"tokens": 6, "prompt_tokens": 5, "json": False, **options})


def test_demo():
    asked = []
    result = demo.run(6, 5, seconds=0, served_by=lambda name, geometry: asked.append(name) or "somebody")
    decode = result["decode"]
    assert decode["tokens_equal"]
    assert len(decode["tokens"]) == 6
    assert decode["max_abs_logit_difference"] < 1e-5
    assert decode["served_by"] == "somebody"
    assert min(decode["ms_per_token"].values()) > 0
    assert asked == [FUSED, UPDATE, UPDATE]
    assert [row["batch"] for row in result["layer"]] == [1, 8]
    for row in result["layer"]:
        assert row["max_abs_difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["transformers_us"] / row["tvm_gdn_us"])
    with pytest.raises(ArgumentError, match=r"^tokens"):
        demo.run(1)
    with pytest.raises(ArgumentError, match=r"^prompt_tokens"):
        demo.run(2, 0)


def test_demo_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next", None)
    with pytest.raises(TvmGdnError, match=r"tvm_gdn\[models\]"):
        demo.run(served_by=lambda name, geometry: "nobody")


def test_demo_output_and_exit_status(monkeypatch, capsys):
    result = demo.run(6, 5, seconds=0, served_by=lambda name, geometry: "somebody")
    monkeypatch.setattr(demo, "run", lambda tokens, prompt_tokens: result)
    assert demo.main(demo_args()) == 0
    text = capsys.readouterr().out
    assert "equal to the unpatched model's" in text
    assert text.count("somebody") == 3
    assert demo.main(demo_args(json=True)) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_demo_fails_on_other_tokens(monkeypatch, capsys, caplog):
    monkeypatch.setattr(tvm_gdn, FUSED, lambda *args, **kwargs: args[0].new_zeros(1, 1, *args[7].shape[1::2]))
    result = demo.run(16, 5, seconds=0, served_by=lambda name, geometry: "zeros")
    monkeypatch.setattr(demo, "run", lambda tokens, prompt_tokens: result)
    assert demo.main(demo_args()) == 1
    captured = capsys.readouterr()
    assert "DIFFERENT" in captured.out
    assert "other tokens" in caplog.text
