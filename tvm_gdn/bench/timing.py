"""Times several calls in turns, so that drift and other load on the machine fall on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

#: A sample shorter than this holds several calls, so that reading the clock does not count.
_SAMPLE_SECONDS = 20e-6


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, quartiles and least of all samples, the median of every round, how many samples."""

    us: float
    q1: float
    q3: float
    rounds: tuple[float, ...]
    least: float = 0.0
    samples: int = 1

    def to_json(self) -> dict[str, float]:
        """Plain data for reports."""
        return {"median": round(self.us, 3), "q1": round(self.q1, 3), "q3": round(self.q3, 3)}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds that both took part in of the quotient of two timings: drift between rounds cancels."""
    return median(a / b for a, b in zip(numerator.rounds, denominator.rounds, strict=False))


def difference(minuend: Timing, subtrahend: Timing) -> float:
    """Median over the rounds of the difference of two timings, in microseconds."""
    return median(a - b for a, b in zip(minuend.rounds, subtrahend.rounds, strict=True))


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 7, most: float = float("inf")
) -> dict[str, Timing]:
    """Time calls in rounds of A, B, C, A, B, C.

    Parameters
    ----------
    calls : mapping
        Callables without arguments, by name.
    seconds : float
        Time to spend on each call, all rounds together.
    rounds : int
        Number of rounds. In each, a call runs once to warm the caches (but if that takes longer than its share of `seconds`),
        then at least once to be measured.
    most : float
        Seconds that the rounds of a slow call may take together: it takes part in the first ones only. What takes longer at once
        is measured a single time, before the rounds.

    Returns
    -------
    dict of Timing
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    first = {name: _first(call) for name, call in calls.items()}
    for number in range(rounds):
        for name, call in calls.items():
            us, wall = first[name]
            if (number + 1) * wall <= most:
                inner = max(1, min(1000, int(1e6 * _SAMPLE_SECONDS / us)))
                samples[name].append(_samples(call, inner, seconds / rounds, warm=wall < seconds / rounds))
            elif not number:
                samples[name].append([us])
    return {name: summary(taken) for name, taken in samples.items()}


def turns(
    calls: Mapping[str, Callable[[], object]], warmup: int, runs: int, seldom: Collection[str] = (), fewer: int | None = None
) -> dict[str, Timing]:
    """Time calls one after the other, `runs` times; the first `warmup` times do not count.

    Parameters
    ----------
    calls : mapping
        Callables without arguments, by name.
    warmup, runs : int
        Calls of each that are not measured, and that are.
    seldom : collection of str
        Who takes part in `fewer` of the runs only, evenly spread, and in as small a share of the warm-ups.
    fewer : int, optional
        A divisor of `runs`; default all of them.

    Returns
    -------
    dict of Timing
        A round lasts from one turn of the seldom to the next.
    """
    every = runs // (fewer or runs)
    samples: dict[str, list[list[float]]] = {name: [[] for _ in range(runs // every)] for name in calls}
    for turn in range(-warmup, runs):
        for name, call in calls.items():
            # Who is seldom is warm all the same: once before anything counts.
            if turn % every == 0 or name not in seldom or (turn == -1 and every > warmup):
                took = timed(call, 1)
                if turn >= 0:
                    samples[name][turn // every].append(took)
    return {name: summary(taken) for name, taken in samples.items()}


def timed(call: Callable[[], object], count: int) -> float:
    """Microseconds per call of `count` calls; a contender in a process of its own has its own clock, `timed`."""
    own = getattr(call, "timed", None)
    if own is not None:
        taken: float = own(count)
        return taken
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - start) / count


def _first(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of a second call, and seconds that measuring it took."""
    call()
    start = time.perf_counter()
    return timed(call, 1), time.perf_counter() - start


def _samples(call: Callable[[], object], inner: int, seconds: float, *, warm: bool) -> list[float]:
    if warm:
        call()
    taken = []
    end = time.perf_counter() + seconds
    while True:
        taken.append(timed(call, inner))
        if time.perf_counter() > end:
            return taken


def summary(taken: list[list[float]]) -> Timing:
    """Median and quartiles of samples, which are given by round."""
    everything = [sample for part in taken for sample in part]
    q1, middle, q3 = quantiles(everything, n=4, method="inclusive") if len(everything) > 1 else everything * 3
    rounds = tuple(median(part) for part in taken)
    return Timing(us=middle, q1=q1, q3=q3, rounds=rounds, least=min(everything), samples=len(everything))
