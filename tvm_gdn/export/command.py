"""``tvm_gdn export``: an operator as C, ONNX, a torch program or GPU source; verified first, then written."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tvm_gdn import models
from tvm_gdn.commands import aot, arguments
from tvm_gdn.commands.text import emit, size_text, table
from tvm_gdn.errors import ArgumentError
from tvm_gdn.export import artifact
from tvm_gdn.export.artifact import Check, ExportError, Request
from tvm_gdn.export.formats import FORMATS, profile_of

#: Axes that kernels take in any size.
_OPEN = ("H", "HV")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_op(parser, "the operator to export")
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
        help="what the kernel serves, as for `tvm_gdn build`; also H=, HV= where a format fixes heads",
    )
    parser.add_argument("--geometry", action="append", default=[], metavar="JSON", help="the same as JSON")
    parser.add_argument("--no-l2norm", action="store_true", help="formats that fix options: q and k come normalized")
    parser.add_argument("--scale", type=float, metavar="X", help="formats that fix options: factor on q; default K ** -0.5")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="tokens per chunk, where the format states chunks")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="the same: fix the number of tokens and unroll")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="folder, or file where the format is one file"
    )
    parser.add_argument("--force", action="store_true", help="replace PATH")
    parser.add_argument("--no-verify", action="store_true", help="write without having run anything")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    path = args.output.resolve()
    artifact.refuse_existing(path, args.force)
    profile = profile_of(args.format, args.profile)
    if args.chunk < 1 or args.tokens < 0:
        raise ArgumentError(f"--chunk {args.chunk} --tokens {args.tokens}: give numbers of tokens")
    if not args.op or len(args.op) != 1:
        raise ArgumentError("say which operator: --op OP")
    heads = _heads(args)
    wanted, _ = aot.selection(args)
    if not wanted:
        raise ArgumentError(f"--model {args.model} does not call {args.op[0]}")
    # Of a model's calls: one that takes a state, of sequences of one length.
    spec, geometry = max(wanted, key=lambda pair: ("initial_state" in pair[1].dtype) - 2 * ("cu_seqlens" in pair[1].dtype))
    if len(wanted) > 1 and not args.model:
        raise ArgumentError("one export holds one kernel: give --dims or --geometry once")
    request = Request(spec, geometry, profile, not args.no_l2norm, args.scale, args.chunk, args.tokens, heads)
    try:
        checks, files = export(request, args.format, path, verify=not args.no_verify)
    except ExportError as error:
        raise ArgumentError(f"--format {args.format}: {error}") from error
    emit(f"{spec.name} for {geometry}\n")
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


def _heads(args: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    """Sizes that kernels leave open and some formats fix: taken out of --dims, or from the model."""
    if args.model:
        return tuple((name, size) for name, size in models.model(args.model).axes.items() if name in _OPEN)
    sizes = {}
    for i, text in enumerate(args.dims):
        parts = [part.strip() for part in text.split(",")]
        for part in parts:
            name, _, value = part.partition("=")
            if name in _OPEN:
                if not value.isdecimal() or not int(value):
                    raise ArgumentError(f"--dims {part}: give a whole number, at least 1")
                sizes[name] = int(value)
        args.dims[i] = ",".join(part for part in parts if part.partition("=")[0] not in _OPEN)
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
    """
    entry = FORMATS[form]
    files = dict(entry.build(request))
    checks: list[Check] = []
    if verify:
        with tempfile.TemporaryDirectory(prefix="tvm_gdn-export-") as folder:
            artifact.fill(Path(folder), files)
            checks = entry.verify(request, Path(folder))
    if not verify or artifact.all_passed(checks):
        artifact.write(path, files)
    return checks, files
