"""Packed expert weights as safetensors files: scheme, shapes, layout version and checksums beside the data."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tvm_gdn import large_pages
from tvm_gdn.errors import PackError
from tvm_gdn.packed_experts import LAYOUT_VERSION, STEP, PackedExperts, shapes

FORMAT = "tvm_gdn.packed_experts"
_NUMBERS = ("group", "experts", "hidden", "intermediate")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _in_memory(mapped: torch.Tensor) -> torch.Tensor:
    """A copy of what the file holds: a file that is cut short later must not end the process that reads its pages."""
    return large_pages.empty(tuple(mapped.shape), mapped.dtype).copy_(mapped)


def _checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(len(tensors)) as pool:  # hashing releases the interpreter's lock
        return dict(zip(tensors, pool.map(_sha256, tensors.values()), strict=True))


def save(pack: PackedExperts, path: str | os.PathLike[str]) -> None:
    """Write packed experts to a safetensors file; the file is whole or not there.

    Parameters
    ----------
    pack : PackedExperts
        What to write.
    path : path
        The file; an existing one is replaced.
    """
    tensors = {name: tensor for name, tensor in pack.tensors().items() if tensor is not None}
    metadata = {
        "format": FORMAT,
        "layout_version": str(LAYOUT_VERSION),
        "scheme": pack.scheme,
        **{name: str(getattr(pack, name)) for name in _NUMBERS},
        **{f"sha256.{name}": value for name, value in _checksums(tensors).items()},
    }
    path = Path(path)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        Path(scratch).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(scratch).unlink()
        raise


def load(path: str | os.PathLike[str], *, verify: bool = True) -> PackedExperts:
    """Read packed experts from a file that :func:`save` wrote.

    Parameters
    ----------
    path : path
        The file.
    verify : bool
        Compare checksums: reads every byte once more.

    Returns
    -------
    PackedExperts

    Raises
    ------
    PackError
        The file is missing, truncated, damaged, of another kind or of another layout version; the message says which.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            scheme, numbers = _read_metadata(path, metadata)
            tensors = {name: _in_memory(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise PackError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise PackError(f"{path}: not a whole safetensors file ({error}); write it again with PackedExperts.save") from error
    expected = shapes(scheme, numbers["group"], numbers["experts"], numbers["hidden"], numbers["intermediate"])
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            raise PackError(f"{path}: holds no {name}; a {scheme} pack has {', '.join(expected)}")
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            raise PackError(
                f"{path}: {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}; its metadata say {shape} {dtype}"
            )
    if verify:
        for name, value in _checksums({name: tensors[name] for name in expected}).items():
            if metadata.get(f"sha256.{name}") != value:
                raise PackError(f"{path}: {name} is not what was saved (its checksum differs); pack the weights again")
    return PackedExperts(
        tensors["w13"],
        tensors["w2"],
        tensors.get("w13_scale"),
        tensors.get("w2_scale"),
        scheme,
        numbers["group"],
        numbers["hidden"],
        numbers["intermediate"],
    )


def _read_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    if metadata.get("format") != FORMAT:
        raise PackError(f"{path}: not a file of packed experts (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("layout_version") != str(LAYOUT_VERSION):
        raise PackError(
            f"{path}: layout version {metadata.get('layout_version')}; this version of tvm_gdn reads {LAYOUT_VERSION}: pack the "
            "weights again"
        )
    scheme = metadata.get("scheme", "")
    if scheme not in STEP:
        raise PackError(f"{path}: unknown scheme {scheme!r}; known: {', '.join(STEP)}")
    try:
        numbers = {name: int(metadata[name]) for name in _NUMBERS}
    except (KeyError, ValueError) as error:
        raise PackError(f"{path}: its metadata lack whole numbers for {', '.join(_NUMBERS)}") from error
    return scheme, numbers
