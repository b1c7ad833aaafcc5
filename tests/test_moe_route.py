"""Routing: choices and weights against a plain loop over numbers, adversarial logits, statistics, transformers' routers."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import tvm_gdn
from tvm_gdn.errors import ArgumentError

INF, NAN = float("inf"), float("nan")
GROUPED = {"T": 1, "E": 32, "top_k": 6, "num_expert_group": 8, "topk_group": 3, "scoring": "sigmoid", "dtype": "float32"}
KERNELS = [
    ("moe_route", {"T": 1, "E": 37, "top_k": 5, "dtype": "bfloat16"}),
    ("moe_route", GROUPED),
    ("moe_route", {**GROUPED, "with": ("correction_bias",), "dtypes": {"correction_bias": "float32"}}),
    *(("moe_route", {**GROUPED, "topk_group": 2, "scoring": scoring}) for scoring in ("softmax", "sigmoid")),
]


def choose(row, k, scoring="softmax", bias=None, groups=1, kept=1):
    """Ids and raw scores of one row of logits, number by number."""
    if scoring == "softmax":
        top = max(row)
        exps = [math.exp(x - top) for x in row]
        scores = [x / sum(exps) for x in exps]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in row]
    key = list(row) if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    biased = scores if bias is None else key
    size = len(row) // groups
    sums = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: (-sums[g], g))[:kept] if groups > 1 else [0]
    candidates = [e for e in range(len(row)) if e // size in allowed]
    ids = sorted(candidates, key=lambda e: (-key[e], e))[:k]
    return ids, [scores[e] for e in ids]


def check(logits, k, renormalize=True, factor=1.0, **options):
    names = {"groups": "num_expert_group", "kept": "topk_group", "bias": "correction_bias", "scoring": "scoring"}
    given = {names[name]: torch.tensor(v) if name == "bias" else v for name, v in options.items()}
    weights, ids = tvm_gdn.moe_route(logits, k, renormalize=renormalize, routed_scaling_factor=factor, **given)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    for row, w, i in zip(logits.double().tolist(), weights.tolist(), ids.tolist(), strict=True):
        want, scores = choose(row, k, **options)
        assert i == want
        total = sum(scores) + 1e-20 if renormalize else 1.0
        assert w == pytest.approx([s / total * factor for s in scores], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 65])
def test_softmax(tokens, dtype):
    logits = torch.randn(tokens, 37, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    check(logits, 5)
    check(logits, 37, renormalize=False)


def test_ties_go_to_the_lower_id():
    """bf16 logits of a few values: almost every choice is a tie."""
    logits = torch.randn(500, 37, generator=torch.Generator().manual_seed(0)).round().to(torch.float32)
    check(logits, 8)
    check(torch.zeros(3, 37), 6)
    check(torch.where(torch.arange(37) % 2 == 0, 0.0, -0.0)[None], 6)


def test_scores_that_round_to_one_number_are_no_ties():
    logits = torch.full((1, 37), -200.0)
    logits[0, [30, 20, 10]] = torch.tensor([0.0, -100.0, -150.0])
    assert tvm_gdn.moe_route(logits, 3)[1].tolist() == [[30, 20, 10]]
    logits[0, [3, 5]] = torch.tensor([40.0, 60.0])
    assert tvm_gdn.moe_route(logits, 2, scoring="sigmoid")[1].tolist() == [[5, 3]]


@pytest.mark.parametrize("with_bias", [False, True])
def test_deepseek_groups(with_bias):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(65, 32, generator=rng)
    bias = {"bias": torch.randn(32, generator=rng).tolist()} if with_bias else {}
    check(logits, 6, scoring="sigmoid", groups=8, kept=3, factor=2.5, **bias)
    if not with_bias:
        check(logits.round(), 6, scoring="sigmoid", groups=8, kept=3)


def test_infinities():
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(2))
    logits[0, :30] = -INF
    logits[1] = -INF
    logits[2, 5] = INF
    weights, ids = tvm_gdn.moe_route(logits, 8)
    assert ids[0].tolist() == [*(30 + logits[0, 30:].argsort(descending=True)).tolist(), 0]
    assert weights[0, 7] == 0
    assert weights[0].sum() == pytest.approx(1)
    assert weights[1].isnan().all()
    assert ids[1].tolist() == list(range(8))
    assert ids[2, 0] == 5
    assert not weights[3].isnan().any()
    zero, _ = tvm_gdn.moe_route(logits[1:2], 4, scoring="sigmoid")
    assert zero.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_is_chosen_first_and_propagates(scoring):
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(3))
    clean = logits.clone()
    logits[1, [7, 21]] = NAN
    weights, ids = tvm_gdn.moe_route(logits, 4, scoring=scoring)
    assert ids[1, :2].tolist() == [7, 21]
    assert len(set(ids[1].tolist())) == 4
    assert weights[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(ids[row], tvm_gdn.moe_route(clean, 4, scoring=scoring)[1][row])
        assert not weights[row].isnan().any()
    # A group with NaN is the best of groups, wherever in it NaN stands.
    for expert in range(20, 24):
        logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
        logits[0, expert] = NAN
        ids = tvm_gdn.moe_route(logits, 3, scoring=scoring, num_expert_group=8, topk_group=2)[1]
        assert torch.equal(ids, tvm_gdn.reference.moe_route(logits, 3, scoring, True, 8, 2, exact=True)[1])
        assert scoring == "softmax" or ids[0, 0] == expert
    ids = tvm_gdn.moe_route(torch.full((2, 32), NAN), 6, scoring="sigmoid", num_expert_group=8, topk_group=3)[1]
    assert all(len(set(row)) == 6 and max(row) < 32 for row in ids.tolist())


#: Values of adversarial logits: ties, both infinities, NaN, signed zeros, the ends of fp32.
ODD = [0.0, -0.0, 1.0, 1.0, -1.0, INF, -INF, NAN, 3e38, -3e38, 1e-45, 88.8, -104.0]


@pytest.mark.parametrize(
    ("scoring", "options"), [("softmax", {}), ("sigmoid", {}), ("sigmoid", {"num_expert_group": 8, "topk_group": 3})]
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_logits(scoring, options, data):
    """Order and weights against torch's stable sort and double arithmetic; k distinct ids that exist, whatever the logits."""
    experts = 32 if options else 37
    palette = data.draw(st.lists(st.sampled_from(ODD), min_size=1, max_size=6))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    tokens = data.draw(st.integers(1, 5))
    logits = torch.tensor(palette)[torch.randint(len(palette), (tokens, experts), generator=rng)]
    k = data.draw(st.integers(1, 6))
    weights, ids = tvm_gdn.moe_route(logits, k, scoring, renormalize=False, **options)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    scores = logits.double().softmax(-1) if scoring == "softmax" else logits.double().sigmoid()
    torch.testing.assert_close(weights.double(), scores.gather(1, ids.long()), rtol=1e-5, atol=1e-12, equal_nan=True)
    if not options:
        # -0.0 equals 0.0, NaN comes first, and equals keep their order.
        assert torch.equal(ids, (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k].int())


