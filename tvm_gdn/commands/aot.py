"""``tvm_gdn build``: kernels compiled ahead of time into one pack."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from tvm_gdn import build, dispatch, env, kernel_cache, models
from tvm_gdn import pack as packs
from tvm_gdn.bench import machine
from tvm_gdn.commands import arguments
from tvm_gdn.commands.text import counted, emit, size_text, table
from tvm_gdn.digest import version_of
from tvm_gdn.errors import ArgumentError, BuildError, PackError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, concrete, resolve

_log = logging.getLogger("tvm_gdn")
#: Kernels per compiling process at most: importing tvm takes seconds, a kernel less than one.
_SHARE = 16

Wanted = tuple[OpSpec, Geometry]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(parser)
    parser.add_argument("--model", metavar="NAME", help=f"every kernel that this model needs; one of: {', '.join(models.MODELS)}")
    arguments.add_op(parser, "one operator (with --dims or --geometry), or those of the model's operators to build")
    parser.add_argument(
        "--dims",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="what one kernel of --op serves, for example K=128,V=128,dtype=bfloat16,state=float32: static axes, "
        "dtype (of q, k, v), state (its dtype), index (int32 or int64), with=NAME+NAME (optional tensors that calls "
        "pass), switches such as state_v_first=1, or TENSOR=DTYPE; what is left out is as in the operator's first "
        "benchmark shape; may be repeated",
    )
    parser.add_argument(
        "--geometry",
        action="append",
        default=[],
        metavar="JSON",
        help="the same as JSON, as the error about a missing kernel prints it; may be repeated",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="folder of the pack; default: in the cache, where calls look"
    )
    parser.add_argument("--force", action="store_true", help="replace the pack at PATH")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="compiling processes; default: one per core")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    target = concrete(resolve(args.target))
    wanted, name = selection(args)
    inside_cache = args.output is None
    folder = env.cache_dir() / "packs" / f"{name}-{target.name}" if inside_cache else args.output.resolve()
    check_output(folder, replace=args.force or inside_cache)
    kernels = build_pack(wanted, target, folder, args.jobs)
    rows = []
    for op in dict.fromkeys(kernel.spec.name for kernel in kernels):
        own = [kernel for kernel in kernels if kernel.spec.name == op]
        origins = [kernel.schedule for kernel in own]
        schedules = ", ".join(f"{origins.count(origin)} {origin}" for origin in dict.fromkeys(origins))
        size = sum(kernel.file.stat().st_size for kernel in own)
        rows.append((op, str(len(own)), size_text(size), schedules))
    emit(f"{target.name}: {counted(len(kernels), 'kernel')}\n")
    emit(table(("operator", "geometries", "size", "schedule"), rows, right=(1, 2)))
    for kernel in kernels:
        if kernel.refusal:
            told = f"{kernel.schedule}, right but slow on long sequences: {kernel.refusal}"
            emit(f"\n{kernel.spec.name} [{kernel.geometry}]: {told}")
    emit(f"\n{folder}")
    if inside_cache or any(folder in (path, *path.glob("*")) for path in dispatch.pack_folders()):
        emit("Calls find this pack.")
    else:
        emit(f"To use it: export TVM_GDN_PACK_PATH={folder}")
    return 0


def selection(args: argparse.Namespace) -> tuple[list[Wanted], str]:
    """What the arguments ask for, and the first part of the pack's default name.

    Raises
    ------
    ArgumentError
        The arguments do not say what to build, or say it twice.
    """
    explicit = bool(args.dims or args.geometry)
    if args.model and explicit:
        raise ArgumentError("--model already says which geometries: leave out --dims and --geometry")
    if args.model:
        wanted = [pair for pair in models.kernels(args.model) if not args.op or pair[0].name in args.op]
        return wanted, "-".join([args.model, *(args.op or ())])
    if not explicit or not args.op or len(args.op) != 1:
        example = OPS[(args.op or ["packed_decode_gated_delta_rule"])[0]]
        raise ArgumentError(
            f"say what to build: --model NAME, or one --op OP with --dims (for example --op {example.name} --dims "
            f"{arguments.example_dims(example)}) or --geometry"
        )
    spec = OPS[args.op[0]]
    geometries = [arguments.parse_dims(spec, text) for text in args.dims]
    geometries += [arguments.parse_geometry(spec, text) for text in args.geometry]
    keys = sorted({geometry.key for geometry in geometries})
    # Builds of other geometries of the same operator must not replace each other.
    return [(spec, geometry) for geometry in geometries], f"{spec.name}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"


def check_output(folder: Path, *, replace: bool) -> None:
    """Refuse an output folder before anything is compiled.

    Raises
    ------
    ArgumentError
        It exists and may not be replaced, or is no pack.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / packs.MANIFEST).is_file():
        raise ArgumentError(f"-o {folder}: exists and is no pack; choose another path")
    if not replace:
        raise ArgumentError(f"-o {folder}: a pack is there already; choose another path, or replace it with --force")


