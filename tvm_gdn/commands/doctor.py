"""``tvm_gdn doctor``: checks what the package needs on this machine, and says what to do about the rest."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from tvm_gdn import build, device, dispatch, env, images, load, torch_modules
from tvm_gdn import pack as packs
from tvm_gdn.bench import machine
from tvm_gdn.commands.text import as_json, counted, emit, size_text
from tvm_gdn.errors import PackError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.target import dispatch_keys, host_cpu, host_features, named, resolve, runnable, target_names

_VARIABLES = (
    "TVM_GDN_TARGET", "TVM_GDN_CACHE_DIR", "TVM_GDN_PACK_PATH", "TVM_GDN_DISABLE_JIT", "TVM_GDN_CHECKS", "TVM_GDN_LOG",
)  # fmt: skip
#: CPU features that some target asks for or that decide how fast kernels can be.
_FEATURES = (
    "sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16",
    "amx_int8",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """Outcome of one check: ``ok``, ``warn`` or ``fail``, what was found, and what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; exit status 1 if a check fails."""
    checks = examine()
    if args.json:
        emit(as_json({**machine.stamp(), "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            emit(f"{check.status:4}  {check.name}: {check.found}")
            if check.advice:
                emit(f"      -> {check.advice}")
    return int(any(check.status == "fail" for check in checks))


def examine() -> list[Check]:
    """Run every check.

    Returns
    -------
    list of Check
        A check that itself breaks is one that failed.
    """
    found: list[Check] = []
    for part in (_software, _cpu, _devices, _cross, _compiler, _cache, _packs, _threads, _openmp, _environment):
        try:
            found += part()
        except Exception as error:
            # The doctor must not die of what it looks for.
            found.append(Check(part.__name__.lstrip("_"), "fail", f"the check broke: {error!r}", "please report this as a bug"))
    return found


def _software() -> Iterator[Check]:
    found = machine.versions()
    old = sys.version_info < (3, 10)
    yield Check("python", "fail" if old else "ok", found["python"], "use Python 3.10 or later" if old else "")
    yield _ffi(found["apache-tvm-ffi"])
    tvm = found["apache-tvm"]
    if tvm == "none":
        yield Check("apache-tvm", "warn", "not installed", "packs run without it; to compile: pip install 'tvm_gdn[compile]'")
    elif tvm.split(".")[:2] != ["0", "27"]:
        yield Check("apache-tvm", "fail", tvm, "this version compiles with 0.27 only: pip install 'apache-tvm==0.27.*'")
    else:
        yield Check("apache-tvm", "ok", tvm)
    for name in (name for name in found if name not in {"python", "tvm_gdn", "apache-tvm", "apache-tvm-ffi"}):
        missing = found[name] == "none"
        yield Check(name, "ok", f"not installed; only for {machine.PACKAGES[name]}" if missing else found[name])


def _ffi(version: str) -> Check:
    if version.startswith("0.1.14"):
        return Check("apache-tvm-ffi", "ok", f"{version} (0.1.14 is needed)")
    known = "0.1.15 is known to crash when tvm saves JSON; " if version.startswith("0.1.15") else ""
    advice = f"{known}0.1.14 is needed: pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
    return Check("apache-tvm-ffi", "fail", "not installed" if version == "none" else version, advice)


def _cpu() -> Iterator[Check]:
    features = [name for name in _FEATURES if name in host_features()]
    known = bool(host_features())
    yield Check(
        "cpu", "ok" if known else "warn", f"{host_cpu()}; {' '.join(features) or 'features unknown'}",
        "" if known else "this system has no /proc/cpuinfo; only targets without required features can run",
    )  # fmt: skip
    targets = [target for target in map(named, target_names()) if target.device == "cpu"]
    able = [target.name for target in targets if target.concrete and not target.missing()]
    unable = [f"{target.name} lacks {', '.join(target.missing())}" for target in targets if target.missing()]
    try:
        chosen = runnable(resolve(env.target_name())).name
        yield Check("targets", "ok", f"runnable: {', '.join(able)}; calls use {chosen}")
    except TvmGdnError as error:
        yield Check("targets", "fail", str(error), f"set TVM_GDN_TARGET to auto or one of: {', '.join(able)}")
    if unable:
        yield Check("targets not here", "ok", "; ".join(unable))


def _devices() -> Iterator[Check]:
    """What accelerators are there, which target serves each, and whether code for it can be compiled here."""
    for kind in sorted(set(dispatch_keys()) - {"cpu"}):
        present = device.architecture(kind)
        if present is None:
            if torch.version.cuda or torch.version.hip or kind != "cuda":
                yield Check(f"{kind} device", "ok", "none is present; CPU calls need none")
            else:
                yield Check(f"{kind} device", "ok", "none: this torch is built without support for one")
            continue
        found = f"{device.name(kind)}, architecture {present}"
        try:
            target = resolve("auto", kind)
        except TvmGdnError as error:
            yield Check(f"{kind} device", "warn", f"{found}; {error}", "calls on it run on the torch reference")
            continue
        tools = images.tools(target)
        yield Check(
            f"{kind} device", "ok" if tools else "warn", f"{found}; calls use {target.name}, compiled with {tools or 'nothing'}",
            "" if tools else f"packs run without it; to compile install {images.wanted_tool(target)}",
        )  # fmt: skip


def _cross() -> Iterator[Check]:
    """For which accelerators code can be built here, present or not, and what stands in the way of loading it."""
    for family in (spec for spec in map(named, target_names()) if not spec.concrete):
        members = [name for name in target_names() if family.name in named(name).lineage[1:]]
        tools = images.tools(family)
        how = f"{family.image} with {tools}" if tools else "source only" if family.image == "source" else "not built here"
        found = f"{', '.join(members)}: {how}"
        wanting = "" if tools else f"to build code for it install {images.wanted_tool(family)}"
        if dict(family.driver).get("loader") == "torch":
            found += f"; loading: {torch_modules.available() or 'through torch'}"
        yield Check(f"code for {family.name}", "ok", found, wanting)


def _compiler() -> Iterator[Check]:
    found = next((path for path in map(shutil.which, build.COMPILERS) if path), None)
    if found:
        yield Check("C compiler", "ok", found)
    else:
        yield Check(
            "C compiler", "warn", f"none of {', '.join(build.COMPILERS)} found",
            "prebuilt packs run without one; to compile kernels install gcc (Debian: apt-get install gcc libc6-dev)",
        )  # fmt: skip


def _cache() -> Iterator[Check]:
    folder = env.cache_dir().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if existing == folder else 0
    kernels = sum(1 for _ in (folder / "kernels").glob(f"*/{packs.MANIFEST}"))
    text = f"{folder}: {counted(kernels, 'kernel')}, {size_text(size)}" if existing == folder else f"{folder}: not there yet"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = f"make {existing} writable, or set TVM_GDN_CACHE_DIR to a folder that is"
        yield Check("cache folder", "fail", f"{text}; {existing} is not writable ({error.strerror})", advice)
    else:
        yield Check("cache folder", "ok", text, "delete it at any time: it fills again when needed" if size > 2**30 else "")


def _packs() -> Iterator[Check]:
    usable, refused = dispatch.usable_packs()
    for folder in env.pack_path():
        if not folder.is_dir():
            text = f"TVM_GDN_PACK_PATH names {folder}, which is no folder"
            yield Check("packs", "warn", text, "correct the variable, or build the pack")
    for reason in refused:
        yield Check("packs", "warn", reason, "calls ignore this pack; rebuild it with `tvm_gdn build`")
    for pack in usable:
        yield _intact(pack)
    if not usable and not refused:
        yield Check("packs", "ok", "none; kernels are compiled at the first call (`tvm_gdn build` compiles them ahead of time)")


def _intact(pack: packs.Pack) -> Check:
    entries = pack.manifest.kernels
    try:
        packs.read_whole(pack.folder)
    except PackError as error:
        return Check(
            "packs", "fail", str(error),
            f"calls compile this kernel, or fail where that is disabled: rebuild {pack.folder} with `tvm_gdn build`",
        )  # fmt: skip
    old = {
        entry.op for entry in entries if entry.op not in OPS or entry.spec_digest != build.spec_digest(OPS[entry.op])
    }  # fmt: skip
    text = f"{pack.folder}: {pack.manifest.target}, {counted(len(entries), 'kernel')}"
    second = sum(bool(entry.refusal) for entry in entries)
    if second:
        text += f", {second} of a second algorithm, right but slow on long sequences"
    if old:
        text += f"; built from another version of {', '.join(sorted(old))}"
        return Check("packs", "warn", text, "rebuild it with `tvm_gdn build`")
    return Check("packs", "ok", text)


def _threads() -> Iterator[Check]:
    threads, cores = torch.get_num_threads(), machine.cores()
    if threads > cores:
        yield Check(
            "threads", "warn", f"torch uses {threads} threads on {cores} cores: they wait for each other",
            f"call torch.set_num_threads({cores}), or set OMP_NUM_THREADS={cores}",
        )  # fmt: skip
    else:
        yield Check("threads", "ok", f"torch and the kernels use {threads} threads on {cores} cores")


def _openmp() -> Iterator[Check]:
    kernel = next(_loadable(), None)
    mapped = machine.openmp_libraries()
    if len(mapped) > 1:
        yield Check(
            "OpenMP", "warn", f"more than one runtime in this process: {', '.join(mapped)}",
            "their threads compete; make all packages use one (for example by installing them from one source)",
        )  # fmt: skip
    if kernel is None:
        text = f"torch runs on {', '.join(mapped) or 'none'}; no compiled kernel is there yet to compare with"
        yield Check("OpenMP", "ok", text)
        return
    shared = load.openmp_library()
    if not shared:
        yield Check("OpenMP", "warn", "kernels found none: they run on one thread", "install a torch build with OpenMP")
    else:
        yield Check("OpenMP", "ok", f"kernels run on torch's threads: {shared}")


def _loadable() -> Iterator[str]:
    """Names of kernels that could be loaded, packs first; nothing is compiled."""
    singles = (path.parent for path in (env.cache_dir() / "kernels").glob(f"*/{packs.MANIFEST}"))
    for pack in dispatch.usable_packs()[0]:
        yield from _load_first(pack)
    for folder in singles:
        try:
            yield from _load_first(packs.read(folder))
        except PackError:
            continue


def _load_first(pack: packs.Pack) -> Iterator[str]:
    try:
        load.load_kernel(pack, pack.manifest.kernels[0])
        yield pack.manifest.kernels[0].symbol
    except PackError:
        return


def _environment() -> Iterator[Check]:
    values = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TVM_GDN_")}
    unknown = sorted(set(values) - set(_VARIABLES))
    text = ", ".join(f"{name}={value}" for name, value in values.items()) or "no TVM_GDN_* variable is set"
    advice = [f"{', '.join(unknown)}: not known, has no effect; known: {', '.join(_VARIABLES)}"] if unknown else []
    advice += [f"{name}: this value has no effect; allowed: {allowed}" for name, allowed in env.without_effect().items()]
    yield Check("environment", "warn" if advice else "ok", text, "; ".join(advice))
