"""Identity of sources and versions: what a compiled kernel or a tuned record was made from."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

#: Sources under these packages decide what a kernel computes and how.
_TRACKED = ("tvm_gdn.ops.tir.", "tvm_gdn.schedules.")


@functools.cache
def version_of(package: str) -> str:
    """Installed version of a distribution, or ``"none"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def abi_of(version: str) -> str:
    """The part of a tvm_ffi version within which compiled kernels can be loaded."""
    return ".".join(version.split(".")[:2])


def _module_path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin)


def _is_module(name: str) -> bool:
    parent, _, child = name.rpartition(".")
    package = importlib.util.find_spec(parent)
    folders = package.submodule_search_locations if package else None
    return any((Path(folder) / f"{child}.py").is_file() for folder in folders or ())


@functools.cache
def _read(module: str) -> tuple[str, tuple[str, ...]]:
    """Text of a module, and the TIR and schedule modules that it imports."""
    text = _module_path(module).read_text(encoding="utf-8")
    # `from tvm_gdn.schedules import cpu` names a module too.
    names = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    ]
    return text, tuple(name for name in dict.fromkeys(names) if name.startswith(_TRACKED) and _is_module(name))


def _collect(module: str, seen: dict[str, str]) -> None:
    if module not in seen:
        seen[module], imported = _read(module)
        for name in imported:
            _collect(name, seen)


@functools.cache
def source_digest(*modules: str) -> str:
    """Hash of modules and of the TIR and schedule modules that they import; needs no tvm.

    Parameters
    ----------
    *modules : str
        Dotted names.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    seen: dict[str, str] = {}
    for module in modules:
        _collect(module, seen)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name}\n{seen[name]}".encode())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
