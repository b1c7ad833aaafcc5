"""``tvm_gdn bench``: correctness first, then medians of this package and of others in interleaved rounds.

The floor is a plain torch copy of as many bytes as the operator must at least move (`OpSpec.cost`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from tvm_gdn import arguments, bench_text, cases, contenders, dispatch, env, machine, models, parity
from tvm_gdn.check import geometry_of
from tvm_gdn.digest import version_of
from tvm_gdn.errors import ArgumentError, KernelError
from tvm_gdn.ops import OPS
from tvm_gdn.report_text import checked_destination, deliver
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import resolve, runnable
from tvm_gdn.timing import Timing, difference, interleaved, ratio

#: Sizes of a call that does next to nothing, on which the cost of calling is measured.
_TINY = {"H": 1, "HV": 1, "K": 8, "V": 8, "M": 1}
#: The operator whose first call is timed.
_FIRST = "packed_decode_gated_delta_rule"

Case = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_target(parser)
    arguments.add_op(parser, "measure this operator only; may be repeated")
    parser.add_argument("--model", metavar="NAME", help=f"only shapes of this model: {', '.join(models.MODELS)}")
    parser.add_argument("--case", metavar="TEXT", default="", help="only shapes whose name contains all words of TEXT: 'B8 fp32'")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and of the kernels; default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="time for each candidate and shape (default 0.5)")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also torch.compile of the reference (it compiles for a minute or so) and transformers' recurrence, on decode shapes",
    )
    parser.add_argument("--no-calls", action="store_true", help="leave out the call overhead and the first call in a fresh process")
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE as JSON; - for stdout, instead of the tables")


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
    chosen = list(_chosen(args))
    if not chosen:
        raise ArgumentError("no benchmark shape is left: --op, --model and --case exclude all of them")
    tiny = [] if args.no_calls else [(OPS[name], tiny_case(OPS[name])) for name in dict.fromkeys(spec.name for spec, _ in chosen)]
    _compile_together([*chosen, *tiny])
    bar = tqdm(chosen, desc="measuring", unit="shape", disable=None)
    measured = [measure(spec, case, args.seconds, peers=args.peers) for spec, case in bar]
    report = {
        "format": 1, **machine.stamp(), "target": target.name, "threads": torch.get_num_threads(), "seconds": args.seconds,
        "peers": args.peers, "cases": measured,
        "calls": [call_cost(spec, case, args.seconds) for spec, case in tiny],
        "first_call": None if args.no_calls else first_calls(),
    }  # fmt: skip
    deliver(report, bench_text.render(report), args.json)
    return 0 if all(row["passed"] for row in measured) else 1


def _chosen(args: argparse.Namespace) -> Iterator[tuple[OpSpec, Case]]:
    model = models.model(args.model) if args.model else None
    for name in args.op or OPS:
        for case in OPS[name].bench:
            words = cases.label(case).split()
            if (model is None or model.has(case)) and all(word in words for word in args.case.split()):
                yield OPS[name], case


def _compile_together(wanted: list[tuple[OpSpec, Case]]) -> None:
    """Compile what is missing in one go: one by one, every kernel would import tvm anew."""
    packs_found, _ = dispatch.usable_packs()
    if packs_found or env.jit_disabled() or version_of("apache-tvm") == "none":
        return
    pairs = [(spec, arguments.geometry_of_case(spec, case)) for spec, case in wanted]
    dispatch.prebuild(pairs, resolve(env.target_name()))


def tiny_case(spec: OpSpec) -> dict[str, Any]:
    """The operator's first benchmark shape with every axis as small as it gets."""
    case = arguments.small_case(spec, spec.bench[0])
    return {name: _TINY.get(name, value) for name, value in case.items()}


