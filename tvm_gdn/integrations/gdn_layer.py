"""The forward of a Gated DeltaNet layer of transformers with tvm_gdn's operators between the projections.

The projections, the cache, the mask and the gated norm (`gated_norm.py`) stay those of the layer; convolution, gates and delta
rule run compiled. A decode step computes its gates inside the recurrence, and for one sequence on a CPU also its convolution:
one operator from projection to norm. What an operator does not serve runs on the layer's own functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tvm_gdn.integrations import packing
from tvm_gdn.logs import warn_once

#: Operator of tvm_gdn -> the function of the modeling module in whose place it runs; the gates have none.
FUNCTIONS = {
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
    "chunk_gated_delta_rule": "torch_chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "torch_recurrent_gated_delta_rule",
}
GATES = "fused_gdn_gating"
MARK = "_tvm_gdn"
#: What transformers up to 5.23 calls a layer's argument `cache`; later ones take both names.
OLD_CACHE = "cache_params"
_CONV_ACTIVATIONS = ("silu", "swish", None)
#: Where softplus becomes the identity: torch's default, which the layers use.
_SOFTPLUS = (1.0, 20.0)
#: Sequences up to which a decode step is one fused operator: it saves a call, but from a few sequences on the separate ones,
#: whose convolution streams its taps and states, are as fast or faster (`tools/bench_fused_decode.py`, docs/performance.md).
_FUSED_BATCH = 1


class Switch:
    """What one patch serves, and whether it still does; copies of a patched module share the switch, and so end with it."""

    def __init__(self, operators: Iterable[str]) -> None:
        self.operators = frozenset(operators)
        self.active = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return self


@dataclass(frozen=True)
class Mark:
    """The attribute of a patched module."""

    switch: Switch
    functions: ModuleType  # the modeling module, whose functions run where an operator is not chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_mark, ()  # a module read from a file is not patched


def _no_mark() -> None:
    return None


def needs_gradients(what: str, tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether transformers' own forward must run, because the operators have no backward pass; said once."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)):
        return False
    if not torch.compiler.is_compiling():
        warn_once(
            f"a patched {what} runs with gradients enabled: transformers' own functions run, since tvm_gdn's"
            " operators have no backward pass; run under torch.no_grad() to use tvm_gdn"
        )
    return True


def forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    cache: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Take the place of the forward of a Gated DeltaNet layer."""
    layer: Any = self
    cache = kwargs.pop(OLD_CACHE, cache)
    mark: Mark = layer._tvm_gdn
    if not mark.switch.active or needs_gradients("Gated DeltaNet layer", (hidden_states, *self.parameters())):
        own: torch.Tensor = type(layer).forward(self, hidden_states, cache, attention_mask, **kwargs)
        return own
    bounds = packing.bounds(kwargs, hidden_states)
    if cache is not None:
        packing.refuse_cache(bounds)
    hidden_states = mark.functions.apply_mask_to_padding_states(hidden_states, attention_mask)
    mixed_qkv, z, a, b = _project(layer, hidden_states)
    state = None if cache is None else cache.get_recurrent_state(layer.layer_idx, state_idx=0)
    final: torch.Tensor | None
    if state is not None and _fuses(layer, mark, mixed_qkv, cache, bounds):
        output, final = _fused_step(layer, mixed_qkv, a, b, state, cache)
    else:
        mixed_qkv = _convolve(layer, mark, mixed_qkv, cache, bounds, kwargs)
        if mixed_qkv.stride(-1) != 1:  # transformers' own convolution leaves tokens innermost; the operators read heads
            mixed_qkv = mixed_qkv.contiguous()
        parts = mixed_qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
        sizes = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in zip(parts, sizes, strict=True))
        heads = q, k, v
        if state is not None and hidden_states.shape[1] == 1:
            output, final = _decode(layer, mark, heads, a, b, state, cache, bounds)
        else:
            output, final = _prefill(layer, mark, heads, a, b, state, cache, bounds)
    if cache is not None:
        cache.update_recurrent_state(final, layer.layer_idx)
    norm, project = (layer.norm, layer.out_proj) if hasattr(layer, "out_proj") else (layer.o_norm, layer.o_proj)
    rows = norm(output.reshape(-1, layer.head_v_dim), z.reshape(-1, layer.head_v_dim))
    projected: torch.Tensor = project(rows.reshape(*hidden_states.shape[:2], -1))
    return projected


def _project(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in one tensor ``[B, T, 2*H*K + HV*V]``, the norm's gate z, and a and b ``[B, T, HV]``."""
    if hasattr(layer, "in_proj_qkvz"):  # interleaved by key head: Qwen3-Next
        query, key, value, z, b, a = layer.fix_query_key_value_ordering(
            layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states)
        )
        return torch.cat([x.flatten(2) for x in (query, key, value)], -1), z, a, b
    if hasattr(layer, "in_proj_qkv"):  # Qwen3.5 and later
        qkv, z, a, b = (getattr(layer, f"in_proj_{name}")(hidden_states) for name in ("qkv", "z", "a", "b"))
        return qkv, z, a, b
    query, key, value, z, a, b = (getattr(layer, f"{name}_proj")(hidden_states) for name in "qkvgab")  # Olmo-Hybrid
    return torch.cat([query, key, value], -1), z, a, b


