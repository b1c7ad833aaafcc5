"""Tile operations of the token recurrence: what a target supplies beside the answers of `plain_tiles.py`.

An algorithm (`delta_rule.py`) calls the methods below while TVM parses the kernel; each call emits code. A worker is one
sequence, one value head and `v_tile` value columns; one thread of a CPU has it, or some threads of a GPU share it, each with its
own rows and columns of the state. ``rows(K)`` and ``cols(v_tile)`` loop over a thread's share, in its own numbers; ``row(i)`` and
``col(j)`` say which rows and columns these are. Vectors, tiles and scalars are the thread's own, in fp32, and what a sum over K
gives is every thread's.

A target plugs in by a class with these methods, returned by the ``tiles(geometry, **knobs)`` of its design space
(`tvm_gdn/schedule.py`); see `schedules/cpu_recurrent.py` and `schedules/gpu_registers.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

#: fp32 TIR expression, or an index.
Expr = Any
#: Array of a thread's share of K or of the columns; of single numbers.
Vector = Any
#: A thread's share of the state; a window of a tensor in memory in the same shape.
Tile = Any
View = Any


class StepTiles(Protocol):
    """Tile operations of one geometry on one target.

    Attributes
    ----------
    v_tile : int
        Value columns per worker; divides V.
    direct : bool
        Whether a state may be updated in the pool's own memory, instead of in a tile, where that is exact.
    host_checks : bool
        Whether the host can read slots and bounds, and so checks them before a kernel starts.
    """

    v_tile: int
    direct: bool
    host_checks: bool

    # Mapping of the work.
    def workers(self, count: Expr) -> Any:
        """Loop over independent pieces of work: threads of a pool, or blocks of a grid."""

    def lanes(self) -> Any:
        """Loop over the threads of a piece of work."""

    def enter(self, lane: Expr) -> None:
        """Take the thread that all following operations belong to."""

    def worker(self, block: Expr, lane: Expr) -> Expr:
        """Number of the worker that a thread of a piece of work belongs to."""

    def rows(self, count: int) -> Any:
        """Loop over the thread's share of the K axis."""

    def cols(self, count: int) -> Any:
        """Loop over the thread's share of the columns."""

    def row(self, i: Expr) -> Expr:
        """Index on the K axis of the thread's row i."""

    def col(self, j: Expr) -> Expr:
        """Index among the worker's columns of the thread's column j."""

    # What a thread has.
    def k_vector(self) -> Vector:
        """The thread's share of a vector along K."""

    def v_vector(self) -> Vector:
        """The thread's share of a vector along the columns."""

    def scalars(self, count: int) -> Vector:
        """Single numbers."""

    def state(self) -> Tile:
        """The thread's share of a state ``[K, v_tile]``."""

    # Data movement.
    def read(self, dst: Vector, buffer: Any, *index: Expr) -> None:
        """The thread's share of K neighbouring elements of a tensor, from `index` on."""

    def view(self, buffer: Any, offset: Expr, j0: Expr) -> View:
        """One head's state in a larger tensor, `offset` elements in, from column `j0`."""

    def load(self, W: Tile, view: View) -> None:
        """Read a state."""

    def store(self, view: View, W: Tile) -> None:
        """Write a state, rounded to the tensor's dtype."""

    def zero(self, W: Tile) -> None:
        """Zeros for a state."""

    def ask_state(self, view: View, present: Expr) -> None:
        """Ask for a state, or for zeros if it is not `present`; only where `fits` can be true."""

    def take_state(self, W: Tile) -> None:
        """What was asked for."""

    # Maths.
    def exp(self, x: Expr) -> Expr:
        """Exp in fp32."""

    def log(self, x: Expr) -> Expr:
        """Natural logarithm in fp32."""

    def sigmoid(self, lanes: int) -> Any:
        """Macro ``(x)``: the logistic function of `lanes` elements in place."""

    def dot(self, m: Vector, at: int, x: Vector, y: Vector) -> None:
        """``m[at] = sum_i x[i] * y[i]`` over K."""

    def gemv(self, acc: Vector, W: Tile, x: Vector) -> None:
        """``acc = W^T x``."""

    def ger_gemv(self, acc: Vector, W: Tile, d: Vector, x: Vector, u: Vector, y: Vector) -> None:
        """``W = diag(d) W + x u^T``, then ``acc = W^T y`` from the unrounded W."""


class ConvolvedStepTiles(StepTiles, Protocol):
    """Those of the fused decode step (`delta_rule_conv.py`): a worker is one q/k head with its value heads.

    Attributes
    ----------
    vector : int
        Neighbouring channels that a thread convolves at once.
    beside : int
        Tiles of value columns that the worker has at the same time.
    lines_shared : bool
        Whether several threads convolve a line for one another.
    """

    vector: int
    beside: int
    lines_shared: bool

    def channels(self, count: Expr) -> Any:
        """Loop over the thread's share of channels."""

    def channel(self, i: Expr) -> Expr:
        """The channel of a turn of that loop."""

    def line(self, vector: Vector, count: int) -> Any:
        """Where `count` channels are written for all threads: the vector itself where one thread has them."""

    def mate(self) -> Expr:
        """Which of the tiles at the same time is this thread's."""

    def take_rows(self, vector: Vector, line: Any) -> None:
        """The thread's share of K channels of a line; where lines are shared."""

    def take_columns(self, vector: Vector, line: Any) -> None:
        """The thread's share of its tile's columns."""

    def sync(self) -> None:
        """What the worker's threads wrote to lines is there for all of them."""

    def array(self, count: int, dtype: str) -> Any:
        """Scratch of a thread."""

    def fit_rows(self, *places: Any) -> Expr:
        """Whether a strip's rows move as vectors, given as flat buffers with place, length and stride; where `strip` > 0."""

    def columns_in(
        self, to: Any, at: Expr, source: Any, first: Expr, count: int, pitch: int, width: int, present: Expr | None = None
    ) -> None:
        """Read `width` rows of `count` elements, contiguous from `first` on, as columns `pitch` apart; zeros if not `present`."""

    def columns_out(self, to: Any, first: Expr, source: Any, at: Expr, count: int, pitch: int, width: int) -> None:
        """The inverse of `columns_in`."""
