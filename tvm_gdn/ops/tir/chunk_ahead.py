"""The chunked delta rule with a gate per head, or none: what does not depend on states ahead of them.

`chunk.py` has the maths. What a chunk needs besides its states is computed first, chunks side by side, and kept in memory:
(I + A)^-1, P, and factors of its tokens. Then a worker passes over a sequence with its state, and one chunk is computed while
the next one arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.tiles import Expr, Tile, keep

#: Factors that are kept of every token: of K S, of Q S, of U in the state's update, beta, and the state's own decay.
FACTORS = 8


def _summands(data: str) -> tuple[str, ...]:
    """Dtypes of tiles whose sum is (I + A)^-1: two bf16 numbers have the digits that products of 16-bit data need."""
    return ("float32",) if data == "float32" else ("bfloat16", "bfloat16")


@dataclass(frozen=True)
class _Head:
    """Tiles of a value head: sums of log-decays, beta, A."""

    G: Tile
    beta: Tile
    A: Tile


class HeadsAhead:
    """The two passes, on the tiles that a worker has (`chunk.py`)."""

    tiles: Any
    C: int
    K: int
    VT: int
    gate: str
    data: str

    @staticmethod
    def head_sizes(C: int, data: str) -> list[tuple[int, str]]:
        """Elements and dtype of what is kept of a chunk: (I + A)^-1, P, and factors."""
        return [*((C * C, dtype) for dtype in _summands(data)), (C * C, data), (C * FACTORS, "float32")]

    def prepare_heads(self, work: Any, kept: tuple[Any, ...], unit: Expr, at: Expr) -> None:
        """Compute and keep what one chunk of value heads needs besides their states: tokens from `at` of the sequence.

        Of lower-triangular tiles the blocks on and below the diagonal are kept.
        """
        tiles, C, exp, zero = self.tiles, self.C, self.tiles.exp, T.float32(0)
        start = T.Bind(work.first + at)
        m = T.Bind(T.min(T.int64(C), work.length - at))
        n, r, several = self.k_factor, self.q_factor, tiles.together
        # The triangles of all value heads one above the other.
        self.A, self.inverse = tiles.tile(several * C, C), tiles.tile(several * C, C)
        heads = [_Head(tiles.tile(C, 1), tiles.tile(C, 1), tiles.block(self.A, C * number, 0, C, C)) for number in range(several)]

        def each(body: Callable[[int, _Head], None]) -> None:
            """Emit `body` for every value head of this worker."""
            body(0, heads[0])
            for number in range(1, several):
                with T.If(number < work.count):
                    with T.Then():
                        body(number, heads[number])

        def fetch(number: int, head: _Head) -> None:
            tiles.load(head.beta, self._rows(work.beta, work, start, work.hv + number, 1), rows=m)
            if self.gate == "none":
                tiles.zero(head.G)
            else:
                tiles.scan(head.G, self._rows(work.g, work, start, work.hv + number, 1), m, turn=number)

        def window(number: int, buffer: Any, cols: int) -> Any:
            return tiles.window(buffer, (unit + number) * (C * cols), C, cols, (cols, 1))

        self._load_keys(work, start, m)
        each(fetch)
        tiles.sync()
        tiles.pack(self.k_left, self.k_right)
        tiles.pack(self.q_left)
        if self.data != "bfloat16":
            tiles.sync()
        self._norms(work, self.k_left, self.q_left)
        tiles.sync()
        *summands, P_kept, factors_kept = kept

        def triangles_of(number: int) -> tuple[tuple[Any, ...], tuple[Tile, ...]]:
            G, beta, A = heads[number].G, heads[number].beta, heads[number].A
            return (A, window(number, P_kept, C)), (G, tiles.turn(G), n, tiles.turn(n), r, beta)

        def finish(i: Expr, j: Expr, decay: Expr, kk: Expr, qk: Expr, *values: Expr) -> tuple[Expr, Expr]:
            _a, _b, f, _h, s, w = values
            return T.Select(j < i, kk * (f * w) * decay, zero), T.Select(j <= i, qk * s * decay, zero)

        tiles.triangles(
            (self.k_left, self.q_left), self.k_right, triangles_of, each,
            common=lambda a, b, _f, h, _r, _w: h * exp(a - b), finish=finish,
        )  # fmt: skip

        def keep_factors(number: int, head: _Head) -> None:
            tiles.fill(
                window(number, factors_kept, FACTORS), head.beta, n, r, head.G, tiles.block(head.G, C - 1, 0, 1, 1),
                row=lambda w, f, s, a, e: (w * f * exp(a), s * exp(a), f * exp(e - a), w, exp(e), zero, zero, zero),
                turn=number,
            )  # fmt: skip

        each(keep_factors)
        # Less memory, more chunks side by side.
        tiles.release(self.k, self.q)
        self._invert(work.count * C)
        tiles.sync()
        each(
            lambda number, _: tiles.keep(
                tuple(window(number, buffer, C) for buffer in summands), tiles.block(self.inverse, C * number, 0, C, C)
            )
        )

    def carry_heads(self, work: Any, kept: tuple[Any, ...], unit: Expr, heads: Expr) -> None:
        """Advance the worker's state over all tokens of its sequence, with what was kept from `unit` on."""
        tiles, C, VT, data = self.tiles, self.C, self.VT, self.data
        S, U, U_end = tiles.state(T.int64(0)), tiles.tile(C, VT, "register"), tiles.tile(C, VT, "register")
        S_right, U_end_right = tiles.operand(S, "right"), tiles.operand(U_end, "right")
        U_right = tiles.operand(U, "right", coarse=True)
        # For those who do not have it.
        S_shown = tiles.operand(S, "right", coarse=True)
        # Two of each or more: one is read while the next chunks arrive in the others.
        stages = tiles.stages
        both = {
            "k": tiles.tile(stages * C, self.K, dtype=data), "q": tiles.tile(stages * C, self.K, dtype=data),
            "v": tiles.tile(stages * C, VT, dtype=data),
        }  # fmt: skip
        summands = [f"inverse{number}" for number in range(len(_summands(data)))]
        kept_names = (*summands, "P", "factors")
        for name, dtype in zip(kept_names, (*_summands(data), data, "float32"), strict=True):
            both[name] = tiles.tile(stages * C, FACTORS if name == "factors" else C, dtype=dtype)

        def half(name: str, c: Expr) -> Tile:
            return tiles.block(both[name], T.Cast("int32", c % stages) * C, 0, C, both[name].cols)

        # Places in tensors go on from chunk to chunk: as sums in memory they are no expressions that every chunk computes again.
        tensors = {
            "k": (work.k, work.h, 0),
            "q": (work.q, work.h, 0),
            "v": (work.v, work.hv, work.j0),
            "o": (work.o, work.hv, work.j0),
        }
        places, names = tiles.integers(len(tensors) + 1), list(tensors)
        for number, (buffer, head, col) in enumerate(tensors.values()):
            s = buffer.strides
            T.buffer_store(places, work.row * s[0] + work.first * s[1] + head * s[2] + col, [number])
        T.buffer_store(places, unit, [len(names)])

        def rows_of(name: str) -> Tile:
            step, cols = tensors[name][0].strides[1], self.K if name in {"k", "q"} else VT
            return tiles.window(tensors[name][0], places[names.index(name)], C, cols, (step, 1))

        def proceed(name: str) -> None:
            number, step = names.index(name), tensors[name][0].strides[1]
            T.buffer_store(places, places[number] + C * step, [number])

        whole = tiles.integers(3)
        for number, name in enumerate(("k", "q", "v")):
            T.buffer_store(whole, T.Cast("int64", tiles.pieces(rows_of(name))), [number])

        def fetch(c: Expr) -> None:
            with T.If(c < count), T.Then():
                m, own = T.min(T.int64(C), work.length - c * C), places[len(names)]
                for number, name in enumerate(("k", "q", "v")):
                    tiles.load(half(name, c), rows_of(name), rows=m, pieces=whole[number] != 0)
                    proceed(name)
                for name, buffer in zip(kept_names, kept, strict=True):
                    cols = both[name].cols
                    window = tiles.window(buffer, own * (C * cols), C, cols, (cols, 1))
                    tiles.load(half(name, c), window, lower=cols == C, pieces=True)
                T.buffer_store(places, own + heads, [len(names)])
            tiles.asked()

        def advance(c: Expr, lead: bool, rest: bool, bring: bool) -> None:
            m = T.Bind(T.min(T.int64(C), work.length - c * C))
            factors = [tiles.block(both["factors"], T.Cast("int32", c % stages) * C, number, C, 1) for number in range(4)]
            end = tiles.block(both["factors"], T.Cast("int32", c % stages) * C, 4, 1, 1)
            k_start, q_start, k_end, beta = factors
            k, q, P = half("k", c), half("q", c), half("P", c)
            k_left, k_t_left = tiles.operand(k, "left"), tiles.operand(k, "left", transpose=True)
            q_left, P_left = tiles.operand(q, "left"), tiles.operand(P, "left")
            inverse_left = [tiles.operand(half(name, c), "left") for name in summands]

            def update() -> None:
                tiles.mma(S, k_t_left, U_end_right, start=lambda _i, _j, s, d: s * d, sources=(end,))

            tiles.sync()
            if bring and not tiles.deferred:
                fetch(c + (stages - 1))
            for operand in (*inverse_left, k_left, q_left, P_left, k_t_left):
                tiles.pack(operand)
            if data != "bfloat16":
                tiles.sync(loads=False)
            if lead:
                tiles.mma(
                    self.R, k_left, S_right, finish=lambda _i, _j, x, v, b, d: b * v - d * x,
                    sources=(half("v", c), beta, k_start),
                )  # fmt: skip
            # All wait for the product above, nobody for this: it begins behind it.
            if bring and tiles.deferred:
                fetch(c + (stages - 1))
            if tiles.held_right and (lead or rest):
                if lead:
                    tiles.pack(S_shown)
                tiles.sync(loads=False)
            if rest:
                tiles.mma(self.out, q_left, S_shown, coarse=True)
            if lead:
                tiles.pack(self.R_right)
                tiles.sync(loads=False, team=True)
                tiles.mma(U, inverse_left[0], self.R_right, lower="left")
                for summand in inverse_left[1:]:
                    tiles.mma(U, summand, self.R_right, lower="left", start=keep, coarse=True)
            # What needs no U stands between the product and the first that reads it.
            if rest:
                tiles.map(self.out, lambda _i, _j, x, d: x * d, self.out, q_start)
            if lead:
                tiles.map(U_end, lambda _i, _j, u, w: u * w, U, k_end)
                if tiles.held_right:
                    # The product that all wait for first.
                    tiles.pack(U_end_right)
                    update()
                    tiles.pack(U_right)
                else:
                    tiles.pack(U_right)
                    tiles.pack(U_end_right)
            if lead or rest:
                tiles.sync(loads=False)
            if not tiles.held_right:
                update()
            if rest:
                tiles.mma(self.out, P_left, U_right, lower="left", start=keep, coarse=True)
            if lead or not tiles.held_right:
                tiles.pack(S_right)
            if rest:
                tiles.store(rows_of("o"), self.out, rows=m)
                proceed("o")

        count = T.Bind((work.length + C - 1) // C)
        tiles.clear(*(both[name] for name in kept_names if both[name].cols == C))
        # One team makes R and U of a chunk, another its output; the last one brings the next chunks. The state is the first one's
        # where that keeps it for its products, else it is shared out.
        for team in tiles.teams:
            lead, rest, bring = team == tiles.teams[0], team == tiles.teams[:2][-1], team == tiles.teams[-1]
            with tiles.team(team):
                if bring:
                    for number in range(stages - 1):
                        fetch(T.int64(number))
                if lead or not tiles.held_right:
                    tiles.pack(S_right)
                with T.serial(count) as c:
                    advance(c, lead, rest, bring)
