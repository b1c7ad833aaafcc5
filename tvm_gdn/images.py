"""Device code: a TIR function -> the host part as a library, the device part as an image, and the table that joins them.

The generated source is compiled by the command that the target's file states, and never by what TVM would do by itself: without
a driver it silently packs *source*. `check` looks at the result: a pack that promises machine code holds machine code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from tvm_gdn import code_object, subset
from tvm_gdn.errors import BuildError, PackError
from tvm_gdn.target import TargetSpec, concrete, named

#: Letters of the launcher's table, by TIR dtype.
_LETTERS = {
    "int64": "l", "uint64": "l", "int32": "i", "uint32": "i", "int16": "s", "int8": "b", "bool": "b", "float32": "f",
    "float64": "d",
}  # fmt: skip
_TAGS = {
    "blockIdx.x": "0", "blockIdx.y": "1", "blockIdx.z": "2", "threadIdx.x": "3", "threadIdx.y": "4", "threadIdx.z": "5",
    "tirx.use_dyn_shared_memory": "6",
}  # fmt: skip
_EM_CUDA, _EM_AMDGPU, _EM_X86_64, _EM_AARCH64 = 190, 224, 62, 183
_CPUS = (_EM_X86_64, _EM_AARCH64)
#: Image formats that are ELF files, with the machines that they may be for.
_MACHINES = {
    "cubin": (_EM_CUDA,),
    "hsaco": (_EM_AMDGPU,),
    "elf-so": _CPUS,
    "emulation": _CPUS,
}
#: Functions that device code calls by name; it includes those in PTX, and their plain C++ for everything else.
FUNCTIONS = "device_functions.h"
#: The one of them by which a kernel waits for those ahead of it.
FOLLOW = "tvm_gdn_follow"
#: What runs device code on a CPU.
EMULATION = "device_emulation.h"
#: Scratch memory of generated launchers; TVM's functions for it, and those that stand there in their places.
WORKSPACE = "torch_workspace.h"
_WORKSPACE = {"TVMBackendAllocWorkspace": "tvm_gdn_allocate", "TVMBackendFreeWorkspace": "tvm_gdn_give_back"}
#: The last line of a generated launcher's preamble.
_LAUNCHER_HEAD = "#define TVM_DLL TVM_FFI_DLL_EXPORT\n"
_CXX = ("c++", "g++", "clang++")
#: Barriers are the schedules' own: inserted ones would stand inside conditions too. And arrays have the size that they were
#: given: compaction cuts them down to the elements that it sees being used, which are not those behind an address.
DISABLED_PASSES = ["s_tir.ThreadSync", "s_tir.CompactBufferAllocation"]


@dataclass(frozen=True)
class DeviceCode:
    """Host library, image, and one line per kernel: name, parameter letters, launch dimensions, + if it may begin early."""

    library: Path
    image: Path
    table: tuple[str, ...]


def tvm_target(codegen: dict[str, Any]) -> Any:
    """The TVM target of device code, with the portable form of this machine as its host."""
    import tvm

    host = dict(named("x86").codegen) if tvm.target.codegen.llvm_get_system_triple().startswith("x86_64") else {"kind": "llvm"}
    return tvm.target.Target(
        {name: list(value) if isinstance(value, tuple) else value for name, value in codegen.items()}, host=host
    )


def compile_function(function: Any, target: TargetSpec, folder: Path, symbol: str) -> DeviceCode:
    """Compile a kernel for an accelerator, in this process.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        The kernel.
    target : TargetSpec
        Its target.
    folder : Path
        Where files are written.
    symbol : str
        Beginning of their names.

    Returns
    -------
    DeviceCode

    Raises
    ------
    BuildError
        No compiler for the device's code, or it failed.
    """
    import tvm

    builder = import_module("tvm.tirx.build")
    concrete(target)
    options = dict(target.codegen)
    goal = tvm_target(options)
    objects = _capture_objects(target, folder)
    with tvm.transform.PassContext(opt_level=3, config=dict(target.pass_config), disabled_pass=DISABLED_PASSES):
        module = tvm.tirx.transform.BindTarget(goal)(tvm.IRModule.from_expr(function))
        pipeline, finalize_host, finalize_device = tvm.tirx.get_default_tir_pipeline(goal)
        host, devices = builder.split_host_device_mods(pipeline(module))
        if len(devices) != 1:
            raise BuildError(f"{symbol}: {len(devices)} device modules; a kernel has one")
        ((device_target, device),) = devices.items()
        lowering = dict(target.compiler).get("lowering")
        if lowering:
            import_module(f"tvm_gdn.schedules.{lowering}").register(options["kind"])
        device = finalize_device()(device)
        table = tuple(_line(function) for function in device.functions.values())
        generated = builder.codegen_build(device, device_target)
        source = generated.inspect_source("cuda" if options["kind"] == "cuda" else "asm")
        library = folder / f"{symbol}.so"
        builder.codegen_build(finalize_host()(host), goal.host).export_library(str(library))
        launcher = launcher_source(function, target) if subset.has_subset(target) and target.image == "source" else ""
    image = folder / f"{symbol}.{target.image}"
    if "linker" in dict(target.compiler):
        _check_shared_memory(generated.inspect_source("llvm"), target)
        _link(objects, target, image)
        image.with_suffix(".s").write_text(source, encoding="utf-8")
    else:
        text = with_functions(source)
        if launcher:
            text = subset.translated(text, launcher, target, symbol)
        _compile_source(text, [line.split()[0] for line in table], target, image)
    check(image, target.image)
    return DeviceCode(library, image, table)


def _check_shared_memory(text: str, target: TargetSpec) -> None:
    """Refuse machine code that takes shared memory for global memory: TVM 0.27 makes such of views of another dtype."""
    if re.search(dict(target.compiler)["misplaced"], text):
        raise BuildError(
            f"the code generator of {target.name} put shared memory into global memory: the code would be wrong; a schedule "
            "has to use the memory in the dtype that it allocates it in"
        )


def launcher_source(function: Any, target: TargetSpec) -> str:
    """C++ of the functions that launch the kernels; exported through tvm_ffi, compiled together with the kernels."""
    import tvm

    builder = import_module("tvm.tirx.build")
    goal = tvm.target.Target(dict(target.codegen), host={"kind": "cuda_host"})
    module = tvm.tirx.transform.BindTarget(goal)(tvm.IRModule.from_expr(function))
    pipeline, finalize_host, _ = tvm.tirx.get_default_tir_pipeline(goal)
    host, _ = builder.split_host_device_mods(pipeline(module))
    with _named_workspace():
        text = str(builder.codegen_build(finalize_host()(host), goal.host).inspect_source())
    if _WORKSPACE["TVMBackendAllocWorkspace"] in text:
        scratch = (resources.files("tvm_gdn") / "csrc" / WORKSPACE).read_text(encoding="utf-8")
        text = text.replace(_LAUNCHER_HEAD, _LAUNCHER_HEAD + scratch, 1)
    return text


@contextlib.contextmanager
def _named_workspace() -> Iterator[None]:
    """While a launcher is generated, its scratch memory comes from `WORKSPACE`: TVM's runtime is not with it."""
    import tvm

    operators = {tvm.ir.Op.get(f"tirx.{theirs}"): ours for theirs, ours in _WORKSPACE.items()}
    before = {operator: operator.get_attr("TGlobalSymbol") for operator in operators}
    for operator, name in operators.items():
        operator.reset_attr("TGlobalSymbol")
        operator.set_attr("TGlobalSymbol", name)
    try:
        yield
    finally:
        for operator, name in before.items():
            operator.reset_attr("TGlobalSymbol")
            operator.set_attr("TGlobalSymbol", name)


