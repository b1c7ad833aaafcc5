"""What benchmarks stand on: turns of contenders, weights that repeat, calls of every operator."""

from __future__ import annotations

import functools
import os
import signal
import time

import pytest
import torch
from calls import usual_kernel

import tvm_gdn
from tvm_gdn import cases, parity
from tvm_gdn.bench import command, contenders, experts, kt_kernel, layers, machine, timing
from tvm_gdn.bench import text as bench_text
from tvm_gdn.bench.side_by_side import Report
from tvm_gdn.errors import TvmGdnError
from tvm_gdn.ops import OPS

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


@pytest.mark.parametrize("kernel", [usual_kernel(op) for op in OPS], ids=list(OPS))
def test_every_operator_is_called_as_a_user_would_and_reported(kernel):
    spec, case = OPS[kernel[0]], kernel[1]
    arguments = cases.draw(spec, case)
    want = parity.expected(spec, arguments)
    result = contenders.public_call(spec, arguments)()
    name, got = next(iter(want)), result[0] if isinstance(result, tuple) else result
    assert got.any() and parity.rms_ratio(got, want[name]) <= parity.limit(spec, name, got.dtype)

    row = command.measure(spec, case, 0.001, peers=False)
    assert row["passed"] and row["us"]["tvm_gdn"]["median"] > 0
    text = bench_text.render(
        {**machine.stamp(), "target": "any", "threads": 1, "peers": False, "cases": [row], "calls": [], "first_call": None}
    )
    assert spec.name in text and "WRONG" not in text


@pytest.mark.parametrize(
    ("fewer", "order", "runs"), [(None, "op" * 10, 6), (3, "opo" * 5, 3), (1, "ooo" + "op" * 2 + "ooooo", 1)]
)
def test_who_is_slow_takes_fewer_turns(fewer, order, runs):
    taken = []
    calls = {name: functools.partial(taken.append, name[0]) for name in ("ours", "peer")}
    times = timing.turns(calls, 4, 6, {"peer"}, fewer)
    assert "".join(taken) == order
    assert {name: found.samples for name, found in times.items()} == {"ours": 6, "peer": runs}
    # Ratios are taken within rounds, so both have the same.
    assert len(times["ours"].rounds) == len(times["peer"].rounds) == runs


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


#: kt-kernel as far as it is called: its calls take a millisecond and answer with their rows.
STAND_IN = """
import ctypes, time
from types import SimpleNamespace

class WorkerPoolConfig:
    pass

class CPUInfer:
    def __init__(self, pool):
        self.backend_ = None
    def submit(self, task):
        task()
    def sync(self):
        pass

class Experts:
    def __init__(self, config):
        self.size = config.D
    def load_weights_task(self, places):
        return lambda: None
    def forward_task(self, rows, k, ids, weights, x, out, incremental):
        count = ctypes.c_int32.from_address(rows).value
        return lambda: (time.sleep(1e-3), ctypes.memmove(out, x, 2 * count * self.size))

moe = SimpleNamespace(MOEConfig=lambda experts, k, D, inner, gpu: SimpleNamespace(D=D), AMXBF16_MOE=Experts)
"""


def test_kt_kernel_stands_still_between_its_turns(monkeypatch, tmp_path):
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(kt_kernel, "extension", lambda build: file)
    layer = kt_kernel.Layer("amx", ["bf16"], SIZES, 1)
    try:
        layer.ready()
        rows = layers.routing(SIZES, 3)
        call = kt_kernel.Call(layer, "bf16", [rows])
        assert torch.equal(call(), rows[0])
        assert call.timed(1) >= 1000
        assert os.waitid(os.P_PID, layer.process.pid, os.WSTOPPED | os.WNOWAIT).si_status == signal.SIGSTOP
    finally:
        layer.close()
    assert layer.process.exitcode == 0


def test_kt_kernel_that_does_not_load_is_an_error(monkeypatch, tmp_path):
    file = tmp_path / "stand_in.py"
    file.write_text("raise OSError('no such library')")
    monkeypatch.setattr(kt_kernel, "extension", lambda build: file)
    layer = kt_kernel.Layer("amx", ["bf16"], SIZES, 1)
    with pytest.raises(TvmGdnError, match="no such library"):
        layer.ready()
    layer.close()
    assert not layer.process.is_alive()
