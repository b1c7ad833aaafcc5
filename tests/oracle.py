"""Float64 numpy oracle of the gated delta rule, written from the contract for one token of one head at a time."""

from __future__ import annotations

import math

import numpy as np
import torch


def oracle_gates(A_log, a, b, dt_bias, softplus_beta=1.0, threshold=20.0):
    g, beta = np.empty(a.shape), np.empty(b.shape)
    for index in np.ndindex(*a.shape):
        x = a[index] + dt_bias[index[-1]]
        softplus = x if softplus_beta * x > threshold else math.log1p(math.exp(softplus_beta * x)) / softplus_beta
        g[index] = -math.exp(A_log[index[-1]]) * softplus
        beta[index] = 1 / (1 + math.exp(-b[index]))
    return g, beta


def oracle_delta(q, k, v, g, beta, bounds, *, scale=None, l2norm=False, pool=None, slots=None, update=True,
                 buffer=None, buffer_slots=None, parents=None):  # fmt: skip
    """Tokens on axis 0, sequences between bounds, K-first float64 states; pool and buffer are written in place."""
    sequences, group, (dim_k, dim_v) = len(bounds) - 1, v.shape[1] // q.shape[1], (q.shape[-1], v.shape[-1])
    slots = range(sequences) if slots is None else slots
    buffer_slots = range(sequences) if buffer_slots is None else buffer_slots
    scale = 1 / math.sqrt(dim_k) if scale is None else scale
    o, finals = np.full(v.shape, np.nan), np.full((sequences, v.shape[1], dim_k, dim_v), np.nan)
    for n in range(sequences):
        for hv in range(v.shape[1]):
            start = np.zeros((dim_k, dim_v)) if pool is None or slots[n] == -1 else pool[slots[n], hv].copy()
            state = start.copy()
            for t, token in enumerate(range(bounds[n], bounds[n + 1])):
                if parents is not None and t > 0:
                    parent, slot = parents[n][t], buffer_slots[n]
                    stored = np.zeros_like(start) if slot == -1 else buffer[slot, max(parent, 0), hv]
                    state = start.copy() if parent == -1 else stored.astype(np.float64)
                q_t, k_t = q[token, hv // group], k[token, hv // group]
                if l2norm:
                    q_t, k_t = (x / math.sqrt(sum(y * y for y in x) + 1e-6) for x in (q_t, k_t))
                state *= math.exp(g[token, hv])
                for j in range(dim_v):
                    u = (v[token, hv, j] - float(np.dot(state[:, j], k_t))) * beta[token, hv]
                    state[:, j] += k_t * u
                    o[token, hv, j] = np.dot(state[:, j], q_t * scale)
                if buffer is not None and buffer_slots[n] != -1:
                    buffer[buffer_slots[n], t, hv] = state
            finals[n, hv] = state
            if pool is not None and update and slots[n] != -1:
                pool[slots[n], hv] = state
    return o, finals


class Data:
    """Random operands of one call and the oracle's view of them."""

    def __init__(self, batch=1, tokens=5, heads=2, v_heads=4, dim_k=7, dim_v=5, dtype=torch.float64, seed=0):
        gen = torch.Generator().manual_seed(seed)

        def draw(*shape, dtype=dtype):
            return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

        self.q, self.k = draw(batch, tokens, heads, dim_k), draw(batch, tokens, heads, dim_k)
        self.v = draw(batch, tokens, v_heads, dim_v)
        self.a, self.b = draw(batch, tokens, v_heads), draw(batch, tokens, v_heads)
        self.A_log, self.dt_bias = draw(v_heads), draw(v_heads)
        self.g = -torch.rand((batch, tokens, v_heads), generator=gen, dtype=torch.float64).to(dtype)
        self.beta = self.b.sigmoid()
        self.k = self.k / dim_k**0.5  # keeps the recurrence contracting
        self.dense_bounds = [n * tokens for n in range(batch + 1)]
        self.states = lambda *lead, dtype=dtype: draw(*lead, v_heads, dim_k, dim_v, dtype=dtype)

    @property
    def qkvgb(self):
        return self.q, self.k, self.v, self.g, self.beta

    def oracle(self, bounds=None, gates=None, **kwargs):
        qkvgb = list(self.qkvgb)[:3] + list(gates if gates is not None else (self.g, self.beta))
        flat = [num(x).reshape(-1, *x.shape[2:]) for x in qkvgb]
        o, finals = oracle_delta(*flat, self.dense_bounds if bounds is None else bounds, **kwargs)
        return o.reshape(self.v.shape), finals


def num(x):
    """Float64 numpy copy."""
    return x.double().numpy().copy() if isinstance(x, torch.Tensor) else np.array(x, dtype=np.float64)
