"""Packs: folders with compiled kernels and a manifest that says what they are and what they need.

::

    PACK/manifest.json      format, target, CPU features, devices, versions; per kernel: operator, geometry, files, schedule
    PACK/NAME-HASH.so       one library per kernel
    PACK/NAME-HASH.cubin    its device code, for accelerators (or .hsaco ...)
    PACK/launcher-HASH.so   runs parallel regions on torch's OpenMP threads, or kernels on a device

Files are named after their content: the dynamic loader takes a file of a known path for a library that it has already.

A pack is written to a temporary folder and renamed, so it is never half there. Reading one checks every field of the manifest
(`manifest.py`), the ABI, the CPU features and, when a kernel is loaded, the file's hash; whatever differs is named. Kernels made
at run time are packs of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_gdn import device, images
from tvm_gdn.digest import abi_of, file_digest, version_of
from tvm_gdn.errors import PackError
from tvm_gdn.manifest import FORMAT, File, Manifest, parse
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, host_features

MANIFEST = "manifest.json"
#: Formats of code that `load.py` can run.
_IMAGES = ("elf-so", "cubin", "hsaco", "emulation")


@dataclass(frozen=True)
class BuiltKernel:
    """A compiled library and what it is; on accelerators also the image of its device code, and that image's kernels.

    `refusal` is why the operator's own algorithm does not serve the geometry, where its second one does.
    """

    spec: OpSpec
    geometry: Geometry
    file: Path
    symbol: str
    schedule: str
    knobs: dict[str, Any]
    source: str
    image: Path | None = None
    table: tuple[str, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Pack:
    """A folder with a sound manifest."""

    folder: Path
    manifest: Manifest

    def file(self, stored: File) -> Path:
        """Path of one of its files, after checking its hash.

        Raises
        ------
        PackError
            The file is missing or its content differs from the manifest.
        """
        path = self.folder / stored.file
        try:
            found = file_digest(path)
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise PackError(f"pack {self.folder}: {stored.file} {reason}; rebuild it with `tvm_gdn build`") from error
        if found != stored.sha256:
            raise PackError(
                f"pack {self.folder}: {stored.file} was changed or cut short: sha256 {found[:12]}..., manifest says "
                f"{stored.sha256[:12]}...; rebuild it with `tvm_gdn build`"
            )
        return path


def write(folder: Path, target: TargetSpec, requires: Iterable[str], kernels: list[BuiltKernel], launcher: Path | None) -> None:
    """Write a pack; an existing one at the same place is replaced.

    Parameters
    ----------
    folder : Path
        Where it will be.
    target : TargetSpec
        What the kernels were built for.
    requires : iterable of str
        CPU flags that the code uses.
    kernels : list of BuiltKernel
        At least one.
    launcher : Path or None
        What runs the kernels on threads or on a device.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        entries = []
        for kernel in kernels:
            entry: dict[str, Any] = {
                "op": kernel.spec.name,
                "geometry": kernel.geometry.to_json(),
                "symbol": kernel.symbol,
                **_store(kernel.file, temporary, kernel.symbol),
                "schedule": kernel.schedule,
                "knobs": kernel.knobs,
                "source": kernel.source,
            }
            if kernel.refusal:
                entry["refusal"] = kernel.refusal
            if kernel.image is not None:
                images.check(kernel.image, target.image)
                entry["image"] = {**_store(kernel.image, temporary, kernel.symbol), "kernels": list(kernel.table)}
            entries.append(entry)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "target": target.name,
            "target_digest": target.digest(),
            "rank": target.rank,
            "device": target.device,
            "machine": platform.machine(),
            "requires": sorted(requires),
            "image": target.image,
            "arch": target.arch,
            "serves": list(target.serves),
            "driver": dict(target.driver),
            "tvm": version_of("apache-tvm"),
            "tvm_ffi": version_of("apache-tvm-ffi"),
            "kernels": entries,
        }
        if launcher is not None:
            manifest["launcher"] = _store(launcher, temporary, "launcher")
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        _install(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _store(source: Path, folder: Path, name: str) -> dict[str, str]:
    """Copy a file into a pack under a name with its hash; its entry in the manifest."""
    digest = file_digest(source)
    stored = f"{name}-{digest[:12]}{source.suffix}"
    shutil.copyfile(source, folder / stored)
    return {"file": stored, "sha256": digest}


def _install(finished: Path, folder: Path) -> None:
    """Rename a finished folder into its place; several processes may do so at once, and the last one stays."""
    while True:
        try:
            finished.replace(folder)
            return
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        # Moved away as a whole: deleting it in its place would show readers a part of it.
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        with contextlib.suppress(FileNotFoundError):
            folder.replace(old)
        shutil.rmtree(old, ignore_errors=True)


def read_any(folder: Path) -> Pack:
    """Read a pack, whether or not it fits this machine.

    Raises
    ------
    PackError
        There is no manifest, or it is damaged or of another format.
    """
    try:
        return Pack(folder, parse((folder / MANIFEST).read_bytes()))
    except OSError as error:
        raise PackError(f"pack {folder}: no readable {MANIFEST} ({error.strerror}); build one with `tvm_gdn build`") from error
    except PackError as error:
        raise PackError(f"pack {folder}: {MANIFEST} {error}; rebuild it with `tvm_gdn build`") from error


def read_whole(folder: Path) -> Pack:
    """Read a pack, whether or not it fits this machine, and check that every file is there and unchanged.

    Raises
    ------
    PackError
        Names what is missing or damaged.
    """
    pack = read_any(folder)
    for stored in pack.manifest.files:
        pack.file(stored)
    return pack


def read(folder: Path) -> Pack:
    """Read a pack and check that it fits this machine and this software.

    Parameters
    ----------
    folder : Path
        The pack.

    Returns
    -------
    Pack

    Raises
    ------
    PackError
        Says what differs: missing or damaged manifest, format, machine, ABI, CPU features.
    """
    pack = read_any(folder)
    manifest = pack.manifest
    differences = []
    if manifest.machine != platform.machine():
        differences.append(f"machine is {manifest.machine!r}, this software needs {platform.machine()!r}")
    if manifest.image not in _IMAGES:
        differences.append(f"image is {manifest.image!r}, this software needs one of {', '.join(_IMAGES)}")
    missing = sorted(set(manifest.requires) - host_features())
    if missing:
        differences.append(f"it needs CPU features that this machine lacks: {', '.join(missing)}")
    abi, own = abi_of(manifest.tvm_ffi), abi_of(version_of("apache-tvm-ffi"))
    if abi != own:
        differences.append(f"it was built for the tvm_ffi ABI {abi}, installed is {own}")
    if not manifest.kernels:
        differences.append("it holds no kernels")
    if differences:
        raise PackError(f"pack {folder} is refused: {'; '.join(differences)}")
    return pack


def check_device(pack: Pack) -> None:
    """Check that the device that is present runs a pack's code; not part of `read`, which must not wake a device up.

    Raises
    ------
    PackError
        Says which devices it serves and which is present.
    """
    manifest = pack.manifest
    if manifest.device == "cpu":
        return
    present = device.architecture(manifest.device)
    if present is None:
        raise PackError(f"pack {pack.folder} is refused: it needs a {manifest.device} device, and none is present")
    if manifest.serves and present not in manifest.serves:
        raise PackError(
            f"pack {pack.folder} is refused: its code is for {manifest.arch} ({manifest.device} devices of architecture "
            f"{', '.join(manifest.serves)}), the device that is present has {present}; build one with `tvm_gdn build`"
        )
