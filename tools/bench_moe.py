"""Experts of one layer side by side: tvm_gdn's schemes, transformers' eager and grouped_mm, and a memory copy, in one process.

    python tools/bench_moe.py --tokens 1 16 128 1024 --schemes raw bf16 int8 int4 --peers --json out.json
    python tools/bench_moe.py --suite              # prefill of 64, 128, 256, 256 tokens, decode of 16 requests; 10 + 100 runs

Rounds are interleaved: every contender runs once per round, and the copy too. Beside each time stand the error
(mean|out - ref| / mean|ref| against float64 on a few tokens), the bytes of the weights of the experts that the routing touches,
their share of the copy's bandwidth, and the load: touched experts, imbalance (largest over mean), entropy. The suite's pasts
(512, 0, 0, 256 and those of the decoded requests) are keys and values of attention: experts do not see them.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tvm_gdn
from tvm_gdn import dispatch, reference
from tvm_gdn.bench import machine

MODELS = {
    "qwen3-moe": {"D": 2048, "I": 768, "E": 128, "k": 8},
    "qwen3-next": {"D": 2048, "I": 512, "E": 512, "k": 10},
    "deepseek-v3": {"D": 7168, "I": 2048, "E": 256, "k": 8},
}
#: Name, tokens, kind: what the model suite of the neighbours measures.
SUITE = (
    ("prefill 64 (past 512)", 64),
    ("prefill 128", 128),
    ("prefill 256", 256),
    ("prefill 256 (past 256)", 256),
    ("decode 16", 16),
)
COPY_BYTES = 256 << 20
ERROR_TOKENS = 4


def weights(sizes: dict[str, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights, drawn expert by expert."""
    rng = torch.Generator().manual_seed(0)
    w13 = torch.empty(sizes["E"], 2 * sizes["I"], sizes["D"], dtype=dtype)
    w2 = torch.empty(sizes["E"], sizes["D"], sizes["I"], dtype=dtype)
    for tensor in (w13, w2):
        for expert in tensor:
            expert.copy_(torch.randn(expert.shape, generator=rng) * expert.shape[-1] ** -0.5)
    return w13, w2


def transformers_module(sizes: dict[str, int], w13: torch.Tensor, w2: torch.Tensor) -> torch.nn.Module | None:
    """Qwen3-MoE's experts over the same weights; None where transformers is not installed."""
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    with torch.device("meta"):
        experts = Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=sizes["D"], moe_intermediate_size=sizes["I"], num_experts=sizes["E"])
        )
    experts.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(w2, requires_grad=False)
    return experts.eval()


