"""Compiled kernels in the cache folder: one pack per kernel, under a name made of everything that decides its code.

Two processes that want the same kernel compile it once, under a file lock; a folder is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from tvm_gdn import build, env, records
from tvm_gdn import pack as packs
from tvm_gdn.digest import version_of
from tvm_gdn.errors import BuildError, PackError
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec

#: Kernels per compiling process: a death, a timeout or an interrupt costs what one process has not handed over yet.
_BATCH = 16


def folder_of(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> Path:
    """Where the cache has, or would have, a kernel."""
    return env.cache_dir() / "kernels" / kernel_key(spec, geometry, target)


def kernel_key(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> str:
    """Name of a kernel's folder in the cache: everything that decides its code."""
    tuned = [records.lookup(one, geometry, target) for one in (spec, spec.second) if one]
    parts = [
        spec.name,
        geometry.key,
        target.digest(),
        *target.lineage,  # whose schedules apply: two targets may compile for one CPU
        build.kernel_digest(spec, target),
        version_of("apache-tvm"),
        version_of("apache-tvm-ffi"),
        json.dumps([record and record["knobs"] for record in tuned], sort_keys=True),
    ]
    return f"{spec.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def compile_each(wanted: Mapping[Path, build.Request], target: TargetSpec) -> dict[Path, BuildError]:
    """Compile kernels in one process and write each as a pack of its own, at the path it is given by.

    A pack that someone else wrote there meanwhile stays, if it is whole.

    Returns
    -------
    dict
        What did not compile, and why.
    """
    failures = {}
    with _compiled(next(iter(wanted)).parent, list(wanted.values()), target) as (built, launcher):
        for folder, kernel in zip(wanted, built, strict=True):
            if isinstance(kernel, BuildError):
                failures[folder] = kernel
                continue
            with locked(folder):
                if not is_whole(folder):
                    packs.write(folder, target, build.required_features(target), [kernel], launcher)
    return failures


def compile_pack(folder: Path, requests: list[build.Request], target: TargetSpec) -> list[packs.BuiltKernel]:
    """Compile kernels in one process and write them as one pack.

    Parameters
    ----------
    folder : Path
        The pack; an existing one is replaced.
    requests : list of Request
        Its kernels.
    target : TargetSpec
        Their target.

    Returns
    -------
    list of BuiltKernel
    """
    with _compiled(folder.parent, requests, target) as (built, launcher):
        kernels = [kernel for kernel in built if not isinstance(kernel, BuildError)]
        for failure in (kernel for kernel in built if isinstance(kernel, BuildError)):
            raise failure
        packs.write(folder, target, build.required_features(target), kernels, launcher)
    return kernels


@contextlib.contextmanager
def _compiled(
    parent: Path, requests: list[build.Request], target: TargetSpec
) -> Iterator[tuple[list[packs.BuiltKernel | BuildError], Path]]:
    """Compile into a scratch folder beside the place where the result will stand."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".build-") as scratch:
        built = build.run_builder(requests, target, Path(scratch), timeout=max(600.0, 60.0 * len(requests)))
        yield built, build.build_launcher(Path(scratch), target)


def prebuild(
    wanted: Iterable[tuple[OpSpec, Geometry]],
    target: TargetSpec,
    jobs: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compile what the cache lacks, many kernels per compiling process.

    Parameters
    ----------
    wanted : iterable of (OpSpec, Geometry)
        Kernels; duplicates are fine.
    target : TargetSpec
        Their target.
    jobs : int
        Compiling processes; default one per core, at most 8.
    progress : callable, optional
        ``progress(done, missing)`` is called before the first kernel, if any is missing, and now and then.

    Returns
    -------
    list of str
        A message for each kernel that could not be compiled.
    """
    folders = {folder_of(spec, geometry, target): (spec, geometry) for spec, geometry in wanted}
    missing = [folder for folder in folders if not is_whole(folder)]
    jobs = max(1, min(jobs or min(os.cpu_count() or 1, 8), len(missing)))
    size = min(_BATCH, -(-len(missing) // jobs))

    def compile_share(share: list[Path]) -> list[str]:
        try:
            failures = compile_each({folder: build.Request(*folders[folder]) for folder in share}, target)
        except BuildError as error:
            if len(share) == 1:
                return [f"{folders[share[0]][0].name} [{folders[share[0]][1]}]: {error}"]
            # One kernel that LLVM aborts on takes its process along: halve until it stands alone.
            middle = len(share) // 2
            return compile_share(share[:middle]) + compile_share(share[middle:])
        return [f"{folders[folder][0].name} [{folders[folder][1]}]: {error}" for folder, error in failures.items()]

    lines: list[str] = []
    done = 0
    with ThreadPoolExecutor(jobs) as pool:
        shares = [missing[first : first + size] for first in range(0, len(missing), max(size, 1))]
        results = pool.map(compile_share, shares)
        for share in shares:
            if progress is not None:
                progress(done, len(missing))
            lines += next(results)
            done += len(share)
    return lines


def is_whole(folder: Path) -> bool:
    """Whether a folder is a pack with every file as its manifest says."""
    with contextlib.suppress(PackError):
        return bool(packs.read_whole(folder).manifest.kernels)
    return False


def locked(folder: Path) -> FileLock:
    """The lock under which a folder of the cache is written, by whatever thread or process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock")
