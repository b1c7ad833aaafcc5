"""Torch-native reference of what stands around the delta rule in a layer: convolution and gated norm.

Part of :mod:`tvm_gdn.reference`, whose rules hold here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "compute_dtype", "rms_norm_gated"]


def compute_dtype(exact: bool) -> torch.dtype:
    """Dtype of the arithmetic: float64 for comparisons, fp32 in the operators' place."""
    return torch.float64 if exact else torch.float32


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation in {"silu", "swish"}:
        return x * torch.sigmoid(x)
    return torch.sigmoid(x) if activation == "sigmoid" else x


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
    *,
    exact: bool = False,
) -> Tensor:
    """Causal depthwise convolution, sequence by sequence; conv_states ``[slots, dim, length]`` is updated in place.

    x is ``[dim, total]`` with ``query_start_loc``, else ``[B, dim, T]``. Sequence n continues from the state in slot
    ``cache_indices[n]`` where ``has_initial_state[n]``, else from zeros; a slot ``pad_slot_id`` reads zeros and writes nothing.
    """
    dtype = compute_dtype(exact)
    if query_start_loc is None:
        pieces = list(x.to(dtype))
    else:
        pieces = [x[:, begin:end].to(dtype) for begin, end in pairwise(query_start_loc.tolist())]
    slots = list(range(len(pieces))) if cache_indices is None else cache_indices.tolist()
    flags = [False] * len(pieces) if has_initial_state is None else has_initial_state.tolist()
    dim, width = weight.shape
    length = width - 1 if conv_states is None else conv_states.shape[2]
    outputs = []
    for piece, slot, flag in zip(pieces, slots, flags, strict=True):
        state = piece.new_zeros(dim, length)
        real = conv_states is not None and slot != pad_slot_id
        if conv_states is not None and real and flag:
            state = conv_states[slot].to(dtype)
        inputs = torch.cat([state, piece], 1)
        taps = [inputs[:, length - (width - 1) + k :][:, : piece.shape[1]] * weight.to(dtype)[:, k, None] for k in range(width)]
        out = torch.stack(taps).sum(0)
        outputs.append(_activate(out if bias is None else out + bias.to(dtype)[:, None], activation))
        if conv_states is not None and real and piece.shape[1]:
            conv_states[slot] = inputs[:, inputs.shape[1] - length :].detach().to(conv_states.dtype)
    if not outputs:
        out = torch.empty_like(x, dtype=dtype)
    else:
        out = torch.stack(outputs) if query_start_loc is None else torch.cat(outputs, 1)
    # Shape, and order of strides, of x.
    return torch.empty_like(x, dtype=dtype if exact else x.dtype).copy_(out)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    *,
    exact: bool = False,
) -> Tensor:
    """:func:`causal_conv1d_fn` on ``[B, dim]`` or ``[B, dim, T]``, every sequence continuing from its state."""
    tokens = x[..., None] if x.ndim == 2 else x
    flags = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    args = (conv_state, None, conv_state_indices, flags, activation, pad_slot_id)
    return causal_conv1d_fn(tokens, weight, bias, *args, exact=exact).reshape(x.shape)


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-6,
    norm_before_gate: bool = True,
    activation: str = "silu",
    *,
    exact: bool = False,
) -> Tensor:
    """Norm over the last axis and gate: ``norm(x) * act(z)``, or ``norm(x * act(z))``; no gate without z."""
    dtype = compute_dtype(exact)
    y, gate = x.to(dtype), None if z is None else _activate(z.to(dtype), activation)
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y if exact else y.to(x.dtype)
