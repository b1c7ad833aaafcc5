"""The chunked delta rules in TensorIR (WY / UT-transform form): one definition over the tile operations of `tiles.py`.

A chunk of C tokens, in fp32, with G the cumulated log-decays within the chunk, S the state before it, rows of K, Q, V the
tokens, n and r the rows' factors from l2 normalization and scale (products run on K and Q as they are stored)::

    A = strictly_lower(beta_i n_i n_j exp(G_i - G_j) k_i.k_j)
    P = lower(r_i n_j exp(G_i - G_j) q_i.k_j)
    R = beta (V - n exp(G) (K S))
    U = (I + A)^-1 R
    O = r exp(G) (Q S) + P U
    S = exp(G_C) S + K^T (n exp(G_C - G) U)

which equals the token recurrence in exact arithmetic. Only differences of cumulated gates are exponentiated, each between a
token and an earlier one (or the chunk's start): decays of any size give factors of at most one, never an overflow. With a gate
per channel (KDA) the exponentials stand inside the products; see `_channel_products`.

**Growing states.** U is what is left of beta (V - exp(G) K S) once the chunk's earlier tokens have taken away what they replace:
R - A U. With decaying gates no term is much larger than the difference. With positive log-decays exp(G) grows, while every token
takes the direction of its key out of the state, a K-th of it: after C tokens the terms are larger than the difference by a
factor that is exponential in C / K, and fp32 loses it (token by token nothing cancels). So a chunk has at most 2 K tokens.

Source of the maths: Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484), Gated Delta Networks
(arXiv:2412.06464); gate per channel: Kimi Linear (arXiv:2510.26692).

The functions below are Python that runs while the kernel is parsed; `with T.serial(...)` is a loop of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.chunk_channels import ChannelsAhead
from tvm_gdn.ops.tir.delta_rule import NORM_EPS, delta_rule
from tvm_gdn.ops.tir.tiles import GRANULE, ChunkTiles, Expr, Operand, Tile, keep
from tvm_gdn.spec import Geometry

#: Diagonal blocks that are inverted by substitution; larger ones are merged by products.
BLOCK = 16
#: Factors that are kept of every token: of K S, of Q S, of U in the state's update, beta, and the state's own decay.
FACTORS = 8


def chunk_lengths(K: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens per chunk that keep fp32's digits where states grow (above), of those that a target offers; one block always.

    RMS error of o in fp32 (worst of 12 draws, 140 tokens, log-decays in [0, 0.5], random keys): K = 7 with 64 tokens 7e-5, with
    16 4e-6; K = 16 with 128 tokens 5e-5, with 32 1e-6; K = 64 with 128 tokens 2e-6. Below K = 5 one block is too long already:
    1e-4 at K = 3 (in [0, 0.25] 4e-6); there, and where keys repeat one direction, the token-recurrent form keeps the digits.
    """
    return tuple(length for length in lengths if length <= max(BLOCK, 2 * K))


def chunk(geometry: Geometry, tiles: ChunkTiles) -> Any:
    """Build the chunked kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes K and V, dtypes of the tensors present, ``state_v_first`` and ``output_final_state``.
    tiles : ChunkTiles
        The target's tile operations.

    Returns
    -------
    tvm.tirx.PrimFunc
    """

    gate = "channel" if geometry.attr.get("channel_gate") else "head" if "g" in geometry.dtype else "none"
    return delta_rule(geometry, tiles, _Advance(tiles, geometry.axis["K"], gate, geometry.dtype["k"]))


