"""The public functions; importing this module registers ``torch.ops.tvm_gdn.*``."""

from __future__ import annotations

from tvm_gdn import logs, torch_ops
from tvm_gdn.ops import OPS
from tvm_gdn.ops.conv import causal_conv1d_fn, causal_conv1d_update
from tvm_gdn.ops.fused_decode import fused_conv_gated_delta_rule_update
from tvm_gdn.ops.gating import fused_gdn_gating
from tvm_gdn.ops.moe import expert_stats, moe_route, moe_sort
from tvm_gdn.ops.moe_experts import fused_experts, shared_expert
from tvm_gdn.ops.norm import rms_norm_gated
from tvm_gdn.ops.packed_decode import packed_decode_gated_delta_rule
from tvm_gdn.ops.recurrent import (
    fused_recurrent_gated_delta_rule_update,
    fused_sigmoid_gating_delta_rule_update,
)
from tvm_gdn.ops.sequence import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from tvm_gdn.packed_experts import PackedExperts, pack_experts

__all__ = [
    "OPS",
    "PackedExperts",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "expert_stats",
    "fused_conv_gated_delta_rule_update",
    "fused_experts",
    "fused_gdn_gating",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_update",
    "fused_recurrent_kda",
    "fused_sigmoid_gating_delta_rule_update",
    "moe_route",
    "moe_sort",
    "pack_experts",
    "packed_decode_gated_delta_rule",
    "rms_norm_gated",
    "shared_expert",
]

logs.configure()
for _spec in OPS.values():
    torch_ops.register(_spec)
