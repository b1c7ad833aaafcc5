"""Runs the kernels of every operator on the CUDA device under compute-sanitizer, and prints per operator what was found.

    python tools/sanitize.py --json sanitized.json           # memcheck, racecheck, synccheck, one after another
    python tools/sanitize.py --tool synccheck --op chunk_kda
    python tools/sanitize.py --tuned                         # the kernels that tuned records shape, on short cases
    python tools/sanitize.py --build-only --target cuda-sm90 # only fill the cache of kernels; needs no device

Cases are short ones of the SPECs, as different as they get, and those that reach what a kernel does only for other sizes or knobs
(`FORMS`). Kernels and float64 references are made before, without the tool; then processes under the tool take cases in
turn, the first of every operator before the second of any, so that a time limit leaves out what says least. Torch's allocator
keeps nothing there, so that an access one element behind a tensor is one outside of an allocation. The numbers are held against
float64 as well. Needs compute-sanitizer (it comes with CUDA's toolkit), torch for CUDA, and apache-tvm to compile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import build, cases, kernel_cache, models, parity, records
from tvm_gdn.bench import machine
from tvm_gdn.commands.arguments import geometry_of_case, use_target
from tvm_gdn.commands.parity import without_schedule
from tvm_gdn.commands.text import as_json
from tvm_gdn.errors import BuildError, TargetError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec, resolve

_TOOLS = ("memcheck", "racecheck", "synccheck")
#: What each tool is called with: only this process, and on after an error; of memory also errors of device code alone.
_COMMON = ("--target-processes", "application-only", "--destroy-on-device-error", "kernel")
_SPECIAL = {"memcheck": ("--padding", "64", "--report-api-errors", "no")}
#: Lines of a report that say nothing about device code.
_BESIDE = re.compile(r"Host Frame|Saved host|Device Frame|COMPUTE-SANITIZER|\w+ SUMMARY")
#: Begins a line of the watched process; the tool's own begin with =====.
_MARK = "sanitize: "
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TVM_GDN_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}

_DECODE = {"H": 1, "V": 64, "with": ("initial_state_source", "initial_state_indices"), "dtype": "bfloat16"}
_CHUNK = {
    "B": 1, "T": 130, "H": 1, "HV": 2, "K": 64, "V": 64, "with": ("initial_state",), "output_final_state": True,
    "dtype": "bfloat16", "state_dtype": "float32",
}  # fmt: skip
_EXPERTS = {"k": 2, "E": 16, "D": 96, "I": 64, "dtype": "bfloat16"}
#: Cases that no short one of a SPEC stands for, each with knobs, or with None for the default's.
FORMS: dict[str, list[tuple[dict[str, Any], dict[str, Any] | None]]] = {
    # As many heads as make the copy engine bring states.
    "packed_decode_gated_delta_rule": [
        ({**_DECODE, "B": 520, "HV": 1, "K": 64, "S": 523, "state_dtype": "float32"}, None),
        ({**_DECODE, "B": 130, "HV": 2, "K": 128, "S": 131, "state_dtype": "bfloat16", "state_v_first": True}, None),
    ],
    # Products of four warps together, in one group, in two and in three.
    "chunk_gated_delta_rule": [
        (_CHUNK, {"groups": 1, "warps": 4}),
        ({**_CHUNK, "K": 128}, {"groups": 2, "warps": 8}),
        ({**_CHUNK, "K": 128, "T": 200}, {"groups": 3, "warps": 12}),
    ],
    "chunk_kda": [({**_CHUNK, "HV": 1}, None)],
    # Tiles of few rows without a sort, blocks that go through all tiles of more, and the order made by many blocks.
    "fused_experts": [
        ({**_EXPERTS, "T": 2}, None),
        ({**_EXPERTS, "T": 120, "E": 3, "D": 128}, None),
        ({**_EXPERTS, "T": 190, "E": 2, "D": 160}, None),
        ({**_EXPERTS, "T": 2100, "E": 40, "D": 32, "I": 32}, None),
    ],
    "fused_experts_packed": [({**_EXPERTS, "T": 3, "scheme": "bf16"}, None)],
    "fused_experts_quantized": [({**_EXPERTS, "T": 3, "scheme": "int8", "scale_dtype": "float32"}, None)],
}  # fmt: skip


#: Sizes of the benchmark's shapes that may be as small as this without other code being run.
_SHORT = {"B": 3, "T": 130, "S": 4, "SC": 4, "M": 70, "H": 1, "HV": 2, "E": 16, "k": 2}


@dataclass(frozen=True)
class Run:
    """A case of an operator, and the knobs of its kernel where they are not the default's."""

    op: str
    case: dict[str, Any]
    knobs: dict[str, Any] | None = None