def _line(function: Any) -> str:
    """A kernel's line of the launcher's table."""
    letters = []
    for parameter in function.params:
        kind = str(parameter.ty)
        letter = "p" if "handle" in kind else _LETTERS.get(kind)
        if letter is None:
            raise BuildError(f"device parameter {parameter.name} has the type {kind}, which the launcher cannot pass")
        letters.append(letter)
    tags = [_TAGS.get(str(tag)) for tag in function.attrs["tirx.kernel_launch_params"]]
    if None in tags:
        raise BuildError(f"launch parameters {list(function.attrs['tirx.kernel_launch_params'])} are not known to the launcher")
    # A kernel that waits for those ahead of it itself may begin before they end.
    early = "+" if f'"{FOLLOW}"' in function.script() else ""
    return f"{function.attrs['global_symbol']} {''.join(letters) or '-'} {''.join(map(str, tags))}{early}"


def _capture_objects(target: TargetSpec, folder: Path) -> list[bytes]:
    """Objects that TVM's code generator hands to its linker, where it generates machine code itself."""
    import tvm
    import tvm_ffi

    objects: list[bytes] = []
    kind = dict(target.codegen)["kind"]

    def keep(code: Any) -> Any:
        objects.append(bytes(code))
        return bytearray(objects[-1])

    tvm_ffi.register_global_func(f"tvm_callback_{kind}_link", keep, override=True)
    linked = []
    if lowering := dict(target.compiler).get("lowering"):
        library = folder / "library.ll"
        library.write_text(import_module(f"tvm_gdn.schedules.{lowering}").LIBRARY, encoding="utf-8")
        linked = [str(library)]
    tvm_ffi.register_global_func(f"tvm_callback_{kind}_bitcode_path", lambda *_: tvm.runtime.convert(linked), override=True)
    # Where a driver is present TVM would compile the source as well.
    tvm_ffi.register_global_func(f"tvm_callback_{kind}_compile", lambda *_: bytearray(b"\x7fELF"), override=True)
    return objects


