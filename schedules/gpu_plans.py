"""Several layouts of one algorithm's workers in one kernel: the host takes one of them by the sizes of a call.

What streams many states at the memory's rate is not what ends soonest with few: there, blocks must be many and small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm_gdn.ops.tir.plans import emit_plans


@dataclass(frozen=True)
class Plan:
    """Tile operations, and the calls that they are for.

    Attributes
    ----------
    tiles : object
        Tile operations.
    most : int, optional
        Heads of all sequences together that a call may have.
    single : bool
        Whether a call must have one token per sequence, as its shapes say.
    """

    tiles: Any
    most: int | None = None
    single: bool = False

    def serves(self, heads: Any, tokens: Any) -> Any:
        """Whether it is for a call."""
        if self.most is not None:
            return heads <= self.most
        return tokens == 1 if self.single else True


class PlannedTiles:
    """Tile operations that are those of one plan at a time.

    Parameters
    ----------
    plans : Plan
        The first that serves a call is taken; the last serves all.
    """

    def __init__(self, *plans: Plan) -> None:
        self.plans, self.current = plans, plans[-1].tiles

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name)

    def plan(self, heads: Any, tokens: Any, emit: Callable[[], None]) -> None:
        """Emit all plans, and on the host the choice between them."""

        def one(plan: Plan) -> None:
            self.current = plan.tiles
            emit()

        emit_plans(self.plans, lambda plan: plan.serves(heads, tokens), one)
