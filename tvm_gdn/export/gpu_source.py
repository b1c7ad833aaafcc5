"""Formats ``cuda-src``, ``musa-src``, ``opencl-src``, ``metal-src``, ``webgpu-src``: kernel source and how to launch it, as JSON.

For vendors whose compilers take such source. CUDA and MUSA get the schedule of those targets. The others get the mapping that
every GPU language can say: one thread per value column, no shuffles, no shared memory, no barriers; slow where registers are few.
What is verified is the same TIR as CUDA C, run by the emulation of a CUDA device on this CPU (`emulation.py`), and OpenCL's text
where there is a runtime for it (`opencl_run.py`).
"""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tvm_gdn import build as builder
from tvm_gdn.errors import TvmGdnError
from tvm_gdn.export import gpu_launch, opencl_run
from tvm_gdn.export.artifact import Check, ExportError, Request, compared, draw
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, resolve

_log = logging.getLogger("tvm_gdn")
#: Language -> suffix of its files, target that supplies the schedule, and dtypes that its source was generated for.
LANGUAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cuda": (".cu", "cuda-sm80", ("float32", "bfloat16", "float16", "int32", "int64", "bool")),
    "musa": (".mu", "musa-mp31", ("float32", "bfloat16", "float16", "int32", "int64", "bool")),
    "opencl": (".cl", "cuda-sm80", ("float32", "bfloat16", "int32", "int64", "bool")),
    "metal": (".metal", "cuda-sm80", ("float32", "int32", "int64", "bool")),
    "webgpu": (".wgsl", "cuda-sm80", ("float32", "int32")),
}
_NATIVE = ("cuda", "musa")
_PORTABLE = ("recurrent", "gating", "norm", "moe_sort", "moe_stats")
#: Algorithms that a language has a mapping for.
ALGORITHMS = {
    "cuda": (*_PORTABLE, "moe_route", "conv", "chunk", "moe_experts"),
    "musa": (*_PORTABLE, "moe_route", "conv", "chunk", "moe_experts"),
    "opencl": (*_PORTABLE, "moe_route", "conv"),
    "metal": (*_PORTABLE, "moe_route", "conv"),
    "webgpu": _PORTABLE,
}


def serves(spec: OpSpec, language: str) -> tuple[str, ...]:
    """Dtypes of an operator in a language's source."""
    return LANGUAGES[language][2] if spec.algorithm in ALGORITHMS[language] else ()


def maker(language: str) -> tuple[Callable[[Request], dict[str, bytes]], Callable[[Request, Path], list[Check]]]:
    """The ``build`` and ``verify`` of a language's format."""
    suffix = LANGUAGES[language][0]

    def build(request: Request) -> dict[str, bytes]:
        """The source, and ``<symbol>.json`` that says how to launch it."""
        _supported(request, language)
        made = _process({"do": "source", "language": language, **_text(request)})
        if made["refusal"]:
            told = "%s: source of its second algorithm, right but slow on long sequences: %s"
            _log.warning(told, request.spec.name, made["refusal"])
        refusal = {"refusal": made["refusal"]} if made["refusal"] else {}
        launch = {"operator": request.spec.name, "geometry": request.geometry.to_json(), **refusal, **made["launch"]}
        return {
            f"{request.symbol}{suffix}": made["source"].encode(),
            f"{request.symbol}.json": (json.dumps(launch, indent=1) + "\n").encode(),
        }

    def verify(request: Request, folder: Path) -> list[Check]:
        """Run the kernel emulated; the text of other languages than CUDA's is not compiled here, and the table says so."""
        source = (folder / f"{request.symbol}{suffix}").read_text(encoding="utf-8")
        launch = json.loads((folder / f"{request.symbol}.json").read_text(encoding="utf-8"))
        named = all(kernel["name"] in source for kernel in launch["kernels"])
        checks = [Check("kernels named in the launch description", "text search", named)]
        if language not in _NATIVE:
            left = sorted(set(re.findall(r"\btvm_gdn_\w+", source)))
            checks.append(Check("calls no function of another language", "text search", not left, ", ".join(left)))
        made = _process({"do": "verify", "language": language, **_text(request), "launch": launch, "text": source})
        ran = "this source" if language == "cuda" else "the same TIR as CUDA C"
        what = f"{ran}, launched by the description, numbers against float64 reference"
        checks.append(Check(what, "device emulation on the CPU", made["passed"], made["detail"]))
        if language == "opencl":
            made = _process({"do": "opencl", "language": language, **_text(request), "launch": launch, "text": source})
            what = "this source, launched by the description, numbers against float64 reference"
            checks.append(Check(what, made["by"], made["passed"], made["detail"]))
        elif language not in _NATIVE:
            checks.append(Check(f"{language} text", f"{language} compiler", None, "none is used here"))
        return checks

    return build, verify


