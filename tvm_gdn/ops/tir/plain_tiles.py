"""What algorithms ask of every target's tile operations, answered as a target does that has nothing of its own to say.

Tiles of all targets inherit these answers (`schedules/cpu.py`, `schedules/gpu.py`) and replace those that they know better. So an
algorithm asks a question by its name, and never whether a target has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

Expr = Any


class PlainTiles:
    """Answers of a target whose memory answers at once, and whose vectors and functions are the code generator's own.

    Attributes
    ----------
    state_first, state_last : bool
        Whether a one-token step asks for its state before it asks for the token's data, or when the token is prepared; between
        the two if neither.
    fits : bool or None
        Whether what is moved now is known to move as vectors: `settled` says so meanwhile.
    strip : int
        Neighbouring channels that a thread of the fused decode step convolves where all that they need moves as vectors; 0 where
        vectors are loops (`vector` channels at once).
    gate_early : bool
        Whether a row's gate is asked for with the row.
    """

    state_first = state_last = False
    fits: bool | None = None
    strip: int = 0
    gate_early = False

    #: Loop over neighbouring elements.
    lane_loop = staticmethod(T.vectorized)

    exp = staticmethod(T.exp)
    log = staticmethod(T.log)

    @staticmethod
    def sigmoid(lanes: int) -> Any:
        """Macro ``(x)``: the logistic function of `lanes` elements in place."""

        @T.inline
        def sigmoid(x):
            for lane in T.serial(lanes):
                x[lane] = T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x[lane]))

        return sigmoid

    @staticmethod
    def in_register(number: Expr) -> Expr:
        """A number that is computed once, where a name for it would have it computed at every use."""
        return number

    def read_all(self, *reads: tuple[Any, ...]) -> None:
        """Call the algorithm's ``read`` with several sets of arguments; together where each alone would be waited for."""
        for arguments in reads:
            self.read(*arguments)

    def settled(self, rows: tuple[Any, ...], view: Any, stride: Expr, emit: Callable[[], None]) -> None:
        """Emit a step: once, or for addresses that all move as vectors and once more for any, behind one test of all of them.

        Parameters
        ----------
        rows : tuple
            Tensors of which `read` will be asked, with their indices.
        view : Buffer
            The first slot's tile of a pool.
        stride : PrimExpr
            Elements from slot to slot.
        emit : callable
            Emits the step.
        """
        del rows, view, stride
        emit()

    def settled_rows(self, places: tuple[Any, ...], further: tuple[Expr, ...], emit: Callable[[bool], None]) -> None:
        """``emit(True)`` for rows that move as vectors and lie evenly, ``emit(False)`` for others.

        Parameters
        ----------
        places : tuple
            Tensors, each with the index of its first row and the elements from row to row.
        further : tuple of PrimExpr
            What else must hold for rows to lie evenly.
        emit : callable
            Emits the rows.
        """
        del places, further
        emit(False)

    def plan(self, heads: Expr, tokens: Expr, emit: Callable[[], None]) -> None:
        """Call ``emit()`` for each of several layouts of the work, behind the host's choice by the sizes of a call.

        Parameters
        ----------
        heads, tokens : PrimExpr
            Value heads of all sequences together; tokens of each, -1 where the host does not know them.
        emit : callable
            Emits the work.
        """
        del heads, tokens
        emit()