def wanted_tool(target: TargetSpec) -> str:
    """The program that compiles or links a target's device code."""
    compiler = dict(target.compiler)
    names = compiler["command"][:1] if "command" in compiler else compiler.get("linker", _CXX)
    return " or ".join(_spoken(name) for name in names)


def tools(target: TargetSpec) -> str | None:
    """Path of that program, or how it is called; None where it is not installed."""
    found = _found(target)
    return None if found is None else " ".join(found)


def _found(target: TargetSpec) -> list[str] | None:
    """Beginning of a command line that calls the first program that is installed."""
    compiler = dict(target.compiler)
    names = compiler["command"][:1] if "command" in compiler else compiler.get("linker", _CXX)
    return next((command for command in map(_command, names) if command), None)


def _command(name: str) -> list[str] | None:
    """A program on PATH; or ``python -m PACKAGE ...``, a program that a Python package brings along."""
    words = name.split()
    if words[:2] == ["python", "-m"]:
        return [sys.executable, *words[1:]] if importlib.util.find_spec(words[2]) else None
    path = shutil.which(name)
    return [path] if path else None


def _spoken(name: str) -> str:
    """A program as advice names it."""
    words = name.split()
    return f"`pip install {words[2]}` (its {words[-1]})" if words[:2] == ["python", "-m"] else name


def _tool(target: TargetSpec) -> list[str]:
    found = _found(target)
    if found is None:
        raise BuildError(
            f"{wanted_tool(target)} is not on PATH: it makes device code for {target.name}; install it, or use a prebuilt pack"
        )
    return found


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} cannot compile {what}:\n{(done.stderr or done.stdout).strip()}")


def _compile_source(source: str, kernels: list[str], target: TargetSpec, image: Path) -> None:
    if target.image == "emulation":
        _emulate(source, kernels, target, image)
        return
    path = image.with_suffix(dict(target.compiler)["suffix"])
    path.write_text(source, encoding="utf-8")
    if target.image == "source":
        shutil.copyfile(path, image)
        return
    command = subset.compile_command(target, str(path), str(image), "")
    _tool(target)
    _run(command, f"device code for {target.name}")


def with_functions(source: str) -> str:
    """Generated source behind the functions that it calls by name."""
    if "tvm_gdn_follow" in source:
        # What is read through restricted pointers counts as constant, and may be read before the kernel ahead has written it.
        source = source.replace(" __restrict__", "")
    return whole_source(FUNCTIONS) + source


