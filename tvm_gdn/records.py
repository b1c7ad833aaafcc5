"""Tuned records: which knobs measured best, per operator, tuning key and target.

One JSON file per target, in one format: `schedules/<target>.json` ships with the package, ``records/<target>.json`` in the
cache folder holds what this user tuned and wins. A record made from other sources or another TVM is ignored, with one log line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from filelock import FileLock

from tvm_gdn import env
from tvm_gdn.digest import source_digest, version_of
from tvm_gdn.errors import TuneError
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec

FORMAT = 1
_log = logging.getLogger("tvm_gdn")
_told: set[tuple[str, str]] = set()


def tuning_key(spec: OpSpec, geometry: Geometry) -> str:
    """Part of a geometry that a schedule's speed depends on: static axes, dtypes of data, states and weights, attributes."""
    dtypes: dict[str, str] = {}
    for tensor in spec.tensors:
        if tensor.name in geometry.dtype and tensor.dtype_role in {"data", "state", "weight"}:
            dtypes.setdefault(tensor.dtype_role, geometry.dtype[tensor.name])
    parts = {"axes": geometry.axis, "dtypes": dtypes, "attrs": geometry.attr}
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def algorithm_digest(spec: OpSpec, target: TargetSpec) -> str:
    """Digest of what shapes an operator's kernels on a target: its TIR, the schedule modules that serve it there, the target.

    Schedule modules are found by their ``@schedule("algorithm", "target")`` lines: importing them would need tvm.
    """
    serving = re.compile(
        rf'^@schedule\("{spec.algorithm}", "({"|".join((*target.lineage, f"generic-{target.family}"))})"\)', re.M
    )
    folder = resources.files("tvm_gdn.schedules")
    modules = [f"tvm_gdn.ops.tir.{spec.algorithm}"]
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".py") and serving.search(entry.read_text(encoding="utf-8")):
            modules.append(f"tvm_gdn.schedules.{entry.name[:-3]}")
    return hashlib.sha256((source_digest(*modules) + target.digest()).encode()).hexdigest()[:16]


def user_file(target: str) -> Path:
    """File of this user's own records."""
    return env.cache_dir() / "records" / f"{target}.json"


def _parse(text: str, origin: str) -> list[dict[str, Any]]:
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        return list(data["records"])
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("tuned records in %s are ignored: %s", origin, error)
        return []


@functools.cache
def _load(target: str, cache: Path) -> tuple[dict[str, Any], ...]:
    """Records of one target name, the user's first."""
    found: list[dict[str, Any]] = []
    path = cache / "records" / f"{target}.json"
    if path.is_file():
        found += _parse(path.read_text(encoding="utf-8"), str(path))
    shipped = resources.files("tvm_gdn.schedules") / f"{target}.json"
    if shipped.is_file():
        found += _parse(shipped.read_text(encoding="utf-8"), f"schedules/{target}.json")
    return tuple(found)


def reload() -> None:
    """Forget what was read, after a file changed."""
    _load.cache_clear()


def lookup(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> dict[str, Any] | None:
    """The tuned record that applies to a geometry, or None.

    Parameters
    ----------
    spec, geometry, target
        What the kernel is for. Records of the nearest target of the lineage win.

    Returns
    -------
    dict or None
    """
    key = tuning_key(spec, geometry)
    for name in target.lineage:
        for record in _load(name, env.cache_dir()):
            if record.get("op") != spec.name or record.get("key") != key:
                continue
            expected = {"source": algorithm_digest(spec, target), "tvm": tvm_series()}
            stale = {field for field, value in expected.items() if record.get(field) not in (value, None)}
            if not stale:
                return record
            if (name, spec.name) not in _told:
                _told.add((name, spec.name))
                _log.info("tuned records of %s for %s are stale (other %s): ignored", spec.name, name, ", ".join(sorted(stale)))
    return None


def tvm_series() -> str:
    """TVM release series that records are keyed on; a runtime-only machine has none and takes any record's."""
    version = version_of("apache-tvm")
    return version if version == "none" else ".".join(version.split(".")[:2])


def store(path: Path, target: str, new: list[dict[str, Any]]) -> None:
    """Add or replace records in a file; other records in it stay, and the file is never half-written.

    Parameters
    ----------
    path : Path
        The JSON file.
    target : str
        Name of the target, for a new file.
    new : list of dict
        Records with ``op`` and ``key``; an older record of the same op and key is replaced.
    """
    if not new:
        raise TuneError(f"no record to store in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        old = _parse(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else []
        replaced = {(record["op"], record["key"]) for record in new}
        kept = [record for record in old if (record["op"], record["key"]) not in replaced]
        merged = sorted([*kept, *new], key=lambda record: (record["op"], record["key"]))
        write_atomic(path, json.dumps({"format": FORMAT, "target": target, "records": merged}, indent=1) + "\n")
    reload()


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp gives 0600; records and manifests are for everyone who may read the folder
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
