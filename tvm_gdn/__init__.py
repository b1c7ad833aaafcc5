"""Compiled operators for hybrid language models, written once in TVM TensorIR.

Importing the package registers ``torch.ops.tvm_gdn.*`` and imports neither tvm nor a compiler.
"""

from __future__ import annotations

from pathlib import Path

# In a checkout that is not installed, `schedules` and `targets` lie beside this folder; setuptools maps them into it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "targets" / "native.toml").is_file() and (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

from tvm_gdn import logs, torch_ops  # noqa: E402
from tvm_gdn.ops import OPS  # noqa: E402
from tvm_gdn.ops.gating import fused_gdn_gating  # noqa: E402
from tvm_gdn.ops.moe import expert_stats, moe_route, moe_sort  # noqa: E402
from tvm_gdn.ops.moe_experts import fused_experts, shared_expert  # noqa: E402
from tvm_gdn.ops.recurrent import (  # noqa: E402
    fused_recurrent_gated_delta_rule_update,
    fused_sigmoid_gating_delta_rule_update,
    packed_decode_gated_delta_rule,
)
from tvm_gdn.ops.sequence import (  # noqa: E402
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from tvm_gdn.packed_experts import PackedExperts, pack_experts  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "OPS",
    "PackedExperts",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "expert_stats",
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
    "shared_expert",
]

logs.configure()
for _spec in OPS.values():
    torch_ops.register(_spec)
