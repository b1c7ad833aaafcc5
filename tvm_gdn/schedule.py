"""Design spaces: how one algorithm maps to one target, with the knobs that tuning may turn.

A module of `schedules/` named after a target registers its spaces::

    @schedule("recurrent", "x86")
    class RecurrentX86:
        def knobs(geometry): ...      # name -> choices
        def default(geometry): ...    # name -> value, hand-shaped
        def tiles(geometry, **knobs): # the target's tile operations

Resolution for a target walks its lineage, nearest first, and ends at the target's device (``generic-cpu``): a tuned record of the
space wins over its hand-shaped default; a space of ``generic-...`` is the portable fallback, reported as such. Where a space has
no plan for a geometry (its memory does not suffice), the operator's second algorithm serves, if its SPEC names one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from tvm_gdn import records
from tvm_gdn.errors import TargetError, TuneError
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec

GENERIC = "generic-"
_SPACES: dict[tuple[str, str], type] = {}


@dataclass(frozen=True)
class Choice:
    """A schedule that was chosen for a kernel: the space, its knobs, and where they came from.

    `refusal` is why the operator's own algorithm has no plan, where another one is chosen.
    """

    algorithm: str
    space: Any
    origin: str
    knobs: dict[str, Any]
    refusal: str = ""

    @property
    def words(self) -> str:
        """What listings say of it: the origin, after the algorithm where that is not the operator's own."""
        return f"{self.algorithm} {self.origin}" if self.refusal else self.origin

    def tiles(self, geometry: Geometry) -> Any:
        """The target's tile operations for a geometry."""
        return self.space.tiles(geometry, **self.knobs)


class NoKnobs:
    """Base of a design space with nothing to tune."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Nothing to tune."""
        del geometry
        return {}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Nothing to set."""
        del geometry
        return {}


def schedule(algorithm: str, target: str) -> Callable[[type], type]:
    """Class decorator that registers a design space.

    Parameters
    ----------
    algorithm : str
        Name of the TIR builder, `OpSpec.algorithm`.
    target : str
        Target whose kernels (and those of the targets that inherit from it) it shapes; ``"generic-cpu"`` for the fallback
        of CPU targets.
    """

    def register(space: type) -> type:
        _SPACES[algorithm, target] = space
        return space

    return register


@functools.cache
def _load_spaces() -> None:
    for entry in resources.files("tvm_gdn.schedules").iterdir():
        if entry.name.endswith(".py") and entry.name != "__init__.py":
            importlib.import_module(f"tvm_gdn.schedules.{entry.name[:-3]}")


def find_space(algorithm: str, target: TargetSpec, *, portable: bool = False) -> tuple[Any, str]:
    """The nearest design space of a target (or its family's portable one) for an algorithm, and the name it has there."""
    _load_spaces()
    for name in (*(() if portable else target.lineage), f"{GENERIC}{target.family}"):
        if (algorithm, name) in _SPACES:
            return _SPACES[algorithm, name], name
    raise TargetError(f"no schedule of {algorithm!r} for {target.name}, and no generic one for {target.family}")


def choose(spec: OpSpec, geometry: Geometry, target: TargetSpec, knobs: Mapping[str, Any] | None = None) -> Choice:
    """Choose the schedule of a kernel.

    Parameters
    ----------
    spec, geometry, target
        What the kernel is for.
    knobs : mapping, optional
        Explicit knobs (a tuning trial) of the operator's own algorithm; records and defaults are then not looked at.

    Returns
    -------
    Choice
        With ``origin`` ``"trial"``, ``"tuned"``, ``"default"`` or ``"generic"``.

    Raises
    ------
    TargetError
        There is no schedule, or it has no plan for the geometry and the operator no second algorithm.
    """
    space, _ = find_space(spec.algorithm, target)
    if knobs is not None:
        return Choice(spec.algorithm, space, "trial", dict(knobs))
    try:
        return _plan(spec, geometry, target)
    except TargetError as error:
        if spec.second is None:
            raise
        return replace(_plan(spec.second, geometry, target), refusal=str(error))


def _plan(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> Choice:
    """The tuned record or the default of an operator's own algorithm."""
    space, _ = find_space(spec.algorithm, target)
    found, record = origin(spec, geometry, target)
    return Choice(spec.algorithm, space, found, space.default(geometry) if record is None else dict(record["knobs"]))


def origin(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> tuple[str, dict[str, Any] | None]:
    """Where the knobs of a kernel come from, without working out a default, which may take a trace of the algorithm.

    Returns
    -------
    origin : str
        ``"tuned"``, ``"default"`` or ``"generic"``.
    record : dict or None
        The tuned record.

    Raises
    ------
    TargetError
        The space refuses the geometry, or there is none.
    """
    space, name = find_space(spec.algorithm, target)
    knobs = space.knobs(geometry)
    record = records.lookup(spec, geometry, target)
    if record is not None and fits(record["knobs"], knobs):
        return "tuned", record
    return "generic" if name.startswith(GENERIC) else "default", None


def fits(knobs: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether knobs name every knob of a space, each with one of its choices."""
    return set(knobs) == set(allowed) and all(knobs[name] in choices for name, choices in allowed.items())


def knob_space(spec: OpSpec, geometry: Geometry, target: TargetSpec) -> dict[str, tuple[Any, ...]]:
    """Knobs and their choices for a geometry.

    Raises
    ------
    TuneError
        The schedule has nothing to tune.
    """
    space, name = find_space(spec.algorithm, target)
    knobs = {key: tuple(choices) for key, choices in space.knobs(geometry).items()}
    if not knobs:
        raise TuneError(f"the {name} schedule of {spec.algorithm} declares no knobs: nothing to tune")
    return knobs
