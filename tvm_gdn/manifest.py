"""What a pack's manifest says, as checked data: whatever is missing, of the wrong type or points elsewhere is a `PackError`."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from tvm_gdn.errors import PackError
from tvm_gdn.spec import Geometry

FORMAT = 2

T = TypeVar("T")
# A file lies in the pack itself: a path would lead out of it.
_FILE = re.compile(r"\w[\w.+-]*", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KERNEL = re.compile(r"[A-Za-z_]\w{0,254} ([plisbfd]{1,128}|-) [0-6]{0,7}[+]?", re.ASCII)
_SOURCE = re.compile(r"\w+-\w+", re.ASCII)
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "a table"}


@dataclass(frozen=True)
class File:
    """A file of a pack: its bare name and the hash of its content."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Image(File):
    """Device code: a file, and a line of the launcher's table (`images.DeviceCode`) for each kernel in it."""

    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Entry(File):
    """A kernel: the function `symbol` of a library serves `geometry` of the operator `op`; its device code is `image`.

    `refusal` is why the target has no plan of the operator's own algorithm, where the second one serves.
    """

    op: str
    geometry: Geometry
    symbol: str
    schedule: str
    knobs: Mapping[str, Any]
    source: str
    image: Image | None
    refusal: str

    @property
    def spec_digest(self) -> str:
        """Second part of `source`: digest of the operator's interface and maths, without its schedules."""
        return self.source.partition("-")[2]


@dataclass(frozen=True)
class Manifest:
    """A pack's target, what it needs, and its kernels; `launcher` runs them on threads or on a device."""

    target: str
    target_digest: str
    rank: int
    device: str
    machine: str
    image: str
    arch: str
    serves: tuple[str, ...]
    driver: Mapping[str, str]
    requires: tuple[str, ...]
    tvm_ffi: str
    kernels: tuple[Entry, ...]
    launcher: File | None

    @property
    def files(self) -> tuple[File, ...]:
        """Everything that it names."""
        images = (entry.image for entry in self.kernels)
        return (*self.kernels, *(image for image in images if image is not None), *([self.launcher] if self.launcher else []))

    @cached_property
    def index(self) -> dict[tuple[str, str], Entry]:
        """Kernels by operator and geometry key."""
        return {(entry.op, entry.geometry.key): entry for entry in self.kernels}


def parse(text: str | bytes) -> Manifest:
    """Read a manifest's text.

    Raises
    ------
    PackError
        Says which field is missing or wrong, and what it must be.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackError(f"is damaged (no valid JSON: {error})") from error
    if not isinstance(data, dict):
        raise _damaged("the whole", "a table", data)
    # First, because the fields of another format are other fields.
    if data.get("format") != FORMAT:
        raise PackError(f"format is {reprlib.repr(data.get('format'))}, this software needs {FORMAT!r}")
    launcher = data.get("launcher")
    return Manifest(
        target=_field(data, "target", str),
        target_digest=_field(data, "target_digest", str),
        rank=_field(data, "rank", int),
        device=_field(data, "device", str),
        machine=_field(data, "machine", str),
        image=_field(data, "image", str),
        arch=_field(data, "arch", str),
        serves=_texts(data, "serves"),
        driver={name: _is(value, str, f"driver.{name}") for name, value in _field(data, "driver", dict).items()},
        requires=_texts(data, "requires"),
        tvm_ffi=_field(data, "tvm_ffi", str),
        kernels=tuple(_entry(entry, f"kernels[{n}]") for n, entry in enumerate(_field(data, "kernels", list))),
        launcher=None if launcher is None else File(**_file(_is(launcher, dict, "launcher"), "launcher.")),
    )


def _entry(value: Any, where: str) -> Entry:
    data = _is(value, dict, where)
    where += "."
    return Entry(
        **_file(data, where),
        op=_field(data, "op", str, where),
        geometry=_geometry(_field(data, "geometry", dict, where), f"{where}geometry."),
        symbol=_text(data, "symbol", _SYMBOL, "the name of a function", where),
        schedule=_field(data, "schedule", str, where),
        knobs=_field(data, "knobs", dict, where),
        source=_text(data, "source", _SOURCE, "two digests as A-B", where),
        image=_image(_is(data["image"], dict, f"{where}image"), f"{where}image.") if data.get("image") is not None else None,
        refusal=_field(data, "refusal", str, where) if "refusal" in data else "",
    )


def _image(data: Mapping[str, Any], where: str) -> Image:
    lines = _texts(data, "kernels", where)
    for number, line in enumerate(lines):
        if not _KERNEL.fullmatch(line):
            raise _damaged(f"{where}kernels[{number}]", "a kernel's name, parameter letters and launch dimensions", line)
    return Image(**_file(data, where), kernels=lines)


def _texts(data: Mapping[str, Any], name: str, where: str = "") -> tuple[str, ...]:
    return tuple(_is(item, str, f"{where}{name}[{n}]") for n, item in enumerate(_field(data, name, list, where)))


def _file(data: Mapping[str, Any], where: str) -> dict[str, str]:
    return {
        "file": _text(data, "file", _FILE, "a bare file name", where),
        "sha256": _text(data, "sha256", _SHA256, "64 hexadecimal digits", where),
    }


def _geometry(data: Mapping[str, Any], where: str) -> Geometry:
    for name, size in _field(data, "axes", dict, where).items():
        _is(size, int, f"{where}axes.{name}")
    for name, dtype in _field(data, "dtypes", dict, where).items():
        _is(dtype, str, f"{where}dtypes.{name}")
    for name, value in _field(data, "attrs", dict, where).items():
        if not isinstance(value, (bool, int, float, str)):
            raise _damaged(f"{where}attrs.{name}", "a plain value", value)
    return Geometry.from_json(data)


def _field(data: Mapping[str, Any], name: str, kind: type[T], where: str = "") -> T:
    if name not in data:
        raise PackError(f"is damaged ({where}{name} is missing)")
    return _is(data[name], kind, where + name)


def _is(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _damaged(where, _KINDS[kind], value)
    return value


def _text(data: Mapping[str, Any], name: str, pattern: re.Pattern[str], what: str, where: str) -> str:
    value = _field(data, name, str, where)
    if not pattern.fullmatch(value):
        raise _damaged(where + name, what, value)
    return value


def _damaged(where: str, what: str, value: object) -> PackError:
    return PackError(f"is damaged ({where} must be {what}, got {reprlib.repr(value)})")
