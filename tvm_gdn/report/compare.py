"""Regressions between benchmark runs: what is compared, with what, and by how much it changed.

A case is compared with the newest earlier run of the same target and thread count that has it, on the same hardware if
there is one. Yardsticks are the contenders that both runs timed in turns with us (a copy, the reference, peers):

- same hardware: our time must be worse *and* our time over the yardsticks (median of their changes). A busy machine
  slows all contenders alike, and a faster peer is no regression of ours; the smaller change counts.
- other hardware: only the ratios to the yardsticks; without one in common there is no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tvm_gdn.report.data import KERNEL, OURS, Bench, BenchCase

#: A change above this is marked where the command line names no other.
THRESHOLD = 0.10


@dataclass(frozen=True)
class Change:
    """How one case fares against an earlier run; factors above 1 are worse.

    `time` is None on other hardware, `relative` holds the change of our time over each yardstick.
    """

    now: BenchCase
    then: BenchCase
    baseline: Bench
    time: float | None
    relative: dict[str, float]

    @property
    def factor(self) -> float | None:
        """The change that counts, None if nothing can be compared."""
        found = [x for x in (self.time, median(self.relative.values()) if self.relative else None) if x is not None]
        return min(found, default=None)

    @property
    def broken(self) -> bool:
        """Whether it was right and compiled before, and is not now."""
        return self.then.passed and not self.now.passed

    def regressed(self, threshold: float) -> bool:
        """Whether it became slower by more than `threshold`, or wrong."""
        return self.broken or (self.factor is not None and self.factor > 1 + threshold)

    def improved(self, threshold: float) -> bool:
        """Whether it became faster by more than `threshold`."""
        return not self.broken and self.factor is not None and self.factor < 1 / (1 + threshold)

    @property
    def compared(self) -> str:
        """What was compared, in words."""
        parts = [] if self.time is None else [f"time {percent(self.time)}"]
        if self.relative:
            yardsticks = ", ".join(f"{name} {percent(x)}" for name, x in self.relative.items())
            parts.append(f"{'ratio' if len(self.relative) == 1 else 'median ratio'} to {yardsticks}")
        if self.time is None:
            return "other hardware: " + (parts[0] if parts else "no contender in common, not compared")
        return "same hardware: " + (f"the smaller of {' and '.join(parts)}" if self.relative else parts[0])


def percent(factor: float) -> str:
    """A factor as a signed percentage: ``+12 %``."""
    return f"{round(100 * (factor - 1)):+d} %"


def compare(bench: Bench, others: Sequence[Bench]) -> dict[tuple[str, str], Change]:
    """Changes of a run's cases, by operator and shape; cases without an earlier run are left out.

    Parameters
    ----------
    bench : Bench
        The run to judge.
    others : sequence of Bench
        Runs to compare with; those that are not earlier, or of another target or thread count, are ignored.

    Returns
    -------
    dict of Change
    """
    earlier = [other for other in others if other.date < bench.date and same_series(other, bench)]
    earlier.sort(key=lambda other: (other.machine == bench.machine, other.date), reverse=True)
    found = {}
    for case in bench.cases:
        for other in earlier:
            then = other.find(case.key)
            if then is not None:
                found[case.key] = _change(bench, case, other, then)
                break
    return found


def same_series(one: Bench, other: Bench) -> bool:
    """Whether two runs measured the same thing: one target, one number of threads."""
    return (one.target, one.threads) == (other.target, other.threads)


def _change(bench: Bench, now: BenchCase, baseline: Bench, then: BenchCase) -> Change:
    yardsticks = [name for name in now.us if name in then.us and name not in {OURS, KERNEL}]
    return Change(
        now=now,
        then=then,
        baseline=baseline,
        time=now.us[OURS].median / then.us[OURS].median if baseline.machine == bench.machine else None,
        relative={name: now.relative(name) / then.relative(name) for name in yardsticks},
    )