def test_no_tokens():
    weights, ids = tvm_gdn.moe_route(torch.empty(0, 37), 5)
    assert weights.shape == ids.shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0; allowed: 1 to 37"),
        ({"top_k": 38}, "top_k is 38"),
        ({"top_k": 2, "num_expert_group": 5}, "num_expert_group is 5"),
        ({"top_k": 2, "num_expert_group": 37}, "num_expert_group is 37"),
        ({"top_k": 2, "topk_group": 2}, "topk_group is 2"),
        ({"top_k": 2, "scoring": "max"}, "scoring"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ArgumentError, match=message):
        tvm_gdn.moe_route(torch.zeros(2, 37), **options)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sort_and_stats(index):
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(-2, 11, (65, 3), generator=rng).to(index)
    counts, offsets, order = tvm_gdn.moe_sort(ids, 9)
    flat = ids.flatten().tolist()
    want = [[p for p, e in enumerate(flat) if e == expert] for expert in range(9)]
    assert counts.tolist() == [len(pairs) for pairs in want]
    assert offsets.tolist() == [sum(map(len, want[:e])) for e in range(10)]
    assert order.flatten().tolist() == [pair for pairs in want for pair in pairs] + [-1] * sum(e < 0 or e > 8 for e in flat)
    loads, imbalance, entropy = tvm_gdn.expert_stats(ids, 9)
    assert torch.equal(loads, counts)
    share = [len(pairs) / sum(map(len, want)) for pairs in want if pairs]
    assert imbalance.item() == pytest.approx(max(map(len, want)) * 9 / sum(map(len, want)), rel=1e-6)
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in share), rel=1e-5)


def test_stats_of_nobody():
    counts, imbalance, entropy = tvm_gdn.expert_stats(torch.full((4, 2), -1), 9)
    assert counts.tolist() == [0] * 9
    assert (imbalance.item(), entropy.item()) == (1, 0)
    counts, offsets, order = tvm_gdn.moe_sort(torch.empty(0, 2, dtype=torch.int64), 9)
    assert counts.sum() == offsets.sum() == 0
    assert order.shape == (0, 2)


def test_routers_of_transformers():
    """The same experts and weights as Qwen3-MoE's and DeepSeek-V3's routers on random numbers."""
    pytest.importorskip("transformers.models.qwen3_moe")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    torch.manual_seed(5)
    config = DeepseekV3Config(
        hidden_size=64, n_routed_experts=32, num_experts_per_tok=6, n_group=8, topk_group=3, routed_scaling_factor=2.5
    )
    router = modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    router.weight.data.normal_()
    router.e_score_correction_bias.normal_()
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(63, 64) * 0.2)
        ours, chosen = tvm_gdn.moe_route(logits, 6, "sigmoid", True, 8, 3, router.e_score_correction_bias, 2.5)
    order, ours_order = ids.argsort(-1), chosen.argsort(-1)
    assert torch.equal(ids.gather(1, order).int(), chosen.gather(1, ours_order))
    torch.testing.assert_close(weights.gather(1, order), ours.gather(1, ours_order), rtol=1e-5, atol=1e-7)
