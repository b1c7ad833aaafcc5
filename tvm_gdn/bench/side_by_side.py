"""Contenders on one case, in turns, next to what the machine can do: a copy and a matrix product of the same rounds.

The floor of a contender is the longer of two times: its bytes at the copy's bandwidth (bytes read plus bytes written), its
operations at the rate of torch's matrix product (oneDNN) in the dtype it multiplies in.
"""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tvm_gdn.bench import contenders, timing
from tvm_gdn.bench.timing import Timing

#: Bytes of the copy, half of them read, half written; more than caches hold.
COPY_BYTES = 512 << 20
#: Rows, depth and columns of the matrix product: what oneDNN runs at its best.
PRODUCT = (1024, 2048, 2048)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    `group` is what it is compared within (ratios are taken to this package's contender of the same group), `moved` and `flops`
    what it must at least do, `peak` the dtype whose matrix product is its floor.
    """

    name: str
    group: str
    call: Callable[[], object]
    error: float
    moved: float
    flops: float
    peak: torch.dtype
    ours: bool = False


@dataclass
class Report:
    """Rows of all cases, and who does not take part and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


class InTurn:
    """Calls of one contender on several inputs: every call takes the next, so that no input stays in the caches."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = itertools.cycle(calls)

    def __call__(self) -> object:
        """Result of the next call."""
        return next(self.calls)()

    def timed(self, count: int) -> float:
        """Microseconds per call."""
        return timing.timed(next(self.calls), count)


@functools.cache
def _operands(dtype: torch.dtype, share: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rows, depth, columns = (size // share for size in PRODUCT)
    if dtype == torch.int8:
        return torch.ones(rows, depth, dtype=dtype), torch.ones(depth, columns, dtype=dtype)
    return torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)


def product(dtype: torch.dtype, share: int = 1) -> Callable[[], torch.Tensor]:
    """Torch's matrix product, its sizes divided by `share`; of int8 with int32 sums."""
    return functools.partial(torch._int_mm if dtype == torch.int8 else torch.mm, *_operands(dtype, share))


@functools.cache
def fastest(dtype: torch.dtype) -> torch.dtype:
    """What to multiply for the floor: fp32 where the CPU has no dot products of `dtype`, and torch takes seconds instead."""
    calls = {kind: product(kind, 8) for kind in (dtype, torch.float32)}
    times = timing.interleaved({str(kind): call for kind, call in calls.items()}, 0.01, 3)
    return min(calls, key=lambda kind: times[str(kind)].least)


def measure(
    found: Sequence[Contender],
    work: str,
    case: str,
    *,
    seconds: float = 0.2,
    rounds: int = 5,
    most: float = float("inf"),
    suite: tuple[int, int, int] | None = None,
    copied: int = COPY_BYTES,
    facts: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Time contenders in turns; a row for each.

    Parameters
    ----------
    found : sequence of Contender
        Names are unique.
    work, case : str
        What the rows are about.
    seconds, rounds, most
        As in `timing.interleaved`.
    suite : tuple of int, optional
        Warm-ups and runs of each instead, and runs of everybody but this package's contenders: see `timing.turns`.
    copied : int
        Bytes of the copy: as many as the contenders move where these stay in caches from call to call.
    facts : dict, optional
        What else belongs into every row.

    Returns
    -------
    list of dict
        ``ms`` (median, q1, q3, least) of so many ``runs``, ``error``, ``ratio`` (median over the rounds of its time over this
        package's in its group; above 1: we are faster), ``share_of_floor``, ``floor`` (what binds), rates.
    """
    calls: dict[str, Callable[[], object]] = {contender.name: contender.call for contender in found}
    multiplied = {dtype: fastest(dtype) for dtype in dict.fromkeys(contender.peak for contender in found)}
    peaks = {dtype: f"peak {kind}" for dtype, kind in multiplied.items()}
    calls |= {"copy": contenders.copy_call(copied), **{peaks[dtype]: product(kind) for dtype, kind in multiplied.items()}}
    if suite:
        warmup, runs, fewer = suite
        times = timing.turns(calls, warmup, runs, calls.keys() - {each.name for each in found if each.ours}, fewer)
    else:
        times = timing.interleaved(calls, seconds, rounds, most)
    bandwidth = copied / times["copy"].us
    operations = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
    rows = []
    for contender in found:
        took = times[contender.name]
        memory, arithmetic = contender.moved / bandwidth, contender.flops * times[peaks[contender.peak]].us / operations
        ours = next((other for other in found if other.ours and other.group == contender.group), None)
        rows.append(
            {
                "work": work, "case": case, "contender": contender.name, "group": contender.group, "ours": contender.ours,
                "ms": {name: value / 1e3 for name, value in _spread(took).items()}, "runs": took.samples,
                "error": contender.error, "ratio": None if ours is None else timing.ratio(took, times[ours.name]),
                "share_of_floor": max(memory, arithmetic) / took.us, "floor": "copy" if memory > arithmetic else "matmul",
                "gbytes_per_s": contender.moved / took.us / 1e3, "gflop_per_s": contender.flops / took.us / 1e3,
                "copy_gbytes_per_s": bandwidth / 1e3, "matmul_gflop_per_s": operations / times[peaks[contender.peak]].us / 1e3,
                "matmul_dtype": str(multiplied[contender.peak]).removeprefix("torch."), "threads": torch.get_num_threads(),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **(facts or {}),
            }
        )  # fmt: skip
    return rows


def _spread(took: Timing) -> dict[str, float]:
    return {"median": took.us, "q1": took.q1, "q3": took.q3, "least": took.least}
