"""What a format works with: the kernel asked for, the checks made on its files, and writing them whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvm_gdn import cases, parity
from tvm_gdn.build import symbol_of
from tvm_gdn.errors import ArgumentError, TvmGdnError
from tvm_gdn.packed_experts import PackedExperts
from tvm_gdn.spec import Geometry, OpSpec, Scalar

#: Axes that kernels take in any size and some formats fix: heads, channels, experts, experts per token.
OPEN = ("H", "HV", "D", "E", "k")


class ExportError(TvmGdnError, RuntimeError):
    """An operator could not be exported; or what was exported did not pass its verification."""


@dataclass(frozen=True)
class Request:
    """One kernel to export.

    Parameters
    ----------
    spec, geometry
        The operator, and what the kernel is compiled for.
    profile : str
        Variant of the format; formats without variants have "".
    l2norm : bool
        For formats that fix options: normalize q and k (`use_qk_l2norm_in_kernel`).
    scale : float, optional
        For formats that fix options: factor on q; default the operator's own.
    chunk : int
        Tokens per chunk, for formats that state the chunked form in other operators.
    tokens : int
        For the same: the number of tokens, if it is to be fixed; 0: any.
    heads : tuple of (str, int)
        Sizes of axes that are symbolic in kernels and fixed in some formats: names of `OPEN`.
    renormalize : bool
        For formats that fix options: divide the weights of `moe_route` by their sum.
    pack : PackedExperts, optional
        Weights that the exported file is to hold, for experts on packed weights.
    """

    spec: OpSpec
    geometry: Geometry
    profile: str = ""
    l2norm: bool = True
    scale: float | None = None
    chunk: int = 64
    tokens: int = 0
    heads: tuple[tuple[str, int], ...] = ()
    renormalize: bool = True
    pack: PackedExperts | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes that kernels leave open: those asked for, else those of the operator's first benchmark shape."""
        bench = self.spec.bench[0] if self.spec.bench else {}
        names = [name for name in OPEN if name not in self.spec.static_axes]
        return {name: int(bench[name]) for name in names if name in bench} | dict(self.heads)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        bench = self.spec.bench[0] if self.spec.bench else {}
        return self.sizes.get("k", int(bench.get("top_k", 1)))

    @property
    def symbol(self) -> str:
        """Name of the exported function."""
        return symbol_of(self.spec, self.geometry)


@dataclass(frozen=True)
class Check:
    """One verification: what was checked, by which program, and how it came out; `passed` None: it could not be run here."""

    what: str
    by: str
    passed: bool | None
    detail: str = ""

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Line of the table that the command prints."""
        return self.what, self.by, {True: "ok", False: "FAILED", None: "not run"}[self.passed], self.detail


def all_passed(checks: Sequence[Check]) -> bool:
    """Whether nothing failed and something was run."""
    return all(check.passed is not False for check in checks) and any(check.passed for check in checks)


def case_of(spec: OpSpec, geometry: Geometry, **sizes: Any) -> dict[str, Any]:
    """A case (see `cases.py`) that has a geometry, at the sizes given; packed sequences have T, 0 and 1 tokens."""
    given = tuple(tensor.name for tensor in spec.tensors if tensor.optional and tensor.name in geometry.dtype)
    options = {scalar.name: _stated(scalar, geometry.attr[scalar.name]) for scalar in spec.scalars if scalar.static}
    case: dict[str, Any] = {**sizes, **geometry.axis, **options, "dtypes": dict(geometry.dtype), "with": given}
    if "T" in case and not {"cu_seqlens", "query_start_loc"}.isdisjoint(given):
        case["lengths"] = (case.pop("T"), 0, 1)
        case.pop("B", None)
    return case


def _stated(scalar: Scalar, meaning: Any) -> Any:
    """A value of a static scalar that has this meaning."""
    return next((value for value, means in scalar.choices if means == meaning), meaning)


def draw(request: Request, seed: int = 0, **sizes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments of a call of the request's kernel, and what the float64 reference makes of them."""
    axis = request.geometry.axis
    inner = {"I": 16 * axis["G"]} if "KI" in axis else {}  # of packed experts
    case = case_of(request.spec, request.geometry, **inner, **sizes)
    fixed = {
        "use_qk_l2norm_in_kernel": request.l2norm, "scale": request.scale, "top_k": request.top_k,
        "renormalize": request.renormalize, "routed_scaling_factor": 1.0 if request.scale is None else request.scale,
    }  # fmt: skip
    case |= {scalar.name: fixed[scalar.name] for scalar in request.spec.scalars if scalar.name in fixed}
    try:
        arguments = cases.draw(request.spec, case, seed)
    except KeyError as error:
        raise ExportError(
            f"{request.spec.name}: inputs to verify it with need the size {error}, which no format states"
        ) from error
    return arguments, parity.expected(request.spec, arguments)


def compared(spec: OpSpec, what: str, by: str, got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> Check:
    """The check that outputs are within the operator's tolerances."""
    missing = sorted(set(want) - set(got))
    if missing:
        return Check(what, by, False, f"no output {', '.join(missing)}")
    errors, limits = parity.compare(spec, got, want)
    text = ", ".join(f"{name} {error:.1e} (limit {limits[name]:.0e})" for name, error in errors.items())
    return Check(what, by, all(error <= limits[name] for name, error in errors.items()), text)


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse an output path before any work is done.

    Raises
    ------
    ArgumentError
        Something is there and may not be replaced, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ArgumentError(f"-o {path}: the folder {path.parent} does not exist")
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not force:
        raise ArgumentError(f"-o {path}: exists; choose another path, or replace it with --force")


def is_one_file(path: Path, files: Sequence[str]) -> bool:
    """Whether an export is written as the file `path` instead of into a folder of that name."""
    return len(files) == 1 and bool(path.suffix) and path.suffix == Path(files[0]).suffix


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Put files at a path: into a folder, or as that file where there is one file and `path` has its suffix.

    They are written beside it first and renamed, so that nobody sees half of a file; other files of the folder stay.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(staging, files)
        if is_one_file(path, list(files)):
            (staging / next(iter(files))).replace(path)
        elif path.is_dir():
            for name in files:
                (staging / name).replace(path / name)
        else:
            staging.chmod(0o755)
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
