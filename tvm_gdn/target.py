"""Targets as data: each is one TOML file of `targets/`; the engine holds no table of their names.

A file states ``description``, ``device`` (torch device type), ``requires`` (CPU flags as in /proc/cpuinfo), ``rank`` (which of
several usable targets ``auto`` prefers; 0 = only when named) and ``[codegen]`` (the options of a TVM target). ``inherits``
takes over whatever a file does not state, and the schedules of the parent. ``[pass_config]`` goes to TVM's PassContext.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tvm_gdn.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class TargetSpec:
    """One target.

    Parameters
    ----------
    name : str
        File name without ``.toml``, or ``custom-`` and the start of its digest for a target given as JSON.
    description : str
        One line for listings.
    device : str
        Torch device type that runs its kernels.
    requires : tuple of str
        CPU flags, as in /proc/cpuinfo, without which its code must not run.
    rank : int
        Preference of ``auto`` among usable targets; 0 is never chosen.
    lineage : tuple of str
        The target's name and those it inherits from, nearest first: where schedules are looked up.
    codegen : mapping
        Options of the TVM target.
    pass_config : mapping
        Configuration of TVM's passes.
    """

    name: str
    description: str
    device: str
    requires: tuple[str, ...]
    rank: int
    lineage: tuple[str, ...]
    codegen: tuple[tuple[str, Any], ...]
    pass_config: tuple[tuple[str, Any], ...]

    def missing(self) -> list[str]:
        """CPU flags that the target requires and this machine lacks."""
        return sorted(set(self.requires) - host_features())

    @property
    def text(self) -> str:
        """What `resolve` makes this target of: its name, or JSON where it has no file."""
        if self.name in target_names():
            return self.name
        inherited = {"inherits": self.lineage[1]} if len(self.lineage) > 1 else {}
        own = {
            "description": self.description, "device": self.device, "requires": self.requires, "rank": self.rank,
            "codegen": dict(self.codegen), "pass_config": dict(self.pass_config),
        }  # fmt: skip
        return json.dumps({**inherited, **own})

    def digest(self) -> str:
        """Hash of what decides the generated code."""
        parts = [self.device, sorted(self.requires), dict(self.codegen), dict(self.pass_config)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def host_features() -> frozenset[str]:
    """Flags of this machine's CPU, as /proc/cpuinfo names them; empty where that file does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), ":")
    return frozenset(flags.split(":", 1)[1].split())


@functools.cache
def host_cpu() -> str:
    """Model name of this machine's CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"


@functools.cache
def target_names() -> tuple[str, ...]:
    """Names of all targets, in order."""
    folder = resources.files("tvm_gdn.targets")
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def _is_table(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    items = [item for entry in value.values() for item in (entry if isinstance(entry, list) else [entry])]
    return all(isinstance(item, _SCALARS) for item in items)


#: What each field must be, and how to tell.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "description": ("text", lambda value: isinstance(value, str)),
    "device": ("text, a torch device type", lambda value: isinstance(value, str) and bool(value)),
    "requires": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(flag, str) for flag in value)),
    "rank": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "inherits": ("the name of a target file", lambda value: isinstance(value, str) and value in target_names()),
    "codegen": ("a table of plain values or lists of them", _is_table),
    "pass_config": ("a table of plain values or lists of them", _is_table),
}


def _items(table: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in table.items())


def _from_mapping(name: str, data: Mapping[str, Any]) -> TargetSpec:
    unknown = sorted(set(data) - set(_FIELDS))
    if unknown:
        raise TargetError(f"target {name}: unknown fields {unknown}; allowed: {sorted(_FIELDS)}")
    for field, value in data.items():
        what, fits = _FIELDS[field]
        if not fits(value):
            raise TargetError(f"target {name}: {field} must be {what}, got {value!r}")
    parent = named(data["inherits"]) if "inherits" in data else None
    if parent is None and not {"device", "codegen"} <= set(data):
        raise TargetError(f"target {name}: states neither `inherits` nor both `device` and `codegen`")
    return TargetSpec(
        name=name,
        description=data.get("description", parent.description if parent else ""),
        device=data.get("device", parent.device if parent else ""),
        requires=tuple(data.get("requires", parent.requires if parent else ())),
        rank=data.get("rank", 0),
        lineage=(name, *(parent.lineage if parent else ())),
        codegen=_items(data["codegen"]) if "codegen" in data else parent.codegen if parent else (),
        pass_config=_items(data["pass_config"]) if "pass_config" in data else parent.pass_config if parent else (),
    )


@functools.cache
def named(name: str) -> TargetSpec:
    """The target of that name, whether or not this machine can run it."""
    if name not in target_names():
        raise TargetError(f"no target {name!r}; known: auto, {', '.join(target_names())}")
    entry = resources.files("tvm_gdn.targets") / f"{name}.toml"
    return _from_mapping(name, tomllib.loads(entry.read_text(encoding="utf-8")))


@functools.cache
def resolve(text: str = "auto") -> TargetSpec:
    """Target for a name, ``auto``, or a JSON object with the fields of a target file.

    Parameters
    ----------
    text : str
        ``"auto"`` takes the usable CPU target of the highest rank.

    Returns
    -------
    TargetSpec

    Raises
    ------
    TargetError
        Unknown name, malformed JSON, or no usable target for ``auto``.
    """
    if text == "auto":
        usable = [spec for spec in map(named, target_names()) if spec.device == "cpu" and spec.rank and not spec.missing()]
        if not usable:
            raise TargetError(f"no target fits this CPU ({host_cpu()}); known: {', '.join(target_names())}")
        return max(usable, key=lambda spec: spec.rank)
    if text.startswith("{"):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TargetError(f"target {text!r} is not valid JSON: {error}") from error
        spec = _from_mapping("given as JSON", data)
        # Two such targets must not pass for each other: by name alone a pack of the one would serve the other.
        name = f"custom-{spec.digest()[:8]}"
        return replace(spec, name=name, lineage=(name, *spec.lineage[1:]))
    return named(text)


def runnable(spec: TargetSpec) -> TargetSpec:
    """The same target, or an error where this machine's CPU cannot run its code.

    Raises
    ------
    TargetError
        Names the missing CPU flags.
    """
    missing = spec.missing()
    if missing:
        raise TargetError(
            f"target {spec.name} needs CPU features that this machine ({host_cpu()}) lacks: {', '.join(missing)}; "
            f"use `auto` or one of: {', '.join(n for n in target_names() if not named(n).missing())}"
        )
    return spec
