"""One call: the chunked gated delta rule over two sequences, in bf16, with the final states.

    python examples/basic_call.py

The first run compiles the kernel (a few seconds, one log line); later runs load it from the cache.
"""

import torch

import tvm_gdn
from tvm_gdn.parity import rms_ratio

B, T, H, HV, K, V = 2, 500, 4, 8, 128, 128  # two value heads share one query/key head; T need not be a multiple of anything
torch.manual_seed(0)
q, k = (torch.randn(B, T, H, K, dtype=torch.bfloat16) for _ in range(2))
v = torch.randn(B, T, HV, V, dtype=torch.bfloat16)
g = -torch.rand(B, T, HV)  # log-decay: the state is multiplied by exp(g)
beta = torch.rand(B, T, HV, dtype=torch.bfloat16)  # write strength

o, state = tvm_gdn.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

print(f"o {tuple(o.shape)} {o.dtype}, state {tuple(state.shape)} {state.dtype}")
want_o, want_state = tvm_gdn.reference.chunk_gated_delta_rule(
    q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True, exact=True
)  # float64, token by token, no code in common with the kernel
for name, got, want, limit in (("o", o, want_o, 5e-3), ("state", state, want_state, 1e-5)):
    error = rms_ratio(got, want)
    print(f"check {name}: RMS error {error:.1e}, limit {limit:.0e}")
    assert error <= limit