class _Advance:
    """What `delta_rule` calls: all in one pass over a sequence, or what does not depend on states ahead of it."""

    def __init__(self, tiles: ChunkTiles, K: int, gate: str, data: str) -> None:
        self.arguments, self.tiles = (tiles, K, gate, data), tiles
        self.ahead, self.channel = tiles.ahead, gate == "channel"
        self.kept: tuple[Any, ...] = ()

    def keep(self, units: Expr) -> None:
        """Memory for (I + A)^-1, P, factors and, with a gate per channel, operands: of every chunk of every value head."""
        C, K, data = self.tiles.chunk, self.arguments[1], self.arguments[3]
        sizes = [*((C * C, dtype) for dtype in _summands(data)), (C * C, data), (C * FACTORS, "float32")]
        if self.channel:
            sizes = ChannelsAhead.channel_sizes(C, K)
        self.kept = tuple(T.alloc_buffer((units * elements,), dtype) for elements, dtype in sizes)

    def prepare(self, *arguments: Any) -> None:
        """One chunk of value heads of one q/k head, ahead of the states."""
        *work, unit, start = arguments
        chunks = _Chunks(*self.arguments)
        (chunks.prepare_channels if self.channel else chunks.prepare)(_Work(*work), self.kept, unit, start)

    def __call__(self, *arguments: Any) -> None:
        """All chunks of a worker's value heads."""
        *arguments, unit, heads = arguments
        work, chunks = _Work(*arguments), _Chunks(*self.arguments)
        if self.ahead:
            (chunks.carry_channels if self.channel else chunks.carry)(work, self.kept, unit, heads)
        else:
            chunks.run(replace(work, j0=work.j0 + self.tiles.shift))


def _summands(data: str) -> tuple[str, ...]:
    """Dtypes of tiles whose sum is (I + A)^-1: two bf16 numbers have the digits that products of 16-bit data need."""
    return ("float32",) if data == "float32" else ("bfloat16", "bfloat16")


@dataclass(frozen=True)
class _Work:
    """What a worker does: `count` value heads from `hv`, of q/k head `h`, columns from `j0`, tokens from `first` of a row."""

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    o: Any
    row: Expr
    first: Expr
    length: Expr
    h: Expr
    hv: Expr
    count: Expr
    j0: Expr
    scale: Expr
    l2norm: Expr
    #: Whether the states before the first chunk are zero.
    fresh: Expr
    #: Tensors of states that are read or written when the last chunk is done, from the first head's elements on: (tensor, offset,
    #: whether written).
    later: tuple[tuple[Any, Expr, bool], ...] = ()


@dataclass(frozen=True)
class _Head:
    """Tiles of a value head: sums of log-decays, beta, A."""

    G: Tile
    beta: Tile
    A: Tile