def _fuses(layer: Any, mark: Mark, mixed_qkv: torch.Tensor, cache: Any, bounds: torch.Tensor | None) -> bool:
    """Whether a step with a cached state runs as one fused operator."""
    parts = {"causal_conv1d_update", "fused_recurrent_gated_delta_rule", GATES}
    return (
        mixed_qkv.shape[0] <= _FUSED_BATCH
        and mixed_qkv.shape[1] == 1
        and mixed_qkv.device.type == "cpu"
        and bounds is None
        and parts <= mark.switch.operators
        and layer.activation in _CONV_ACTIVATIONS
        and not _doubles(layer)
        and _copies_into_own_tensor(cache, layer)
        and not cache.is_recording_past(layer.layer_idx)
    )


def _fused_step(
    layer: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, state: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sequence from the projections on; both states are updated in the cache's tensors."""
    import tvm_gdn

    conv_state = cache.get_conv_state(layer.layer_idx, state_idx=0)
    output = tvm_gdn.fused_conv_gated_delta_rule_update(
        mixed_qkv[:, 0], conv_state, layer.conv1d.weight.squeeze(1), a[:, 0], b[:, 0], layer.A_log, layer.dt_bias, state,
        layer.conv1d.bias, activation=layer.activation,
    )  # fmt: skip
    return output, state


def _convolve(
    layer: Any, mark: Mark, mixed_qkv: torch.Tensor, cache: Any, bounds: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Convolution of ``[B, T, D]`` behind the cached inputs; the cache is updated."""
    import tvm_gdn

    weight, bias, activation = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.activation
    chosen = mark.switch.operators if activation in _CONV_ACTIVATIONS else ()
    tokens, x = mixed_qkv.shape[1], mixed_qkv.transpose(1, 2)
    state = None if cache is None else cache.get_conv_state(layer.layer_idx, state_idx=0)
    if state is not None and tokens == 1 and not cache.is_recording_past(layer.layer_idx):
        source = tvm_gdn if "causal_conv1d_update" in chosen else mark.functions
        o: torch.Tensor = source.causal_conv1d_update(x, state, weight, bias, activation)
        return o.transpose(1, 2)
    if cache is not None:
        x = cache.update_conv_state(x, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
    if "causal_conv1d_fn" not in chosen:
        o = mark.functions.causal_conv1d_fn(x, weight, bias, activation=activation, **kwargs)
    elif bounds is not None:
        o = tvm_gdn.causal_conv1d_fn(x[0], weight, bias, query_start_loc=bounds, activation=activation)[None]
    else:
        o = tvm_gdn.causal_conv1d_fn(x, weight, bias, activation=activation)
    return o[:, :, -tokens:].transpose(1, 2)


def _gates(layer: Any, mark: Mark, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import tvm_gdn

    if GATES in mark.switch.operators:
        g, beta = tvm_gdn.fused_gdn_gating(layer.A_log, a, b, layer.dt_bias, *_SOFTPLUS)
    else:
        g, beta = -layer.A_log.float().exp() * functional.softplus(a.float() + layer.dt_bias), b.sigmoid()
    return g, 2 * beta if _doubles(layer) else beta


def _doubles(layer: Any) -> bool:
    """Whether the write strength goes up to 2 (eigenvalues down to -1: Olmo-Hybrid)."""
    return bool(getattr(layer, "allow_neg_eigval", False))


def _decode(
    layer: Any,
    mark: Mark,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
    cache: Any,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sequence. The state is updated in the cache's tensor where the cache would copy the new one there anyway."""
    import tvm_gdn

    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds}
    ours = "fused_recurrent_gated_delta_rule" in mark.switch.operators
    in_place = ours and _copies_into_own_tensor(cache, layer)
    if in_place and GATES in mark.switch.operators and not _doubles(layer):
        output = tvm_gdn.fused_sigmoid_gating_delta_rule_update(
            layer.A_log, a, layer.dt_bias, *_SOFTPLUS, *heads, b, state, None, **options
        )
        return output, state
    g, beta = _gates(layer, mark, a, b)
    if in_place:
        return tvm_gdn.fused_recurrent_gated_delta_rule_update(*heads, g, beta, initial_state_source=state, **options), state
    function: Any = tvm_gdn.fused_recurrent_gated_delta_rule if ours else mark.functions.torch_recurrent_gated_delta_rule
    output, final = function(*heads, g=g, beta=beta, initial_state=state, output_final_state=True, **options)
    return output, final


def _prefill(
    layer: Any,
    mark: Mark,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor | None,
    cache: Any,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    import tvm_gdn

    ours = "chunk_gated_delta_rule" in mark.switch.operators
    function: Any = tvm_gdn.chunk_gated_delta_rule if ours else mark.functions.torch_chunk_gated_delta_rule
    g, beta = _gates(layer, mark, a, b)
    output, final = function(
        *heads, g=g, beta=beta, initial_state=state, output_final_state=cache is not None,
        use_qk_l2norm_in_kernel=True, cu_seqlens=bounds,
    )  # fmt: skip
    return output, final


def _copies_into_own_tensor(cache: Any, layer: Any) -> bool:
    """Whether this cache hands out its own state tensor and copies the new state into it, as transformers' caches do.

    A cache class of somebody else may share that tensor (a common prefix) or keep what it was given (a history).
    """
    from transformers.cache_utils import Cache, LinearAttentionLayer

    if not isinstance(cache, Cache):
        return False
    layer_cache: Any = cache.layers[layer.layer_idx]
    return (
        type(cache).get_recurrent_state is Cache.get_recurrent_state
        and type(cache).update_recurrent_state is Cache.update_recurrent_state
        and isinstance(layer_cache, LinearAttentionLayer)
        and type(layer_cache).update_recurrent_state is LinearAttentionLayer.update_recurrent_state
    )