def chosen(ops: list[str], count: int, target: TargetSpec) -> list[Run]:
    """Cases of the operators that have a schedule on the target: first one of each and all forms, then the second ones."""
    lacking = without_schedule(ops, target)
    usual = {op: parity.sample(OPS[op], count) for op in ops if op not in lacking}
    turns = [[Run(op, found[turn]) for op, found in usual.items() if turn < len(found)] for turn in range(count)]
    forms = []
    for op in usual:
        for case, knobs in FORMS.get(op, []):
            with contextlib.suppress(TargetError):
                forms.append(Run(op, case, None if knobs is None else explicit(op, case, knobs, target)))
    first, *later = turns
    return [*first, *forms, *(run for turn in later for run in turn)]


def tuned(ops: list[str], target: TargetSpec) -> list[Run]:
    """A short case of every kernel whose knobs are a record's."""
    found: dict[tuple[str, str], Run] = {}
    # Experts of every model: their hidden sizes are part of a record's key.
    shapes = [(op, shape) for op in ops for name in (None, *models.MODELS) for shape in models.bench(OPS[op], name)]
    for op, shape in shapes:
        sizes = _SHORT.keys() - set(OPS[op].static_axes)
        short = {name: min(value, _SHORT[name]) if name in sizes else value for name, value in shape.items()}
        case = {**short, **({"lengths": (63, 1, 40)} if "lengths" in shape else {})}
        # One kernel has several shapes: few and many rows of an expert go through other code.
        if records.lookup(OPS[op], geometry_of_case(OPS[op], case), target):
            found.setdefault((op, cases.label(case)), Run(op, case))
    return list(found.values())


def explicit(op: str, case: dict[str, Any], knobs: dict[str, Any], target: TargetSpec) -> dict[str, Any]:
    """All knobs of a kernel, of which some are given.

    Raises
    ------
    TargetError
        The target's schedule lacks one of them.
    """
    from tvm_gdn import schedule

    geometry = geometry_of_case(OPS[op], case)
    space, _ = schedule.find_space(OPS[op].algorithm, target)
    known = space.knobs(geometry)
    if lacking := [name for name, value in knobs.items() if value not in known.get(name, ())]:
        raise TargetError(f"{op} on {target.name} lacks {lacking}")
    return {**space.default(geometry), **knobs}


def build_all(runs: list[Run], target: TargetSpec, packs: Path, jobs: int) -> list[str]:
    """Compile what the cache lacks, one kernel per process, and kernels of explicit knobs as packs; what failed."""
    requests = {(run.op, geometry_of_case(OPS[run.op], run.case), json.dumps(run.knobs)): run for run in runs}
    start = time.perf_counter()

    def make(item: tuple[int, Any]) -> str:
        number, ((op, geometry, _), run) = item
        try:
            if run.knobs is None:
                failed = "\n".join(kernel_cache.prebuild([(OPS[op], geometry)], target, 1))
            else:
                kernel_cache.compile_pack(packs / str(number), [build.Request(OPS[op], geometry, run.knobs)], target)
                failed = ""
        except BuildError as error:
            failed = str(error)
        print(f"{time.perf_counter() - start:5.0f} s, {op} [{cases.label(run.case)}] {failed or 'built'}", flush=True)
        return failed

    # Chunked rules and experts take longest to compile.
    ordered = sorted(requests.items(), key=lambda item: not re.match("chunk|fused_experts", item[0][0]))
    with ThreadPoolExecutor(jobs) as pool:
        return [failed for failed in pool.map(make, enumerate(ordered)) if failed]