class _Chunks(ChannelsAhead):
    """Tiles of a worker, and the steps over them."""

    def __init__(self, tiles: ChunkTiles, K: int, gate: str, data: str) -> None:
        self.tiles, self.K, self.C, self.VT, self.gate, self.data = tiles, K, tiles.chunk, tiles.v_tile, gate, data
        C, VT, tile, operand = self.C, self.VT, tiles.tile, tiles.operand
        self.k, self.q = tile(C, K, dtype=data), tile(C, K, dtype=data)
        self.k_factor, self.q_factor = tile(C, 1), tile(C, 1)
        self.beta, self.k_start, self.q_start, self.k_end = tile(C, 1), tile(C, 1), tile(C, 1), tile(C, 1)
        self.kk, self.qk = tile(C, C), tile(C, C)
        # One value head overwrites the products of q and k with its own A and P; several need them again.
        self.A, self.P = (self.kk, self.qk) if tiles.span == 1 or gate == "channel" else (tile(C, C), tile(C, C))
        self.inverse, self.merge = tile(C, C), tile(max(C // 2, BLOCK), max(C // 2, BLOCK))
        self.R, self.U, self.out = tile(C, VT, "register"), tile(C, VT, "register"), tile(C, VT, "register", data)
        self.R_right, self.inverse_left = operand(self.R, "right"), operand(self.inverse, "left")
        if tiles.fused:
            self.U_right, self.P_left = operand(self.U, "right", coarse=True), operand(self.P, "left", coarse=True)
            self.U_end_right = operand(self.U, "right", scale=self.k_end)
        else:
            self.U_right, self.P_left = operand(self.U, "right"), operand(self.P, "left")
        if gate == "channel":
            self.G = tile(C, K)
            self.near, self.far = tile(BLOCK, K), tile(C, K)
            self.near_left, self.far_right = operand(self.near, "left"), operand(self.far, "right", transpose=True)
            self.decayed = tile(C, K)
            self.decayed_left = operand(self.decayed, "left")
            self.decayed_t_left = operand(self.decayed, "left", transpose=True)
            self.end = tile(1, K)
        else:
            self.G, self.D = tile(C, 1), tile(C, C)
            self.k_left, self.q_left = operand(self.k, "left"), operand(self.q, "left")
            self.k_right, self.k_t_left = operand(self.k, "right", transpose=True), operand(self.k, "left", transpose=True)
            self.end = tile(1, 1)

    def run(self, work: _Work) -> None:
        """Advance the worker's states over all tokens of its sequence."""
        C = self.C
        self.tiles.zero(self.inverse)  # above the diagonal blocks it stays so
        with T.serial((work.length + C - 1) // C) as c:
            start = T.Bind(work.first + c * C)
            m = T.Bind(T.min(T.int64(C), work.length - c * C))
            zero = T.Bind(T.And(work.fresh, c == 0))
            more = T.Bind((c + 1) * C < work.length)
            self._keys(work, start, m)
            if self.tiles.span == 1:
                self._value_head(work, start, m, T.int64(0), zero, more)
            else:
                with T.serial(work.count) as index:
                    self._value_head(work, start, m, index, zero, more)

    def prepare(self, work: _Work, kept: tuple[Any, ...], unit: Expr, at: Expr) -> None:
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

    def carry(self, work: _Work, kept: tuple[Any, ...], unit: Expr, heads: Expr) -> None:
        """Advance the worker's state over all tokens of its sequence, with what was kept from `unit` on."""
        tiles, C, VT, data = self.tiles, self.C, self.VT, self.data
        S, U, U_end = tiles.state(T.int64(0)), tiles.tile(C, VT, "register"), tiles.tile(C, VT, "register")
        S_right, U_end_right = tiles.operand(S, "right"), tiles.operand(U_end, "right")
        U_right = tiles.operand(U, "right", coarse=True)
        # Two of each: one is read while the next chunk arrives in the other.
        both = {
            "k": tiles.tile(2 * C, self.K, dtype=data), "q": tiles.tile(2 * C, self.K, dtype=data),
            "v": tiles.tile(2 * C, VT, dtype=data),
        }  # fmt: skip
        summands = [f"inverse{number}" for number in range(len(_summands(data)))]
        kept_names = (*summands, "P", "factors")
        for name, dtype in zip(kept_names, (*_summands(data), data, "float32"), strict=True):
            both[name] = tiles.tile(2 * C, FACTORS if name == "factors" else C, dtype=dtype)

        def half(name: str, c: Expr) -> Tile:
            return tiles.block(both[name], T.Cast("int32", c % 2) * C, 0, C, both[name].cols)

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

        def advance(c: Expr, lead: bool, rest: bool) -> None:
            m = T.Bind(T.min(T.int64(C), work.length - c * C))
            factors = [tiles.block(both["factors"], T.Cast("int32", c % 2) * C, number, C, 1) for number in range(4)]
            end = tiles.block(both["factors"], T.Cast("int32", c % 2) * C, 4, 1, 1)
            k_start, q_start, k_end, beta = factors
            k, q, P = half("k", c), half("q", c), half("P", c)
            k_left, k_t_left = tiles.operand(k, "left"), tiles.operand(k, "left", transpose=True)
            q_left, P_left = tiles.operand(q, "left"), tiles.operand(P, "left")
            inverse_left = [tiles.operand(half(name, c), "left") for name in summands]

            def fetch_next() -> None:
                with T.If(c + 1 < count), T.Then():
                    fetch(c + 1)

            tiles.sync()
            if not tiles.deferred:
                fetch_next()
            for operand in (*inverse_left, k_left, q_left, P_left, k_t_left):
                tiles.pack(operand)
            if data != "bfloat16":
                tiles.sync(loads=False)
            if lead:
                tiles.mma(
                    self.R, k_left, S_right, finish=lambda _i, _j, x, v, b, d: b * v - d * x,
                    sources=(half("v", c), beta, k_start),
                )  # fmt: skip
            if rest:
                # All wait for the product above, nobody for this one: it begins behind it.
                if tiles.deferred:
                    fetch_next()
                tiles.mma(self.out, q_left, S_right, coarse=True)
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
                tiles.pack(U_right)
                tiles.pack(U_end_right)
            tiles.sync(loads=False)
            tiles.mma(S, k_t_left, U_end_right, start=lambda _i, _j, s, d: s * d, sources=(end,))
            if rest:
                tiles.mma(self.out, P_left, U_right, lower="left", start=keep, coarse=True)
            tiles.pack(S_right)
            if rest:
                tiles.store(rows_of("o"), self.out, rows=m)
                proceed("o")

        count = T.Bind((work.length + C - 1) // C)
        # One team makes R and U of a chunk, another its output, and brings the next chunk; the state is all teams' work.
        for team in tiles.teams:
            lead, rest = team == tiles.teams[0], team == tiles.teams[-1]
            with tiles.team(team):
                if rest:
                    with T.If(count > 0), T.Then():
                        fetch(T.int64(0))
                tiles.pack(S_right)
                with T.serial(count) as c:
                    advance(c, lead, rest)

    def _rows(self, buffer: Any, work: _Work, start: Expr, head: Expr, cols: int, col: Expr | int = 0) -> Tile:
        """Tokens of the chunk in a tensor [B, T, heads, columns]."""
        s = buffer.strides
        offset = work.row * s[0] + start * s[1] + head * s[2] + col
        return self.tiles.window(buffer, offset, self.C, cols, (s[1], 1))

    def _load_keys(self, work: _Work, start: Expr, m: Expr) -> None:
        """K and Q of a chunk."""
        self.tiles.load(self.k, self._rows(work.k, work, start, work.h, self.K), rows=m)
        self.tiles.load(self.q, self._rows(work.q, work, start, work.h, self.K), rows=m)

    def _norms(self, work: _Work, k_left: Operand, q_left: Operand) -> None:
        """Factors of the rows of K and Q, ahead of the states."""
        tiles, one = self.tiles, T.float32(1)
        for turn, (operand, factor, scale) in enumerate(((k_left, self.k_factor, one), (q_left, self.q_factor, work.scale))):
            with T.If(work.l2norm != 0):
                with T.Then():
                    tiles.squares(factor, operand, lambda s, a=scale: a * T.rsqrt(s + T.float32(NORM_EPS)), turn=turn)
                with T.Else():
                    tiles.map(factor, lambda _i, _j, a=scale: a)

    def _keys(self, work: _Work, start: Expr, m: Expr) -> None:
        """What all value heads of a q/k head share: K, Q, their factors, K K^T and Q K^T."""
        tiles, one = self.tiles, T.float32(1)
        tiles.sync()
        self._load_keys(work, start, m)
        tiles.sync()
        for tile, factor, scale in ((self.k, self.k_factor, one), (self.q, self.q_factor, work.scale)):
            with T.If(work.l2norm != 0):
                with T.Then():
                    tiles.row_sum(factor, lambda _i, _j, x: x * x, tile)
                    tiles.sync()
                    tiles.map(factor, lambda _i, _j, s, a=scale: a / T.sqrt(s + T.float32(NORM_EPS)), factor)
                with T.Else():
                    tiles.map(factor, lambda _i, _j, a=scale: a)
        if self.gate != "channel":
            tiles.pack(self.k_left, self.k_right, self.k_t_left, rows=m)
            tiles.pack(self.q_left, rows=m)
            tiles.sync()
            tiles.mma(self.kk, self.k_left, self.k_right, rows=m, cols=m, lower="result")
            tiles.mma(self.qk, self.q_left, self.k_right, rows=m, cols=m, lower="result")

    def _value_head(self, work: _Work, start: Expr, m: Expr, index: Expr, zero: Expr, more: Expr) -> None:
        """One chunk of one value head.

        `zero`: its state is still zero, so that K S and Q S need not be computed; `more`: another chunk will read the new one.
        """
        tiles = self.tiles
        hv = T.Bind(work.hv + index)
        S = tiles.state(index)
        S_right = tiles.operand(S, "right")
        output = self._rows(work.o, work, start, hv, self.VT, work.j0)
        tiles.sync()
        tiles.load(self.beta, self._rows(work.beta, work, start, hv, 1), rows=m)
        tiles.load(self.R, self._rows(work.v, work, start, hv, self.VT, work.j0), rows=m)
        if self.gate == "none":
            tiles.zero(self.G)
        else:
            tiles.scan(self.G, self._rows(work.g, work, start, hv, self.G.cols), m)
        tiles.sync()
        channel = self.gate == "channel"
        (self._channel_products if channel else self._head_products)(m)
        with T.If(zero):
            with T.Then():
                tiles.map(self.R, lambda _i, _j, v, b: b * v, self.R, self.beta, rows=m)
                tiles.map(self.out, lambda _i, _j: T.float32(0), rows=m)
                if tiles.fused:
                    tiles.pack(self.R_right, rows=m)
            with T.Else():
                if not tiles.fused:
                    tiles.pack(S_right)
                tiles.sync()
                (self._channel_state if channel else self._head_state)(m, S_right, output)
        if channel:
            tiles.sync()
            last = tiles.block(self.G, self.C - 1, 0, 1, self.K)
            tiles.map(self.decayed, lambda _i, _j, x, a, e: x * tiles.exp(e - a), self.k, self.G, last, rows=m)
            tiles.sync()
            tiles.pack(self.decayed_t_left, rows=m)
        # Here R = beta (V - n exp(G) (K S)), out = r exp(G) (Q S), A and P are decayed and masked.
        self._invert(T.Bind(T.min(T.int64(self.C), (m + tiles.tail - 1) // tiles.tail * tiles.tail)))
        tiles.sync()
        tiles.pack(self.inverse_left, rows=m, lower=True)
        tiles.pack(self.P_left, rows=m, lower=True)
        if tiles.fused:
            into = (self.U_right, self.U_end_right)
            self._expect_states(work, index, more, 0)
            tiles.mma(self.U, self.inverse_left, self.R_right, rows=m, depth=m, lower="left", into=into)
        else:
            tiles.pack(self.R_right, rows=m)
            tiles.sync()
            self._expect_states(work, index, more, 0)
            tiles.mma(self.U, self.inverse_left, self.R_right, rows=m, depth=m, lower="left")
            tiles.pack(self.U_right, rows=m)
        tiles.sync()
        self._expect_states(work, index, more, 1)
        tiles.mma(self.out, self.P_left, self.U_right, rows=m, depth=m, lower="left", start=keep)
        tiles.store(output, self.out, rows=m)
        tiles.sync()
        self._expect_states(work, index, more, 2)
        self._expect_states(work, index, more, 3)
        # Next come the same tokens' next value head, or the next tokens.
        last = T.Bind(index + 1 == work.count)
        next_start = T.Bind(T.Select(last, start + self.C, start))
        next_hv = T.Bind(T.Select(last, work.hv, hv + 1))
        tiles.expect(self._rows(work.v, work, next_start, next_hv, self.VT, work.j0))
        tiles.expect(*(self._rows(x, work, start + self.C, work.h, self.K) for x in (work.k, work.q)))
        update: Operand = self.decayed_t_left if self.gate == "channel" else self.k_t_left
        advance: dict[str, Any] = {"start": lambda _i, _j, s, d: s * d, "sources": (tiles.turn(self.end),)}
        if tiles.fused:
            tiles.mma(S, update, self.U_end_right, depth=m, into=(S_right,), wanted=more, **advance)
        else:
            tiles.map(self.U, lambda _i, _j, u, w: u * w, self.U, self.k_end, rows=m)
            tiles.pack(self.U_right, rows=m)
            tiles.sync()
            tiles.mma(S, update, self.U_right, depth=m, **advance)

    def _expect_states(self, work: _Work, index: Expr, more: Expr, quarter: int) -> None:
        """A quarter of the states that memory is asked for after the last chunk: each has as many bytes as a chunk's data."""
        for buffer, offset, write in work.later if self.K % 4 == 0 else ():
            at = offset + T.Cast("int64", index) * (self.K * self.tiles.V) + quarter * (self.K * self.tiles.V // 4)
            window = self.tiles.window(buffer, at, self.K // 4, self.tiles.V, (self.tiles.V, 1))
            self.tiles.expect(window, write=write, when=T.Not(more))

    def _head_products(self, m: Expr) -> None:
        """One gate per head, or none: A, P, and factors of rows and columns around the products of K and Q."""
        tiles, exp, zero = self.tiles, self.tiles.exp, T.float32(0)
        G, n, r, beta, D = self.G, self.k_factor, self.q_factor, self.beta, self.D
        last = tiles.block(G, self.C - 1, 0, 1, 1)
        tiles.map(self.k_start, lambda _i, _j, x, a, b: x * a * exp(b), beta, n, G)
        tiles.map(self.q_start, lambda _i, _j, a, b: a * exp(b), r, G)
        tiles.map(self.k_end, lambda _i, _j, a, b, e: a * exp(e - b), n, G, last)
        tiles.map(self.end, lambda _i, _j, e: exp(e), last)
        tiles.map(
            D, lambda i, j, a, b, f: T.Select(j <= i, f * exp(a - b), zero), G, tiles.turn(G), tiles.turn(n), rows=m, lower=True
        )
        tiles.sync()
        tiles.map(self.P, lambda _i, _j, x, d, f: x * d * f, self.qk, D, r, rows=m, lower=True)
        tiles.map(self.A, lambda i, j, x, d, f, b: T.Select(j < i, x * d * f * b, zero), self.kk, D, n, beta, rows=m, lower=True)

    def _head_state(self, m: Expr, S_right: Operand, output: Tile) -> None:
        """K S and Q S."""
        tiles, into = self.tiles, {"into": (self.R_right,)} if self.tiles.fused else {}
        tiles.mma(
            self.R, self.k_left, S_right, rows=m, finish=lambda _i, _j, x, v, b, d: b * v - d * x,
            sources=(self.R, self.beta, self.k_start), **into,
        )  # fmt: skip
        tiles.expect(output, write=True)
        tiles.mma(self.out, self.q_left, S_right, rows=m, finish=lambda _i, _j, x, d: x * d, sources=(self.q_start,))

    def _channel_products(self, m: Expr) -> None:
        """A and P for a gate per channel c: exp(G_ic - G_jc) stands inside the sums over c.

        Off the diagonal blocks both factors are taken relative to the gate at the first token of the row block, which lies
        between the two tokens: neither exponent exceeds zero for decaying gates. Inside a diagonal block no such reference
        exists, and every pair of tokens gets its own exponent.
        """
        tiles, exp, zero = self.tiles, self.tiles.exp, T.float32(0)
        G, K, C, n, r, beta = self.G, self.K, self.C, self.k_factor, self.q_factor, self.beta
        last = tiles.block(G, C - 1, 0, 1, K)
        if C > BLOCK:
            self._channel_products_below(m)
        tiles.pair_sum((self.kk, self.qk), lambda a, y, b: y * exp(a - b), (self.k, self.q), (G,), (self.k, G), m)
        tiles.map(self.k_end, lambda _i, _j, f: f, n)
        tiles.map(self.end, lambda _i, _j, e: exp(e), last)
        tiles.sync()
        tiles.map(self.P, lambda i, j, x, f, h: T.Select(j <= i, x * f * h, zero), self.qk, r, tiles.turn(n), rows=m, lower=True)
        tiles.map(
            self.A, lambda i, j, x, f, h, b: T.Select(j < i, x * f * h * b, zero), self.kk, n, tiles.turn(n), beta,
            rows=m, lower=True,
        )  # fmt: skip
        tiles.sync()

    def _channel_products_below(self, m: Expr) -> None:
        """Of K K^T and Q K^T what stands left of the diagonal blocks; one block has nothing there, and needs no memory for it."""
        tiles, exp, G, K, C = self.tiles, self.tiles.exp, self.G, self.K, self.C
        with T.serial((m + BLOCK - 1) // BLOCK) as b:
            row = b * BLOCK
            reference = tiles.block(G, row, 0, 1, K)
            tiles.sync()
            tiles.map(self.far, lambda _i, _j, x, a, e: x * exp(e - a), self.k, G, reference, rows=row)
            tiles.sync()
            tiles.pack(self.far_right, rows=row)
            for tile, product in ((self.k, self.kk), (self.q, self.qk)):
                source, gates = tiles.block(tile, row, 0, BLOCK, K), tiles.block(G, row, 0, BLOCK, K)
                tiles.sync()
                tiles.map(self.near, lambda _i, _j, x, a, e: x * exp(a - e), source, gates, reference)
                tiles.sync()
                tiles.pack(self.near_left)
                tiles.sync()
                tiles.mma(tiles.block(product, row, 0, BLOCK, C), self.near_left, self.far_right, cols=row)

    def _channel_state(self, m: Expr, S_right: Operand, output: Tile) -> None:
        """K S and Q S."""
        tiles, exp, G, decayed = self.tiles, self.tiles.exp, self.G, self.decayed
        into = {"into": (self.R_right,)} if tiles.fused else {}
        tiles.map(decayed, lambda _i, _j, x, a: x * exp(a), self.k, G, rows=m)
        tiles.sync()
        tiles.pack(self.decayed_left, rows=m)
        tiles.sync()
        tiles.mma(
            self.R, self.decayed_left, S_right, rows=m, finish=lambda _i, _j, x, v, b, f: b * (v - f * x),
            sources=(self.R, self.beta, self.k_factor), **into,
        )  # fmt: skip
        tiles.sync()
        tiles.map(decayed, lambda _i, _j, x, a: x * exp(a), self.q, G, rows=m)
        tiles.sync()
        tiles.pack(self.decayed_left, rows=m)
        tiles.sync()
        tiles.expect(output, write=True)
        tiles.mma(self.out, self.decayed_left, S_right, rows=m, finish=lambda _i, _j, x, f: x * f, sources=(self.q_factor,))

    def _invert(self, wanted: Expr) -> None:
        """Inverse of I + A: diagonal blocks by substitution, then pairs of blocks, [[X, 0], [-Y A' X, Y]], by doubling.

        `wanted` are rows; where products are chained, of several triangles one above the other.
        """
        tiles, T_, A, merge = self.tiles, self.inverse, self.A, self.merge
        tiles.sync()
        tiles.invert_diagonal(T_, A, wanted)
        size = BLOCK
        while size < self.C:
            pairs = (wanted + size - 1) // (2 * size)
            if tiles.chained:

                def pieces(pair: Expr, size: int = size) -> tuple[Tile, ...]:
                    row = pair * (2 * size)
                    below, col = row + size, row % self.C
                    places = (T_, below, col), (T_, below, col + size), (A, below, col), (T_, row, col)
                    return tuple(tiles.block(tile, row, col, size, size) for tile, row, col in places)

                # A warp merges what it inverted itself.
                tiles.sync(warp=size == BLOCK)
                tiles.chain(pairs, pieces, lambda _i, _j, x: -x)
                size *= 2
                continue
            with T.serial(pairs) as pair:
                low = pair * (2 * size)
                high = low + size
                upper = tiles.operand(tiles.block(T_, low, low, size, size), "right")
                lower = tiles.operand(tiles.block(T_, high, high, size, size), "left")
                below = tiles.operand(tiles.block(A, high, low, size, size), "left")
                product = tiles.block(merge, 0, 0, size, size)
                product_right = tiles.operand(product, "right")
                tiles.sync()
                tiles.pack(upper)
                tiles.pack(lower)
                tiles.pack(below)
                tiles.sync()
                # Rows from `wanted` on were not computed.
                there = None if tiles.tail == GRANULE else T.Bind(T.min(T.int64(size), wanted - high))
                tiles.mma(product, below, upper, rows=there)
                tiles.sync()
                tiles.pack(product_right)
                tiles.sync()
                merged = tiles.block(T_, high, low, size, size)
                tiles.mma(merged, lower, product_right, rows=there, depth=there, finish=lambda _i, _j, x: -x)
            size *= 2
