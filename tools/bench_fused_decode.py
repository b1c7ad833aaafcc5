"""The fused decode step against the operators that it is made of, in one process: public calls, interleaved, minima and medians.

``python tools/bench_fused_decode.py [--threads 1] [--rounds 300] [--batch 1 8 32] [--dtype bfloat16 float32]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import cases, parity
from tvm_gdn.bench import contenders

FUSED = tvm_gdn.OPS["fused_conv_gated_delta_rule_update"]


def separate(x: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """The same step as two calls: the convolution, then the recurrence with its gates."""

    def call() -> torch.Tensor:
        row = tvm_gdn.causal_conv1d_update(
            x["mixed_qkv"], x["conv_state"], x["conv_weight"], None, "silu", x["conv_state_indices"]
        )
        return tvm_gdn.packed_decode_gated_delta_rule(
            row, x["a"], x["b"], x["A_log"], x["dt_bias"], x["initial_state_source"], x["initial_state_indices"]
        )

    return call


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call, taken in turns; each call first runs once to warm the caches."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter_ns()
            call()
            found[name].append((time.perf_counter_ns() - start) / 1e3)
    return found


def main() -> None:
    """Print a line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), {args.rounds} rounds; us: minimum (median)")
    for case in FUSED.bench:
        if case["B"] not in args.batch or case["dtype"] not in args.dtype:
            continue
        inputs = contenders.steady(FUSED, case)
        other = cases.clone(inputs)
        calls = {"fused": contenders.public_call(FUSED, inputs), "separate": separate(other)}
        error = parity.rms_ratio(calls["fused"](), calls["separate"]())
        found = times(calls, args.rounds)
        ratio = (
            min(found["separate"]) / min(found["fused"]),
            median(two / one for one, two in zip(found["fused"], found["separate"], strict=True)),
        )
        shown = "  ".join(f"{name} {min(us):.1f} ({median(us):.1f})" for name, us in found.items())
        print(f"{cases.label(case)}: {shown}  separate/fused {ratio[0]:.2f} ({ratio[1]:.2f})  difference {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