def draw_all(runs: list[Run], folder: Path) -> None:
    """Write each case's arguments and what float64 makes of them to a file."""
    torch.set_num_threads(1)  # other cores compile; and these are small tensors
    for number, run in enumerate(runs):
        arguments = cases.draw(OPS[run.op], run.case)
        torch.save((run, arguments, parity.expected(OPS[run.op], arguments)), folder / f"{number}.pt")


def run_cases(folder: Path, target: TargetSpec) -> None:
    """What a watched process does: take one case after another that no other process has taken, and print a line about each."""
    for number in range(len(list(folder.glob("*.pt")))):
        try:
            (folder / os.environ["SANITIZE_TOOL"] / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        run, arguments, want = torch.load(folder / f"{number}.pt", weights_only=False)
        start = time.perf_counter()
        try:
            result = parity.check_arguments(OPS[run.op], run.case, arguments, want, target.device)
            if target.device == "cuda":
                torch.cuda.synchronize()
            failure = "" if result.passed else result.failure or f"errors {result.errors}"
        except (TvmGdnError, RuntimeError) as error:
            failure = str(error).splitlines()[0]
        row = {"number": number, "failure": failure, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{_MARK}{json.dumps(row)}", flush=True)


def findings(text: str) -> Iterator[str]:
    """The tool's reports, one text each, without its prefix and its host stacks."""
    for block in re.split(r"^=========\s*$", text, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.splitlines() if line.startswith("=========")]
        report = [line for line in lines if not _BESIDE.match(line)]
        if any(" at " in line or line.startswith("at ") for line in report):
            yield "; ".join(report)


class Watch:
    """Processes under one tool that go through all cases together.

    Parameters
    ----------
    tool : str
        The tool; empty for none.
    folder : Path
        The cases, as `draw_all` writes them.
    runs : list of Run
        The same.
    args : argparse.Namespace
        Of the command.
    deadline : float
        When processes are ended, by `time.monotonic`.
    """

    def __init__(self, tool: str, folder: Path, runs: list[Run], args: argparse.Namespace, deadline: float) -> None:
        self.tool, self.folder, self.runs, self.args, self.deadline = tool, folder, runs, args, deadline
        self.rows: dict[int, dict[str, Any]] = {}
        self.taken = folder / tool
        self.taken.mkdir()

    def processes(self, jobs: int) -> str:
        """Run them until every case is taken or time is up; what they printed."""
        with ThreadPoolExecutor(jobs) as pool:
            return "".join(pool.map(self._one_after_another, range(jobs)))

    def _one_after_another(self, slot: int) -> str:
        """A process, and another one where it ended before all cases were taken."""
        text, before = "", -1
        while (now := len(list(self.taken.iterdir()))) < len(self.runs) and time.monotonic() < self.deadline and now != before:
            before = now
            text += self._one()
        if self.args.logs:
            (self.args.logs / f"{self.tool}-{slot}.log").write_text(text, encoding="utf-8")
        return text

    def _one(self) -> str:
        command = [sys.executable, __file__, "--run", str(self.folder), "--target", self.args.target.text]
        command = ["compute-sanitizer", "--tool", self.tool, *_COMMON, *_SPECIAL.get(self.tool, ()), *command]
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
        packs = {"TVM_GDN_PACK_PATH": str(self.folder / "packs"), "SANITIZE_TOOL": self.tool}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, **_ENVIRONMENT, **packs, "PYTHONPATH": paths},
        )  # fmt: skip
        late = threading.Timer(max(0.0, self.deadline - time.monotonic()), lambda: os.killpg(process.pid, signal.SIGKILL))
        late.start()
        text = []
        for line in process.stdout or ():
            text.append(line)
            if line.startswith(_MARK):
                row = json.loads(line.removeprefix(_MARK))
                run = self.runs[row["number"]]
                self.rows[row["number"]] = row
                said = f"{self.tool} {run.op} [{cases.label(run.case)}] {row['seconds']} s {row['failure']}"
                print(f"  {len(self.rows)} of {len(self.runs)}: {said}", flush=True)
        process.wait()
        late.cancel()
        return "".join(text)

    def outcome(self, text: str) -> dict[str, dict[str, Any]]:
        """Per operator its cases, those that failed or were not reached, and what the tool found."""
        reports = list(findings(text))
        found: dict[str, dict[str, Any]] = {}
        for op in dict.fromkeys(run.op for run in self.runs):
            own = {number: run for number, run in enumerate(self.runs) if run.op == op}
            rows = [self.rows[number] for number in own if number in self.rows]
            begun = [n for n in own if n not in self.rows and (self.taken / str(n)).exists()]
            found[op] = {
                "cases": len(rows),
                "not_reached": len(own) - len(rows) - len(begun),
                "failures": [f"[{cases.label(own[row['number']].case)}] {row['failure']}" for row in rows if row["failure"]]
                + [f"[{cases.label(own[number].case)}] not ended in time, or with its process" for number in begun],
                "reports": [report for report in reports if re.search(rf"\b{op}_[0-9a-f]{{12}}", report)],
            }
        return found


