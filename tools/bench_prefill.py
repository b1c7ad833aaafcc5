"""Cost per token of chunked prefill: longer sequences, and packed short ones against one long, interleaved in one process.

``python tools/bench_prefill.py [--threads 2] [--rounds 20] [--dtype bfloat16 float32] [--states none final both pool]
[--tokens 512 1024 2048 4096 8192 16384] [--packed 256 128 100 64 32] [--cpu-time] [--memory] [--json F]``

`--states`: what the call does with states: none at all; `final` ones in a fresh tensor, as a new prompt; `both`, from given
states to fresh ones; `pool`: read and written in place, as an engine. Times are minima; `--cpu-time` takes that of the process,
for one thread on a machine where others run. `--memory`: only what calls of `--tokens` take beside their tensors.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import dispatch
from tvm_gdn.bench import machine

OPERATOR = "chunk_gated_delta_rule"
H, K, V = 16, 128, 128


def lengths_of(tokens: int, each: int) -> list[int]:
    """As many sequences of `each` tokens as fit, and the rest; 0: drawn between 17 and 200."""
    drawn = random.Random(1)
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        found.append(min(left, each or drawn.randint(17, 200)))
    return found


def prefill(heads: int, dtype: torch.dtype, lengths: list[int], states: str) -> Callable[[], object]:
    """One call on packed sequences."""
    tokens, count = sum(lengths), len(lengths)
    rng = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(1, tokens, H, K, generator=rng).to(dtype) for _ in range(2))
    v = torch.randn(1, tokens, heads, V, generator=rng).to(dtype)
    g, beta = -torch.rand(1, tokens, heads, generator=rng), torch.rand(1, tokens, heads, generator=rng)
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "use_qk_l2norm_in_kernel": True}
    options["output_final_state"] = states in {"final", "both"}
    if states in {"both", "pool"}:
        options["initial_state"] = torch.zeros(count, heads, K, V)
    if states == "pool":
        options["initial_state_indices"] = torch.arange(count)
    return lambda: tvm_gdn.chunk_gated_delta_rule(q, k, v, g, beta, **options)


def minima(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of every call, taken in turns after one call of each that loads its kernel."""
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def memory(heads: int, dtype: torch.dtype, tokens: int) -> int:
    """KiB that a prompt of `tokens` tokens takes at most beside inputs, output and final state."""
    (o, state), taken = machine.peak_memory(prefill(heads, dtype, [tokens], "final"))
    return (taken - o.nbytes - state.nbytes) >> 10


def main() -> None:
    """Print two lines per dtype, heads and use of states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--heads", type=int, nargs="+", default=[32])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--states", nargs="+", default=["none", "final", "both", "pool"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--packed", type=int, nargs="*", default=[256, 128, 100, 64, 0, 32])
    parser.add_argument("--total", type=int, default=4096, help="tokens of packed sequences together")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path, help="every line's figures, written anew with each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{args.threads} thread(s), {args.rounds} rounds; ms: minimum (per token, against the first)")
    rows: list[dict[str, Any]] = []

    def keep(shown: str, **row: Any) -> None:
        print(shown, flush=True)
        rows.append({"threads": args.threads, **row})
        if args.json:
            args.json.write_text(json.dumps({**machine.stamp(), "served": dispatch.served_by(OPERATOR), "rows": rows}, indent=1))

    for dtype in args.dtype:
        for heads in args.heads:
            if args.memory:
                memory(heads, getattr(torch, dtype), 32)  # loads the kernel
                taken = {tokens: memory(heads, getattr(torch, dtype), tokens) for tokens in args.tokens}
                shown = "  ".join(f"T {tokens} {kib} KiB" for tokens, kib in taken.items())
                keep(f"{dtype} HV {heads}, memory beside the tensors: {shown}", dtype=dtype, heads=heads, memory_kib=taken)
            for states in [] if args.memory else args.states:
                longer = {f"T {tokens}": [tokens] for tokens in args.tokens}
                packed = {str(each or "17-200"): lengths_of(args.total, each) for each in args.packed}
                for table in (longer, {"one": [args.total], **packed} if packed else {}):
                    if not table:
                        continue
                    calls = {name: prefill(heads, getattr(torch, dtype), lengths, states) for name, lengths in table.items()}
                    found = minima(calls, args.rounds, clock)
                    per_token = {name: ms / sum(table[name]) for name, ms in found.items()}
                    first = next(iter(per_token.values()))
                    shown = "  ".join(f"{name} {found[name]:.1f} ({cost / first:.2f})" for name, cost in per_token.items())
                    shown = f"{dtype} HV {heads}, states {states}: {shown}"
                    keep(shown, dtype=dtype, heads=heads, states=states, ms=found, per_token=per_token)


if __name__ == "__main__":
    main()
