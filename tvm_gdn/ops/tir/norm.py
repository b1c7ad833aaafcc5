"""RMS norm of rows with a gate in TensorIR: norm(x) * act(z), or norm(x * act(z)), in fp32."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

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

    def quotient(number: Any, by: Any, limit: Any) -> Any:
        """Division in 32 bits where the numbers have no more: in 64 it would cost a GPU as much as the rest of a row."""
        short = T.Cast("int64", T.truncdiv(T.Cast("int32", number), T.Cast("int32", by)))
        return T.if_then_else(limit <= T.int64(2**31 - 1), short, number // by)

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
        def multiply_gate(row, m, g, to, at, width, sigmoid):
            """Multiply row[to:] by act(z)."""
            gate, value = tiles.scalars(width), tiles.scalars(width)
            tiles.read(value, 0, z, (m, g, at), width)
            for lane in T.vectorized(width):
                gate[lane] = value[lane]
            sigmoid(gate)
            for lane in T.vectorized(width):
                row[to + lane] = row[to + lane] * gate[lane]
            if silu:
                for lane in T.vectorized(width):
                    row[to + lane] = row[to + lane] * value[lane]

        @T.inline
        def load(row, squares, m, g, to, at, width):
            """Row[to:] in fp32, gated if the gate comes first; its squares are added to `squares`."""
            tiles.read(row, to, x, (m, g, at), width)
            if gated and not norm_first:
                multiply_gate(row, m, g, to, at, width, sigmoids[width])
            for lane in T.vectorized(width):
                squares[lane] = squares[lane] + row[to + lane] * row[to + lane]

        @T.inline
        def store(row, factor, m, g, to, at, width):
            """Normalize, weigh, gate if the gate comes last, and store row[to:]."""
            weights = tiles.scalars(width)
            tiles.read(weights, 0, weight, (at,), width)
            for lane in T.vectorized(width):
                row[to + lane] = row[to + lane] * factor[0] * weights[lane]
            if gated and norm_first:
                multiply_gate(row, m, g, to, at, width, sigmoids[width])
            tiles.write(o, (m, g, at), row, to, width)

        pieces: T.let[T.int64] = (M * G + block - 1) // block
        for unit in tiles.workers(pieces):
            for member in tiles.lanes():
                tiles.enter(member)
                w: T.let[T.int64] = T.Cast("int64", tiles.worker(unit, member))
                if tiles.inside(w, pieces):
                    for r in T.serial(T.min(T.int64(block), M * G - w * block)):
                        m: T.let[T.int64] = quotient(w * block + r, G, M * G)
                        g: T.let[T.int64] = w * block + r - m * G
                        row, squares = tiles.scalars(tiles.turns(full) * lanes + tiles.turns(rest)), tiles.scalars(lanes)
                        tail, factor = tiles.scalars(1), tiles.scalars(1)
                        for lane in T.vectorized(lanes):
                            squares[lane] = T.float32(0)
                        tail[0] = T.float32(0)
                        for i in tiles.every(tiles.turns(full)):
                            if tiles.has(i, full):
                                load(row, squares, m, g, i * lanes, tiles.piece(i) * lanes, lanes)
                        for i in tiles.every(tiles.turns(rest)):
                            if tiles.has(i, rest):
                                load(row, tail, m, g, tiles.turns(full) * lanes + i, full * lanes + tiles.piece(i), 1)
                        factor[0] = tiles.sum(squares, lanes)
                        factor[0] = factor[0] + tail[0]
                        tiles.total(factor)
                        factor[0] = T.float32(1) / T.sqrt(factor[0] * T.float32(1 / D) + eps)
                        for i in tiles.every(tiles.turns(full)):
                            if tiles.has(i, full):
                                store(row, factor, m, g, i * lanes, tiles.piece(i) * lanes, lanes)
                        for i in tiles.every(tiles.turns(rest)):
                            if tiles.has(i, rest):
                                store(row, factor, m, g, tiles.turns(full) * lanes + i, full * lanes + tiles.piece(i), 1)

    return kernel
