"""(SPEC, geometry, target, schedule) -> compiled library.

Compiling always happens in a process of its own (`python -m tvm_gdn.build`): LLVM aborts on what it cannot select, tvm takes
seconds to import, and the process that serves a model stays free of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from filelock import FileLock

from tvm_gdn import env, images
from tvm_gdn.digest import source_digest
from tvm_gdn.errors import BuildError
from tvm_gdn.pack import BuiltKernel
from tvm_gdn.records import algorithm_digest
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import HOST, TargetSpec, host_isa, resolve
from tvm_gdn.tracing import quick_macros

#: C compilers that are looked for, first match first.
COMPILERS = ("cc", "gcc", "clang")
_LAUNCHER_FLAGS = ("-O2", "-fPIC", "-shared", "-ldl", "-lpthread")
#: Lines of a failed compilation that an error shows, and whole outputs that the cache keeps.
_SHOWN, _KEPT_LOGS = 12, 50
#: What the seam between generated code and the machine is made of, by whether code runs on a device.
_LAUNCHERS = {False: "omp_launcher.c", True: "device_launcher.c"}


#: Scratch memory for generated C, which does not ask the runtime for it.
WORKSPACE = "workspace.c"


@dataclass(frozen=True)
class Request:
    """One kernel to compile; `knobs` None means the schedule that applies (record, default, generic)."""

    spec: OpSpec
    geometry: Geometry
    knobs: Mapping[str, Any] | None = None


def symbol_of(spec: OpSpec, geometry: Geometry) -> str:
    """Name of a kernel's function and file."""
    return f"{spec.name}_{hashlib.sha256(geometry.key.encode()).hexdigest()[:12]}"


def prim_func(spec: OpSpec, geometry: Geometry, tiles: Any) -> Any:
    """The operator's TIR function: the algorithm's, reduced to the parameters that the SPEC names, in its order."""
    import tvm

    algorithm = import_module(f"tvm_gdn.ops.tir.{spec.algorithm}")
    with quick_macros():
        function = getattr(algorithm, spec.algorithm)(geometry, tiles)
    parameters = {param.name: param for param in function.params}
    names = [tensor.name for tensor in spec.tensors if tensor.name in geometry.dtype]
    ordered = [
        arg.name
        for arg in spec.inputs
        if arg.name in names or (arg.name in {s.name for s in spec.scalars if s.passed and not s.static})
    ]
    ordered += [output.name for output in spec.outputs if not output.when or geometry.attr.get(output.when)]
    unknown = [name for name in ordered if name not in parameters]
    if unknown:
        raise BuildError(f"{spec.name}: its SPEC names {', '.join(unknown)}, which {spec.algorithm!r} does not take")
    # A scalar that the operator does not have is off: disable_state_update, use_qk_l2norm_in_kernel.
    absent = {
        variable: tvm.tirx.const(0, str(variable.ty))
        for name, variable in parameters.items()
        if name not in ordered and isinstance(variable.ty, tvm.ir.PrimType)
    }
    if absent:
        function = function.specialize(absent)
        parameters = {param.name: param for param in function.params}
    reduced = tvm.tirx.PrimFunc([parameters[name] for name in ordered], function.body, function.ret_type, function.attrs)
    return reduced.with_attr("global_symbol", symbol_of(spec, geometry))


def tvm_target(target: TargetSpec) -> Any:
    """The TVM target of a descriptor; ``mcpu = "host"`` becomes this CPU's LLVM name."""
    import tvm

    options = dict(target.codegen)
    if options.get("mcpu") == HOST:
        options["mcpu"] = tvm.target.codegen.llvm_get_system_cpu()
    return tvm.target.Target(options)


def required_features(target: TargetSpec) -> list[str]:
    """CPU flags that a pack must demand: those of the descriptor, or for a host build all instructions that this CPU has."""
    return list(target.requires) if dict(target.codegen).get("mcpu") != HOST else host_isa()


