"""A conversation on a pool of states: prefill, decode, and a second turn that resumes where the first one ended.

    python examples/multi_turn.py

The pool is all that is kept between calls; its size does not grow with the conversation.
"""

import torch

import tvm_gdn
from tvm_gdn.parity import rms_ratio

H, HV, K, V = 4, 8, 128, 128
torch.manual_seed(0)
pool = torch.full((16, HV, K, V), 7.0)  # 16 slots; whatever an earlier conversation left in ours must not matter
slot = torch.tensor([5])
pool[slot] = 0.0


def tokens(count: int) -> tuple[torch.Tensor, ...]:
    """Operands of some tokens of one sequence, as a model's projections would give them: q, k, v, g, beta."""
    return (
        torch.randn(1, count, H, K),
        torch.randn(1, count, H, K),
        torch.randn(1, count, HV, V),
        -torch.rand(1, count, HV),
        torch.rand(1, count, HV),
    )


def prefill(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Many tokens at once, in chunks; the state of the slot is read and updated in place."""
    o, _ = tvm_gdn.chunk_gated_delta_rule(*operands, initial_state=pool, initial_state_indices=slot, use_qk_l2norm_in_kernel=True)
    return o


def decode(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One token, on the same slot."""
    return tvm_gdn.fused_recurrent_gated_delta_rule_update(
        *operands, initial_state_source=pool, initial_state_indices=slot, use_qk_l2norm_in_kernel=True
    )


turns = [tokens(65), *(tokens(1) for _ in range(8)), tokens(30), *(tokens(1) for _ in range(4))]
outputs = [prefill(turn) if turn[0].shape[1] > 1 else decode(turn) for turn in turns]

whole = [torch.cat(parts, dim=1) for parts in zip(*turns, strict=True)]
want_o, want_state = tvm_gdn.reference.chunk_gated_delta_rule(
    *whole, output_final_state=True, use_qk_l2norm_in_kernel=True, exact=True
)
print(f"{len(turns)} calls, {want_o.shape[1]} tokens, compared with one pass over the whole conversation")
for name, got, want in (("o", torch.cat(outputs, dim=1), want_o), ("state", pool[slot], want_state)):
    error = rms_ratio(got, want)
    print(f"check {name}: RMS error {error:.1e}, limit 1e-05")
    assert error <= 1e-5
others = torch.cat([pool[:5], pool[6:]])
print(f"check other slots: {int((others != 7.0).sum())} values changed, limit 0")
assert bool((others == 7.0).all())
