"""The table of export formats: name -> module with ``build``, ``verify`` and, where it has any, profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tvm_gdn.errors import ArgumentError
from tvm_gdn.export.artifact import Check, Request
from tvm_gdn.spec import FLOATS, OpSpec


@dataclass(frozen=True)
class Format:
    """One export format.

    Parameters
    ----------
    module : str
        Module of `tvm_gdn.export` with ``build(request)`` and ``verify(request, folder)``; ``module:NAME`` where its
        ``maker(NAME)`` gives the two.
    summary : str
        One line for the help text.
    profiles : tuple of str
        Variants, the default first; empty where there is one.
    """

    module: str
    summary: str
    profiles: tuple[str, ...] = ()

    @property
    def build(self) -> Callable[[Request], Mapping[str, bytes]]:
        """The format's files of a request, by name."""
        return self._functions()[0]

    @property
    def verify(self) -> Callable[[Request, Path], list[Check]]:
        """Checks of a request's files, which lie in a folder."""
        return self._functions()[1]

    def serves(self, spec: OpSpec) -> tuple[str, ...]:
        """Floating dtypes in which the format has an operator; none: it has it not."""
        name, _, variant = self.module.partition(":")
        module = import_module(f"tvm_gdn.export.{name}")
        dtypes: tuple[str, ...] = module.serves(spec, variant) if variant else module.serves(spec)
        # The data of some operators are indices alone.
        return tuple(dtype for dtype in dtypes if dtype in FLOATS)

    def _functions(self) -> Any:
        name, _, variant = self.module.partition(":")
        module = import_module(f"tvm_gdn.export.{name}")
        return module.maker(variant) if variant else (module.build, module.verify)


FORMATS = {
    "onnx": Format(
        "onnx_files",
        "one .onnx model; operators of opset 27, or by profile older ones or onnxruntime's own",
        ("standard", "decomposed", "chunked", "ort", "dense", "loop"),
    ),
    "c": Format("c_files", "portable C99 with a header, a CMake file and a self-test; no TVM, no torch"),
    "torch": Format("torch_program", "a saved torch.export program (.pt2) that holds the operator as one node"),
    **{
        f"{language}-src": Format(f"gpu_source:{language}", f"{title} source with a JSON launch description")
        for language, title in (
            ("cuda", "CUDA"),
            ("musa", "MUSA"),
            ("opencl", "OpenCL"),
            ("metal", "Metal"),
            ("webgpu", "WGSL"),
        )
    },
}


def combinations(spec: OpSpec) -> str:
    """What works for an operator: formats, their profiles, dtypes."""
    lines = []
    for name, entry in FORMATS.items():
        dtypes = entry.serves(spec)
        if dtypes:
            profiles = profiles_of(name, spec.algorithm)
            variants = f" (--profile {', '.join(profiles)})" if profiles else ""
            lines.append(f"{name}{variants}: {', '.join(dtypes)}")
    return f"{spec.name} has: " + "; ".join(lines)


def profiles_of(name: str, algorithm: str) -> tuple[str, ...]:
    """Profiles of a format for an algorithm, the default first; of a format without variants none."""
    profiles = FORMATS[name].profiles
    if profiles:
        from tvm_gdn.export import onnx_files

        profiles = onnx_files.profiles(algorithm)
    return profiles


def profile_of(name: str, profile: str | None, algorithm: str) -> str:
    """A format's profile for an algorithm: the one asked for, or its default.

    Raises
    ------
    ArgumentError
        The format has no such profile for it.
    """
    profiles = profiles_of(name, algorithm) or FORMATS[name].profiles
    if profile is None:
        return profiles[0] if profiles else ""
    if profile not in profiles:
        allowed = f"allowed: {', '.join(profiles)}" if profiles else "the format has none"
        raise ArgumentError(f"--profile {profile}: {allowed} (--format {name})")
    return profile
