"""RMS norm of rows with a gate in TensorIR: norm(x) * act(z), or norm(x * act(z)), in fp32."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.integers import quotient
from tvm_gdn.ops.tir.parsing import pick
from tvm_gdn.spec import Geometry


def norm(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axis D (row width), dtypes of x, weight and z, ``norm_before_gate`` and ``activation``.
    tiles : object
        The target's loops: `workers` over blocks of `rows_per_worker` rows, `vector` elements at once, `sum` of a vector; which
        pieces of a row a member of a worker has (`turns`, `piece`, `has`), `read` and `write` of one, `total` over all members.
        And `PlainTiles`.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    has, D = geometry.dtype, geometry.axis["D"]
    data, gated = has["x"], "z" in has
    silu, norm_first = geometry.attr["activation"] == "silu", bool(geometry.attr["norm_before_gate"])
    block, lanes = tiles.rows_per_worker, min(tiles.vector, D)
    full, rest = D // lanes, D % lanes
    sigmoids = {width: tiles.sigmoid(width) for width in (1, lanes)}

    loop, early = tiles.lane_loop, gated and norm_first and tiles.gate_early
    size = tiles.turns(full) * lanes + tiles.turns(rest)

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, weight_: T.handle, z_: T.handle, o_: T.handle, eps: T.float32):
        T.func_attr({"global_symbol": "kernel"})
        M, G = T.int64(), T.int64()
        x0, x1, z0, z1 = T.int64(), T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_, (M, G, D), data, strides=(x0, x1, 1), align=2)
        weight = T.match_buffer(weight_, (D,), has["weight"], align=2)
        z = T.match_buffer(z_, (M, G, D), has.get("z", data), strides=(z0, z1, 1), align=2)
        o = T.match_buffer(o_, (M, G, D), data, align=2)

        @T.inline
        def multiply_gate(row, gates, m, g, to, at, width, sigmoid):
            """Multiply row[to:] by act(z)."""
            gate, value = tiles.scalars(width), tiles.scalars(width)
            if early:
                for lane in loop(width):
                    value[lane] = gates[to + lane]
            else:
                tiles.read(value, 0, z, (m, g, at), width)
            for lane in loop(width):
                gate[lane] = value[lane]
            sigmoid(gate)
            for lane in loop(width):
                row[to + lane] = row[to + lane] * gate[lane]
            if silu:
                for lane in loop(width):
                    row[to + lane] = row[to + lane] * value[lane]

        @T.inline
        def load(row, gates, squares, m, g, to, at, width):
            """Row[to:] in fp32, gated if the gate comes first; its squares are added to `squares`."""
            tiles.read(row, to, x, (m, g, at), width)
            if early:
                tiles.read(gates, to, z, (m, g, at), width)
            if gated and not norm_first:
                multiply_gate(row, gates, m, g, to, at, width, sigmoids[width])
            for lane in loop(width):
                squares[lane] = squares[lane] + row[to + lane] * row[to + lane]

        @T.inline
        def store(row, gates, factor, m, g, to, at, width):
            """Normalize, weigh, gate if the gate comes last, and store row[to:]."""
            weights = tiles.scalars(width)
            tiles.read(weights, 0, weight, (at,), width)
            for lane in loop(width):
                row[to + lane] = row[to + lane] * factor[0] * weights[lane]
            if gated and norm_first:
                multiply_gate(row, gates, m, g, to, at, width, sigmoids[width])
            tiles.write(o, (m, g, at), row, to, width)

        @T.inline
        def one_row(m, g):
            row, squares = tiles.scalars(size), tiles.scalars(lanes)
            gates = tiles.scalars(pick(early, size, 1))
            tail, factor = tiles.scalars(1), tiles.scalars(1)
            for lane in loop(lanes):
                squares[lane] = T.float32(0)
            tail[0] = T.float32(0)
            for i in tiles.every(tiles.turns(full)):
                if tiles.has(i, full):
                    load(row, gates, squares, m, g, i * lanes, tiles.piece(i) * lanes, lanes)
            for i in tiles.every(tiles.turns(rest)):
                if tiles.has(i, rest):
                    load(row, gates, tail, m, g, tiles.turns(full) * lanes + i, full * lanes + tiles.piece(i), 1)
            factor[0] = tiles.sum(squares, lanes)
            factor[0] = factor[0] + tail[0]
            tiles.total(factor)
            factor[0] = T.float32(1) / T.sqrt(factor[0] * T.float32(1 / D) + eps)
            for i in tiles.every(tiles.turns(full)):
                if tiles.has(i, full):
                    store(row, gates, factor, m, g, i * lanes, tiles.piece(i) * lanes, lanes)
            for i in tiles.every(tiles.turns(rest)):
                if tiles.has(i, rest):
                    store(row, gates, factor, m, g, tiles.turns(full) * lanes + i, full * lanes + tiles.piece(i), 1)

        pieces: T.let[T.int64] = (M * G + block - 1) // block
        for unit in tiles.workers(pieces):
            for member in tiles.lanes():
                tiles.enter(member)
                w: T.let[T.int64] = T.Cast("int64", tiles.worker(unit, member))

                @T.inline
                def rows(even):
                    """The worker's rows; `even`: they lie one behind the other, as if there were one group."""
                    for r in T.serial(T.min(T.int64(block), M * G - w * block)):
                        m: T.let[T.int64] = pick(even, T.int64(0), tiles.in_register(quotient(w * block + r, G, M * G)))
                        g: T.let[T.int64] = w * block + r - m * G
                        one_row(m, g)

                if tiles.inside(w, pieces):
                    tiles.settled_rows(
                        ((x, (0, 0, 0), x1), (weight, (0,), 0), (o, (0, 0, 0), D), *pick(gated, ((z, (0, 0, 0), z1),), ())),
                        (x0 == G * x1, pick(gated, z0 == G * z1, True)), rows,
                    )  # fmt: skip

    return kernel