def scheduled(request: Request, target: TargetSpec) -> tuple[Any, Any]:
    """The schedule of a kernel on a target, and its TIR function as the target's code generator takes it."""
    import tvm

    from tvm_gdn import schedule

    choice = schedule.choose(request.spec, request.geometry, target, request.knobs)
    spec = replace(request.spec, algorithm=choice.algorithm)
    function: Any = prim_func(spec, request.geometry, choice.tiles(request.geometry))
    if dict(target.codegen)["kind"] == "c":
        # The generator's only storage scope is "global"; small arrays become C arrays by their annotation.
        function = tvm.ir.load_json(tvm.ir.save_json(function).replace('"local"', '"global"'))
    return choice, function


def compile_kernel(request: Request, target: TargetSpec, folder: Path) -> BuiltKernel:
    """Compile one kernel in this process.

    Parameters
    ----------
    request : Request
        What to compile.
    target : TargetSpec
        For which target.
    folder : Path
        Where the library is written.

    Returns
    -------
    BuiltKernel
    """
    import tvm

    choice, function = scheduled(request, target)
    symbol = symbol_of(request.spec, request.geometry)
    path = folder / f"{symbol}.so"
    device: dict[str, Any] = {}
    if target.image == "elf-so":
        with tvm.transform.PassContext(opt_level=3, config=dict(target.pass_config)):
            library = tvm.compile(function, target=tvm_target(target))
            if dict(target.codegen)["kind"] == "c":
                with resources.as_file(resources.files("tvm_gdn") / "csrc" / WORKSPACE) as source:
                    library.export_library(str(path), cc=_compiler(), options=["-O2", "-Dinff=INFINITY", str(source), "-lm"])
            else:
                library.export_library(str(path))
    else:
        code = images.compile_function(function, target, folder, symbol)
        path, device = code.library, {"image": code.image, "table": code.table}
    return BuiltKernel(
        spec=request.spec,
        geometry=request.geometry,
        file=path,
        symbol=symbol,
        schedule=choice.words,
        knobs=choice.knobs,
        source=kernel_digest(request.spec, target),
        refusal=choice.refusal,
        **device,
    )


def kernel_digest(spec: OpSpec, target: TargetSpec) -> str:
    """Digest of everything that decides what a kernel computes and how it is called."""
    names = [_LAUNCHERS[target.image != "elf-so"]]
    if target.image != "elf-so":
        also = {"emulation": images.EMULATION, "source": images.WORKSPACE}
        names += [images.FUNCTIONS, *([also[target.image]] if target.image in also else [])]
    seam = "".join(map(images.whole_source, names))
    compilers = ["tvm_gdn.build"]
    if target.image != "elf-so":
        compilers += ["tvm_gdn.images", "tvm_gdn.subset"]
    if "lowering" in dict(target.compiler):
        compilers.append(f"tvm_gdn.schedules.{dict(target.compiler)['lowering']}")
    # Which of its algorithms serves is known when a kernel is built, and its place in the cache before that.
    algorithms = [algorithm_digest(one, target) for one in (spec, spec.second) if one]
    parts = *algorithms, source_digest(*compilers), seam
    return f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}-{spec_digest(spec)}"


def spec_digest(spec: OpSpec) -> str:
    """Digest of an operator's kernel interface and maths: its arguments and outputs in order, and the TIR that may serve it."""
    interface = repr((spec.name, spec.inputs, spec.outputs, spec.static_axes))
    interface = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", interface)
    modules = [f"tvm_gdn.ops.tir.{one.algorithm}" for one in (spec, spec.second) if one]
    return hashlib.sha256((interface + source_digest(*modules)).encode()).hexdigest()[:16]


def _compiler() -> str:
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise BuildError(f"no C compiler found ({', '.join(COMPILERS)}): it links kernels; install one, or use a prebuilt pack")
    return compiler


