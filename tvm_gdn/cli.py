"""The command line: one table of subcommands; each is a module with ``add_arguments(parser)`` and ``main(args)``.

Results go to stdout, logs, progress and errors to stderr. Exit status: 0 done, 1 a check or comparison failed, 2 the
command could not be carried out. Only the module of the subcommand that was asked for is imported, and torch only with it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import tvm_gdn
from tvm_gdn import env
from tvm_gdn.errors import TvmGdnError

_EPILOG = """\
first steps:
  tvm_gdn doctor                              is everything in place on this machine?
  tvm_gdn demo                                decode with a small model, with and without tvm_gdn
  tvm_gdn build --model qwen3-next            compile a model's kernels ahead of time
  tvm_gdn bench --op packed_decode_gated_delta_rule
                                              how fast, next to torch and to a plain memory copy

Environment variables (all optional): TVM_GDN_TARGET, TVM_GDN_CACHE_DIR, TVM_GDN_PACK_PATH, TVM_GDN_DISABLE_JIT,
TVM_GDN_CHECKS, TVM_GDN_LOG; `tvm_gdn doctor` shows those that are set. TVM_GDN_LOG=DEBUG shows tracebacks.
"""


class _Command(NamedTuple):
    module: str
    summary: str
    description: str = ""


COMMANDS = {
    "doctor": _Command(
        "commands.doctor",
        "check this machine: versions, CPU features, compiler, cache, packs",
        "Check everything that tvm_gdn needs. Each line says ok, warn or fail, and what to do about it.",
    ),
    "demo": _Command(
        "commands.demo",
        "decode with a small Qwen3-Next, with and without tvm_gdn",
        "Build a small Qwen3-Next with random weights (no download), decode greedily with and without tvm_gdn, say "
        "whether the tokens are equal, and time both; then time a decode step at the size of the published 80B model.",
    ),
    "list": _Command(
        "commands.listing",
        "which schedule each operator gets on each target, and which packs are found",
        "Show, for every operator and target, where its schedule comes from, and the packs that calls would use.",
    ),
    "build": _Command(
        "commands.aot",
        "compile kernels ahead of time into a pack",
        "Compile kernels ahead of time into one folder, a pack. Programs then start without compiling, and on "
        "machines that have no compiler. Say what to compile with --model, with --op and --dims, or with --op and "
        "--geometry.",
    ),
    "tune": _Command(
        "tuning.tune",
        "search for faster schedules on this machine",
        "Measure candidate schedules on this machine and record the fastest; everything measured is kept, and a run "
        "that was interrupted resumes.",
    ),
    "bench": _Command(
        "bench.command",
        "measure every operator next to torch and to a plain memory copy",
        "Measure operators on the shapes of Qwen3-Next: correctness first, then medians in interleaved rounds, so that "
        "other load on the machine falls on all candidates alike.",
    ),
    "export": _Command(
        "export.command",
        "export an operator as C99, ONNX, a torch program or GPU source",
        "Export an operator for programs without torch and for vendors' compilers. What is exported is run and held against "
        "the float64 reference first; if that fails, nothing is written and the exit status is 1.",
    ),
    "parity": _Command(
        "commands.parity",
        "hold every operator against the float64 reference",
        "Compile every operator for a target, run all its cases, and compare with the float64 reference. Exit status 1 "
        "if a case fails.",
    ),
    "report": _Command(
        "commands.report",
        "one HTML page from recorded benchmarks and parity runs",
        "Write one self-contained HTML page from the JSON of `tvm_gdn bench --json` and `tvm_gdn parity --json`: what works "
        "on which target, errors against tolerances, times against the floor and peers, and regressions against earlier "
        "benchmarks. Exit status 1 if --fail-on-regression is given and a shape regressed.",
    ),
}


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tvm_gdn",
        description="Compiled operators for hybrid language models: delta rules, convolution, gated norm, mixture of experts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tvm_gdn {tvm_gdn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), "")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.description)
        if name == chosen:
            module = import_module(f"tvm_gdn.{command.module}")
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default: those of the process.

    Returns
    -------
    int
        Exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
        tvm_gdn.load_api()
        return int(args.main(args))
    except (TvmGdnError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader (head, less) went away; Python would complain once more while it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if env.log_level() == "DEBUG":
            traceback.print_exc()
        print(f"tvm_gdn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tvm_gdn: interrupted", file=sys.stderr)
        return 130
