r"""Speculative decoding: verify a tree of drafted tokens in one call, then commit the path that was accepted.

    python examples/verify_tree.py

        0          the token that is certain
       / \
      1   2        two drafts for the next one
      |
      3            a draft that follows 1
"""

import torch

import tvm_gdn
from tvm_gdn.parity import rms_ratio

B, STEPS, H, HV, K, V = 2, 4, 4, 8, 128, 128
torch.manual_seed(0)
parents = torch.tensor([[-1, 0, 0, 1]] * B)  # -1: step 0 starts from the state in the pool
q, k = (torch.randn(B, STEPS, H, K) for _ in range(2))
v, g, beta = torch.randn(B, STEPS, HV, V), -torch.rand(B, STEPS, HV), torch.rand(B, STEPS, HV)
pool = torch.randn(8, HV, K, V)
slots = torch.tensor([6, 2])
before = pool.clone()

buffer = torch.empty(B, STEPS, HV, K, V)  # gets the state after every step
o = tvm_gdn.fused_recurrent_gated_delta_rule_update(
    q, k, v, g, beta,
    initial_state_source=pool, initial_state_indices=slots, use_qk_l2norm_in_kernel=True,
    disable_state_update=True,  # nothing is decided yet
    intermediate_states_buffer=buffer, intermediate_state_indices=torch.arange(B), cache_steps=STEPS,
    retrieve_parent_token=parents,
)  # fmt: skip
print(f"check pool before the commit: {int((pool != before).sum())} values changed, limit 0")
assert torch.equal(pool, before)

# The model's logits decide; say it accepted 0-1-3 in the first sequence and 0-2 in the second.
paths = [[0, 1, 3], [0, 2]]
for n, path in enumerate(paths):
    pool[slots[n]] = buffer[n, path[-1]]

for n, path in enumerate(paths):
    want_o, want_state = tvm_gdn.reference.fused_recurrent_gated_delta_rule(
        *(x[n : n + 1, path] for x in (q, k, v, g, beta)),
        initial_state=before[slots[n : n + 1]],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        exact=True,
    )
    error = max(rms_ratio(o[n : n + 1, path], want_o), rms_ratio(pool[slots[n : n + 1]], want_state))
    print(f"check sequence {n}, path {'-'.join(map(str, path))}: RMS error {error:.1e}, limit 1e-05")
    assert error <= 1e-5