def build_launcher(folder: Path, target: TargetSpec) -> Path:
    """Compile what runs a target's kernels (on threads, or on a device) with the C compiler of this machine.

    Raises
    ------
    BuildError
        No compiler, or it failed.
    """
    compiler = _compiler()
    name = _LAUNCHERS[target.image != "elf-so"]
    path = folder / "launcher.so"
    with resources.as_file(resources.files("tvm_gdn") / "csrc" / name) as source:
        done = subprocess.run(
            [compiler, str(source), "-o", str(path), *_LAUNCHER_FLAGS], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise BuildError(f"{compiler} cannot compile {name}:\n{done.stderr}")
    return path


def run_builder(
    requests: Sequence[Request], target: TargetSpec, folder: Path, timeout: float = 600.0
) -> list[BuiltKernel | BuildError]:
    """Compile kernels in a process of their own.

    Parameters
    ----------
    requests : sequence of Request
        What to compile.
    target : TargetSpec
        For which target.
    folder : Path
        Where the libraries are written.
    timeout : float
        Seconds after which the process is killed.

    Returns
    -------
    list of BuiltKernel or BuildError
        Per request: one kernel that does not compile leaves the others alone.

    Raises
    ------
    BuildError
        The process died (LLVM aborts on what it cannot select) or took too long; with the end of its output.
    """
    from tvm_gdn.ops import OPS

    job = {
        "target": target.text,
        "folder": str(folder),
        "kernels": [
            {"op": r.spec.name, "geometry": r.geometry.to_json(), "knobs": None if r.knobs is None else dict(r.knobs)}
            for r in requests
        ],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tvm_gdn.build"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=builder_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"compiling {len(requests)} kernel(s) for {target.name} took over {timeout:.0f} s") from error
    if done.returncode:
        raise BuildError(f"compiling for {target.name} died (exit status {done.returncode}):\n{_told(done.stderr)}")
    return [
        BuildError(f"compiling for {target.name} failed:\n{_told(entry['error'])}")
        if "error" in entry
        else BuiltKernel(
            spec=OPS[entry["op"]],
            geometry=Geometry.from_json(entry["geometry"]),
            file=Path(entry["file"]),
            symbol=entry["symbol"],
            schedule=entry["schedule"],
            knobs=entry["knobs"],
            source=entry["source"],
            refusal=entry["refusal"],
            image=Path(entry["image"]) if entry["image"] else None,
            table=tuple(entry["table"]),
        )
        for entry in json.loads(done.stdout.splitlines()[-1])
    ]


def _told(text: str) -> str:
    """End of a compiler's output, and the file that has the whole; a TVMScript diagnostic ends with a line of carets alone."""
    lines = [line for line in text.strip().splitlines() if line.strip(" |^")]
    if len(lines) <= _SHOWN:
        return "\n".join(lines)
    logs = env.cache_dir() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=logs, prefix="build-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(text)
    with FileLock(logs / "lock"):  # other processes tidy up too
        for old in sorted(logs.glob("build-*.log"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
            old.unlink()
    return "\n".join([f"(the whole output: {file.name})", *lines[-_SHOWN:]])


def builder_environment() -> dict[str, str]:
    """The environment of a compiling process: this process's import path, and readable parser errors."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TVM_BACKTRACE": "1"}


def _main() -> None:
    from tvm_gdn.ops import OPS

    job = json.load(sys.stdin)
    target, folder = resolve(job["target"]), Path(job["folder"])
    built: list[dict[str, Any]] = []
    for entry in job["kernels"]:
        request = Request(OPS[entry["op"]], Geometry.from_json(entry["geometry"]), entry["knobs"])
        try:
            kernel = compile_kernel(request, target, folder)
        except Exception:
            built.append({"error": traceback.format_exc()})
            continue
        built.append(
            {
                "op": kernel.spec.name,
                "geometry": kernel.geometry.to_json(),
                "file": str(kernel.file),
                "symbol": kernel.symbol,
                "schedule": kernel.schedule,
                "knobs": kernel.knobs,
                "source": kernel.source,
                "refusal": kernel.refusal,
                "image": None if kernel.image is None else str(kernel.image),
                "table": list(kernel.table),
            }
        )
    sys.stdout.write("\n" + json.dumps(built) + "\n")


if __name__ == "__main__":
    _main()
