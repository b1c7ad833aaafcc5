"""A transformers model on tvm_gdn's operators: a small Qwen3-Next with random weights, so nothing is downloaded.

    python examples/transformers_patch.py

Needs transformers: pip install 'tvm_gdn[models]'
"""

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import tvm_gdn
from tvm_gdn.integrations.transformers import patch
from tvm_gdn.parity import rms_ratio

torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
    linear_value_head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, initializer_range=0.05, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
model = Qwen3NextForCausalLM(config).eval()
prompt = torch.randint(1, 512, (2, 37))


def generate() -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits of every step."""
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


stock_tokens, stock_logits = generate()
with patch(model) as patched:
    print(f"patched layers: {', '.join(patched.layers)}")
    tokens, logits = generate()
unpatched = generate()[0]  # leaving the block restores the model

print(f"check tokens: {int((tokens != stock_tokens).sum())} of {tokens.numel()} differ from transformers' own, limit 0")
assert torch.equal(tokens, stock_tokens) and torch.equal(unpatched, stock_tokens)
error = rms_ratio(logits, stock_logits)
print(f"check logits: RMS error {error:.1e}, limit 1e-04")
assert error <= 1e-4
for name in ("chunk_gated_delta_rule", "fused_sigmoid_gating_delta_rule_update"):
    print(f"{name}: {tvm_gdn.dispatch.served_by(name)}")
