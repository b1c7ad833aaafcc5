"""Sequences of different lengths packed into one call by cu_seqlens, without padding; one of them is empty.

python examples/varlen_batch.py
"""

import torch

import tvm_gdn
from tvm_gdn.parity import rms_ratio

H, HV, K, V = 4, 8, 128, 128
lengths = [63, 1, 0, 200, 17]
torch.manual_seed(0)
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)  # bounds: [0, 63, 64, 64, 264, 281]
total = sum(lengths)
q, k = (torch.randn(1, total, H, K) for _ in range(2))  # packed along the tokens, so B is 1
v, g, beta = torch.randn(1, total, HV, V), -torch.rand(1, total, HV), torch.rand(1, total, HV)
initial = torch.randn(len(lengths), HV, K, V)  # one state per sequence

o, final = tvm_gdn.chunk_gated_delta_rule(
    q, k, v, g, beta, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True
)

print(f"{len(lengths)} sequences, {total} tokens; each compared with a call of its own")
for n, length in enumerate(lengths):
    part = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
    want_o, want_final = tvm_gdn.reference.chunk_gated_delta_rule(
        *(x[:, part] for x in (q, k, v, g, beta)),
        initial_state=initial[n : n + 1],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        exact=True,
    )
    error = max(rms_ratio(o[:, part], want_o), rms_ratio(final[n : n + 1], want_final))
    print(f"check sequence {n} of {length} tokens: RMS error {error:.1e}, limit 1e-05")
    assert error <= 1e-5
