"""The measuring process of `tvm_gdn tune` (``python -m tvm_gdn.tuning.measure FOLDER``), which imports tvm once.

It compiles a candidate, loads it, holds its numbers against the float64 reference, and only then times it: one JSON line per
request on stdin, one per answer on stdout. `worker.py` is the other end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from tvm_gdn import build, cases, load, parity, records, schedule, torch_ops
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
    """Arguments of a call, and what the reference makes of them."""

    label: str
    geometry: Geometry
    arguments: dict[str, Any]
    expected: dict[str, torch.Tensor]


class Bench:
    """Compiles, checks and times candidates for one operator and tuning key.

    Parameters
    ----------
    op, key, target, threads, built, share
        As in `worker.Worker.open`.
    folder : Path
        Where libraries are written.
    """

    def __init__(
        self, op: str, key: str, target: str, threads: int, folder: Path, built: str | None = None, share: int = 1
    ) -> None:
        self.spec, self.target, self.folder = OPS[op], resolve(target), folder
        self._built = folder if built is None else Path(built)
        timed, checked, others = select_cases(self.spec, key)
        # As many workers as share the CPU run the reference at once; kernels run alone and on all threads.
        torch.set_num_threads(max(1, threads // share))
        self.timed = [self._case(case) for case in timed]
        self.checked = [self._case(case) for case in checked] + self.timed
        torch.set_num_threads(threads)
        self.others = others
        self.inputs = [contenders.steady(self.spec, case, self.target.device) for case in timed]
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}
        self._right: set[str] = set()

    def _case(self, case: Mapping[str, Any]) -> _Case:
        arguments = cases.draw(self.spec, case)
        expected = parity.expected(self.spec, arguments)
        return _Case(cases.label(case), geometry_of_case(self.spec, case), arguments, expected)

    def prepare(self, knobs: Mapping[str, Any], thorough: bool = False, part: Sequence[int] = (0, 1)) -> None:
        """Compile and load a candidate and check its numbers.

        Parameters
        ----------
        knobs : mapping
            The candidate.
        thorough : bool
            Check the other geometries of the tuning key too, which a record would also serve.
        part : sequence of int
            Of those geometries only the i-th of n parts, given as (i, n).

        Raises
        ------
        TrialError
            Wrong numbers, and where.
        """
        if thorough:
            first, step = part
            self._check_others(knobs, self.others[first::step])
            return
        name = json.dumps(knobs, sort_keys=True)
        if name not in self._right:
            for case in self.checked:
                self._check(case, knobs)
            self._right.add(name)

    def _check_others(self, knobs: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
        for other in others:
            if schedule.fits(knobs, schedule.knob_space(self.spec, geometry_of_case(self.spec, other), self.target)):
                self._check(self._case(other), knobs)

    def _check(self, case: _Case, knobs: Mapping[str, Any]) -> None:
        function = self._function(case.geometry, knobs)
        arguments = {
            name: value.to(self.target.device) if isinstance(value, torch.Tensor) else value
            for name, value in cases.clone(case.arguments).items()
        }
        got = parity.run(self.spec, arguments, function)
        errors, limits = parity.compare(self.spec, got, case.expected)
        wrong = [f"{name} error {errors[name]:.1e} > {limits[name]:.1e}" for name in limits if not errors[name] <= limits[name]]
        if wrong:
            raise TrialError(f"wrong numbers on {case.label}: {', '.join(wrong)}")

    def time(self, candidates: Sequence[Mapping[str, Any]], seconds: float, rounds: int) -> dict[str, list[list[float]]]:
        """Time candidates in turns on every benchmark case.

        Parameters
        ----------
        candidates : sequence of mapping
            Knobs; `prepare` is run for those that it has not been run for.
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
        for knobs in candidates:
            self.prepare(knobs)
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
            pack = packs.read(self._compiled(geometry, knobs))
            kernel = load.load_kernel(pack, pack.manifest.kernels[0])
            present = frozenset(geometry.dtype) | {name for name, value in geometry.attrs if value}
            self._functions[name] = torch_ops.call_function(self.spec, present, geometry.axis, kernel)
        return self._functions[name]

    def _compiled(self, geometry: Geometry, knobs: Mapping[str, Any]) -> Path:
        """A candidate's pack; compiled once by all workers of a run, since finalists come from several of them."""
        identity = json.dumps([self.spec.name, self.target.name, geometry.key, knobs], sort_keys=True)
        place = self._built / hashlib.sha256(identity.encode()).hexdigest()[:24]
        if not place.exists():
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            built = build.compile_kernel(build.Request(self.spec, geometry, knobs), self.target, folder)
            launcher = _launcher(self.folder, self.target)
            packs.write(folder / "pack", self.target, build.required_features(self.target), [built], launcher)
            with contextlib.suppress(OSError):  # another worker was first
                (folder / "pack").rename(place)
        return place


@functools.cache
def _launcher(folder: Path, target: TargetSpec) -> Path:
    return build.build_launcher(folder, target)


def select_cases(spec: OpSpec, key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Cases that concern a tuning key.

    Parameters
    ----------
    spec : OpSpec
        The operator.
    key : str
        A tuning key that occurs in its benchmark cases.

    Returns
    -------
    timed, checked, others : list of dict
        Its benchmark cases; parity cases that run on the same kernels; parity cases of the other geometries that a record of
        this key serves. Parity cases take over the benchmark's static axes, storage dtypes and static attributes.
    """
    timed = [dict(case) for case in spec.bench if records.tuning_key(spec, geometry_of_case(spec, case)) == key]
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
    try:
        _serve(answers, folder)
    except BrokenPipeError:
        pass  # The parent was killed while this process measured for it.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(answers: TextIO, folder: Path) -> None:
    import tvm  # noqa: F401 - here, and not inside the time of the first candidate

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
                bench = Bench(**message, folder=folder)
            elif do == "prepare":
                bench.prepare(**message)  # type: ignore[union-attr]
            else:
                answer = bench.time(**message)  # type: ignore[union-attr]
        except Exception as error:
            answer["error"] = _reason(error)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, TrialError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


if __name__ == "__main__":
    main()
