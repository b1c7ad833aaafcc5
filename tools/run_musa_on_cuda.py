"""Compiles the MUSA sources with nvcc through a shim header, and runs them on the NVIDIA device that is present, against float64.

    python tools/run_musa_on_cuda.py --json parity-musa-mp31.json          # two short cases per operator
    python tools/run_musa_on_cuda.py --cases all --op chunk_kda
    python tools/run_musa_on_cuda.py --compile-only                        # no device needed
    python tools/run_musa_on_cuda.py --compile-only --arch 90 --kept LIBS  # what is there is not compiled again

What runs is the text of the `.mu` file, launcher included; only the names of the vendor's runtime are NVIDIA's
(`tvm_gdn/csrc/musa_shim`). It shows that the source is right, and nothing about Moore Threads' compiler or devices: reports call
it emulated. Needs nvcc, apache-tvm and, to run, torch for CUDA.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from tvm_gdn import build, cases, device, parity, records, torch_ops
from tvm_gdn.bench import machine
from tvm_gdn.commands import parity_record
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.commands.parity import summary, without_schedule
from tvm_gdn.commands.text import as_json
from tvm_gdn.errors import BuildError
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec, emulation_of, named

_FLAGS = ("-x", "cu", "-w", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")
#: Beginnings of the operators whose sources are longest.
_LONG = ("chunk", "fused_experts")


def compile_with_nvcc(source: Path, arch: str) -> Path:
    """Compile a `.mu` file with nvcc; path of the library.

    Raises
    ------
    BuildError
        With nvcc's message.
    """
    library = source.with_suffix(".so")
    shim = resources.files("tvm_gdn") / "csrc" / "musa_shim"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", *_FLAGS, code, f"-I{shim}", f"-I{tvm_ffi.libinfo.find_include_path()}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"nvcc cannot compile {source.name}:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return library


def chosen_cases(ops: list[str], selection: str, target: TargetSpec) -> list[tuple[str, dict[str, Any]]]:
    """Operators that have a schedule on the target, with their cases."""
    lacking = without_schedule(ops, target)
    chosen = {op: parity.sample(OPS[op]) if selection == "small" else map(dict, OPS[op].cases) for op in ops if op not in lacking}
    return [(op, case) for op, found in chosen.items() for case in found]


def library_name(request: build.Request, target: TargetSpec, arch: str) -> str:
    """File of a kernel's library: other sources, shim or flags have another name."""
    shim = sorted((resources.files("tvm_gdn") / "csrc" / "musa_shim").iterdir(), key=lambda entry: entry.name)
    knobs = request.knobs or records.lookup(request.spec, request.geometry, target)
    parts = build.kernel_digest(request.spec, target), str(knobs), *_FLAGS, *(entry.read_text("utf-8") for entry in shim)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return f"{build.symbol_of(request.spec, request.geometry)}-{digest}-{arch}.so"


def build_one(
    request: build.Request, target: TargetSpec, folder: Path, arch: str, kept: Path | None = None
) -> tuple[Path, str]:  # fmt: skip
    """Generate and compile a kernel's source: its library and the name of its function; one that is kept is taken as it is.

    Raises
    ------
    BuildError
        Either fails.
    """
    name = library_name(request, target, arch)
    if kept and (kept / name).is_file():
        return kept / name, build.symbol_of(request.spec, request.geometry)
    folder.mkdir()
    (kernel,) = build.run_builder([request], target, folder)
    if isinstance(kernel, BuildError):
        raise kernel
    library = compile_with_nvcc(folder / f"{kernel.symbol}.mu", arch)
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, kept / f"{name}.part")
        library = (kept / f"{name}.part").rename(kept / name)
    return library, kernel.symbol


def check(
    op: str, case: Mapping[str, Any], arguments: Mapping[str, Any], want: Mapping[str, torch.Tensor], kernel: Any
) -> dict[str, Any]:
    """Run one case on the device and compare: a row of a parity report."""
    spec, geometry = OPS[op], geometry_of_case(OPS[op], case)
    function = torch_ops.call_function(spec, geometry, kernel, "cuda")
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    errors, limits = parity.compare(spec, parity.run(spec, there, function), want)
    passed = all(errors[name] <= limit for name, limit in limits.items())
    served = f"compiled (musa source by nvcc, on {device.name('cuda')})"
    return {
        "op": op, "case": cases.label(case), "passed": passed, "served_by": served, "errors": errors, "limits": limits,
        "failure": "",
    }  # fmt: skip


