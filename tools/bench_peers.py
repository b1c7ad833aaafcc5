"""tvm_gdn and its peers side by side: experts, delta-rule prefill and decode, convolution, on a CPU.

    python tools/bench_peers.py                            # everything, 32 of the layer's 128 experts
    python tools/bench_peers.py --quick                    # fewer shapes and rounds
    python tools/bench_peers.py --work experts --experts 128 --tokens 1 16 128 1024 4096 --threads 16 --json e.json --png e.png
    python tools/bench_peers.py --scaling 1 2 4 8 16 --work experts prefill decode
    python tools/bench_peers.py --suite                    # the model suite: 10 warm-ups, 100 runs, latency, tokens/s, loads

Contenders take turns; beside each time stand its spread, its error against float64, its ratio to this package's time in the
same group (scheme), and its share of the floor: a copy's bandwidth or a matrix product's rate, of the same rounds. Peers:
transformers, onnxruntime's contrib kernels, kt-kernel (each build in a process of its own; pip install --no-deps kt-kernel).
One that does not take part is named with the reason.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tvm_gdn import dispatch
from tvm_gdn.bench import chart, experts, kt_kernel, layers, machine, sequences
from tvm_gdn.bench.side_by_side import Report

WORKS = ("experts", "prefill", "decode", "conv")
SCHEMES = ("fp32", "bf16", "int8", "int4", "int4_kgroup")
DTYPES = ("bfloat16", "float32")
#: Tokens, value heads, dtype.
PREFILLS = ((1024, 32, "bfloat16"), (4096, 32, "bfloat16"), (1024, 16, "bfloat16"), (1024, 32, "float32"))
#: Whose kernels are named at the end.
OPERATORS = (
    "fused_experts", "fused_experts_packed", "fused_experts_quantized",
    sequences.PREFILL, sequences.DECODE, sequences.CONV, sequences.CONV_UPDATE,
)  # fmt: skip
#: Batch, tokens, dtype.
CONVS = ((1, 1024, "bfloat16"), (1, 1024, "float32"), (32, 1, "bfloat16"), (32, 1, "float32"))


def parse() -> argparse.Namespace:
    """Command line, with what --quick and --suite stand for filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--model", choices=layers.MODELS, default="qwen3-moe", help="whose layer of experts")
    parser.add_argument("--experts", type=int, default=32, help="at most so many experts, to fit memory; 0: all (default 32)")
    parser.add_argument(
        "--drawn", type=int, metavar="N", help="numbers for so many experts; the others repeat them: quick to set up"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024], help="of the experts")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--lengths", type=int, nargs="+", help="prefill lengths; default 1024 and 4096")
    parser.add_argument("--heads", type=int, nargs="+", default=[32], help="value heads of these prefills; 16 of q and k")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of these prefills")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of decode")
    parser.add_argument("--suite", action="store_true", help="experts on the model suite's shapes, 10 warm-ups and 100 runs")
    parser.add_argument("--peer-runs", type=int, default=layers.RUNS, metavar="N", help="of the suite, where peers are slow: "
                        f"whoever is not this package's runs so often, evenly spread; a divisor of {layers.RUNS}")  # fmt: skip
    parser.add_argument("--scaling", type=int, nargs="+", metavar="N", help="this package's times for these numbers of threads")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each contender and shape (default 0.2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=float, default=float("inf"), metavar="S", help="seconds for the rounds of a slow "
                        "contender: it runs in fewer; a peer of the experts whose call may take longer is left out")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="16 experts, bf16 and int8, fewer shapes, 3 rounds")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--without", nargs="+", choices=experts.PEERS, default=[], help="peers to leave out; onnxruntime's set-up takes minutes"
    )
    parser.add_argument("--kt-builds", nargs="+", choices=kt_kernel.KINDS, default=list(kt_kernel.KINDS), help="of kt-kernel")
    parser.add_argument("--kt-threads", type=int, nargs="+", default=[], metavar="N", help="of kt-kernel, a contender for "
                        "each number; one more spins that hands out tasks; default: threads, at most cores less one")  # fmt: skip
    parser.add_argument("--kt-cores", type=int, nargs="+", default=[], metavar="CORE", help="of kt-kernel's threads, one more "
                        "than its threads; default: as it binds them, the machine's first")  # fmt: skip
    parser.add_argument("--json", type=Path, help="written anew with every row")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    if options.kt_cores and max(options.kt_threads, default=1) >= len(options.kt_cores):
        parser.error(f"--kt-cores: {len(options.kt_cores)} cores; give at least one more than --kt-threads")
    if options.peer_runs < 1 or layers.RUNS % options.peer_runs:
        parser.error(f"--peer-runs: {options.peer_runs}; give a divisor of {layers.RUNS}, the runs of this package")
    if options.quick:
        options.experts, options.tokens, options.schemes = 16, [1, 64], ["bf16", "int8"]
        options.batches, options.lengths, options.rounds, options.seconds = [1, 8], [512], 3, 0.05
    if options.suite:
        options.work = ["experts"]
    left_out = experts.PEERS if options.no_peers or options.scaling else options.without
    options.peers = [name for name in experts.PEERS if name not in left_out]
    return options


