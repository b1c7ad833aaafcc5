"""Targets as data: each is one TOML file of `targets/`; the engine holds no table of their names.

A file states

- ``description``, and ``rank``: which of several usable targets ``auto`` prefers (0 = only when named);
- ``device`` (torch device type) and ``dispatch_key`` (torch's name for it where operators are registered);
- what a machine must have: ``requires``, CPU flags as in /proc/cpuinfo, all of them; ``serves``, devices of which one suffices,
  named as `device.architecture` names them (``"9.0"``, ``"gfx942"``);
- ``[codegen]``, the options of a TVM target, and ``[pass_config]`` for TVM's PassContext;
- for accelerators ``arch``, the architecture of their code, ``image``, the format in which a pack holds it, ``[compiler]``, the
  command that makes it, and ``[driver]``, the library that runs it.

``inherits`` takes over whatever a file does not state, and the schedules of the parent. An ``arch`` with braces is a family: it
stands for the device that is present.
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

from tvm_gdn import device
from tvm_gdn.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCALARS = (bool, int, float, str)
#: `[codegen] mcpu` that stands for this machine's CPU.
HOST = "host"
#: Flags of /proc/cpuinfo that code made for this very CPU may rely on, by their beginnings.
_ISA = (
    "sse", "ssse3", "pni", "avx", "fma", "f16c", "amx", "bmi", "popcnt", "movbe", "abm", "adx", "aes", "vaes", "pclmulqdq",
    "vpclmulqdq", "sha_ni", "gfni", "rdrand", "rdseed", "rdpid", "clflushopt", "clwb", "xsave", "fsgsbase", "cx16", "lahf_lm",
    "3dnowprefetch", "serialize", "movdiri", "movdir64b", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip
#: Prefix of targets whose kernels run on the CPU, in an emulation of the device.
EMULATED = "emulated:"
_EMULATION_DRIVER = (("library", "{image}"), ("prefix", "emu"), ("launch", "emuLaunchKernel"), ("error", "emuGetErrorName"))

Items = tuple[tuple[str, Any], ...]


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
        Torch device type of the tensors that its kernels take.
    dispatch_key : str
        Torch's dispatch key of that device type.
    requires : tuple of str
        CPU flags, as in /proc/cpuinfo, without which its code must not run.
    serves : tuple of str
        Devices that run its code; one must be present. Empty: any.
    lacks : tuple of str
        Dtypes that its code cannot have.
    rank : int
        Preference of ``auto`` among usable targets; 0 is never chosen.
    lineage : tuple of str
        The target's name and those it inherits from, nearest first: where schedules are looked up.
    family : str
        Device type whose portable schedules (``generic-...``) end the look-up.
    arch : str
        Architecture of its device code; empty for CPUs.
    image : str
        Format of its code in packs: ``elf-so``, ``cubin``, ``hsaco``, ``source`` or ``emulation``.
    codegen : mapping
        Options of the TVM target.
    pass_config : mapping
        Configuration of TVM's passes.
    compiler : mapping
        How device code becomes an image: ``command`` (with the fields {arch}, {number}, {source}, {image}), or ``linker``.
    driver : mapping
        What loads and launches an image: ``library``, ``prefix`` of its functions, name of the ``launch`` function; ``loader``
        ``torch`` where torch's module loader loads it.
    """

    name: str
    description: str
    device: str
    dispatch_key: str
    requires: tuple[str, ...]
    serves: tuple[str, ...]
    lacks: tuple[str, ...]
    rank: int
    lineage: tuple[str, ...]
    family: str
    arch: str
    image: str
    codegen: Items
    pass_config: Items
    compiler: Items
    driver: Items

    def missing(self) -> list[str]:
        """What the target requires and this machine lacks: CPU flags, or a device."""
        lacking = sorted(set(self.requires) - host_features())
        if self.device == "cpu":
            return lacking
        present = device.architecture(self.device)
        if present is None:
            lacking.append(f"a {self.device} device")
        elif self.serves and present not in self.serves:
            lacking.append(f"a {self.device} device of architecture {' or '.join(self.serves)} (present: {present})")
        return lacking

    def refuses(self, dtypes: Mapping[str, str]) -> str:
        """Why its code cannot take tensors of these dtypes (by name); empty if it can."""
        names = [name for name, dtype in dtypes.items() if dtype in self.lacks]
        lacking = ", ".join(sorted({dtypes[name] for name in names}))
        return f"target {self.name} has no type for {lacking} ({', '.join(names)})" if names else ""

    @property
    def emulated(self) -> bool:
        """Whether its device code runs in an emulation on the CPU."""
        return self.name.startswith(EMULATED)

    @property
    def concrete(self) -> bool:
        """Whether it names one architecture, and not the one that will be present."""
        return "{" not in self.arch

    @property
    def text(self) -> str:
        """What `resolve` makes this target of: its name, or JSON where it has no file."""
        if self.name in target_names() or self.emulated:
            return self.name
        inherited = {"inherits": self.lineage[1]} if len(self.lineage) > 1 else {}
        own = {
            "description": self.description, "device": self.device, "dispatch_key": self.dispatch_key, "rank": self.rank,
            "requires": self.requires, "serves": self.serves, "lacks": self.lacks, "arch": self.arch, "image": self.image,
            "codegen": dict(self.codegen), "pass_config": dict(self.pass_config),
            "compiler": dict(self.compiler), "driver": dict(self.driver),
        }  # fmt: skip
        return json.dumps({**inherited, **own})

    def digest(self) -> str:
        """Hash of what decides the generated code."""
        parts: list[Any] = [self.device, sorted(self.requires), dict(self.codegen), dict(self.pass_config)]
        if self.image != "elf-so":
            parts += [self.arch, sorted(self.serves), self.image, dict(self.compiler), dict(self.driver)]
        if dict(self.codegen).get("mcpu") == HOST:
            # The word stands for another CPU on every machine; caches and packs travel.
            parts += [host_cpu(), host_isa()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def host_features() -> frozenset[str]:
    """Flags of this machine's CPU, as /proc/cpuinfo names them; empty where that file does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.split(":", 1)[1].split())


def host_isa() -> list[str]:
    """Those flags that stand for instructions which compiled code may use."""
    return sorted(flag for flag in host_features() if flag.startswith(_ISA))


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


@functools.cache
def dispatch_keys() -> dict[str, str]:
    """Torch device types that some target has, with their dispatch keys."""
    return {spec.device: spec.dispatch_key for spec in map(named, target_names())}


def _is_table(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    items = [item for entry in value.values() for item in (entry if isinstance(entry, list) else [entry])]
    return all(isinstance(item, _SCALARS) for item in items)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_TABLE = ("a table of plain values or lists of them", _is_table)
#: What each field must be, and how to tell.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "description": ("text", _is_text),
    "device": ("text, a torch device type", lambda value: isinstance(value, str) and bool(value)),
    "dispatch_key": ("text, a torch dispatch key", lambda value: isinstance(value, str) and bool(value)),
    "requires": ("a list of texts", _is_texts),
    "serves": ("a list of texts", _is_texts),
    "lacks": ("a list of texts", _is_texts),
    "rank": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "inherits": ("the name of a target file", lambda value: isinstance(value, str) and value in target_names()),
    "arch": ("text", _is_text),
    "image": ("text", _is_text),
    "codegen": _TABLE,
    "pass_config": _TABLE,
    "compiler": _TABLE,
    "driver": _TABLE,
}


def _items(table: Mapping[str, Any]) -> Items:
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

    def inherited(field: str, default: Any) -> Any:
        return data.get(field, getattr(parent, field) if parent else default)

    def table(field: str) -> Items:
        return _items(data[field]) if field in data else inherited(field, ())

    kind = inherited("device", "")
    return TargetSpec(
        name=name,
        description=inherited("description", ""),
        device=kind,
        dispatch_key=inherited("dispatch_key", kind.upper()),
        requires=tuple(inherited("requires", ())),
        serves=tuple(inherited("serves", ())),
        lacks=tuple(inherited("lacks", ())),
        rank=data.get("rank", 0),
        lineage=(name, *(parent.lineage if parent else ())),
        family=kind,
        arch=inherited("arch", ""),
        image=inherited("image", "elf-so"),
        codegen=table("codegen"),
        pass_config=table("pass_config"),
        compiler=table("compiler"),
        driver=table("driver"),
    )


@functools.cache
def named(name: str) -> TargetSpec:
    """The target of that name, whether or not this machine can run it."""
    if name not in target_names():
        raise TargetError(f"no target {name!r}; known: auto, {', '.join(target_names())}")
    entry = resources.files("tvm_gdn.targets") / f"{name}.toml"
    return _from_mapping(name, tomllib.loads(entry.read_text(encoding="utf-8")))


def emulation_of(spec: TargetSpec) -> TargetSpec:
    """The target whose kernels are the same device code, run on the CPU in an emulation."""
    # Generated C is what can be emulated; other generators' schedules are run in that form.
    warp = dict(spec.codegen).get("thread_warp_size", 32)
    return replace(
        spec, name=f"{EMULATED}{spec.name}", description=f"{spec.name}, emulated on the CPU", device="cpu", dispatch_key="CPU",
        requires=(), serves=(), rank=0, lineage=(f"{EMULATED}{spec.name}", *spec.lineage), image="emulation",
        codegen=(("kind", "cuda"), ("arch", "sm_80"), ("thread_warp_size", warp)), compiler=(), driver=_EMULATION_DRIVER,
    )  # fmt: skip


@functools.cache
def resolve(text: str = "auto", kind: str = "cpu") -> TargetSpec:
    """Target for a name, ``auto``, ``emulated:NAME``, or a JSON object with the fields of a target file.

    Parameters
    ----------
    text : str
        ``"auto"`` takes the usable target of the highest rank. A family (``"cuda"``) becomes the target of it that serves the
        device that is present.
    kind : str
        Torch device type that ``auto`` chooses for.

    Returns
    -------
    TargetSpec

    Raises
    ------
    TargetError
        Unknown name, malformed JSON, or no usable target for ``auto``.
    """
    if text == "auto":
        usable = [spec for spec in map(named, target_names()) if spec.device == kind and spec.rank and not spec.missing()]
        if not usable:
            what = f"this CPU ({host_cpu()})" if kind == "cpu" else f"the {kind} device ({device.architecture(kind)})"
            raise TargetError(f"no target fits {what}; known: {', '.join(target_names())}")
        return max(usable, key=lambda spec: spec.rank)
    if text.startswith(EMULATED):
        return emulation_of(concrete(resolve(text.removeprefix(EMULATED))))
    if text.startswith("{"):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TargetError(f"target {text!r} is not valid JSON: {error}") from error
        spec = _from_mapping("given as JSON", data)
        # Two such targets must not pass for each other: by name alone a pack of the one would serve the other.
        name = f"custom-{spec.digest()[:8]}"
        return replace(spec, name=name, lineage=(name, *spec.lineage[1:]))
    spec = named(text)
    return spec if spec.concrete else _present(spec)


def _present(family: TargetSpec) -> TargetSpec:
    """The member of a family that serves the device that is present; the family itself where there is none."""
    present = device.architecture(family.device)
    if present is None:
        return family
    members = [spec for spec in map(named, target_names()) if family.name in spec.lineage[1:] and present in spec.serves]
    if members:
        return max(members, key=lambda spec: spec.rank)
    arch = family.arch.format(*present.split("."))
    codegen = {key: arch if value == family.arch else value for key, value in family.codegen}
    return resolve(json.dumps({"inherits": family.name, "arch": arch, "serves": [present], "codegen": codegen}))


def concrete(spec: TargetSpec) -> TargetSpec:
    """The same target, or an error where it is a family and no device says which member.

    Raises
    ------
    TargetError
        Names the members.
    """
    if not spec.concrete:
        members = [name for name in target_names() if spec.name in named(name).lineage[1:]]
        raise TargetError(
            f"target {spec.name} means the {spec.device} device that is present, and none is; name one: {', '.join(members)}"
        )
    return spec


def runnable(spec: TargetSpec) -> TargetSpec:
    """The same target, or an error where this machine cannot run its code.

    Raises
    ------
    TargetError
        Names the missing CPU flags or device.
    """
    missing = spec.missing()
    if missing:
        here = f"CPU features that this machine ({host_cpu()})" if spec.device == "cpu" else "what this machine"
        raise TargetError(
            f"target {spec.name} needs {here} lacks: {', '.join(missing)}; "
            f"use `auto` or one of: {', '.join(n for n in target_names() if not named(n).missing())}"
        )
    return concrete(spec)