def _supported(request: Request, language: str) -> None:
    if request.spec.algorithm not in ALGORITHMS[language]:
        have = ", ".join(ALGORITHMS[language])
        raise ExportError(f"{request.spec.name}: no mapping for {language}; operators of {have} kernels have one")
    if language not in _NATIVE and request.geometry.axis.get("V", 32) % 32:
        V = request.geometry.axis["V"]
        raise ExportError(f"{request.spec.name} in {language}: V = {V}; allowed: multiples of 32 (fewer columns need shuffles)")
    allowed = LANGUAGES[language][2]
    wrong = [f"{name} {dtype}" for name, dtype in request.geometry.dtype.items() if dtype not in allowed]
    if wrong:
        raise ExportError(f"{request.spec.name} in {language}: {', '.join(wrong)}; allowed: {', '.join(allowed)}")


def _text(request: Request) -> dict[str, Any]:
    return {"op": request.spec.name, "geometry": request.geometry.to_json()}


def _process(job: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tvm_gdn.export.gpu_source"], input=json.dumps(job), capture_output=True, text=True,
        timeout=timeout, check=False, env=builder.builder_environment(),
    )  # fmt: skip
    if done.returncode:
        raise ExportError(f"{job['op']} in {job['language']}: {done.stderr.strip()[-800:]}")
    made = dict(json.loads(done.stdout.splitlines()[-1]))
    if "error" in made:
        raise ExportError(f"{job['op']} in {job['language']}: {made['error']}")
    return made


