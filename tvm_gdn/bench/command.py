"""``tvm_gdn bench``: correctness first, then medians of this package and of others in interleaved rounds.

The floor is a plain torch copy of as many bytes as the operator must at least move (`OpSpec.cost`).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tvm_gdn import cases, device, dispatch, env, models, parity
from tvm_gdn.bench import calls as bench_calls
from tvm_gdn.bench import contenders, first_result, machine
from tvm_gdn.bench import device as bench_device
from tvm_gdn.bench import text as bench_text
from tvm_gdn.bench.timing import Timing, interleaved, ratio
from tvm_gdn.check import geometry_of
from tvm_gdn.commands import aot, arguments
from tvm_gdn.commands.text import as_json, checked_destination, deliver
from tvm_gdn.digest import version_of
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.records import write_atomic
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import TargetSpec, resolve, runnable

_log = logging.getLogger("tvm_gdn")
Case = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(parser)
    arguments.add_op(parser, "measure this operator only; may be repeated")
    parser.add_argument("--model", metavar="NAME", help=f"only shapes of this model; one of: {', '.join(models.MODELS)}")
    parser.add_argument("--case", metavar="TEXT", default="", help="only shapes with all words of TEXT, such as 'B8 fp32'")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and kernels; default: torch's choice")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="time for each candidate and shape (default 0.5)")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also transformers', onnxruntime's (fp32 prefill) and torch.compile of the reference (one token; slow to compile)",
    )
    parser.add_argument("--no-calls", action="store_true", help="leave out the call overhead and the first call")
    parser.add_argument(
        "--first-result", type=int, metavar="N",
        help="instead: N fresh processes with a pack and nothing else, from after `import torch` to the first result of each "
        f"operator's first shape (default: {', '.join(first_result.OPERATORS)})",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE as JSON; - prints it instead of the tables")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; exit status 1 if a result is wrong or not compiled code."""
    checked_destination(args.json)
    if args.seconds <= 0:
        raise ArgumentError(f"--seconds {args.seconds}: give a positive number")
    if args.threads is not None:
        if args.threads < 1:
            raise ArgumentError(f"--threads {args.threads}: give at least 1")
        torch.set_num_threads(args.threads)
    target = resolve(args.target) if args.target == "auto" else arguments.use_target(args.target)
    runnable(target)
    if args.first_result is not None:
        return _first_results(args, target)
    kind = target.device
    chosen = _chosen(args)
    tiny = (
        []
        if args.no_calls or kind != "cpu"
        else [(OPS[name], bench_calls.tiny_case(OPS[name])) for name in dict.fromkeys(spec.name for spec, _ in chosen)]
    )
    _compile_together([*chosen, *tiny])
    measured: list[dict[str, Any]] = []
    report = {
        "format": 1, **machine.stamp(), "device": device.name(kind), "target": target.name, "threads": torch.get_num_threads(),
        "seconds": args.seconds, "peers": args.peers, "cases": measured, "calls": [], "first_call": None,
    }  # fmt: skip
    with logging_redirect_tqdm([_log]):
        for spec, case in tqdm(chosen, desc="measuring", unit="shape", disable=None):
            row = measure(spec, case, args.seconds, peers=args.peers, kind=kind)
            measured.append(row)
            # A run that is ended early has told what it knew, on stderr and in the file.
            _log.info("%s", bench_text.line(row))
            if args.json not in (None, "-"):
                write_atomic(Path(args.json), as_json(report) + "\n")
    report["calls"] = [bench_calls.call_cost(spec, case, args.seconds) for spec, case in tiny]
    report["first_call"] = None if args.no_calls else bench_calls.first_calls(kind)
    deliver(report, bench_text.render(report), args.json)
    return 0 if all(row["passed"] for row in measured) else 1


def _first_results(args: argparse.Namespace, target: TargetSpec) -> int:
    if args.first_result < 1:
        raise ArgumentError(f"--first-result {args.first_result}: give at least 1")
    args.op = args.op or list(first_result.OPERATORS)
    # An operator's first shape stands for it: what counts is loading, not running.
    chosen = list({spec.name: (spec, case) for spec, case in reversed(_chosen(args))}.values())[::-1]
    report = first_result.measure(chosen, target, args.first_result)
    deliver(report, first_result.render(report), args.json)
    return 0


def _chosen(args: argparse.Namespace) -> list[tuple[OpSpec, Case]]:
    model = models.model(args.model) if args.model else None
    shapes: list[tuple[OpSpec, Case]] = [
        (OPS[name], case)
        for name in args.op or OPS
        for case in models.bench(OPS[name], args.model)
        if model is None or model.has(case)
    ]
    wanted = set(args.case.split())
    found = [(spec, case) for spec, case in shapes if wanted <= set(cases.label(case).split())]
    if not found and not shapes:
        raise ArgumentError(f"--model {args.model} has no benchmark shape of {', '.join(args.op)}; leave one of them out")
    if not found:
        words = dict.fromkeys(word for _, case in shapes for word in cases.label(case).split())
        raise ArgumentError(f"--case {args.case!r}: no benchmark shape has all of these words; allowed: {' '.join(words)}")
    return found


