"""A decode step's own convolution: the packed row is convolved by the worker that needs it (`delta_rule.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.conv_step import ConvStep
from tvm_gdn.ops.tir.delta_rule_form import Form, Vectors, Worker
from tvm_gdn.ops.tir.delta_rule_step import StepMacros
from tvm_gdn.ops.tir.parsing import pick
from tvm_gdn.spec import Geometry


class Convolution:
    """The convolution of one geometry.

    Parameters
    ----------
    form : Form
        Of the kernel.
    geometry : Geometry
        Static axes W and L, ``activation``.
    tiles : object
        The target's tile operations.
    """

    def __init__(self, form: Form, geometry: Geometry, tiles: Any) -> None:
        self.W, self.L, self.dtype = geometry.axis["W"], geometry.axis["L"], form.dtype_of("conv_state")
        self.step = ConvStep(
            tiles,
            W=self.W,
            L=self.L,
            state=self.dtype,
            biased="conv_bias" in form.has,
            silu=geometry.attr["activation"] == "silu",
            index=lambda n, c, _token: (n, c),
        )
        self.strip = tiles.strip
        self.silus = {width: tiles.sigmoid(width) for width in (1, tiles.vector, *([self.strip] if self.strip else []))}


@dataclass(frozen=True, eq=False)
class Row:
    """A worker's row while it is convolved."""

    #: Value heads of its q/k head.
    value_heads: Any
    #: States and weights as one-dimensional buffers.
    state_flat: Any
    weight_flat: Any
    #: Whether the row has a state, and whose slot is read: its own, or the first.
    usable: Any
    slot: Any
    #: What the worker's threads convolve for one another: k, q, v; on CPUs the vectors themselves.
    x: Any
    y: Any
    v: Any