def contenders(
    names: list[str], sizes: dict[str, int], w13: torch.Tensor, w2: torch.Tensor, peers: bool
) -> dict[str, tuple[Callable[..., torch.Tensor], float]]:
    """Name -> (function of x, weights, ids; bytes of one expert's weights)."""
    found: dict[str, tuple[Callable[..., torch.Tensor], float]] = {}
    plain = (w13.nbytes + w2.nbytes) / sizes["E"]
    for name in names:
        if name == "raw":
            found["tvm_gdn raw"] = (lambda x, w, i: tvm_gdn.fused_experts(x, w13, w2, w, i)), plain
            continue
        start = time.perf_counter()
        pack = tvm_gdn.pack_experts(w13, w2, name)
        print(f"packed {pack} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        run = lambda x, w, i, pack=pack: tvm_gdn.fused_experts(x, pack, topk_weights=w, topk_ids=i)  # noqa: E731
        found[f"tvm_gdn {name}"] = run, pack.nbytes / sizes["E"]
    if not peers:
        return found
    module = transformers_module(sizes, w13, w2)
    if module is None:
        print("transformers is not installed: its experts are missing from the comparison", file=sys.stderr)
    for name in ("eager", "grouped_mm") if module is not None else ():

        def run_peer(x: torch.Tensor, w: torch.Tensor, i: torch.Tensor, name: str = name) -> torch.Tensor:
            module.config._experts_implementation_internal = name  # type: ignore[union-attr]
            return module(x, i.long(), w.to(x.dtype))  # type: ignore[misc]

        found[f"transformers {name}"] = run_peer, plain
    try:
        import kt_kernel  # noqa: F401

        print("kt-kernel is installed; this tool does not drive it", file=sys.stderr)
    except ImportError:
        print("kt-kernel is not installed: missing from the comparison", file=sys.stderr)
    return found


def measure(
    label: str, tokens: int, sizes: dict[str, int], options: argparse.Namespace, runners: dict, dense: tuple
) -> list[dict]:
    """Interleaved rounds of every contender on one routing; a row per contender."""
    rng = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, sizes["D"], generator=rng).bfloat16()
    logits = torch.randn(tokens, sizes["E"], generator=rng)
    share, ids = tvm_gdn.moe_route(logits, sizes["k"])
    counts, imbalance, entropy = tvm_gdn.expert_stats(ids, sizes["E"])
    touched = int((counts > 0).sum())
    sample = slice(0, min(tokens, ERROR_TOKENS))
    used, local = ids[sample].unique(return_inverse=True)
    ref = reference.fused_experts(
        x[sample], dense[0][used.long()], dense[1][used.long()], share[sample], local.view(ids[sample].shape), exact=True
    )
    source = torch.ones(COPY_BYTES // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in runners}
    copies: list[float] = []
    errors = {}
    for turn in range(options.warmup + options.runs):
        for name, (function, _) in runners.items():
            start = time.perf_counter()
            out = function(x, share, ids)
            elapsed = time.perf_counter() - start
            if turn >= options.warmup:
                times[name].append(elapsed)
            elif name not in errors:
                errors[name] = ((out[sample].double() - ref).abs().mean() / ref.abs().mean()).item()
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
    bandwidth = 2 * source.nbytes / sorted(copies)[len(copies) // 10]
    flops = 6 * tokens * sizes["k"] * sizes["D"] * sizes["I"]
    rows = []
    for name, (_, each) in runners.items():
        ordered = sorted(times[name])
        low, median = ordered[len(ordered) // 10], ordered[len(ordered) // 2]
        rows.append(
            {
                "case": label, "tokens": tokens, "contender": name, "ms_low": low * 1e3, "ms_median": median * 1e3,
                "tokens_per_s": tokens / low, "gbytes_per_s": touched * each / low / 1e9,
                "share_of_copy": touched * each / low / bandwidth, "copy_gbytes_per_s": bandwidth / 1e9,
                "gflops": flops / low / 1e9, "error": errors[name], "touched_experts": touched,
                "imbalance": imbalance.item(), "entropy": entropy.item(), "runs": len(ordered),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe")
    parser.add_argument("--experts", type=int, help="fewer experts than the model has, where memory is short")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--schemes", nargs="+", default=["bf16"], help="raw, or schemes of pack_experts")
    parser.add_argument("--suite", action="store_true", help="the model suite instead of --tokens; 10 warm-ups, 100 runs")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.suite:
        options.warmup, options.runs = 10, 100
    sizes = dict(MODELS[options.model])
    sizes["E"] = options.experts or sizes["E"]
    print(machine.line(), file=sys.stderr)
    w13, w2 = weights(sizes, torch.bfloat16)
    rows = []
    with torch.no_grad():
        runners = contenders(options.schemes, sizes, w13, w2, options.peers)
        for label, tokens in SUITE if options.suite else [(f"T {tokens}", tokens) for tokens in options.tokens]:
            found = measure(label, tokens, sizes, options, runners, (w13, w2))
            rows += found
            print(f"\n{label}: {found[0]['touched_experts']} experts touched, imbalance {found[0]['imbalance']:.2f}, entropy "
                  f"{found[0]['entropy']:.2f}; copy {found[0]['copy_gbytes_per_s']:.1f} GB/s")  # fmt: skip
            for row in found:
                print(
                    f"  {row['contender']:26s} {row['ms_low']:9.3f} ms (median {row['ms_median']:9.3f}) "
                    f"{row['tokens_per_s']:9.0f} tok/s {row['gbytes_per_s']:6.1f} GB/s = {row['share_of_copy']:4.0%} of copy "
                    f"{row['gflops']:7.0f} GFLOP/s  error {row['error']:.2%}",
                    flush=True,
                )
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", file=sys.stderr)
    for name in ("fused_experts", "fused_experts_packed", "fused_experts_quantized"):
        print(f"{name}: {dispatch.served_by(name)}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.stamp(), "sizes": sizes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
