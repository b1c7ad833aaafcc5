"""Packed sequences in patched models: each sequence's logits are those of the sequence alone, which stock transformers refuses."""

from __future__ import annotations

import pytest
import torch
from calls import kernels_of_packed_prompts

pytest.importorskip("transformers.models.qwen3_next")

from test_transformers import FAMILIES, build, calls  # noqa: F401

from tvm_gdn.errors import ArgumentError
from tvm_gdn.integrations.transformers import patch

KERNELS = [
    kernel
    for dtype, index_dtype in (("float32", "int32"), ("float32", "int64"), ("bfloat16", "int32"))
    for kernel in kernels_of_packed_prompts(32, 48, dtype, index_dtype)
]
LENGTHS = (17, 1, 65, 2, 30)
BOUNDS = torch.tensor((0, *LENGTHS)).cumsum(0, dtype=torch.int32)
NUMBERS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0).int()
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
IDS = torch.arange(sum(LENGTHS)).unsqueeze(0) * 29 % 490 + 3


@torch.no_grad()
def alone(model):
    return torch.cat([model(ids, use_cache=False).logits for ids in IDS.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_sequences_are_those_alone(family, calls):  # noqa: F811
    model = build(family)
    stock = alone(model)
    with pytest.raises(ValueError, match="packed sequences"):
        model(IDS, position_ids=POSITIONS, cu_seq_lens_q=BOUNDS, use_cache=False)
    assert stock.std() > 0.1
    with patch(model):
        packed = model(IDS, position_ids=POSITIONS, cu_seq_lens_q=BOUNDS, use_cache=False).logits
        assert calls["causal_conv1d_fn"] == calls["chunk_gated_delta_rule"] == calls["fused_gdn_gating"] == 3
        mixed = model(IDS, use_cache=False).logits
    assert (packed - stock).abs().max() < 1e-5
    # Without bounds the sequences run into each other: the first one alone is the same.
    assert (mixed - stock)[:, : LENGTHS[0]].abs().max() < 1e-5
    assert (mixed - stock)[:, LENGTHS[0] :].abs().max() > 0.1


@pytest.fixture(scope="module")
def model():
    return build("Qwen3_5")


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": BOUNDS},
        {"cu_seq_lens_q": BOUNDS.long(), "cu_seq_lens_k": BOUNDS.long(), "max_length_q": 65, "max_length_k": 65},
        {"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones_like(IDS)},
        {"seq_idx": NUMBERS},
        {"seq_idx": NUMBERS, "position_ids": POSITIONS},
        {"position_ids": POSITIONS, "use_cache": False},
    ],
    ids=lambda given: "-".join(given),
)
@torch.no_grad()
def test_every_way_to_say_it(model, given):
    """One of bounds, numbers and position ids is enough; attention and Gated DeltaNet layers agree on it."""
    stock = alone(model)
    with patch(model):
        output = model(IDS, **given)
    assert (output.logits - stock).abs().max() < 1e-5
    assert output.past_key_values is None


@torch.no_grad()
def test_bf16_packed_sequences(model):
    model = build("Qwen3_5").to(torch.bfloat16)
    exact = alone(build("Qwen3_5"))
    with patch(model):
        packed, apart = (logits.double() for logits in (model(IDS, cu_seq_lens_q=BOUNDS).logits, alone(model)))
    scale = exact.double().square().mean().sqrt()
    assert (packed - apart).square().mean().sqrt() / scale < 5e-3
    assert (packed - exact).square().mean().sqrt() / scale < 0.05


@torch.no_grad()
def test_a_poisoned_neighbour_changes_nothing(model):
    """NaN in one sequence's embeddings leaves every other sequence's logits bit-identical, through all layers."""
    embedded = model.get_input_embeddings()(IDS)
    bounds = {"cu_seq_lens_q": BOUNDS}
    with patch(model, operators=("causal_conv1d_fn", "chunk_gated_delta_rule", "fused_gdn_gating", "rms_norm_gated")):
        layer = model.model.layers[0].linear_attn
        clean = layer(embedded, **bounds)
        embedded[:, 18:83] = float("nan")
        poisoned = layer(embedded, **bounds)
    assert torch.equal(poisoned[:, :18], clean[:, :18])
    assert torch.equal(poisoned[:, 83:], clean[:, 83:])
    assert poisoned[:, 18:83].isnan().all()


@torch.no_grad()
def test_packed_sequences_that_cannot_be_served(model):
    two_rows = IDS[:, :114].reshape(2, 57)
    with patch(model):
        for given, message in (
            ({"cu_seq_lens_q": BOUNDS, "use_cache": True}, r"cu_seq_lens_q: a cache holds one state.*use_cache=False"),
            (
                {"cu_seq_lens_q": BOUNDS, "attention_mask": (IDS > 100).long()},
                r"attention_mask: packed sequences have no padding",
            ),
            ({"cu_seq_lens_q": BOUNDS + 1}, "query_start_loc"),
            ({"seq_idx": NUMBERS[0]}, r"seq_idx has shape \(115,\)"),
        ):
            with pytest.raises(ArgumentError, match=message):
                model(IDS, **given)
        with pytest.raises(ArgumentError, match=r"cu_seq_lens_q: packed sequences stand in one row, input_ids has 2"):
            model(two_rows, cu_seq_lens_q=BOUNDS, position_ids=torch.arange(57).expand(2, 57))