def summary(tool: str, found: dict[str, dict[str, Any]]) -> int:
    """Print a line per operator; how many of them are clean."""
    clean = 0
    for op, row in found.items():
        wrong = [*row["reports"], *row["failures"]]
        counts = f"{len(row['reports'])} reports, {len(row['failures'])} failures"
        state = f"{counts}; first: {wrong[0][:600]}" if wrong else "clean" if row["cases"] else "not reached"
        clean += state == "clean"
        left = f" ({row['not_reached']} more not reached)" if row["not_reached"] else ""
        print(f"{tool} {op}, {row['cases']} cases{left}: {state}")
    print(f"{tool}: {clean} of {len(found)} operators clean", flush=True)
    return clean


def main() -> int:
    """Run the tool; exit status 1 if anything was found or not reached."""
    parser = argparse.ArgumentParser(description="Run the kernels under compute-sanitizer.")
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP")
    parser.add_argument("--tool", action="append", choices=(*_TOOLS, "initcheck"), help="default: the first three")
    parser.add_argument("--count", type=int, default=2, help="short cases per operator; default 2")
    parser.add_argument("--tuned", action="store_true", help="instead: a short case of every kernel that a tuned record shapes")
    parser.add_argument("--target", default="cuda", help="default: cuda, the device that is present")
    parser.add_argument("--build-only", action="store_true", help="compile the cases' kernels into the cache, and run nothing")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="processes at once; default: one per core")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="of everything; default 600")
    parser.add_argument("--logs", metavar="FOLDER", type=Path, help="keep what the tools print")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcome")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args, start = parser.parse_args(), time.monotonic()
    tvm_gdn.load_api()
    if args.run:
        run_cases(args.run, use_target(args.target))
        return 0
    args.target = resolve(args.target) if args.build_only else use_target(args.target)
    ops = args.op or list(OPS)
    runs = tuned(ops, args.target) if args.tuned else chosen(ops, args.count, args.target)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(build_all, runs, args.target, folder / "packs", args.jobs)
            draw_all(runs, folder)
            failed = building.result()
        print(f"{len(runs)} cases; {len(failed)} kernels could not be compiled", flush=True)
        if args.build_only:
            return int(bool(failed))
        tools, found, texts = args.tool or list(_TOOLS), {}, []
        for number, tool in enumerate(tools):
            left = max(0.0, args.limit - (time.monotonic() - start))
            watch = Watch(tool, folder, runs, args, time.monotonic() + left / (len(tools) - number))
            texts.append(watch.processes(args.jobs))
            found[tool] = watch.outcome(texts[-1])
    clean = sum(summary(tool, found[tool]) for tool in tools)
    # Device code that is not ours is torch's.
    others = sorted({report for text in texts for report in findings(text) if not re.search(r"_[0-9a-f]{12}", report)})
    for text in others[:3]:
        print(f"not ours: {text[:600]}")
    if args.json:
        report = {"format": 1, **machine.stamp(), "count": args.count, "tools": found, "others": others}
        args.json.write_text(as_json(report) + "\n", encoding="utf-8")
    return int(clean < sum(len(rows) for rows in found.values()) or bool(others or failed))


if __name__ == "__main__":
    sys.exit(main())