def build_pack(wanted: Iterable[Wanted], target: TargetSpec, folder: Path, jobs: int = 0) -> list[packs.BuiltKernel]:
    """Compile kernels, or take them from the cache, and write them as one pack.

    Parameters
    ----------
    wanted : iterable of (OpSpec, Geometry)
        Kernels; duplicates are fine.
    target : TargetSpec
        Their target; this machine need not be able to run it.
    folder : Path
        Where the pack is written; an existing one is replaced.
    jobs : int
        Compiling processes; default one per core.

    Returns
    -------
    list of BuiltKernel
        The pack's kernels, as they lie in the cache.

    Raises
    ------
    BuildError
        Names every kernel that could not be compiled; no pack is written then.
    """
    unique = list({(spec.name, geometry.key): (spec, geometry) for spec, geometry in wanted}.values())
    if not unique:
        raise ArgumentError("nothing to build: no operator of the model is among --op")
    compile_all(unique, target, jobs)
    kernels, launcher = [], None
    for spec, geometry in unique:
        pack = _cached(spec, geometry, target)
        entry = pack.manifest.kernels[0]
        kernels.append(
            packs.BuiltKernel(
                spec=spec, geometry=geometry, file=pack.file(entry), symbol=entry.symbol, schedule=entry.schedule,
                knobs=dict(entry.knobs), source=entry.source, refusal=entry.refusal,
                image=pack.file(entry.image) if entry.image else None, table=entry.image.kernels if entry.image else (),
            )
        )  # fmt: skip
        if pack.manifest.launcher is not None:
            launcher = pack.file(pack.manifest.launcher)
    packs.write(folder, target, build.required_features(target), kernels, launcher)
    return kernels


def _cached(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> packs.Pack:
    """A kernel of the cache, for whatever CPU; a damaged one is compiled again."""
    folder = kernel_cache.folder_of(spec, geometry, target)
    try:
        return packs.read_whole(folder)
    except PackError as error:
        _log.warning("%s; compiling it again", error)
    kernel_cache.compile_each({folder: build.Request(spec, geometry)}, target)
    return packs.read_whole(folder)


def compile_all(wanted: list[Wanted], target: TargetSpec, jobs: int = 0) -> None:
    """Bring kernels into the cache, with a progress bar.

    Raises
    ------
    BuildError
        There is no compiler, or it failed; names every kernel that could not be compiled.
    """
    if jobs < 0:
        raise ArgumentError(f"--jobs {jobs}: give a number of processes, or 0 for one per core")
    if version_of("apache-tvm") == "none":
        raise BuildError("compiling needs apache-tvm, which is not installed: pip install 'tvm_gdn[compile]'")
    jobs = jobs or machine.cores()
    share = max(1, min(_SHARE, -(-len(wanted) // jobs)))
    shares = [wanted[start : start + share] for start in range(0, len(wanted), share)]
    failures: list[str] = []
    bar = tqdm(total=len(wanted), desc=f"compiling for {target.name}", unit="kernel", disable=None)
    pool = ThreadPoolExecutor(min(jobs, len(shares)))
    try:
        running = {pool.submit(kernel_cache.prebuild, part, target, 1): len(part) for part in shares}
        for done in as_completed(running):
            failures += done.result()
            bar.update(running[done])
    finally:
        # After Ctrl-C no further process starts; what is compiled already stays in the cache.
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    if failures:
        raise BuildError(f"{len(failures)} of {len(wanted)} kernels could not be compiled:\n" + "\n".join(failures))