def _knobs(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> dict[str, Any]:
    """Knobs of the mapping that every language can say."""
    from tvm_gdn import schedule

    if spec.algorithm not in {"recurrent", "norm"}:
        return schedule.choose(spec, geometry, target).knobs
    if spec.algorithm == "norm":
        return {"alone": True}
    # All threads along the value columns: no sum crosses threads, so no shuffles. And no vectors: whether an address is aligned
    # for one is asked of a function in CUDA C.
    return {"column_lanes": math.gcd(geometry.axis["V"], 32), "columns": 1, "group": 1, "widest": 1}


def _source(spec: OpSpec, geometry: Geometry, language: str, *, as_cuda: bool = False) -> dict[str, Any]:
    """Source and launch description; `as_cuda` gives the same TIR as CUDA C for the emulation."""
    import tvm

    from tvm_gdn import images, schedule, subset
    from tvm_gdn.target import concrete, emulation_of

    target = resolve(LANGUAGES[language][1])
    refusal = ""
    if language in _NATIVE:
        choice, function = builder.scheduled(builder.Request(spec, geometry), target)
        refusal = choice.refusal
    else:
        # The routing's schedules for CUDA work in warps.
        space, _ = schedule.find_space(spec.algorithm, target, portable=spec.algorithm.startswith("moe_"))
        function = builder.prim_func(spec, geometry, space.tiles(geometry, **_knobs(spec, geometry, target)))
    native = as_cuda or language in _NATIVE
    goal = images.tvm_target(
        dict((emulation_of(concrete(target)) if as_cuda else target).codegen) if native else {"kind": language}
    )
    tool: Any = import_module("tvm.tirx.build")
    with tvm.transform.PassContext(opt_level=3, config=dict(target.pass_config), disabled_pass=images.DISABLED_PASSES):
        module = tvm.tirx.transform.BindTarget(goal)(tvm.IRModule.from_expr(function))
        pipeline, _, finalize = tvm.tirx.get_default_tir_pipeline(goal)
        host, devices = tool.split_host_device_mods(pipeline(module))
        ((device_target, device),) = devices.items()
        launch = gpu_launch.description(host.script(), device)
        source = tool.codegen_build(finalize()(device), device_target).inspect_source("cuda" if native else "")
        restricted = subset.has_subset(target) and not as_cuda
        # The generated launcher cannot allocate what passes from kernel to kernel; the description says it.
        host_source = images.launcher_source(function, target) if restricted and not launch["workspaces"] else ""
    if native:
        source = images.with_functions(source)
    if restricted:
        source = subset.translated(source, host_source, target, builder.symbol_of(spec, geometry))
    return {"source": source, "launch": launch, "refusal": refusal}


def _verify(spec: OpSpec, geometry: Geometry, language: str, launch: dict[str, Any], text: str) -> dict[str, Any]:
    """Run the source, or for other languages the same TIR as CUDA C, in emulation, launched by the description alone."""
    if language != "cuda":
        text = _source(spec, geometry, language, as_cuda=True)["source"]
    with tempfile.TemporaryDirectory() as name:
        check = numbers(spec, geometry, gpu_launch.launcher(emulated_library(text, language, launch, Path(name)), launch))
    return {"passed": bool(check.passed), "detail": check.detail}


def emulated_library(text: str, language: str, launch: dict[str, Any], folder: Path) -> Path:
    """CUDA C, compiled for the emulation of a device of a language's target."""
    from tvm_gdn import images
    from tvm_gdn.target import concrete, emulation_of

    path = folder / "kernel.cc"
    path.write_text(images.emulated_source(text, [kernel["name"] for kernel in launch["kernels"]]), encoding="utf-8")
    images.compile_emulated(path, emulation_of(concrete(resolve(LANGUAGES[language][1]))), path.with_suffix(".so"))
    return path.with_suffix(".so")


def _on_opencl(spec: OpSpec, geometry: Geometry, language: str, launch: dict[str, Any], text: str) -> dict[str, Any]:
    """Compile and run the text itself, where this machine has an OpenCL runtime."""
    del language
    found = opencl_run.runtime()
    if found is None:
        return {"by": "an OpenCL runtime", "passed": None, "detail": "none here: pip install pyopencl[pocl] brings one for CPUs"}
    context, name = found
    try:
        check = numbers(spec, geometry, opencl_run.launcher(context, text, launch))
    except ExportError as error:
        return {"by": name, "passed": False, "detail": str(error)}
    return {"by": name, "passed": bool(check.passed), "detail": check.detail}


def numbers(spec: OpSpec, geometry: Geometry, kernel: Callable[..., None]) -> Check:
    """A kernel's results on drawn arguments against the float64 reference."""
    from tvm_gdn import parity, torch_ops

    sizes = {"B": 2, "T": 65 if spec.algorithm == "chunk" else 5, "H": 1, "HV": 2, "S": 4, "M": 5, "D": 6, "G": 3, "E": 8, "k": 2}
    arguments, want = draw(Request(spec, geometry), **sizes)
    got = parity.run(spec, arguments, torch_ops.call_function(spec, geometry, kernel, "cpu"))
    return compared(spec, "", "", got, want)


def _main() -> None:
    from tvm_gdn.ops import OPS

    job = json.load(sys.stdin)
    make: Any = {"source": _source, "verify": _verify, "opencl": _on_opencl}[job.pop("do")]
    try:
        result = make(OPS[job.pop("op")], Geometry.from_json(job.pop("geometry")), **job)
    except TvmGdnError as error:
        result = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    _main()