def _compile_together(wanted: list[tuple[OpSpec, Case]]) -> None:
    """Compile what no pack holds in one go: one by one, every kernel would import tvm anew."""
    if env.jit_disabled() or version_of("apache-tvm") == "none":
        return
    packed = {kernel for pack in dispatch.usable_packs()[0] for kernel in pack.manifest.index}
    pairs = [(spec, arguments.geometry_of_case(spec, case)) for spec, case in wanted]
    lacking = [(spec, geometry) for spec, geometry in pairs if (spec.name, geometry.key) not in packed]
    if lacking:
        _log.info("compiling what no pack holds, of %d kernels", len(lacking))
        aot.compile_all(lacking, resolve(env.target_name()))


def measure(spec: OpSpec, case: Case, seconds: float, *, peers: bool, kind: str = "cpu") -> dict[str, Any]:
    """Check one shape, then time every contender on it.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    case : mapping
        The shape.
    seconds : float
        Time for each contender.
    peers : bool
        Whether torch.compile, transformers and onnxruntime take part.
    kind : str
        Torch device type. On accelerators ``us`` is the time of a captured graph, and ``eager_us`` that of calls from Python.

    Returns
    -------
    dict
        Ready for JSON: ``errors`` and ``limits`` (RMS ratio to the float64 reference) by tensor, ``bytes`` and
        ``flops`` (the floor), ``us`` by contender, and ratios: above 1 means that this package is faster.
    """
    drawn = cases.draw(spec, case, device=kind)
    # On the device too the reference is torch in float64; thousands of tokens take it a minute on a few cores.
    want = parity.expected(spec, drawn)
    peer_errors, peer_notes = _peer_errors(spec, drawn, want) if peers else ({}, {})
    result = parity.check_arguments(spec, case, drawn, want, kind)
    inputs = contenders.steady(spec, case, kind)
    served, kernel = contenders.kernel_call(spec, inputs)
    calls: dict[str, Callable[[], object]] = {"tvm_gdn": contenders.public_call(spec, inputs)}
    if kernel is not None:
        calls["kernel"] = kernel
    moved, flops = spec.cost(cases.sizes_of(spec, case), geometry_of(spec, inputs)) if spec.cost else (0, 0)
    if moved:
        calls["copy"] = contenders.copy_call(moved, kind)
    if kind == "cpu":
        # Token by token in torch: on an accelerator it is thousands of launches, and nobody's alternative.
        calls["reference"] = contenders.reference_call(spec, inputs)
    for name in peer_errors:
        call = contenders.PEERS[name](spec, inputs)
        assert call is not None  # it has an error, so it ran
        calls[name] = call
    eager: dict[str, Timing] = {}
    notes: dict[str, str] = {}
    if kind == "cpu":
        times = interleaved(calls, seconds)
    else:
        times, notes = bench_device.graphs(calls, seconds)
        eager = bench_device.eager({name: call for name, call in calls.items() if name != "copy"}, seconds)
    ours = times["tvm_gdn"]
    return {
        "op": spec.name, "case": cases.label(case), "served_by": str(served), "passed": result.passed,
        "errors": result.errors, "limits": result.limits, "peer_errors": peer_errors, "peer_notes": peer_notes | notes,
        "bytes": moved, "flops": flops, "us": {name: timing.to_json() for name, timing in times.items()},
        "eager_us": {name: timing.to_json() for name, timing in eager.items()},
        "gb_per_s": moved / ours.us / 1e3, "gflop_per_s": flops / ours.us / 1e3,
        "share_of_copy": ratio(times["copy"], ours) if moved else None,
        "times_faster": {name: ratio(times[name], ours) for name in times if name not in {"tvm_gdn", "kernel", "copy"}},
    }  # fmt: skip


def _peer_errors(
    spec: OpSpec, drawn: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> tuple[dict[str, float], dict[str, str]]:
    """Error of every peer's first output, and why other peers do not take part."""
    want = next(iter(expected.values()))
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, make in contenders.PEERS.items():
        try:
            call = make(spec, cases.clone(drawn))
            if call is None:
                continue
            got: Any = call()
        except Exception as error:
            # A peer may fail in its own way: it is left out, with its reason.
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        errors[name] = parity.rms_ratio(got[0] if isinstance(got, tuple) else got, want)
    return errors, notes
