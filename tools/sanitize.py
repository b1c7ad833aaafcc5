"""Runs the kernels of every operator on the CUDA device under compute-sanitizer, and prints per operator what was found.

    python tools/sanitize.py --json sanitized.json           # memcheck and racecheck
    python tools/sanitize.py --tool synccheck --op chunk_kda
    python tools/sanitize.py --build-only --target cuda-sm90 # only fill the cache of kernels; needs no device

Cases are short ones of the SPECs, as different as they get; kernels are compiled before, without the tool. Torch's allocator
keeps nothing here, so that an access one element behind a tensor is one outside of an allocation. The numbers are held against
float64 as well. Needs compute-sanitizer (it comes with CUDA's toolkit), torch for CUDA, and apache-tvm to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm_gdn
from tvm_gdn import cases, parity
from tvm_gdn.bench import machine
from tvm_gdn.commands import aot
from tvm_gdn.commands.arguments import geometry_of_case, use_target
from tvm_gdn.commands.parity import without_schedule
from tvm_gdn.commands.text import as_json
from tvm_gdn.errors import TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec, resolve

_TOOLS = ("memcheck", "racecheck")
#: What each tool is called with: only this process, and on after an error; of memory also errors of device code alone.
_COMMON = ("--target-processes", "application-only", "--destroy-on-device-error", "kernel")
_SPECIAL = {"memcheck": ("--padding", "64", "--report-api-errors", "no")}
#: Lines of a report that say nothing about device code.
_BESIDE = re.compile(r"Host Frame|Saved host|Device Frame|COMPUTE-SANITIZER|\w+ SUMMARY")
#: Begins a line of the watched process; the tool's own begin with =====.
_MARK = "sanitize: "
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TVM_GDN_DISABLE_JIT": "1", "OMP_NUM_THREADS": "2"}


def chosen(ops: list[str], count: int, target: TargetSpec) -> list[tuple[str, dict[str, Any]]]:
    """Short cases of the operators that have a schedule on the target."""
    lacking = without_schedule(ops, target)
    return [(op, case) for op in ops if op not in lacking for case in parity.sample(OPS[op], count)]


def run_cases(ops: list[str], count: int, target: TargetSpec) -> None:
    """What the watched process does: each case on the device, and a line about it."""
    import torch

    for op, case in chosen(ops, count, target):
        try:
            result = parity.check_case(OPS[op], case, device=target.device)
            if target.device == "cuda":
                torch.cuda.synchronize()
            failure = "" if result.passed else result.failure or f"errors {result.errors}"
        except (TvmGdnError, RuntimeError) as error:
            failure = str(error).splitlines()[0]
        print(f"{_MARK}{json.dumps({'op': op, 'case': cases.label(case), 'failure': failure})}", flush=True)


def findings(text: str) -> Iterator[str]:
    """The tool's reports, one text each, without its prefix and its host stacks."""
    for block in re.split(r"^=========\s*$", text, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.splitlines() if line.startswith("=========")]
        report = [line for line in lines if not _BESIDE.match(line)]
        if any(" at " in line or line.startswith("at ") for line in report):
            yield "; ".join(report)


def watch(tool: str, ops: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run operators in one process under a tool: per operator its cases, those that failed, and what the tool found."""
    command = ["compute-sanitizer", "--tool", tool, *_COMMON, *_SPECIAL.get(tool, ()), sys.executable, __file__, "--run"]
    command += ["--target", args.target.name, "--count", str(args.count), *(word for op in ops for word in ("--op", op))]
    folder = Path(__file__).parent.parent
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths}
    late = ""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=args.limit, env=environment
        )
        text = done.stdout
    except subprocess.TimeoutExpired as error:
        text, late = (error.stdout or b"").decode(errors="replace"), f"not reached in {args.limit:.0f} s"
    if args.logs:
        (args.logs / f"{tool}-{ops[0]}.log").write_text(text, encoding="utf-8")
    rows = [json.loads(line.removeprefix(_MARK)) for line in text.splitlines() if line.startswith(_MARK)]
    reports = list(findings(text))
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
    found: dict[str, dict[str, Any]] = {}
    for op in ops:
        own = [row for row in rows if row["op"] == op]
        found[op] = {
            "cases": len(own),
            "failures": [f"[{row['case']}] {row['failure']}" for row in own if row["failure"]],
            "reports": [report for report in reports if re.search(rf"\b{op}_[0-9a-f]{{12}}", report)],
            "others": [],
        }
        if len(own) < len(chosen([op], args.count, args.target)):
            found[op]["failures"].append(late or f"the process ended before: {last[:300]}")
    # Device code that is not ours is torch's; it is said once, of the first operator of the process.
    found[ops[0]]["others"] = [report for report in reports if not re.search(r"_[0-9a-f]{12}", report)]
    return found


def main() -> int:
    """Run the tool; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Run the kernels under compute-sanitizer.")
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP")
    parser.add_argument("--tool", action="append", choices=(*_TOOLS, "synccheck", "initcheck"), help="default: the first two")
    parser.add_argument("--count", type=int, default=4, help="short cases per operator; default 4")
    parser.add_argument("--target", default="cuda", help="default: cuda, the device that is present")
    parser.add_argument("--build-only", action="store_true", help="compile the cases' kernels into the cache, and run nothing")
    parser.add_argument("--jobs", type=int, default=4, help="watched processes per tool; default 4")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="of a watched process; default 600")
    parser.add_argument("--logs", metavar="FOLDER", type=Path, help="keep what the tools print")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcome")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tvm_gdn.load_api()
    if args.run:
        run_cases(args.op, args.count, use_target(args.target))
        return 0
    args.target = resolve(args.target) if args.build_only else use_target(args.target)
    pairs = chosen(args.op or list(OPS), args.count, args.target)
    wanted = [(OPS[op], geometry_of_case(OPS[op], case)) for op, case in pairs]
    cores = machine.cores()
    # Neighbours take alike long to compile: each process gets some of every kind.
    aot.compile_all([pair for first in range(cores) for pair in wanted[first::cores]], args.target)
    if args.build_only:
        print(f"the kernels of {len(wanted)} cases are in the cache")
        return 0
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    ops, tools = list(dict.fromkeys(op for op, _ in pairs)), args.tool or list(_TOOLS)
    shares = [(tool, ops[first :: args.jobs]) for tool in tools for first in range(min(args.jobs, len(ops)))]
    with ThreadPoolExecutor(len(shares)) as pool:
        outcomes = list(pool.map(lambda share: watch(*share, args), shares))
    found: dict[str, dict[str, Any]] = {tool: {} for tool in tools}
    for (tool, _), outcome in zip(shares, outcomes, strict=True):
        found[tool] |= outcome
    bad = 0
    for tool in tools:
        for op in ops:
            row = found[tool][op]
            wrong = [*row["reports"], *row["failures"], *(f"not ours: {report}" for report in row["others"])]
            bad += bool(wrong)
            counts = f"{len(row['reports'])} reports, {len(row['failures'])} failures"
            print(f"{tool} {op}, {row['cases']} cases: {f'{counts}; first: {wrong[0][:600]}' if wrong else 'clean'}")
    if args.json:
        report = {"format": 1, **machine.stamp(), "count": args.count, "tools": found}
        args.json.write_text(as_json(report) + "\n", encoding="utf-8")
    print(f"{len(tools) * len(ops) - bad} of {len(tools) * len(ops)} clean")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