def expert_rows(options: argparse.Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Rows of the experts."""
    sizes = dict(layers.MODELS[options.model])
    sizes["E"] = min(sizes["E"], options.experts or sizes["E"])
    sizes["k"] = min(sizes["k"], sizes["E"])
    if options.drawn:
        sizes["drawn"] = min(options.drawn, sizes["E"])
    kt_kernel_runs = {"builds": options.kt_builds, "kt_threads": options.kt_threads, "kt_cores": options.kt_cores}
    layer = experts.Layer(sizes, options.schemes, options.peers, report, **kt_kernel_runs)
    try:
        cases = layers.SUITE if options.suite else [(f"T {tokens}", tokens) for tokens in options.tokens]
        suite = (layers.WARMUP, layers.RUNS, options.peer_runs) if options.suite else None
        for case, tokens in cases:
            yield from layer.measure(tokens, case, seconds=options.seconds, rounds=options.rounds, most=options.most, suite=suite)
    finally:
        layer.close()


def rows_of(options: argparse.Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Rows of all works."""
    timing = {"seconds": options.seconds, "rounds": options.rounds, "most": options.most, "peers": options.peers}
    for work in options.work:
        if work == "experts":
            yield from expert_rows(options, report)
            continue
        if work == "prefill":
            wanted = itertools.product(options.lengths, options.heads, options.dtypes) if options.lengths else PREFILLS
            shapes = [sequences.prefill(*each) for each in wanted]
        elif work == "decode":
            shapes = [sequences.decode(batch, dtype) for dtype in ("bfloat16", "float32") for batch in options.batches]
        else:
            shapes = [sequences.conv(*each) for each in (CONVS[:2] if options.quick else CONVS)]
        for op, case in shapes:
            yield from sequences.measure(work, op, case, report, **timing)


def write(path: Path | None, report: Report) -> None:
    """Write what there is; the file is whole at any time."""
    if path is None:
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({**machine.stamp(), "missing": report.missing, "served": served(), "rows": report.rows}, indent=1))
    part.replace(path)


def served() -> dict[str, str]:
    """Whose kernels ran."""
    return {op: by for op in OPERATORS if (by := dispatch.served_by(op)) != "not called yet"}


def show(rows: Iterator[dict[str, Any]], report: Report, keep: Callable[[], None], *, every_load: bool = False) -> None:
    """Print and keep rows as they come; `every_load`: with the number of rows of every expert."""
    place = None
    for row in rows:
        report.rows.append(row)
        keep()
        if place != (row["work"], row["case"]):
            place = row["work"], row["case"]
            print(f"\n{row['work']} {row['case']}: copy {row['copy_gbytes_per_s']:.1f} GB/s", end="")
            if "imbalance" in row:
                loads = row["tokens_per_expert"]
                print(f"; {row['touched_experts']:.0f} experts touched, {min(loads)} to {max(loads)} rows each, imbalance "
                      f"{row['imbalance']:.2f}, entropy {row['entropy']:.2f}", end="")  # fmt: skip
                print(f"; peak memory {row['peak_memory_mb']:.0f} MB", end="")
                if every_load:
                    print("\n  rows of each expert: " + " ".join(map(str, loads)), end="")
            print(f"\n  {'contender':30s} {'runs':>5s} {'ms':>9s} {'quartiles':>17s} {'least':>8s} {'error':>8s} {'x ours':>7s} "
                  "of floor")  # fmt: skip
        ms, ratio = row["ms"], row["ratio"]
        line = (
            f"  {row['contender']:30s} {row['runs']:5d} {ms['median']:9.3f} {ms['q1']:8.3f}-{ms['q3']:8.3f} {ms['least']:8.3f} "
            f"{row['error']:8.1e} {'-' if ratio is None else f'{ratio:.2f}':>7s} {row['share_of_floor']:5.0%} {row['floor']:>6s}"
            f" {row['gbytes_per_s']:7.1f} GB/s {row['gflop_per_s']:8.0f} GFLOP/s"
        )
        print(line + (f" {row['tokens_per_s']:9.0f} tok/s" if "tokens_per_s" in row else ""), flush=True)


def scaling(options: argparse.Namespace, report: Report, keep: Callable[[], None]) -> None:
    """Rows of this package at several numbers of threads, and a table of how much faster each is than the first."""
    for threads in options.scaling:
        if threads > machine.cores():
            report.missing[f"{threads} threads"] = f"this process may use {machine.cores()} cores"
            continue
        torch.set_num_threads(threads)
        print(f"\n=== {threads} threads", flush=True)
        show(rows_of(options, report), report, keep)
    table: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in report.rows:
        table.setdefault((row["work"], row["case"], row["contender"]), {})[row["threads"]] = row["ms"]["median"]
    print(f"\n{'ms, and how much faster than with the fewest threads':60s}")
    for (work, case, name), times in table.items():
        first = next(iter(times.values()))
        cells = "  ".join(f"{threads}: {ms:.3f} ({first / ms:.2f}x)" for threads, ms in times.items())
        print(f"{work:8s} {case:24s} {name:22s} {cells}")


def main() -> None:
    """Measure, print, write."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine.line(), file=sys.stderr)
    report = Report()
    keep = functools.partial(write, options.json, report)
    with torch.no_grad():
        if options.scaling:
            scaling(options, report, keep)
        else:
            if options.peers:
                report.missing["fla-core"] = "its kernels are Triton: nothing runs on a CPU"
            report.missing |= dict.fromkeys(options.without, "left out by --without")
            show(rows_of(options, report), report, keep, every_load=options.suite)
    keep()
    print("\ndoes not take part:" if report.missing else "")
    for name, reason in report.missing.items():
        print(f"  {name}: {reason}")
    for op, by in served().items():
        print(f"{op}: {by}", file=sys.stderr)
    if options.png:
        chart.write(options.png, report.rows, machine.line())


if __name__ == "__main__":
    main()
