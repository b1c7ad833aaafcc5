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
per channel (KDA) the exponentials stand inside the products; see `chunk_products.py`, which has the products and the inverse.

All can be done in one pass over a sequence, here, or what does not depend on states ahead of it: `chunk_ahead.py`, and
`chunk_channels.py` with a gate per channel.

**Growing states.** U is what is left of beta (V - exp(G) K S) once the chunk's earlier tokens have taken away what they replace:
R - A U. With decaying gates no term is much larger than the difference. With positive log-decays exp(G) grows, while every token
takes the direction of its key out of the state, a K-th of it: after C tokens the terms are larger than the difference by a
factor that is exponential in C / K, and fp32 loses it (token by token nothing cancels). So a chunk has at most 2 K tokens.

Source of the maths: Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484), Gated Delta Networks
(arXiv:2412.06464); gate per channel: Kimi Linear (arXiv:2510.26692).

The functions below are Python that runs while the kernel is parsed; `with T.serial(...)` is a loop of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.chunk_ahead import HeadsAhead
from tvm_gdn.ops.tir.chunk_channels import ChannelsAhead
from tvm_gdn.ops.tir.chunk_products import BLOCK, ChunkProducts
from tvm_gdn.ops.tir.delta_rule import delta_rule
from tvm_gdn.ops.tir.delta_rule_step import NORM_EPS
from tvm_gdn.ops.tir.tiles import ChunkTiles, Expr, Operand, Tile, keep
from tvm_gdn.spec import Geometry


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
        sizes = ChannelsAhead.channel_sizes(C, K) if self.channel else HeadsAhead.head_sizes(C, data)
        self.kept = tuple(T.alloc_buffer((units * elements,), dtype) for elements, dtype in sizes)

    def prepare(self, *arguments: Any) -> None:
        """One chunk of value heads of one q/k head, ahead of the states."""
        *work, unit, start = arguments
        chunks = _Chunks(*self.arguments)
        (chunks.prepare_channels if self.channel else chunks.prepare_heads)(_Work(*work), self.kept, unit, start)

    def __call__(self, *arguments: Any) -> None:
        """All chunks of a worker's value heads."""
        *arguments, unit, heads = arguments
        work, chunks = _Work(*arguments), _Chunks(*self.arguments)
        if self.ahead:
            (chunks.carry_channels if self.channel else chunks.carry_heads)(work, self.kept, unit, heads)
        else:
            chunks.run(replace(work, j0=work.j0 + self.tiles.shift))


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


class _Chunks(HeadsAhead, ChannelsAhead, ChunkProducts):
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
