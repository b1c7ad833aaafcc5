"""Delta rules as users of flash-linear-attention 0.6 call them.

No word of tvm_gdn: `tests/test_verbatim.py` runs this file with its imports changed, and with nothing else changed.
"""

import pytest
import torch
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda, fused_recurrent_kda


def loop(q, k, v, g, beta, state, scale=None):
    """float64 token loop; g [B, T, H] or [B, T, H, K], state [B, H, K, V]."""
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state))
    g = g if g.ndim == 4 else g[..., None]
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None]
        u = (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])) * beta[:, t, :, None]
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (scale or q.shape[-1] ** -0.5))
    return torch.stack(out, 1), S


def tensors(B, T, H, D, channel=False):
    torch.manual_seed(B + T + H + D)
    q, k = torch.randn(B, T, H, D), torch.nn.functional.normalize(torch.randn(B, T, H, D), dim=-1)
    v, beta = torch.randn(B, T, H, 2 * D), torch.rand(B, T, H)
    g = -torch.rand(B, T, H, D) if channel else torch.nn.functional.logsigmoid(torch.rand(B, T, H))
    return q, k, v, g, beta, torch.randn(B, H, D, 2 * D) / 8


def close(out, want, limit=1e-5):
    assert (out.double() - want).square().mean().sqrt() < limit * want.square().mean().sqrt()


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize(("B", "T", "H", "scale"), [(1, 63, 1, 1.0), (2, 500, 3, None), (2, 65, 4, 0.1)])
def test_gated(function, B, T, H, scale):
    q, k, v, g, beta, h0 = tensors(B, T, H, 64)
    o, ht = function(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=h0, output_final_state=True)
    want, last = loop(q, k, v, g, beta, h0, scale)
    close(o, want)
    close(ht, last)


def test_gated_varlen():
    q, k, v, g, beta, _ = tensors(1, 130, 2, 64)
    bounds = torch.tensor([0, 15, 100, 130])
    h0 = torch.randn(3, 2, 64, 128) / 8
    o, ht = chunk_gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta, initial_state=h0, output_final_state=True, cu_seqlens=bounds)
    for n in range(3):
        part = [x[:, bounds[n] : bounds[n + 1]] for x in (q, k, v, g, beta)]
        want, last = loop(*part, h0[n : n + 1])
        close(o[:, bounds[n] : bounds[n + 1]], want)
        close(ht[n : n + 1], last)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize("T", [15, 65])
def test_kda(function, T):
    q, k, v, g, beta, h0 = tensors(2, T, 2, 64, channel=True)
    o, ht = function(q=q, k=k, v=v, g=g, beta=beta, initial_state=h0, output_final_state=True)
    want, last = loop(q, k, v, g, beta, h0)
    close(o, want)
    close(ht, last)


@pytest.mark.parametrize("function", [chunk_delta_rule, fused_recurrent_delta_rule])
def test_delta(function):
    q, k, v, _, beta, h0 = tensors(2, 65, 2, 64)
    o, ht = function(q, k, v, beta, initial_state=h0, output_final_state=True)
    want, last = loop(q, k, v, torch.zeros_like(beta), beta, h0)
    close(o, want)
    close(ht, last)
