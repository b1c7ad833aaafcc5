"""The processes of `tvm_gdn tune` that compile and that measure (``python -m tvm_gdn.tuning.measure FOLDER``).

One compiles candidates; another loads a candidate, holds its numbers against the float64 reference, and only then times it: one
JSON line per request on stdin, one per answer on stdout. `worker.py` is the other end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from tvm_gdn import build, cases, load, models, parity, records, torch_ops
from tvm_gdn import device as devices
from tvm_gdn import pack as packs
from tvm_gdn.bench import contenders, timing
from tvm_gdn.bench import device as bench_device
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, resolve
from tvm_gdn.tuning.worker import TrialError


@dataclass(frozen=True)
class _Case:
    """Arguments of a call, on the target's device, and what the reference makes of them."""

    label: str
    geometry: Geometry
    arguments: dict[str, Any]
    expected: dict[str, torch.Tensor]


class Bench:
    """Checks and times compiled candidates for one operator and tuning key.

    Parameters
    ----------
    op, key, target : str
        Operator, tuning key and name of the target.
    threads : int
        Threads that kernels run on.
    built : str
        Folder of compiled candidates.
    model : str, optional
        Model whose sizes the benchmark shapes have.
    """

    def __init__(self, op: str, key: str, target: str, threads: int, built: str, model: str | None = None) -> None:
        self.spec, self.target, self._built = OPS[op], resolve(target), Path(built)
        torch.set_num_threads(threads)
        timed, checked, self._others = select_cases(self.spec, key, model)
        self._drawn = [(case, cases.draw(self.spec, case)) for case in (*timed, *checked)]
        self._count = len(timed)
        self._cases: list[_Case] = []
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}
        self._right: set[str] = set()

    def refer(self) -> None:
        """Run the reference on every case, on the target's device; once."""
        if not self._cases:
            self._cases = [self._case(*drawn) for drawn in self._drawn]
            self.timed = self._cases[: self._count]
            self.inputs = [contenders.settled(self.spec, cases.clone(case.arguments)) for case in self.timed]

    def _case(self, case: Mapping[str, Any], drawn: Mapping[str, Any]) -> _Case:
        arguments = {
            name: value.to(self.target.device) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()
        }
        try:
            expected = parity.expected(self.spec, arguments)
        except RuntimeError:  # no memory for it there, or an operation without float64
            expected = parity.expected(self.spec, drawn)
        return _Case(cases.label(case), geometry_of_case(self.spec, case), arguments, expected)

    def prepare(self, knobs: Mapping[str, Any]) -> None:
        """Load a candidate and check its numbers.

        Raises
        ------
        TrialError
            Wrong numbers, and where.
        """
        name = json.dumps(knobs, sort_keys=True)
        if name not in self._right:
            for case in self._cases:
                self._check(case, knobs)
            self._right.add(name)

    def prepare_others(self, knobs: Mapping[str, Any], places: Sequence[int]) -> None:
        """The same on other geometries of the tuning key, which a record would also serve.

        Parameters
        ----------
        knobs : mapping
            The candidate.
        places : sequence of int
            Which of those that `select_cases` gives.
        """
        for place in places:
            case = self._others[place]
            self._check(self._case(case, cases.draw(self.spec, case)), knobs)

    def _check(self, case: _Case, knobs: Mapping[str, Any]) -> None:
        function = self._function(case.geometry, knobs)
        got = parity.run(self.spec, cases.clone(case.arguments), function)
        errors, limits = parity.compare(self.spec, got, case.expected)
        wrong = [f"{name} error {errors[name]:.1e} > {limits[name]:.1e}" for name in limits if not errors[name] <= limits[name]]
        if wrong:
            raise TrialError(f"wrong numbers on {case.label}: {', '.join(wrong)}")

    def time(self, candidates: Sequence[Mapping[str, Any]], seconds: float, rounds: int) -> dict[str, list[list[float]]]:
        """Time candidates in turns on every benchmark case.

        Parameters
        ----------
        candidates : sequence of mapping
            Knobs that `prepare` found right.
        seconds : float
            Time to spend on each candidate and case.
        rounds : int
            Rounds to split it into.

        Returns
        -------
        dict
            By candidate and case: ``us``, median microseconds of a call; ``ratio``, the same relative to the first candidate,
            as the median over the rounds.
        """
        calls = {
            f"{number} {index}": functools.partial(self._function(case.geometry, knobs), *inputs.values())
            for index, (case, inputs) in enumerate(zip(self.timed, self.inputs, strict=True))
            for number, knobs in enumerate(candidates)
        }
        if self.target.device == "cpu":
            taken = timing.interleaved(calls, seconds, rounds)
        else:
            taken, refused = bench_device.graphs(calls, seconds, rounds)
            if refused:
                raise TrialError(f"cannot be captured as a graph: {next(iter(refused.values()))}")
        rows = [[taken[f"{number} {index}"] for index in range(len(self.timed))] for number in range(len(candidates))]
        return {
            "us": [[round(one.us, 3) for one in row] for row in rows],
            "ratio": [[timing.ratio(one, first) for one, first in zip(row, rows[0], strict=True)] for row in rows],
        }

    def _function(self, geometry: Geometry, knobs: Mapping[str, Any]) -> Callable[..., Any]:
        """The operator's function of its arguments, on the candidate's kernel."""
        name = (json.dumps(knobs, sort_keys=True), geometry.key)
        if name not in self._functions:
            pack = packs.read(_place(self._built, self.spec, self.target, geometry, knobs))
            kernel = load.load_kernel(pack, pack.manifest.kernels[0])
            self._functions[name] = torch_ops.call_function(self.spec, geometry, kernel, self.target.device)
        return self._functions[name]


