"""(operator, geometry, device) -> loaded kernel, or the torch reference with the reason.

A kernel is looked for in the packs (`TVM_GDN_PACK_PATH`, then the cache's ``packs``), then among the kernels compiled earlier,
and is compiled at last, under a file lock, so that two first calls compile once. What was found holds until `reset`. Only with
the target ``auto`` may the torch reference stand in, with one log line; an explicit target that cannot be served raises. An
explicit target speaks for calls on its own device type; on others ``auto`` holds.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_gdn import build, env, kernel_cache, load, records
from tvm_gdn import pack as packs
from tvm_gdn.digest import version_of
from tvm_gdn.errors import BuildError, PackError, TargetError, TvmGdnError
from tvm_gdn.manifest import Entry
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, named, resolve, runnable, target_names

_log = logging.getLogger("tvm_gdn")

#: Operator, geometry key, torch device type.
_Key = tuple[str, str, str]
#: Guards the dictionaries below and the list of packs; a kernel is looked for, and compiled, under its own lock alone.
_lock = threading.Lock()
_locks: dict[_Key, threading.Lock] = {}
_served: dict[_Key, Served] = {}
_latest: dict[str, _Key] = {}
_reset_hooks: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Served:
    """What serves a geometry: a loaded kernel, or None and the reason why the reference does."""

    kernel: Callable[..., Any] | None
    target: str
    schedule: str
    reason: str = ""

    def __str__(self) -> str:
        if self.kernel is None:
            return f"fallback (torch reference): {self.reason}"
        return f"compiled ({self.target}, {self.schedule})"


def on_reset(hook: Callable[[], None]) -> None:
    """Call `hook` whenever loaded kernels must be forgotten."""
    _reset_hooks.append(hook)


def reset() -> None:
    """Forget every dispatch decision: the next calls read packs, records and environment again."""
    with _lock:
        _served.clear()
        _latest.clear()
        _read_packs.cache_clear()
    records.reload()
    for hook in _reset_hooks:
        hook()


def served_by(op: str, geometry: Geometry | None = None, device: str = "cpu") -> str:
    """What serves a geometry of an operator in this process.

    Parameters
    ----------
    op : str
        Operator name.
    geometry : Geometry, optional
        Default: the one that was looked up last, on whatever device. That is the first call's of every geometry: a call of a
        geometry that has its kernel already looks nothing up.
    device : str
        Torch device type of the geometry's calls.

    Returns
    -------
    str
        For example ``"compiled (x86-avx512, tuned)"``, ``"compiled (cuda-sm80, recurrent default)"`` where the target has no room
        for the operator's own algorithm and its second one serves, ``"fallback (torch reference): ..."`` or ``"not called yet"``.
    """
    with _lock:
        key = _latest.get(op) if geometry is None else (op, geometry.key, device)
        return str(_served[key]) if key in _served else "not called yet"


def lookup(spec: OpSpec, geometry: Geometry, device: str) -> Served:
    """Find or make the kernel of a geometry.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    geometry : Geometry
        What the kernel must serve.
    device : str
        Torch device type of the call.

    Returns
    -------
    Served

    Raises
    ------
    TvmGdnError
        An explicit target cannot be served, or compiling is disabled and no pack has the kernel.
    """
    key = (spec.name, geometry.key, device)
    with _lock:
        own = _locks.setdefault(key, threading.Lock())
    with own:
        served = _served.get(key) or _lookup(spec, geometry, device)
        with _lock:
            _served[key] = served
            _latest[spec.name] = key
    return served


def _lookup(spec: OpSpec, geometry: Geometry, device: str) -> Served:
    name = env.target_name()
    if name != "auto" and resolve(name).device != device:
        name = "auto"
    try:
        target = runnable(resolve(name, device))
        refusal = target.refuses(geometry.dtype)
        if refusal:
            raise TargetError(f"{spec.name}: {refusal}")
        served, refused = _from_packs(spec, geometry, target, explicit=name != "auto")
        return served or _from_cache_or_compiler(spec, geometry, target, refused)
    except TvmGdnError as error:
        if name != "auto" or env.jit_disabled():
            raise
        lines = str(error).splitlines()
        reason = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
        _log.warning("%s [%s] runs on the torch reference: %s", spec.name, geometry, reason)
        return Served(None, "reference", "none", reason)


@functools.cache
def _read_packs(folders: tuple[Path, ...]) -> tuple[list[packs.Pack], list[str]]:
    """Usable packs in order of preference, and why the others are refused."""
    found, refused = [], []
    for folder in folders:
        candidates = [folder] if (folder / packs.MANIFEST).exists() else sorted(folder.glob(f"*/{packs.MANIFEST}"))
        for candidate in candidates:
            try:
                found.append(packs.read(candidate if candidate.is_dir() else candidate.parent))
            except PackError as error:
                refused.append(str(error))
                _log.warning("%s", error)
    found.sort(key=lambda pack: -pack.manifest.rank)
    return found, refused


def pack_folders() -> tuple[Path, ...]:
    """Folders in which packs are looked for, first match first."""
    return (*env.pack_path(), env.cache_dir() / "packs")


def usable_packs() -> tuple[list[packs.Pack], list[str]]:
    """Packs that calls may take kernels from, in order of preference, and why others are refused."""
    with _lock:
        found, refused = _read_packs(pack_folders())
    return list(found), list(refused)


def _from_packs(spec: OpSpec, geometry: Geometry, target: TargetSpec, *, explicit: bool) -> tuple[Served | None, list[str]]:
    """The kernel of the first pack whose copy is sound, and every reason why something was passed over."""
    found, refused = usable_packs()
    for pack in found:
        manifest = pack.manifest
        entry = manifest.index.get((spec.name, geometry.key))
        if entry is None or manifest.device != target.device or (explicit and manifest.target != target.name):
            continue
        try:
            if explicit and manifest.target_digest != target.digest():
                raise PackError(f"pack {pack.folder} was built for another {target.name}; rebuild it with `tvm_gdn build`")
            if entry.spec_digest != build.spec_digest(spec):
                raise PackError(
                    f"pack {pack.folder}: {entry.symbol} was built from another version of {spec.name}; rebuild it with "
                    "`tvm_gdn build`"
                )
            packs.check_device(pack)
            served = _load(pack, entry)
            _compare_record(pack, entry, spec.second if entry.refusal and spec.second else spec, geometry)
            return served, refused
        except PackError as error:
            _log.warning("%s", error)
            refused.append(str(error))
    return None, refused


def _load(pack: packs.Pack, entry: Entry) -> Served:
    """A kernel of a pack; that it is one of the operator's second algorithm is never silent."""
    served = Served(load.load_kernel(pack, entry), pack.manifest.target, entry.schedule)
    if entry.refusal:
        _log.warning(
            "%s [%s] on %s is served by its second algorithm (%s), right but slow on long sequences: %s",
            entry.op, entry.geometry, served.target, entry.schedule, entry.refusal,
        )  # fmt: skip
    return served


