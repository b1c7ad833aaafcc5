"""Gated-delta-rule scenarios of serving, written for SGLang of 2026: states V-first, pools updated in place.

No word of tvm_gdn: `tests/test_verbatim.py` runs this file with its imports changed, and with nothing else changed.
"""

import time

import pytest
import torch
import torch.nn.functional as F
from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule_update
from sglang.kernels.ops.attention.linear.fused_gdn_gating import fused_gdn_gating
from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import fused_sigmoid_gating_delta_rule_update


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def gates(A_log, a, b, dt_bias):
    return -A_log.double().exp() * F.softplus(a.double() + dt_bias.double()), b.double().sigmoid()


def token_loop(q, k, v, g, beta, state, l2norm):
    """float64, one sequence: q, k [T, H, K], v [T, HV, V], g, beta [T, HV], state [HV, V, K]."""
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state))
    if l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q * q.shape[-1] ** -0.5, k))
    out = []
    for t in range(q.shape[0]):
        S = S * g[t].exp()[:, None, None]
        u = (v[t] - torch.einsum("hvk,hk->hv", S, k[t])) * beta[t][:, None]
        S = S + torch.einsum("hv,hk->hvk", u, k[t])
        out.append(torch.einsum("hvk,hk->hv", S, q[t]))
    return torch.stack(out), S


def close(out, want, limit):
    assert torch.isfinite(out).all() and want.abs().max() > 0
    assert (out.double() - want).square().mean().sqrt() < limit * want.square().mean().sqrt()


def prompt(lengths, heads, v_heads, dim):
    total = sum(lengths)
    q, k = (torch.randn(1, total, heads, dim).bfloat16() for _ in range(2))
    v, g = torch.randn(1, total, v_heads, dim).bfloat16(), -torch.rand(1, total, v_heads)
    return q, k, v, g, torch.rand(1, total, v_heads).bfloat16(), torch.tensor([0, *lengths]).cumsum(0).int()


def step(batch, heads, v_heads, dim):
    q, k = (torch.randn(1, batch, heads, dim).bfloat16() for _ in range(2))
    return {
        "q": q, "k": k, "v": torch.randn(1, batch, v_heads, dim).bfloat16(), "a": torch.randn(batch, v_heads).bfloat16(),
        "b": torch.randn(batch, v_heads).bfloat16(), "A_log": torch.rand(v_heads), "dt_bias": torch.rand(v_heads).bfloat16(),
    }  # fmt: skip


class TestFusedGdnGating:
    @pytest.mark.parametrize("heads", [6, 32, 64, 128])
    @pytest.mark.parametrize("tokens", [1, 64, 1024, 2048])
    def test_gating(self, tokens, heads):
        A_log, dt_bias = torch.rand(heads), torch.rand(heads).bfloat16()
        a, b = torch.randn(tokens, heads).bfloat16(), torch.randn(tokens, heads).bfloat16()
        g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
        want_g, want_beta = gates(A_log, a, b, dt_bias)
        assert g.shape == beta.shape == (1, tokens, heads) and g.dtype == torch.float32
        close(g[0], want_g, 1e-5)
        close(beta[0], want_beta, 5e-3)

    def test_qwen3_next(self):
        self.test_gating(4096, 32)


class TestChunkGatedDeltaRule:
    def check(self, lengths, l2norm, slots=9):
        q, k, v, g, beta, cu_seqlens = prompt(lengths, 2, 4, 64)
        pool = torch.randn(slots, 4, 64, 64) / 8
        before, indices = pool.clone(), torch.randperm(slots)[: len(lengths)].int()
        if not l2norm:
            k = k / 8
        out, _, _ = chunk_gated_delta_rule(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=pool, initial_state_indices=indices, cu_seqlens=cu_seqlens,
            head_first=False, use_qk_l2norm_in_kernel=l2norm,
        )  # fmt: skip
        assert out.shape == v.shape and out.dtype == torch.bfloat16
        for n, slot in enumerate(indices.tolist()):
            part = slice(cu_seqlens[n], cu_seqlens[n + 1])
            want, state = token_loop(*(x[0, part] for x in (q, k, v, g, beta)), before[slot], l2norm)
            close(out[0, part], want, 5e-3)
            close(pool[slot], state, 1e-4)
        untouched = [slot for slot in range(slots) if slot not in indices.tolist()]
        assert torch.equal(pool[untouched], before[untouched])

    @pytest.mark.parametrize("l2norm", [True, False])
    @pytest.mark.parametrize("tokens", [64, 256, 512])
    def test_prefill(self, tokens, l2norm):
        self.check((tokens,), l2norm)

    def test_varlen(self):
        self.check((63, 1, 128, 65), True)