def compile_candidate(
    op: str, target: str, geometries: Sequence[Mapping[str, Any]], knobs: Mapping[str, Any], built: str, folder: Path
) -> None:
    """Compile a candidate into packs where a `Bench` looks for them, unless they are there.

    Parameters
    ----------
    op, target : str
        Operator and name of the target.
    geometries : sequence of mapping
        Geometries, as JSON.
    knobs : mapping
        The candidate.
    built : str
        Folder of compiled candidates.
    folder : Path
        Scratch folder of this process.
    """
    spec, goal = OPS[op], resolve(target)
    for geometry in map(Geometry.from_json, geometries):
        place = _place(Path(built), spec, goal, geometry, knobs)
        if place.exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            kernel = build.compile_kernel(build.Request(spec, geometry, knobs), goal, scratch)
            packs.write(scratch / "pack", goal, build.required_features(goal), [kernel], _launcher(folder, goal))
            with contextlib.suppress(OSError):  # another process was first
                (scratch / "pack").rename(place)


def _place(built: Path, spec: OpSpec, target: TargetSpec, geometry: Geometry, knobs: Mapping[str, Any]) -> Path:
    identity = json.dumps([spec.name, target.name, geometry.key, knobs], sort_keys=True)
    return built / hashlib.sha256(identity.encode()).hexdigest()[:24]


@functools.cache
def _launcher(folder: Path, target: TargetSpec) -> Path:
    return build.build_launcher(folder, target)


def select_cases(
    spec: OpSpec, key: str, model: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Cases that concern a tuning key.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    key : str
        A tuning key that occurs in its benchmark cases.
    model : str, optional
        Model whose sizes those have.

    Returns
    -------
    timed, checked, others : list of dict
        Its benchmark cases; parity cases that run on the same kernels; parity cases of the other geometries that a record of
        this key serves. Parity cases take over the benchmark's static axes, storage dtypes and static attributes.
    """
    timed = [case for case in models.bench(spec, model) if records.tuning_key(spec, geometry_of_case(spec, case)) == key]
    shared = (*spec.static_axes, *spec.static_attrs, *spec.shaping, "dtype", "state_dtype")
    fixed = {name: timed[0][name] for name in shared if name in timed[0]}
    own = {geometry_of_case(spec, case) for case in timed}
    checked, others = [], []
    variants = [{name: value for name, value in case.items() if name not in shared} | fixed for case in spec.cases]
    for variant in {repr(variant): variant for variant in variants}.values():
        geometry = geometry_of_case(spec, variant)
        if geometry in own:
            checked.append(variant)
        elif records.tuning_key(spec, geometry) == key:
            others.append(variant)
    return timed, checked, others


def main() -> None:
    """Serve requests until the parent is gone."""
    folder = Path(sys.argv[1])
    # What compilers and kernels print on stdout must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):  # The parent was killed while this process worked for it.
        _serve(answers, folder)


def _serve(answers: TextIO, folder: Path) -> None:
    bench: Bench | None = None
    for line in sys.stdin:
        message = json.loads(line)
        do, timeout = message.pop("do"), message.pop("timeout")
        # Should the parent be gone, nobody else ends a candidate that hangs.
        faulthandler.dump_traceback_later(timeout + 10, exit=True)
        answer: dict[str, Any] = {}
        try:
            if do == "open":
                bench = None
                bench = Bench(**message)
            elif do == "load":
                import tvm  # noqa: F401 - not inside the time of the first candidate
            elif do == "compile":
                compile_candidate(**message, folder=folder)
            else:
                answer = getattr(bench, do)(**message) or {}
        except Exception as error:
            # A point that the schedule does not have is no failure of a candidate: there is none.
            answer = {"error": _reason(error), "refused": isinstance(error, ValueError)}
            answer["broken"] = bench is not None and not _sound(bench.target)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _sound(target: TargetSpec) -> bool:
    """Whether this process can go on: after some faults of a kernel a device refuses everything else."""
    try:
        devices.synchronize(target.device)
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, TrialError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


if __name__ == "__main__":
    main()
