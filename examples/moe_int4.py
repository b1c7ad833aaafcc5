"""Mixture of experts on int4 weights: pack once, save, load, route, run.

    python examples/moe_int4.py

int4 with a scale per 32 weights: 4.5 bits a weight, 0.28 of bf16's bytes, which is what a decode step waits for.
"""

import tempfile
from pathlib import Path

import torch

import tvm_gdn

T, E, D, INNER, K = 65, 8, 256, 128, 2  # tokens, experts, hidden size, intermediate size, experts per token
torch.manual_seed(0)
w13 = torch.randn(E, 2 * INNER, D, dtype=torch.bfloat16) * D**-0.5  # gate rows, then up rows
w2 = torch.randn(E, D, INNER, dtype=torch.bfloat16) * INNER**-0.5
x = torch.randn(T, D, dtype=torch.bfloat16)
logits = torch.randn(T, E)

pack = tvm_gdn.pack_experts(w13, w2, "int4_kgroup", progress=False)
with tempfile.TemporaryDirectory() as folder:
    pack.save(Path(folder) / "experts.safetensors")
    pack = tvm_gdn.PackedExperts.load(Path(folder) / "experts.safetensors")
share = pack.nbytes / ((w13.numel() + w2.numel()) * 2)
print(f"check bytes of bf16: share {share:.3f}, limit 0.290")
assert share <= 0.29

weights, ids = tvm_gdn.moe_route(logits, top_k=K)  # softmax, the K largest, weights that add up to 1
out = tvm_gdn.fused_experts(x, pack, topk_weights=weights, topk_ids=ids)
print(f"out {tuple(out.shape)} {out.dtype}, tokens per expert {ids.flatten().bincount().tolist()}")


def by_hand(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Every token through its experts in float64, one after the other."""
    total = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for weight, expert in zip(weights[t].double(), ids[t].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
            total[t] += weight * (down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return total


# Against the very weights that the pack holds only rounding to int8 rows and bf16 is left; against the originals int4's loss too.
for name, pair, limit in (("packed weights", pack.unpack(), 0.03), ("original weights", (w13, w2), 0.15)):
    want = by_hand(*pair)
    error = float((out - want).abs().mean() / want.abs().mean())
    print(f"check {name}: mean error {error:.1e}, limit {limit:.2f}")
    assert error <= limit
