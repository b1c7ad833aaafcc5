"""The forward of the gated norm of a Gated DeltaNet layer of transformers, on tvm_gdn's `rms_norm_gated`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tvm_gdn.integrations.gdn_layer import Mark, needs_gradients

OPERATOR = "rms_norm_gated"
_ACTIVATIONS = ("silu", "swish", "sigmoid")


def forward(self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Take the place of a gated norm's forward; the product with the weight is not rounded in between."""
    import tvm_gdn

    norm: Any = self
    mark: Mark = norm._tvm_gdn
    unserved = not mark.switch.active or norm.activation not in _ACTIVATIONS
    if unserved or needs_gradients("gated norm", (hidden_states, norm.weight, gate)):
        own: torch.Tensor = type(norm).forward(self, hidden_states, gate)
        return own
    return tvm_gdn.rms_norm_gated(hidden_states, norm.weight, gate, norm.variance_epsilon, activation=norm.activation)