class TestFusedSigmoidGating:
    def check(self, batch=4, heads=16, v_heads=16, slots=None, padding=False, l2norm=True, beta=1.0, threshold=20.0):
        x, slots = step(batch, heads, v_heads, 128), slots or batch
        if not l2norm:
            x["k"] = x["k"] / 11
        pool = torch.randn(slots, v_heads, 128, 128) / 11
        before, indices = pool.clone(), torch.randperm(slots)[:batch].int()
        if padding:
            indices[1] = -1
        out = fused_sigmoid_gating_delta_rule_update(
            A_log=x["A_log"], a=x["a"], dt_bias=x["dt_bias"], softplus_beta=beta, softplus_threshold=threshold, q=x["q"],
            k=x["k"], v=x["v"], b=x["b"], initial_state_source=pool, initial_state_indices=indices,
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32), use_qk_l2norm_in_kernel=l2norm,
        )  # fmt: skip
        decay = F.softplus(x["a"].double() + x["dt_bias"].double(), beta, threshold) * -x["A_log"].double().exp()
        for n, slot in enumerate(indices.tolist()):
            start = before[slot] if slot >= 0 else torch.zeros_like(before[0])
            args = (x["q"][0, n], x["k"][0, n], x["v"][0, n], decay[n], x["b"][n].double().sigmoid())
            want, state = token_loop(*(arg[None] for arg in args), start, l2norm)
            close(out.view(batch, v_heads, 128)[n], want[0], 5e-3)
            if slot >= 0:
                close(pool[slot], state, 1e-4)
        untouched = [slot for slot in range(slots) if slot not in indices.tolist()]
        assert torch.equal(pool[untouched], before[untouched])

    @pytest.mark.parametrize("batch", [1, 4, 8, 16, 32])
    def test_batch(self, batch):
        self.check(batch)

    @pytest.mark.parametrize("heads", [8, 16, 32])
    def test_heads(self, heads):
        self.check(heads=heads, v_heads=heads)

    def test_pool(self):
        self.check(slots=10)

    def test_pool_with_padding(self):
        self.check(slots=10, padding=True)

    def test_grouped_values(self):
        self.check(heads=16, v_heads=32)

    def test_without_l2norm(self):
        self.check(l2norm=False)

    def test_softplus_parameters(self):
        self.check(beta=0.5, threshold=2.0)


class TestFusedRecurrentUpdate:
    @pytest.mark.parametrize("disable", [False, True])
    def test_verification(self, disable):
        q, k, v, g, beta, cu_seqlens = prompt((4, 1, 3), 4, 4, 128)
        pool, indices = torch.randn(8, 4, 128, 128) / 11, torch.tensor([6, 0, 3], dtype=torch.int32)
        before = pool.clone()
        out = fused_recurrent_gated_delta_rule_update(
            q=q, k=k, v=v, g=g, beta=beta, initial_state_source=pool, initial_state_indices=indices, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, disable_state_update=disable,
        )  # fmt: skip
        for n, slot in enumerate(indices.tolist()):
            part = slice(cu_seqlens[n], cu_seqlens[n + 1])
            want, state = token_loop(*(x[0, part] for x in (q, k, v, g, beta)), before[slot], True)
            close(out[0, part], want, 5e-3)
            if not disable:
                close(pool[slot], state, 1e-4)
        kept = range(8) if disable else [1, 2, 4, 5, 7]
        assert torch.equal(pool[list(kept)], before[list(kept)])