def measure(spec: OpSpec, case: Case, seconds: float, *, peers: bool) -> dict[str, Any]:
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
        Whether torch.compile and transformers take part.

    Returns
    -------
    dict
        Ready for JSON: ``errors`` and ``limits`` (RMS ratio to the float64 reference) by tensor, ``bytes`` and ``flops`` (the
        floor), ``us`` by contender, and ratios: above 1 means that this package is faster.
    """
    result = parity.check_case(spec, case)
    peer_errors, peer_notes = _peer_errors(spec, case) if peers else ({}, {})
    inputs = contenders.steady(spec, case)
    served, kernel = contenders.kernel_call(spec, inputs)
    calls: dict[str, Callable[[], object]] = {"tvm_gdn": contenders.public_call(spec, inputs)}
    if kernel is not None:
        calls["kernel"] = kernel
    moved, flops = spec.cost(cases.sizes_of(spec, case), geometry_of(spec, inputs)) if spec.cost else (0, 0)
    if moved:
        calls["copy"] = contenders.copy_call(moved)
    calls["reference"] = contenders.reference_call(spec, inputs)
    calls |= {name: contenders.PEERS[name](spec, inputs) for name in peer_errors}
    times = interleaved(calls, seconds)
    ours = times["tvm_gdn"]
    return {
        "op": spec.name, "case": cases.label(case), "served_by": str(served), "passed": result.passed,
        "errors": result.errors, "limits": result.limits, "peer_errors": peer_errors, "peer_notes": peer_notes,
        "bytes": moved, "flops": flops, "us": {name: timing.to_json() for name, timing in times.items()},
        "gb_per_s": moved / ours.us / 1e3, "gflop_per_s": flops / ours.us / 1e3,
        "share_of_copy": ratio(times["copy"], ours) if moved else None,
        "times_faster": {name: ratio(times[name], ours) for name in times if name not in {"tvm_gdn", "kernel", "copy"}},
    }  # fmt: skip


def _peer_errors(spec: OpSpec, case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Error of every peer's first output, and why other peers do not take part."""
    if case.get("T", 1) != 1 or spec.algorithm != "recurrent":
        return {}, {}
    arguments_ = cases.draw(spec, case)
    want = next(iter(parity.expected(spec, arguments_).values()))
    errors, notes = {}, {}
    for name, make in contenders.PEERS.items():
        try:
            got = make(spec, cases.clone(arguments_))()
        except Exception as error:  # noqa: BLE001 - a peer that fails in its own way is left out, with its reason
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        errors[name] = parity.rms_ratio(got[0] if isinstance(got, tuple) else got, want)
    return errors, notes


def call_cost(spec: OpSpec, case: Case, seconds: float) -> dict[str, Any]:
    """What a call costs above the bare kernel, in microseconds, and where it goes.

    Returns
    -------
    dict
        ``public``, ``operator`` (torch operator), ``kernel`` and ``allocation`` (outputs) as medians, ``overhead``: public
        minus kernel.
    """
    inputs = contenders.steady(spec, case)
    _, kernel = contenders.kernel_call(spec, inputs)
    if kernel is None:
        raise KernelError(f"{spec.name} is not served by compiled code: {dispatch.served_by(spec.name)}")
    calls = {
        "public": contenders.public_call(spec, inputs),
        "operator": contenders.operator_call(spec, inputs),
        "kernel": kernel,
        "allocation": contenders.allocation_call(spec, inputs),
    }
    times: dict[str, Timing] = interleaved(calls, seconds, rounds=15)
    return {
        "op": spec.name, "case": cases.label(case), **{name: round(timing.us, 3) for name, timing in times.items()},
        "overhead": round(difference(times["public"], times["kernel"]), 3),
    }  # fmt: skip


_FIRST_CALL = """
import json, sys, time
import tvm_gdn
start = time.perf_counter()
from tvm_gdn import cases, contenders, dispatch
spec = tvm_gdn.OPS[sys.argv[1]]
call = contenders.public_call(spec, cases.draw(spec, json.loads(sys.argv[2])))
ready = time.perf_counter()
call()
end = time.perf_counter()
print(json.dumps({"from_import_ms": 1e3 * (end - start), "call_ms": 1e3 * (end - ready), "served_by": dispatch.served_by(spec.name)}))
"""


def first_calls() -> dict[str, Any]:
    """Time of the first call in a fresh process, with its kernel in a pack, and with nothing but the compiler.

    Returns
    -------
    dict
        ``pack`` and ``compiler`` (None where it is not installed), each with ``from_import_ms`` (from ``import tvm_gdn`` to the
        result, inputs included), ``call_ms``, ``served_by`` and ``log``.
    """
    spec = OPS[_FIRST]
    case = arguments.small_case(spec, spec.bench[0])
    target = runnable(resolve(env.target_name()))
    geometry = arguments.geometry_of_case(spec, case)
    dispatch.lookup(spec, geometry, target.device)
    # A kernel of the cache is a pack of one; where a pack served the call above, that pack serves again.
    single = env.cache_dir() / "kernels" / dispatch.kernel_key(spec, geometry, target)
    path = os.pathsep.join(map(str, [*env.pack_path(), *([single] if single.is_dir() else [])]))
    found: dict[str, Any] = {"op": spec.name, "geometry": str(geometry)}
    found["pack"] = _first_call(spec, case, {"TVM_GDN_PACK_PATH": path, "TVM_GDN_DISABLE_JIT": "1"})
    found["compiler"] = None
    if version_of("apache-tvm") != "none":
        with tempfile.TemporaryDirectory(prefix="tvm_gdn-bench-") as empty:
            changes = {"TVM_GDN_CACHE_DIR": empty, "TVM_GDN_PACK_PATH": "", "TVM_GDN_DISABLE_JIT": "0", "TVM_GDN_LOG": "INFO"}
            found["compiler"] = _first_call(spec, case, changes)
    return found


def _first_call(spec: OpSpec, case: Case, changes: Mapping[str, str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}
    command = [sys.executable, "-c", _FIRST_CALL, spec.name, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise KernelError(f"the first call in a fresh process failed:\n{done.stderr.strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr.strip().splitlines()}
