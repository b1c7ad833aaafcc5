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
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tvm_gdn.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FIELDS = frozenset({"description", "device", "requires", "rank", "inherits", "codegen", "pass_config"})


@dataclass(frozen=True)
class TargetSpec:
    """One target.

    Parameters
    ----------
    name : str
        File name without ``.toml``, or ``custom`` for a target given as JSON.
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


def _raw(name: str) -> dict[str, Any]:
    entry = resources.files("tvm_gdn.targets") / f"{name}.toml"
    data = tomllib.loads(entry.read_text(encoding="utf-8"))
    unknown = set(data) - _FIELDS
    if unknown:
        raise TargetError(f"target {name}: unknown fields {sorted(unknown)}; allowed: {sorted(_FIELDS)}")
    return data


def _from_mapping(name: str, data: Mapping[str, Any]) -> TargetSpec:
    parent = named(data["inherits"]) if "inherits" in data else None
    if parent is None and not {"device", "codegen"} <= set(data):
        raise TargetError(f"target {name}: states neither `inherits` nor both `device` and `codegen`")
    return TargetSpec(
        name=name,
        description=data.get("description", parent.description if parent else ""),
        device=data.get("device", parent.device if parent else ""),
        requires=tuple(data.get("requires", parent.requires if parent else ())),
        rank=int(data.get("rank", 0)),
        lineage=(name, *(parent.lineage if parent else ())),
        codegen=tuple(data.get("codegen", dict(parent.codegen) if parent else {}).items()),
        pass_config=tuple(data.get("pass_config", dict(parent.pass_config) if parent else {}).items()),
    )


@functools.cache
def named(name: str) -> TargetSpec:
    """The target of that name, whether or not this machine can run it."""
    if name not in target_names():
        raise TargetError(f"no target {name!r}; known: auto, {', '.join(target_names())}")
    return _from_mapping(name, _raw(name))


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
            return _from_mapping("custom", json.loads(text))
        except json.JSONDecodeError as error:
            raise TargetError(f"target {text!r} is not valid JSON: {error}") from error
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