class TestIntegration:
    def prefill(self, pool, q, k, v, g, beta, cu_seqlens, indices):
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=pool, initial_state_indices=indices, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    def test_qwen3_next_prefill_then_decode(self):
        heads, v_heads, dim, tokens = 16, 32, 128, 65
        pool, slot = torch.zeros(3, v_heads, dim, dim), torch.tensor([1], dtype=torch.int32)
        x = step(tokens, heads, v_heads, dim)
        g, beta = fused_gdn_gating(x["A_log"], x["a"], x["b"], x["dt_bias"])
        want_g, want_beta = gates(x["A_log"], x["a"], x["b"], x["dt_bias"])
        close(g[0], want_g, 1e-5)
        out = self.prefill(pool, x["q"], x["k"], x["v"], g, beta, torch.tensor([0, tokens], dtype=torch.int32), slot)
        state = torch.zeros(v_heads, dim, dim)
        want, state = token_loop(x["q"][0], x["k"][0], x["v"][0], want_g, want_beta, state, True)
        close(out[0], want, 5e-3)
        for _ in range(3):
            y = {**step(1, heads, v_heads, dim), "A_log": x["A_log"], "dt_bias": x["dt_bias"]}
            out = fused_sigmoid_gating_delta_rule_update(
                **y, softplus_beta=1.0, softplus_threshold=20.0, initial_state_source=pool, initial_state_indices=slot,
                cu_seqlens=torch.tensor([0, 1], dtype=torch.int32), use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            want_g, want_beta = gates(y["A_log"], y["a"], y["b"], y["dt_bias"])
            want, state = token_loop(y["q"][0], y["k"][0], y["v"][0], want_g, want_beta, state, True)
            close(out.view(1, v_heads, dim), want, 5e-3)
        close(pool[1], state, 1e-3)
        assert not pool[[0, 2]].any()

    def test_chunked_prefill(self):
        q, k, v, g, beta, cu_seqlens = prompt((256,), 2, 4, 64)
        whole, pieces = torch.zeros(1, 4, 64, 64), torch.zeros(1, 4, 64, 64)
        slot, bounds = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32)
        out = self.prefill(whole, q, k, v, g, beta, cu_seqlens, slot)
        parts = [
            self.prefill(pieces, *(x[:, at : at + 64].contiguous() for x in (q, k, v, g, beta)), bounds, slot)
            for at in range(0, 256, 64)
        ]
        close(torch.cat(parts, 1), out.double(), 5e-3)
        close(pieces, whole.double(), 1e-5)

    def test_continuous_batching(self):
        lengths = (5, 96, 31, 64)
        q, k, v, g, beta, cu_seqlens = prompt(lengths, 2, 4, 64)
        together, alone = torch.zeros(4, 4, 64, 64), torch.zeros(4, 4, 64, 64)
        out = self.prefill(together, q, k, v, g, beta, cu_seqlens, torch.arange(4, dtype=torch.int32))
        for n, length in enumerate(lengths):
            part = [x[:, cu_seqlens[n] : cu_seqlens[n + 1]].contiguous() for x in (q, k, v, g, beta)]
            bounds = torch.tensor([0, length], dtype=torch.int32)
            close(
                self.prefill(alone, *part, bounds, torch.tensor([n], dtype=torch.int32)),
                out[:, cu_seqlens[n] : cu_seqlens[n + 1]].double(),
                5e-3,
            )
        close(alone, together.double(), 1e-5)


class TestPerformance:
    @pytest.mark.parametrize("batch", [1, 8, 32, 64])
    def test_decode_throughput(self, batch):
        x, pool = step(batch, 16, 32, 128), torch.zeros(batch, 32, 128, 128)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            out = fused_sigmoid_gating_delta_rule_update(
                **x, softplus_beta=1.0, softplus_threshold=20.0, initial_state_source=pool,
                initial_state_indices=torch.arange(batch, dtype=torch.int32),
                cu_seqlens=torch.arange(batch + 1, dtype=torch.int32), use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            times.append(time.perf_counter() - start)
        assert torch.isfinite(out).all() and out.any() and min(times) > 0
        print(f"batch {batch}: {batch / min(times):.0f} tokens/s")