def report_of(
    wanted: list[tuple[str, dict[str, Any]]], rows: Mapping[tuple[str, int], Any], target: TargetSpec, selection: str, *,
    compile_only: bool,
) -> dict[str, Any]:  # fmt: skip
    """A parity report of the cases that are known so far, by operator and number; None of one that was compiled only.

    `tvm_gdn parity --merge` takes it into a matrix; an operator that is not whole yet counts as stale there.
    """
    note = f"the .mu source and its launcher, compiled by nvcc through a shim header, on {device.name('cuda')}; not by mcc"
    ran, order = "built" if compile_only else "emulated", sorted(rows, key=lambda key: key[1])
    ops: dict[str, dict[str, Any]] = {}
    for op in dict.fromkeys(op for op, _ in order):
        own = [case for name, case in wanted if name == op]
        found = [rows[key] for key in order if key[0] == op]
        ops[op] = {
            **summary(own, op, [row for row in found if row]), "ran": ran,
            "image": {"format": "mu", "built": True, "text": note},
        }  # fmt: skip
        if len(found) == len(own):
            made = target if compile_only else emulation_of(target)
            ops[op]["made_of"] = parity_record.made_of(OPS[op], made, selection)
    return {
        "format": 1, **machine.stamp(), "target": target.name, "ran": ran, "compile_only": compile_only, "selection": selection,
        "ops": ops, "cases": [rows[key] for key in order if rows[key]],
    }  # fmt: skip


def main() -> int:
    """Run the tool; exit status 1 if a case fails or a source does not compile."""
    parser = argparse.ArgumentParser(description="Run the MUSA sources on an NVIDIA device, through nvcc and a shim header.")
    parser.add_argument("--target", default="musa-mp31", help="default: musa-mp31")
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP")
    parser.add_argument("--cases", choices=("small", "all"), default="small")
    parser.add_argument("--arch", help="compute capability, such as 90; default: that of the device, or 80")
    parser.add_argument("--compile-only", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="processes that compile at once")
    parser.add_argument("--kept", metavar="FOLDER", type=Path, help="where libraries stay; what is there is not compiled again")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write a parity report")
    args = parser.parse_args()
    present = device.architecture("cuda")
    if present is None and not args.compile_only:
        print("no CUDA device is present; --compile-only needs none", file=sys.stderr)
        return 2
    target, arch = named(args.target), args.arch or (present or "8.0").replace(".", "")
    wanted = chosen_cases(args.op or list(OPS), args.cases, target)
    geometries = [(op, geometry_of_case(OPS[op], case)) for op, case in wanted]
    # What takes longest to compile begins first; a case runs as soon as its kernel is there.
    unique = sorted(dict.fromkeys(geometries), key=lambda pair: not pair[0].startswith(_LONG))
    rows: dict[tuple[str, int], dict[str, Any] | None] = {}
    failed, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        built = {
            pool.submit(
                build_one, build.Request(OPS[pair[0]], pair[1]), target, Path(folder) / str(number), arch, args.kept
            ): pair
            for number, pair in enumerate(unique)
        }
        torch.set_num_threads(1)  # the other cores compile
        drawn = [] if args.compile_only else [cases.draw(OPS[op], case) for op, case in wanted]
        expected = [parity.expected(OPS[op], arguments) for (op, _), arguments in zip(wanted, drawn, strict=False)]
        ready = ((done, n) for done in as_completed(built) for n, pair in enumerate(geometries) if pair == built[done])
        for done, number in ready:
            op, case = wanted[number]
            try:
                library, symbol = done.result()
                function = tvm_ffi.load_module(str(library))[symbol]
                row = None if args.compile_only else check(op, case, drawn[number], expected[number], function)
            except (BuildError, RuntimeError) as error:
                row = {
                    "op": op, "case": cases.label(case), "passed": False, "served_by": "none", "errors": {}, "limits": {},
                    "failure": str(error),
                }  # fmt: skip
            failed += row is not None and not row["passed"]
            rows[op, number] = row
            if args.json:
                args.json.write_text(
                    as_json(report_of(wanted, rows, target, args.cases, compile_only=args.compile_only)) + "\n", encoding="utf-8"
                )
            outcome = "compiled" if row is None else "passed" if row["passed"] else row["failure"] or row["errors"]
            print(f"{time.perf_counter() - start:5.0f} s, {op} [{cases.label(case)}]: {outcome}", flush=True)
    print(f"{len(wanted) - failed} of {len(wanted)} cases {'compiled' if args.compile_only else 'passed'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
