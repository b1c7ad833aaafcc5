"""The forward of a mixture's router of transformers with tvm_gdn's `moe_route` behind its product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tvm_gdn.integrations.gdn_layer import Mark, needs_gradients

OPERATOR = "moe_route"
#: Class names of the routers that can be served.
ROUTERS = (
    "Qwen3NextTopKRouter",
    "Qwen3_5MoeTopKRouter",
    "Qwen4ExpTextTopKRouter",
    "Qwen3MoeTopKRouter",
    "DeepseekV3TopkRouter",
)


def forward(self: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the place of a router's forward: logits, weights and ids of the chosen experts, in the dtypes of the router."""
    import tvm_gdn

    router: Any = self
    mark: Mark = router._tvm_gdn
    if not mark.switch.active or needs_gradients("router", (hidden_states, router.weight)):
        own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = type(router).forward(self, hidden_states)
        return own
    rows = hidden_states.reshape(-1, router.hidden_dim)
    options: dict[str, Any] = {"renormalize": getattr(router, "norm_topk_prob", True)}
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3: everything in fp32
        logits = functional.linear(rows.float(), router.weight.float())
        options |= {
            "scoring": "sigmoid",
            "num_expert_group": router.num_group,
            "topk_group": router.topk_group,
            "correction_bias": router.e_score_correction_bias,
            "routed_scaling_factor": router.routed_scaling_factor,
        }
    else:
        logits = functional.linear(rows, router.weight)
    weights, ids = tvm_gdn.moe_route(logits, router.top_k, **options)
    return logits, weights.to(logits.dtype), ids.long()
