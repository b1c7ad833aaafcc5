"""Serve the experts of a transformers model with tvm_gdn's `fused_experts`.

transformers looks an experts implementation up by the name in a model's configuration; :func:`register` adds ``"tvm_gdn"`` to
those names. :class:`Served` sets it for one model, and takes it back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tvm_gdn.logs import warn_once
from tvm_gdn.packed_experts import PackedExperts, pack_experts

NAME = "tvm_gdn"
_packs: weakref.WeakKeyDictionary[nn.Module, PackedExperts] = weakref.WeakKeyDictionary()


def unsupported(experts: nn.Module) -> str:
    """Why `fused_experts` cannot serve a module of experts; empty if it can."""
    from transformers.integrations import moe

    layout: Any = experts
    if not getattr(layout, "has_gate", False) or not getattr(layout, "is_concatenated", True):
        return "gate and up projection are not one after the other"
    if layout.has_bias or layout.is_transposed or getattr(layout, "has_post_expert_norm", False):
        return "it has biases, transposed weights or a norm after each expert"
    if getattr(type(experts), "_apply_gate", None) is not moe._default_apply_gate:
        return "it has a gate function of its own"
    if type(layout.act_fn).__name__ not in {"SiLU", "SiLUActivation"}:
        return f"its activation is {type(layout.act_fn).__name__}, not SiLU"
    return ""


def find(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that can be served, by qualified name."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, field) for field in ("gate_up_proj", "down_proj", "act_fn", "config", "_is_expert_parallel"))
        and not unsupported(module)
    }


def forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Take the place of an experts implementation of transformers; what cannot be served runs on its ``grouped_mm``."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    import tvm_gdn

    layout: Any = self
    pack = _packs.get(self)
    reason = unsupported(self)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, top_k_weights, layout.gate_up_proj)):
        reason = "gradients are enabled, and fused_experts has no backward pass: run under torch.no_grad()"
    elif hidden_states.device.type != "cpu":
        reason = f"the model is on {hidden_states.device.type}"
    elif pack is None and hidden_states.dtype != layout.gate_up_proj.dtype:
        reason = f"activations are {hidden_states.dtype}, weights {layout.gate_up_proj.dtype}"
    if reason:
        if not torch.compiler.is_compiling():
            warn_once(f"{type(self).__name__} runs on transformers' grouped_mm: {reason}")
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if pack is not None:
        return tvm_gdn.fused_experts(hidden_states, pack, topk_weights=top_k_weights, topk_ids=top_k_index)
    return tvm_gdn.fused_experts(hidden_states, layout.gate_up_proj, layout.down_proj, top_k_weights, top_k_index)


def register() -> None:
    """Make ``"tvm_gdn"`` an experts implementation of transformers (``model.set_experts_implementation("tvm_gdn")``)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


class Served:
    """The experts of one model on `fused_experts`, until :meth:`restore`.

    Parameters
    ----------
    modules : iterable of torch.nn.Module
        What `find` found.
    scheme : str, optional
        Pack the weights so (`pack_experts`), in memory of their own; the model keeps its weights.
    """

    def __init__(self, modules: Iterable[nn.Module], scheme: str | None = None) -> None:
        self._modules = tuple(modules)
        if self._modules:
            register()
        configs: dict[int, Any] = {id(module.config): module.config for module in self._modules}
        if scheme is not None:
            for module in self._modules:
                layout: Any = module
                _packs[module] = pack_experts(layout.gate_up_proj, layout.down_proj, scheme)
        self._previous = [(config, config._experts_implementation) for config in configs.values()]
        for config in configs.values():
            config._experts_implementation_internal = NAME

    def restore(self) -> None:
        """Give every configuration its implementation back, and forget the packs."""
        for config, name in self._previous:
            config._experts_implementation_internal = name
        for module in self._modules:
            _packs.pop(module, None)
        self._previous, self._modules = [], ()