def convolution_macros(worker: Worker, conv: Convolution, line: Row) -> tuple[Any, Any]:
    """Macros of one worker: what the row's channels give next, and their state one token on.

    Parameters
    ----------
    worker : Worker
        The worker.
    conv : Convolution
        Of the geometry.
    line : Row
        The worker's.

    Returns
    -------
    convolve : macro ``(to, c, size)``
        Of `size` channels from c on.
    convolve_strips : macro ``(skipped, c, size)``
        Of `size` value columns from channel c on, and of q and k unless those are skipped; in vectors.
    """
    tiles, call = worker.tiles, worker.call
    K, W, L, strip, step, n, h, heads = worker.form.K, conv.W, conv.L, conv.strip, conv.step, worker.n, worker.h, call.heads
    h0, h1, h2 = call.conv_state.strides
    w0, w1 = call.conv_weight.strides
    conv_state, conv_weight, conv_bias, mixed_qkv = call.conv_state, call.conv_weight, call.conv_bias, call.mixed_qkv
    conv_from, conv_usable = line.slot, line.usable

    @T.inline
    def convolve_lanes(to, at, c, width, regular):
        taps, old = tiles.scalars((W + 1) * width), tiles.array(max(L, 1) * width, conv.dtype)
        acc = tiles.scalars(width)
        dense: T.let[T.bool] = h2 == 1 and h1 == L
        step.load_taps(
            taps, 0, width, conv_weight, line.weight_flat, pick(regular, True, w1 == 1 and w0 == W), conv_bias, c, width
        )
        step.load_state(
            old, conv_state, line.state_flat, pick(regular, True, dense), conv_from * h0 + c * L, conv_from, conv_usable, c, width
        )
        step.head(acc, taps, 0, width, old, True, mixed_qkv, n, c, T.int64(0), T.int64(0), width)
        step.activate(acc, width, conv.silus[width])
        for lane in step.loop(width):
            to[at + lane] = acc[lane]
        if conv_usable:
            step.keep(old, mixed_qkv, n, c, T.int64(0), T.int64(1), width)
            step.store_state(
                old, conv_state, line.state_flat, pick(regular, True, dense), conv_from * h0 + c * L, conv_from, c, width
            )

    @T.inline
    def convolve_strips(skipped, c, size):
        """The next output of `size` value columns from channel c on, and of q and k unless those are skipped."""
        for i in tiles.channels((size + (2 * K - skipped)) // strip):
            at: T.let[T.int64] = skipped + tiles.channel(i) * strip
            own = tiles.scalars(strip)
            of_q: T.let[T.int64] = h * K + at - K
            convolve_lanes(
                own,
                0,
                T.Select(at < K, (heads + h) * K + at, T.Select(at < 2 * K, of_q, c + at - 2 * K)),
                strip,
                True,
            )
            for lane in T.unroll(strip):
                if at < K:
                    line.x[at + lane] = own[lane]
                elif at < 2 * K:
                    line.y[at - K + lane] = own[lane]
                else:
                    line.v[at - 2 * K + lane] = own[lane]

    @T.inline
    def convolve(to, c, size):
        """The next output of `size` channels of the packed row from c on, in fp32; their state moves by one."""
        for i in tiles.channels(size // tiles.vector):
            convolve_lanes(to, tiles.channel(i) * tiles.vector, c + tiles.channel(i) * tiles.vector, tiles.vector, False)
        if tiles.vector > 1:
            for i in T.serial(size % tiles.vector):
                convolve_lanes(to, size - size % tiles.vector + i, c + size - size % tiles.vector + i, 1, False)

    return convolve, convolve_strips


def convolved_steps(worker: Worker, conv: Convolution, line: Row, vectors: Vectors, macros: StepMacros) -> None:
    """Emit the step of all value heads of a worker's q/k head: the row is convolved, then tiles of value columns take turns.

    Parameters
    ----------
    worker : Worker
        The worker.
    conv : Convolution
        Of the geometry.
    line : Row
        The worker's.
    vectors : Vectors
        The worker's.
    macros : StepMacros
        The worker's.
    """
    tiles, call, token, memory, per_key = worker.tiles, worker.call, macros.token, macros.memory, line.value_heads
    K, V, W, L, strip = worker.form.K, worker.form.V, conv.W, conv.L, conv.strip
    h, hv, heads = worker.h, worker.hv, call.heads
    h0, h1, h2 = call.conv_state.strides
    w0, w1 = call.conv_weight.strides
    convolve, convolve_strips = convolution_macros(worker, conv, line)
    # Tiles of value columns that a worker has at the same time.
    beside = tiles.beside
    # A worker's threads show each other what they convolve: states are on their way meanwhile.
    early = tiles.lines_shared and tiles.state_first

    @T.inline
    def load_piece(W, piece):
        """The state of one of the worker's tiles of value columns."""
        memory.load_initial(W, hv + piece // (V // tiles.v_tile), piece % (V // tiles.v_tile) * tiles.v_tile)

    @T.inline
    def step_piece(W, piece):
        """A tile's token, and its state back to the pool."""
        own_head: T.let[T.int64] = hv + piece // (V // tiles.v_tile)
        own_column: T.let[T.int64] = piece % (V // tiles.v_tile) * tiles.v_tile
        token.fetch(0, own_head, own_column)
        token.apply(W, 0, own_head, own_column)
        memory.store_final(W, own_head, own_column)

    @T.inline
    def all_pieces():
        pieces: T.let[T.int64] = per_key * (V // tiles.v_tile)
        if early:
            states = tiles.state()
            if tiles.mate() < pieces:
                load_piece(states, tiles.mate())
        if strip == 0:
            convolve(line.x, (heads + h) * K, K)
            convolve(line.y, h * K, K)
        if not tiles.lines_shared:
            token.normalize_qk()
        for turn in T.serial((pieces + (beside - 1)) // beside):
            width: T.let[T.int64] = pick(beside == 1, T.int64(tiles.v_tile), T.min(pieces - turn * beside, beside) * tiles.v_tile)
            columns: T.let[T.int64] = 2 * heads * K + hv * V + turn * (beside * tiles.v_tile)
            if strip > 0:
                if (
                    h2 == 1
                    and h1 == L
                    and w1 == 1
                    and w0 == W
                    and tiles.fit_rows((line.weight_flat, 0, W, T.int64(0)), (line.state_flat, 0, L, h0))
                ):
                    if turn == 0:
                        convolve_strips(0, columns, width)
                    else:
                        convolve_strips(2 * K, columns, width)
                else:
                    if turn == 0:
                        convolve(line.x, (heads + h) * K, K)
                        convolve(line.y, h * K, K)
                    convolve(line.v, columns, width)
            else:
                convolve(line.v, columns, pick(beside == 1, tiles.v_tile, width))
            tiles.sync()
            if tiles.lines_shared:
                if turn == 0:
                    tiles.take_rows(vectors.x, line.x)
                    tiles.take_rows(vectors.y, line.y)
                    token.normalize_qk()
            piece: T.let[T.int64] = turn * beside + tiles.mate()
            if piece < pieces:
                tiles.take_columns(vectors.v, line.v)
                if early:
                    step_piece(states, piece)
                    if piece + beside < pieces:
                        load_piece(states, piece + beside)
                else:
                    macros.sequence(hv + piece // (V // tiles.v_tile), piece % (V // tiles.v_tile) * tiles.v_tile)
            tiles.sync()

    all_pieces()
