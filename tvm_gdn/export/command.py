"""``tvm_gdn export``: an operator as C, ONNX, a torch program or GPU source; verified first, then written."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tvm_gdn import models
from tvm_gdn.commands import arguments
from tvm_gdn.commands.text import emit, size_text, table
from tvm_gdn.errors import ArgumentError, TvmGdnError
from tvm_gdn.export import artifact, onnx_layer
from tvm_gdn.export.artifact import Check, ExportError, Request
from tvm_gdn.export.formats import FORMATS, combinations, profile_of
from tvm_gdn.ops import OPS
from tvm_gdn.packed_experts import PackedExperts
from tvm_gdn.spec import Geometry, OpSpec

#: Layers of several operators, which only ONNX takes.
_LAYERS = {onnx_layer.SPEC.name: onnx_layer.SPEC}
_NAMES = (*OPS, *_LAYERS)
#: What the extra `export` installs.
_EXTRA = {"onnx", "onnxruntime", "onnxscript", "tvm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument(
        "--op", choices=_NAMES, metavar="OP", help=f"the operator, or layer, to export; one of: {', '.join(_NAMES)}"
    )
    formats = "; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), metavar="FORMAT", help=formats)
    variants = "; ".join(f"{name}: {', '.join(entry.profiles)}" for name, entry in FORMATS.items() if entry.profiles)
    parser.add_argument("--profile", metavar="NAME", help=f"variant of the format; {variants or 'none so far'}")
    parser.add_argument("--model", metavar="NAME", help="export what this model calls: with a state, sequences of one length")
    parser.add_argument(
        "--dims",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="what the kernel serves, as for `tvm_gdn build`; also H=, HV=, D=, E=, k= where a format fixes them",
    )
    parser.add_argument("--geometry", action="append", default=[], metavar="JSON", help="the same as JSON")
    parser.add_argument("--no-l2norm", action="store_true", help="formats that fix options: q and k come normalized")
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="formats that fix options: factor on q (default K ** -0.5), or on routing weights (default 1)",
    )
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="tokens per chunk, where the format states chunks")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="the same: fix the number of tokens and unroll")
    parser.add_argument("--no-renormalize", action="store_true", help="the same, routing: leave the weights as they are")
    parser.add_argument("--weights", type=Path, metavar="PACK", help="packed experts (.safetensors) that the file is to hold")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="folder, or file where the format is one file"
    )
    parser.add_argument("--force", action="store_true", help="replace PATH")
    parser.add_argument("--no-verify", action="store_true", help="write without having run anything")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    path = args.output.resolve()
    artifact.refuse_existing(path, args.force)
    if args.chunk < 1 or args.tokens < 0:
        raise ArgumentError(f"--chunk {args.chunk} --tokens {args.tokens}: give numbers of tokens")
    if not args.op:
        raise ArgumentError("say which operator: --op OP")
    spec = _LAYERS.get(args.op) or OPS[args.op]
    if not FORMATS[args.format].serves(spec):
        served = [one.name for one in (*OPS.values(), *_LAYERS.values()) if FORMATS[args.format].serves(one)]
        raise ArgumentError(
            f"--format {args.format} has no {spec.name}; {combinations(spec)}. {args.format} has: {', '.join(served)}"
        )
    profile = profile_of(args.format, args.profile, spec.algorithm)
    heads = _heads(args, spec)
    pack = PackedExperts.load(args.weights) if args.weights else None
    request = Request(
        spec, _geometry(args, spec, pack), profile, not args.no_l2norm, args.scale, args.chunk, args.tokens, heads,
        not args.no_renormalize, pack,
    )  # fmt: skip
    try:
        checks, files = export(request, args.format, path, verify=not args.no_verify)
    except ExportError as error:
        raise ArgumentError(f"--format {args.format}: {error}\n{combinations(spec)}") from error
    emit(f"{spec.name} for {request.geometry}\n")
    if checks:
        emit(table(("verified", "by", "", "result"), [check.row for check in checks]))
    if checks and not artifact.all_passed(checks):
        emit("\nverification failed: nothing was written")
        return 1
    if not checks:
        emit("not verified (--no-verify)")
    for name, content in files.items():
        emit(f"{path if artifact.is_one_file(path, list(files)) else path / name}  {size_text(len(content))}")
    return 0


def _geometry(args: argparse.Namespace, spec: OpSpec, pack: PackedExperts | None) -> Geometry:
    """What is exported: by dims, by JSON, or what a model calls."""
    if args.model and (args.dims or args.geometry):
        raise ArgumentError("--model already says which geometries: leave out --dims and --geometry")
    if len(args.dims) + len(args.geometry) > 1:
        raise ArgumentError("one export holds one kernel: give --dims or --geometry once")
    if pack is None and args.format == "onnx" and any(scalar.name == "scheme" for scalar in spec.scalars):
        raise ArgumentError(f"{spec.name}: the model holds the weights: give --weights PACK.safetensors (PackedExperts.save)")
    if pack is not None:
        return _of_pack(args, spec, pack)
    if args.model:
        facts = models.model(args.model)
        if args.op in _LAYERS:
            return arguments.geometry_of_case(spec, {**spec.bench[0], **facts.axes, "dtype": facts.dtype})
        called = [geometry for one, geometry in models.kernels(args.model) if one.name == spec.name]
        if not called:
            raise ArgumentError(f"--model {args.model} does not call {spec.name}: say what to export with --dims")
        # Of a model's calls: one that takes a state, of sequences of one length.
        return max(called, key=lambda one: ("initial_state" in one.dtype) - 2 * ("cu_seqlens" in one.dtype))
    if not (args.dims or args.geometry):
        raise ArgumentError(
            f"say what to export: --dims (for example --dims {arguments.example_dims(spec)}), --geometry, or --model (one of: "
            f"{', '.join(models.MODELS)})"
        )
    return arguments.parse_dims(spec, args.dims[0]) if args.dims else arguments.parse_geometry(spec, args.geometry[0])


def _of_pack(args: argparse.Namespace, spec: OpSpec, pack: PackedExperts) -> Geometry:
    """The kernel of packed experts: the pack says all but the dtypes of x, ids and routing weights."""
    takes = next((scalar for scalar in spec.scalars if scalar.name == "scheme"), None)
    if takes is None or pack.scheme not in dict(takes.choices):
        fitting = [one.name for one in OPS.values() for s in one.scalars if s.name == "scheme" and pack.scheme in dict(s.choices)]
        raise ArgumentError(f"--weights: a pack of {pack.scheme}; allowed with it: --op {', '.join(fitting)}")
    if args.geometry or args.model:
        raise ArgumentError("--weights says the sizes: give --dims dtype=DTYPE,k=K at most")
    axis = {"D": pack.hidden, "E": pack.experts, "G": pack.w13.shape[1], "KD": pack.w13.shape[2]}
    axis |= {"ND": pack.w2.shape[1], "KI": pack.w2.shape[2]}
    if pack.w13_scale is not None and pack.w2_scale is not None:
        axis |= {"S13": pack.w13_scale.shape[2], "S2": pack.w2_scale.shape[2]}
    dims = [*args.dims, *(f"{name}={axis[name]}" for name in spec.static_axes), f"scheme={pack.scheme}"]
    dtypes = arguments.parse_dims(spec, ",".join(dims)).dtypes
    attrs = tuple((s.name, pack.scheme if s.name == "scheme" else s.meaning(s.default)) for s in spec.scalars if s.static)
    return Geometry(tuple((name, axis[name]) for name in spec.static_axes), dtypes, attrs)


def _heads(args: argparse.Namespace, spec: OpSpec) -> tuple[tuple[str, int], ...]:
    """Sizes that kernels leave open and some formats fix: taken out of --dims, or from the model."""
    names = [name for name in artifact.OPEN if name not in spec.static_axes]
    if args.model:
        return tuple((name, size) for name, size in models.model(args.model).axes.items() if name in names)
    sizes = {}
    for i, text in enumerate(args.dims):
        kept = []
        for part in (part.strip() for part in text.split(",")):
            name, _, value = part.partition("=")
            if name not in names:
                kept.append(part)
                continue
            if not value.isdecimal() or not int(value):
                raise ArgumentError(f"--dims {part}: give a whole number, at least 1")
            sizes[name] = int(value)
        args.dims[i] = ",".join(kept)
    return tuple(sizes.items())


def export(request: Request, form: str, path: Path, *, verify: bool = True) -> tuple[list[Check], dict[str, bytes]]:
    """Export a kernel: build its files, verify them, and write them if everything passed.

    Parameters
    ----------
    request : Request
        The kernel and its options.
    form : str
        A name of `formats.FORMATS`.
    path : Path
        Folder, or file where the format is one file and `path` has its suffix; replaced if it exists.
    verify : bool
        Whether to verify; without it nothing is run.

    Returns
    -------
    checks : list of Check
        Empty without verification. Nothing was written if one of them failed.
    files : dict
        What was (or would have been) written.

    Raises
    ------
    ExportError
        The format cannot express the kernel.
    TvmGdnError
        What makes the format's files is not installed.
    """
    entry = FORMATS[form]
    try:
        files = dict(entry.build(request))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise TvmGdnError(f"--format {form} needs {error.name}: pip install 'tvm_gdn[export]'") from error
    checks: list[Check] = []
    if verify:
        with tempfile.TemporaryDirectory(prefix="tvm_gdn-export-") as folder:
            artifact.fill(Path(folder), files)
            checks = entry.verify(request, Path(folder))
    if not verify or artifact.all_passed(checks):
        artifact.write(path, files)
    return checks, files