def _compare_record(pack: packs.Pack, entry: Entry, spec: OpSpec, geometry: Geometry) -> None:
    """Say so where a schedule was tuned after the pack was built: the pack wins, because it was put there on purpose."""
    if pack.manifest.target not in target_names():
        return
    record = records.lookup(spec, geometry, named(pack.manifest.target))
    if record is not None and dict(entry.knobs) != record["knobs"]:
        _log.warning(
            "pack %s has %s with knobs %s; a tuned record says %s: rebuild the pack with `tvm_gdn build` to use it",
            pack.folder, entry.symbol, json.dumps(dict(entry.knobs)), json.dumps(record["knobs"]),
        )  # fmt: skip


def _from_cache_or_compiler(spec: OpSpec, geometry: Geometry, target: TargetSpec, refused: list[str]) -> Served:
    folder = kernel_cache.folder_of(spec, geometry, target)
    served = _load_single(folder)
    if served is not None:
        return served
    if env.jit_disabled():
        also = f" Refused: {'; '.join(refused)}." if refused else ""
        raise PackError(
            f"{spec.name} [{geometry}] is in no pack and TVM_GDN_DISABLE_JIT is set. Searched: "
            f"{', '.join(map(str, pack_folders()))}.{also} Build it with: tvm_gdn build --target {shlex.quote(target.text)} "
            f"--op {spec.name} --geometry {shlex.quote(geometry.key)}"
        )
    if version_of("apache-tvm") == "none":
        raise BuildError(
            f"no pack has {spec.name} [{geometry}] and apache-tvm is not installed to compile it: pip install 'tvm_gdn[compile]' "
            "or name the folder of a pack from `tvm_gdn build` in TVM_GDN_PACK_PATH"
        )
    try:
        with kernel_cache.locked(folder):
            served = _load_single(folder) or _compile(spec, geometry, target, folder)
    except OSError as error:
        raise BuildError(
            f"the cache folder {env.cache_dir()} cannot be used ({error}): name one that can be written to in TVM_GDN_CACHE_DIR"
        ) from error
    if served is None:
        raise BuildError(f"{folder} holds no kernel after compiling {spec.name}; is the cache folder being cleared?")
    return served


def _compile(spec: OpSpec, geometry: Geometry, target: TargetSpec, folder: Path) -> Served | None:
    _announce()
    start = time.perf_counter()
    kernel_cache.compile_pack(folder, [build.Request(spec, geometry)], target)
    _log.info("compiled %s [%s] for %s in %.1f s", spec.name, geometry, target.name, time.perf_counter() - start)
    return _load_single(folder)


@functools.cache
def _announce() -> None:
    """Say once, before the first wait, what is being waited for."""
    _log.info("compiling: kernels that no pack has are compiled at their first call, some seconds each, and kept in the cache")


def _load_single(folder: Path) -> Served | None:
    """The kernel of a one-kernel pack in the cache; a damaged one is compiled anew."""
    if not folder.is_dir():
        return None
    try:
        pack = packs.read(folder)
        entry = pack.manifest.kernels[0]
        return _load(pack, entry)
    except PackError as error:
        _log.warning("%s%s", error, "" if env.jit_disabled() else "; compiling it again")
        return None


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _locks.clear()


os.register_at_fork(after_in_child=_after_fork)
