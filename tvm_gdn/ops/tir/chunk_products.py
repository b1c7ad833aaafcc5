"""Products of a chunk's keys, queries and state, and the inverse (`chunk.py`, which has the maths)."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.tiles import GRANULE, Expr, Operand, Tile

#: Diagonal blocks that are inverted by substitution; larger ones are merged by products.
BLOCK = 16


class ChunkProducts:
    """The steps of one chunk that its gate decides, and the inverse, on the tiles that a worker has."""

    tiles: Any
    C: int
    K: int

    def _head_products(self, m: Expr) -> None:
        """One gate per head, or none: A, P, and factors of rows and columns around the products of K and Q."""
        tiles, exp, zero = self.tiles, self.tiles.exp, T.float32(0)
        G, n, r, beta, D = self.G, self.k_factor, self.q_factor, self.beta, self.D
        last = tiles.block(G, self.C - 1, 0, 1, 1)
        tiles.map(self.k_start, lambda _i, _j, x, a, b: x * a * exp(b), beta, n, G)
        tiles.map(self.q_start, lambda _i, _j, a, b: a * exp(b), r, G)
        tiles.map(self.k_end, lambda _i, _j, a, b, e: a * exp(e - b), n, G, last)
        tiles.map(self.end, lambda _i, _j, e: exp(e), last)
        tiles.decays(D, G, n, m)
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
