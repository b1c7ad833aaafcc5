"""Several plans in one kernel: the host takes one of them by the sizes of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script import tirx as T


def emit_plans(plans: Sequence[Any], serves: Callable[[Any], Any], emit: Callable[[Any], None]) -> None:
    """Emit all plans, and on the host the choice between them.

    Parameters
    ----------
    plans : sequence
        The first that serves a call is taken; the last serves all.
    serves : callable
        ``serves(plan)``: whether a plan is for a call, as an expression of its sizes.
    emit : callable
        ``emit(plan)``: the code of a plan.
    """
    plan, *more = plans
    if not more:
        emit(plan)
        return
    with T.If(serves(plan)):
        with T.Then():
            emit(plan)
        with T.Else():
            emit_plans(more, serves, emit)