def whole_source(name: str) -> str:
    """A file of `csrc` with those that it includes in their places: what is exported or digested must not name other files."""
    folder = resources.files("tvm_gdn") / "csrc"

    def included(line: re.Match[str]) -> str:
        return whole_source(line[1]) if (folder / line[1]).is_file() else line[0]

    return re.sub(r'^#include "(\w+\.h)"\n', included, (folder / name).read_text(encoding="utf-8"), flags=re.M)


def _link(objects: list[bytes], target: TargetSpec, image: Path) -> None:
    linker = _tool(target)
    if not objects:
        raise BuildError(f"TVM generated no object code for {target.name}")
    path = image.with_suffix(".o")
    path.write_bytes(objects[-1])
    _run([*linker, "-shared", "--no-undefined", str(path), "-o", str(image)], f"device code for {target.name}")


def _emulate(source: str, kernels: list[str], target: TargetSpec, image: Path) -> None:
    """Compile CUDA C for the CPU, with the emulation header in front and a launcher per kernel behind."""
    path = image.with_suffix(".cc")
    path.write_text(emulated_source(source, kernels), encoding="utf-8")
    compile_emulated(path, target, image)


def compile_emulated(path: Path, target: TargetSpec, image: Path) -> None:
    """Compile a file of `emulated_source` for this CPU."""
    compiler = _tool(target)
    warp = dict(target.codegen).get("thread_warp_size", 32)
    folder = resources.files("tvm_gdn") / "csrc"
    with resources.as_file(folder) as include:
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread"]
        _run(
            [*compiler, *flags, f"-DEMULATED_WARP={warp}", f"-I{include}", str(path), "-o", str(image)],
            f"the emulation of {target.name}",
        )


def emulated_source(source: str, kernels: list[str]) -> str:
    """Generated CUDA C as C++ for the emulation header."""
    text = re.sub(r"#\s*include\s*[<\"](?:mma|cuda|musa|math_constants)[^>\"]*[>\"]", "", source)
    dynamic = r"extern\s+__shared__\s+(?:alignas\(\d+\)\s+|__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\]"
    text = re.sub(dynamic, r"\1* \2 = (\1*)emulation::dynamic_shared()", text)
    text = re.sub(r"__shared__\s+(alignas\(\d+\)|__align__\(\d+\))", r"\1 __shared__", text)
    entries = []
    for name in kernels:
        declared = re.search(rf"void\s+(?:__launch_bounds__\([^)]*\)\s*)?{name}\(([^)]*)\);", text)
        if declared is None:
            raise BuildError(f"no declaration of {name} in the generated source")
        types = [re.sub(r"\w+$", "", part.replace("__restrict__", "").strip()).strip() for part in declared[1].split(",") if part]
        call = ", ".join(f"*({kind}*)p[{n}]" for n, kind in enumerate(types))
        entries.append(f"EMULATED_KERNEL({json.dumps(name)}, [](void** p) {{ {name}({call}); }})")
    return "\n".join([f'#include "{EMULATION}"', text, *entries, ""])


def check(path: Path, image: str) -> None:
    """Look at an image's first bytes, whether it is what its format says.

    Raises
    ------
    PackError
        It is text, or an ELF file for another machine.
    """
    if image == "source":
        return
    head = path.read_bytes()[:20]
    if head[:4] != b"\x7fELF":
        raise PackError(f"{path.name} is no machine code ({image} wanted): it begins with {head[:8]!r}")
    (machine,) = struct.unpack_from("<H", head, 18)
    if machine not in _MACHINES[image]:
        raise PackError(f"{path.name} is an ELF file for machine {machine}; {image} wants {_MACHINES[image]}")


def facts(path: Path, image: str) -> dict[str, int | str]:
    """What an image states about itself: of code objects the architecture, threads, registers, spills, scratch, local memory."""
    return code_object.summary(path.read_bytes()) if image == "hsaco" else {}
