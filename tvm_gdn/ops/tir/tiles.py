"""Tile operations: what the chunked algorithms are written in, and what a target supplies.

An algorithm (`chunk.py`) is plain Python that runs while TVM parses the kernel and calls the methods below; each call emits
code. It holds *tiles* and *operands* only as opaque handles: it never indexes into them, so a tile may live in AVX-512 registers,
on a worker's stack, in shared memory, or as the fragments of tensor-core instructions. What happens to single elements is said
by *element functions* ``f(i, j, *values)`` on fp32 TIR expressions, written in the algorithm and inlined by the target wherever
it holds the elements (vector loop, epilogue on accumulator registers, thread-strided loop over shared memory).

**Shapes.** A tile has `rows` and `cols` (Python ints). ``(n, 1)`` holds one number per token; `turn` shows it as ``(1, n)``.
The `sources` of an element function broadcast as in numpy: ``(n, 1)`` along the columns, ``(1, n)`` along the rows.

**Places.** ``"register"``: results of products over value columns, ``[*, v_tile]``; every element belongs to one thread until
the tile is packed. ``"shared"``: visible to all threads of the worker. ``"global"``: a window of a tensor, read and written only
by `load`, `scan` and `store`. A target may treat places alike (CPUs do).

**Operands.** ``operand(tile, side, transpose)`` is a tile in the layout and number format in which products read it: side
``"left"`` is A of ``C += A B``, ``"right"`` is B. `pack` brings it up to date with its tile. It may alias the tile (fp32 FMA
reads tiles as they are), so a tile stays untouched between `pack` and the operand's last use. bf16, bf16 pairs (high and low
part) or tf32 are the target's choice, within the tolerances of the contract; accumulation is always fp32.

**Ragged chunks.** A chunk has `m` valid tokens (a TIR expression). `load` zero-fills the rows from m on; the algorithm makes sure
that zeros stay zeros. ``rows=m``, ``cols``, ``depth`` bound what is *wanted*: a target rounds up to its own granule (at most
`GRANULE`, the same for all operations) or computes everything; whatever it does not compute it must not read later.

**Triangles.** ``lower="result"``: only elements on and below the diagonal are wanted. ``lower="left"``: A is lower triangular,
with zeros above the diagonal inside the diagonal blocks of `GRANULE`; blocks above them are never read.

**Synchronization.** `sync` stands between an operation that writes a shared tile or an operand and one that reads what other
threads wrote, and before a shared tile is overwritten. CPUs emit nothing. Operations end with every element written, not with
every thread having seen it.

A target plugs in by a class with these methods, returned by the ``tiles(geometry, **knobs)`` of its design space
(`tvm_gdn/schedule.py`); see `schedules/cpu_chunk.py` for fp32 FMA and `schedules/x86_amx.py` for matrix units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

Tile = Any
Operand = Any
#: fp32 TIR expression, or an index.
Expr = Any
ElementFunction = Callable[..., Expr]
Place = Literal["register", "shared"]

#: Rows (tokens) up to which bounds may be rounded up.
GRANULE = 32


def keep(_i: Expr, _j: Expr, value: Expr, *_sources: Expr) -> Expr:
    """`start` of a product that adds to what the tile holds."""
    return value


class ChunkTiles(Protocol):
    """Tile operations of one geometry on one target.

    Attributes
    ----------
    chunk : int
        Tokens per chunk, a power of two from 16 to 128.
    v_tile : int
        Value columns per worker; divides V.
    span : int
        Value heads of one q/k head per worker, one after the other in every chunk: what depends on q and k alone is then
        computed once for all of them.
    fused : bool
        Whether products bring operands of their results up to date themselves (`into`, and `scale` and `coarse` of `operand`),
        and states have an operand each, which `load` of a state brings up to date and which stays so while the worker runs.
    tail : int
        Rows up to which bounds of triangles are rounded up, at most `GRANULE`; where less, products of blocks stop there too.
    chained : bool
        Whether products of triangles are operations of their own: `squares`, `triangles`, `chain`, `fill` and `keep`, as
        `schedules/gpu_triangles.py` describes them, and barriers of a warp. What is computed ahead of states needs them.
    shift : Expr
        Columns of the worker that other workers take: a target may cut the columns of workers where they are fewer than threads.
    deferred : bool
        Whether products go on behind the call that begins them, until their result is read or packed.
    teams : tuple of int
        Groups of threads that may do different things at the same time, each under `team`.
    held_right : bool
        Whether the first of them has the state, and keeps right operands of its next products itself: others see those that are
        packed as `coarse` ones.
    stages : int
        Chunks whose data is there or arrives at a time.
    host_checks : bool
        Whether the host part of a kernel can read tensors, and so checks slots and sequence bounds.
    """

    chunk: int
    v_tile: int
    span: int
    fused: bool
    tail: int
    chained: bool
    shift: Expr
    deferred: bool
    teams: tuple[int, ...]
    held_right: bool
    stages: int
    host_checks: bool

    def outputs(self, *tensors: tuple[Any, Expr]) -> None:
        """Tensors, each with its number of elements, that the kernel is about to fill; emitted where `host_checks`."""

    # Mapping of the work.
    def workers(self, count: Expr) -> Any:
        """Loop over independent pieces of work: threads of a pool, or blocks of a grid."""

    def lanes(self) -> Any:
        """Loop over the threads that share a worker's tiles."""

    def enter(self, lane: Expr) -> None:
        """Take the thread that all following operations belong to; allocate what a worker needs."""

    def leave(self) -> None:
        """The worker's last operation is done."""

    def sync(self) -> None:
        """Everything written to shared tiles and operands is visible to all threads of the worker."""

    # Tiles.
    def tile(self, rows: int, cols: int, place: Place = "shared", dtype: str = "float32") -> Tile:
        """Tile of numbers that are exact in `dtype`, or of results that only go into a tensor of it; contents undefined."""

    def state(self, index: Expr) -> Tile:
        """fp32 state ``[K, v_tile]`` of the worker's value head `index` < `span`; the same tile at every call."""

    def window(self, buffer: Any, offset: Expr, rows: int, cols: int, strides: tuple[Expr, Expr]) -> Tile:
        """A strided window of a tensor in global memory, `offset` elements in."""

    def view(self, buffer: Any, offset: Expr, j0: Expr) -> Tile:
        """One head's state in a larger tensor, in the tensor's layout, as a ``[K, v_tile]`` window from column `j0`."""

    def block(self, tile: Tile, row: Expr, col: Expr, rows: int, cols: int) -> Tile:
        """Part of a shared tile; also as source or destination of a product. `row` and `col` are multiples of 16, or rows = 1."""

    def turn(self, tile: Tile) -> Tile:
        """A shared ``(n, 1)`` tile as ``(1, n)``, or the reverse."""

    # Data movement.
    def load(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """``dst[i, :] = src[i, :]`` for i < rows, zero in the other rows; nothing else of `src` is read."""

    def store(self, dst: Tile, src: Tile, rows: Expr | None = None) -> None:
        """``dst[i, :] = src[i, :]`` for i < rows, rounded to the tensor's dtype; nothing else is written."""

    def expect(self, *windows: Tile, write: bool = False, when: Expr | None = None) -> None:
        """A hint: windows that are read (written) soon, if `when` holds; rows may lie outside of the tensor."""

    def zero(self, dst: Tile) -> None:
        """All elements zero."""

    # Elements.
    def map(self, dst: Tile, function: ElementFunction, *sources: Tile, rows: Expr | None = None, lower: bool = False) -> None:
        """``dst[i, j] = function(i, j, *values)``; `dst` may be a source.

        `lower`: elements above the diagonal blocks of `GRANULE` are not wanted.
        """

    def row_sum(self, dst: Tile, function: ElementFunction, *sources: Tile, rows: Expr | None = None) -> None:
        """``dst[i, 0] = sum_j function(i, j, *values)`` over the columns of the first source."""

    def scan(self, dst: Tile, src: Tile, rows: Expr) -> None:
        """Inclusive sums down the rows: ``dst[i, j] = sum_{r <= min(i, rows - 1)} src[r, j]``; all rows of `dst` are written."""

    def pair_sum(
        self,
        dsts: tuple[Tile, ...],
        weight: ElementFunction,
        lefts: tuple[Tile, ...],
        own: tuple[Tile, ...],
        right: tuple[Tile, ...],
        rows: Expr,
    ) -> None:
        """Sums over the columns of pairs of rows, in the diagonal blocks of 16, one per `left`.

        ``dst[i, j] = sum_c left[i, c] * weight(*(x[i, c] for x in own), *(y[j, c] for y in right))`` for j <= i, zero above the
        diagonal; outside these blocks `dst` stays as it was.
        """

    def decays(self, dst: Tile, gates: Tile, factors: Tile, rows: Expr) -> None:
        """``dst[i, j] = factors[j] exp(gates[i] - gates[j])`` for j <= i, else zero, in the rows and blocks of a `lower` map."""

    def exp(self, x: Expr) -> Expr:
        """Exp in fp32."""

    # Products.
    def operand(
        self,
        tile: Tile,
        side: Literal["left", "right"],
        *,
        transpose: bool = False,
        scale: Tile | None = None,
        coarse: bool = False,
    ) -> Operand:
        """A tile as operand of products; to be packed before each use.

        Where `fused`: `scale` are factors ``(n, 1)`` of the tile's rows; `coarse` is for results that only go into a tensor of
        the data's dtype.
        """

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Bring operands up to date with their tile, all the same one, so that a target can make one from another.

        `rows` are those of the tile; `lower`: a lower-triangular left operand.
        """

    def mma(
        self,
        dst: Tile,
        a: Operand,
        b: Operand,
        *,
        rows: Expr | None = None,
        cols: Expr | None = None,
        depth: Expr | None = None,
        lower: Literal["result", "left"] | None = None,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Tile, ...] = (),
        into: tuple[Operand, ...] = (),
        wanted: Expr | None = None,
    ) -> None:
        """Product with fp32 accumulators: ``dst = finish(i, j, start(i, j, dst, *sources) + A B, *sources)``.

        `start` None starts from zero, `finish` None writes the sum as it is. `dst` itself may be among the sources; it is no
        operand of its own product. Where `fused`: `into` are operands of `dst` that are brought up to date with the result
        (where the condition `wanted` fails nothing reads them any more); `dst` itself is then written only if it has a `start`.
        """

    def invert_diagonal(self, dst: Tile, a: Tile, rows: Expr) -> None:
        """``dst = (I + A)^-1`` in every diagonal block of 16 of a strictly lower-triangular tile, by substitution in fp32.

        Zeros above the diagonal inside these blocks; outside them `dst` stays as it was.
        """
