"""What benchmarks stand on: turns of contenders, weights that repeat."""

from __future__ import annotations

import time

import torch

import tvm_gdn
from tvm_gdn.bench import experts, layers, timing
from tvm_gdn.bench.side_by_side import Report

SIZES = {"D": 96, "I": 40, "E": 5, "k": 2, "drawn": 2}


def test_a_slow_contender_takes_part_in_the_first_rounds_or_once():
    counts = dict.fromkeys(("fast", "slow", "slowest"), 0)

    def sleeper(name, seconds):
        def call():
            counts[name] += 1
            time.sleep(seconds)

        return call

    calls = {name: sleeper(name, seconds) for name, seconds in (("fast", 0.0), ("slow", 0.03), ("slowest", 0.25))}
    times = timing.interleaved(calls, 0.01, 5, most=0.1)
    assert len(times["fast"].rounds) == 5
    assert 1 <= len(times["slow"].rounds) <= 3 and counts["slow"] == 2 + len(times["slow"].rounds)
    assert len(times["slowest"].rounds) == 1 and counts["slowest"] == 2
    assert times["slowest"].us >= 250_000
    assert timing.ratio(times["slow"], times["fast"]) > 1 < timing.ratio(times["slowest"], times["slow"])


def test_experts_that_are_not_drawn_repeat_the_others():
    drawn = layers.weights({**SIZES, "E": 2}, torch.bfloat16)
    for whole, part in zip(layers.weights(SIZES, torch.bfloat16), drawn, strict=True):
        assert torch.equal(whole, part[[0, 1, 0, 1, 0]]) and not torch.equal(part[0], part[1])


def test_packs_of_repeated_experts_are_those_of_all():
    layer = experts.Layer(SIZES, ["bf16", "int8", "int4_kgroup"], (), Report())
    for scheme in ("bf16", "int8", "int4_kgroup"):
        (packed,) = layer.runs[f"tvm_gdn {scheme}"][1].args
        whole = tvm_gdn.pack_experts(layer.w13, layer.w2, scheme)
        assert packed.experts == 5
        for name, tensor in whole.tensors().items():
            given = packed.tensors()[name]
            assert given is None if tensor is None else torch.equal(given, tensor)


def test_a_peer_that_may_take_too_long_is_left_out_and_named(monkeypatch):
    report = Report()
    layer = experts.Layer(SIZES, ["bf16"], (), report)
    monkeypatch.setattr(tvm_gdn, "fused_experts", lambda x, *_, **__: torch.zeros_like(x))
    monkeypatch.setattr(tvm_gdn, "moe_route", lambda logits, k: logits.topk(k))
    monkeypatch.setattr(tvm_gdn, "expert_stats", lambda ids, count: (torch.zeros(count), torch.ones(()), torch.ones(())))
    layer.runs["peer"] = layer.runs["tvm_gdn raw bf16"]
    layer.took = {"peer": (16, 500.0), "tvm_gdn bf16": (16, 500.0)}
    named = {name: [each.name for each in layer.contenders(tokens, most=3.0)[0]] for name, tokens in (("few", 64), ("many", 128))}
    assert named == {"few": ["tvm_gdn bf16", "tvm_gdn raw bf16", "peer"], "many": ["tvm_gdn bf16", "tvm_gdn raw bf16"]}
    assert report.missing == {"peer, T 128": "left out: took 500 ms at T 16, so up to 4.0 s a call"}
