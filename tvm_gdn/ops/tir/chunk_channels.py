"""The chunked delta rule with a gate per channel, what does not depend on states ahead of them.

`chunk.py` has the maths; with a gate per channel c the products of keys and queries are::

    A = strictly_lower(beta_i n_i n_j sum_c exp(G_ic - G_jc) k_ic k_jc)
    P = lower(r_i n_j sum_c exp(G_ic - G_jc) q_ic k_jc)

and what the states are multiplied with is decayed channel by channel. So ahead of the states a chunk's keys are decayed from its
start, with beta, and to its end, and its queries from its start; keys are kept as sums of two bf16 numbers, as their products go
into states. All exponentials are computed there, once per chunk and value head::

    R = beta V - K_start S        K_start = beta n exp(G) k
    U = (I + A)^-1 R
    O = Q_start S + P U           Q_start = r exp(G) q
    S = exp(G_C) S + K_end^T U    K_end = n exp(G_C - G) k
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.tiles import Expr, keep


class ChannelsAhead:
    """The two passes, on the tiles that a worker has (`chunk.py`)."""

    tiles: Any
    C: int
    K: int
    VT: int
    data: str

    @staticmethod
    def channel_sizes(C: int, K: int) -> list[tuple[int, str]]:
        """Elements and dtype of what is kept of a chunk: K_start, Q_start, K_end, (I + A)^-1, P, and factors."""
        rows = [*((parts * C * K, "bfloat16") for parts in (2, 1, 2)), (2 * C * C, "bfloat16"), (C * C, "bfloat16")]
        return [*rows, (C + K, "float32")]

    def _channel_windows(self, kept: tuple[Any, ...], unit: Expr) -> list[list[Any]]:
        """Windows of a unit's operands: tiles of a chunk's rows, one or two of each kind."""
        C, K = self.C, self.K
        found = []
        for buffer, (elements, _), cols in zip(kept, self.channel_sizes(C, K), (K, K, K, C, C), strict=False):
            size = C * cols
            found.append([self.tiles.window(buffer, unit * elements + at, C, cols, (cols, 1)) for at in range(0, elements, size)])
        return found

    def prepare_channels(self, work: Any, kept: tuple[Any, ...], unit: Expr, at: Expr) -> None:
        """Compute and keep what one chunk of one value head needs besides its states: tokens from `at` of the sequence."""
        tiles, C, K, zero = self.tiles, self.C, self.K, T.float32(0)
        k, q, G, beta, n, r = self.k, self.q, self.G, self.beta, self.k_factor, self.q_factor
        start = T.Bind(work.first + at)
        m = T.Bind(T.min(T.int64(C), work.length - at))
        A, P = tiles.tile(C, C), tiles.tile(C, C, dtype="bfloat16")
        k_start, q_start, k_end, inverse, (P_kept,) = self._channel_windows(kept, unit)
        self._load_keys(work, start, m)
        tiles.load(beta, self._rows(work.beta, work, start, work.hv, 1), rows=m)
        tiles.zero(P)
        # In powers of two, which is what a unit computes.
        tiles.scan(G, self._rows(work.g, work, start, work.hv, K), m, unit=math.log2(math.e))
        tiles.sync()
        k_left, q_left = tiles.operand(k, "left"), tiles.operand(q, "left")
        tiles.pack(k_left)
        tiles.pack(q_left)
        self._norms(work, k_left, q_left)
        tiles.sync()

        def finish(i: Expr, j: Expr, kk: Expr, qk: Expr, f: Expr, s: Expr, h: Expr, w: Expr) -> tuple[Expr, Expr]:
            return T.Select(j < i, kk * (f * w) * h, zero), qk * s * h

        tiles.channel_triangles((A, P), (k, q), k, G, decay=tiles.power, finish=finish, sources=(n, r, tiles.turn(n), beta))
        # A few threads are busy with that; the others go on.
        self.A, self.inverse = A, tiles.tile(C, C)
        self._invert(T.int32(C))
        last = tiles.block(G, C - 1, 0, 1, K)
        tiles.keep_rows(
            (tuple(k_start), tuple(q_start), tuple(k_end)),
            lambda _x, _y, a, e, *_: (tiles.power(a), tiles.power(e - a)),
            lambda a, e, x, y, _a, _e, f, s, w: (x * (f * w) * a, y * s * a, x * f * e),
            k, q, G, last, n, r, beta,
        )  # fmt: skip
        own = unit * (C + K)
        tiles.map(tiles.window(kept[-1], own, 1, C, (C, 1)), lambda _i, _j, w: w, tiles.turn(beta))
        tiles.map(tiles.window(kept[-1], own + C, 1, K, (K, 1)), lambda _i, _j, e: tiles.exp(e * T.float32(math.log(2))), last)
        tiles.store(P_kept, P)
        tiles.sync()
        tiles.keep(tuple(inverse), self.inverse)

    def carry_channels(self, work: Any, kept: tuple[Any, ...], unit: Expr, heads: Expr) -> None:
        """Advance the worker's state over all tokens of its sequence, with what was kept from `unit` on."""
        tiles, C, K, VT, data = self.tiles, self.C, self.K, self.VT, self.data
        S, R, out, U = tiles.state(T.int64(0)), self.R, self.out, tiles.tile(C, VT, "register")
        S_right, R_right, U_right = tiles.operand(S, "right"), self.R_right, tiles.operand(U, "right")
        # Two of each: one is read while the next chunk arrives in the other.
        shapes, triangles = [(2 * C, K), (C, K), (2 * C, K), (2 * C, C), (C, C)], 3
        both = [tiles.tile(2 * rows, cols, dtype=data) for rows, cols in shapes]
        both_v, both_factors = tiles.tile(2 * C, VT, dtype=data), tiles.tile(2, C + K)

        def half(tile: Any, c: Expr, row: int = 0, rows: int | None = None) -> Any:
            own = tile.rows // 2
            return tiles.block(tile, T.Cast("int32", c % 2) * own + row, 0, own if rows is None else rows, tile.cols)

        # Places in tensors go on from chunk to chunk.
        places = tiles.integers(3)
        for number, buffer in enumerate((work.v, work.o)):
            s = buffer.strides
            T.buffer_store(places, work.row * s[0] + work.first * s[1] + work.hv * s[2] + work.j0, [number])
        T.buffer_store(places, unit, [2])

        def rows_of(number: int) -> Any:
            buffer = (work.v, work.o)[number]
            return tiles.window(buffer, places[number], C, VT, (buffer.strides[1], 1))

        def proceed(number: int) -> None:
            T.buffer_store(places, places[number] + C * (work.v, work.o)[number].strides[1], [number])

        whole = tiles.integers(1)
        T.buffer_store(whole, T.Cast("int64", tiles.pieces(rows_of(0))), [0])

        def fetch(c: Expr) -> None:
            tiles.load(half(both_v, c), rows_of(0), rows=T.min(T.int64(C), work.length - c * C), pieces=whole[0] != 0)
            proceed(0)
            windows = self._channel_windows(kept, places[2])
            for number, (tile, parts) in enumerate(zip(both, windows, strict=True)):
                for part, window in enumerate(parts):
                    tiles.load(half(tile, c, part * C, C), window, lower=number >= triangles, pieces=True)
            factors = tiles.window(kept[-1], places[2] * (C + K), 1, C + K, (C + K, 1))
            tiles.load(half(both_factors, c), factors, pieces=True)
            T.buffer_store(places, places[2] + heads, [2])
            tiles.asked()

        count = T.Bind((work.length + C - 1) // C)
        with T.If(count > 0), T.Then():
            fetch(T.int64(0))
        tiles.pack(S_right)
        with T.serial(count) as c:
            m = T.Bind(T.min(T.int64(C), work.length - c * C))
            k_start, q_start, k_end, inverse, P = (half(tile, c) for tile in both)
            beta, end = (tiles.turn(tiles.block(half(both_factors, c), 0, at, 1, size)) for at, size in ((0, C), (C, K)))
            q_left, P_left = tiles.operand(q_start, "left"), tiles.operand(P, "left")
            tiles.sync()
            with T.If(c + 1 < count), T.Then():
                fetch(c + 1)
            tiles.pack(q_left)
            tiles.pack(P_left)
            tiles.mma(
                R, tiles.summands(k_start, "left"), S_right, finish=lambda _i, _j, x, v, w: w * v - x,
                sources=(half(both_v, c), beta),
            )  # fmt: skip
            tiles.mma(out, q_left, S_right, coarse=True)
            tiles.pack(R_right)
            tiles.sync(loads=False)
            tiles.mma(U, tiles.summands(inverse, "left"), R_right, lower="left")
            tiles.pack(U_right)
            tiles.sync(loads=False)
            tiles.mma(
                S, tiles.summands(k_end, "left", transpose=True), U_right, start=lambda _i, _j, s, e: s * e, sources=(end,)
            )  # fmt: skip
            tiles.mma(out, P_left, U_right, lower="left", start=keep, coarse=True)
            tiles.pack(S_right)
            tiles.store(rows_of(1), out, rows=m)
            proceed(1)
