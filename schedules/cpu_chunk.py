"""Tile operations of the chunked delta rule on CPUs: fp32, explicit vectors, register-blocked products.

Every product runs on one micro-kernel: `rows` x `columns` fp32 accumulators in vector registers, one broadcast of the left and
one vector of the right operand per multiply-add. Tiles are arrays on the worker's stack (L2-resident: about 0.3 MiB at
C = 64, K = V = 128); nothing is allocated per call.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array, sum_lanes

BLOCK = 16


class ChunkTiles(CpuTiles):
    """Tile operations of one geometry.

    Parameters
    ----------
    K, V, v_tile : int
        State rows, state columns, columns per worker.
    chunk : int
        Tokens per chunk, a multiple of 16.
    rows, columns : int
        Accumulators of the micro-kernel; `rows` divides 16, `columns` divides v_tile.
    v_first : bool
        Whether states are stored ``[V, K]``; the tile is then transposed on the way in and out.
    direct : bool
        Update an fp32 K-first state in the pool's own memory.
    """

    def __init__(self, K: int, V: int, *, v_tile: int, chunk: int, rows: int, columns: int, v_first: bool, direct: bool) -> None:
        self.K, self.V, self.v_tile, self.chunk = K, V, v_tile, chunk
        self.mr, self.nr, self.v_first, self.direct = rows, columns, v_first, direct and not v_first
        self.square_nr = next(n for n in (columns, 32, 16) if chunk % n == 0)
        self.load = self.store = self._copy()
        self.zero = self._zero()
        self.load_rows, self.transpose, self.scale_rows = self._load_rows(), self._transpose(), self._scale_rows()
        self.gram, self.decay = self._gram(), self._decay()
        self.gram_channel, self.mask = self._gram_channel(), self._mask()
        self.gemm, self.gemm_lower = self._gemm(), self._gemm_lower()
        self.gemm_update, self.solve = self._gemm_update(), self._solve()

    def cols(self, count: int) -> Any:
        """Loop over the V axis, or any contiguous axis of a tile."""
        return T.vectorized(count)

    def col(self, j: Any) -> Any:
        """Index on the V axis of local column j."""
        return j

    def k_rows(self) -> Any:
        """[C, K] tile."""
        return local_array(self.chunk, self.K)

    def k_columns(self) -> Any:
        """[K, C] tile."""
        return local_array(self.K, self.chunk)

    def v_rows(self) -> Any:
        """[C, v_tile] tile."""
        return local_array(self.chunk, self.v_tile)

    def square(self) -> Any:
        """[C, C] tile."""
        return local_array(self.chunk, self.chunk)

    def per_token(self) -> Any:
        """[C] vector."""
        return local_array(self.chunk)

    def per_channel(self) -> Any:
        """[K] vector."""
        return local_array(self.K)

    def state(self) -> Any:
        """[K, v_tile] state tile."""
        return local_array(self.K, self.v_tile)

    def view(self, buffer: Any, offset: Any, j0: Any) -> Any:
        """One head's state in a larger tensor as a [K, v_tile] tile: `offset` elements in, from column `j0`."""
        strides = (1, self.K) if self.v_first else (self.V, 1)
        return T.decl_buffer(
            (self.K, self.v_tile), buffer.dtype, data=buffer.data, elem_offset=offset + j0 * strides[1], strides=strides
        )

    def _copy(self) -> Any:
        K, VT, v_first = self.K, self.v_tile, self.v_first

        @T.inline
        def copy(dst, src):
            if v_first:
                for j in T.serial(VT):
                    for i in T.serial(K):
                        dst[i, j] = T.Cast(dst.dtype, src[i, j])
            else:
                for i in T.serial(K):
                    for j in T.vectorized(VT):
                        dst[i, j] = T.Cast(dst.dtype, src[i, j])

        return copy

    def _zero(self) -> Any:
        K, VT = self.K, self.v_tile

        @T.inline
        def zero(W):
            for i in T.serial(K):
                for j in T.vectorized(VT):
                    W[i, j] = T.float32(0)

        return zero

    def _load_rows(self) -> Any:
        C, K = self.chunk, self.K
        eps = 1e-6
        lanes = max(n for n in (1, 2, 4, 8, 16) if K % n == 0)

        @T.inline
        def load_rows(dst, src, row, t0, h, m, scale, l2norm):
            s = local_array(1)
            part = local_array(lanes)
            for i in T.serial(T.int64(C)):
                if i < m:
                    for kk in T.vectorized(K):
                        dst[i, kk] = T.Cast("float32", src[row, t0 + i, h, kk])
                    s[0] = scale
                    if l2norm != 0:
                        for lane in T.vectorized(lanes):
                            part[lane] = T.float32(0)
                        for c in T.serial(K // lanes):
                            for lane in T.vectorized(lanes):
                                part[lane] = part[lane] + dst[i, c * lanes + lane] * dst[i, c * lanes + lane]
                        s[0] = T.float32(0)
                        for lane in T.unroll(lanes):
                            s[0] = s[0] + part[lane]
                        s[0] = scale / T.sqrt(s[0] + T.float32(eps))
                    for kk in T.vectorized(K):
                        dst[i, kk] = dst[i, kk] * s[0]
                else:
                    for kk in T.vectorized(K):
                        dst[i, kk] = T.float32(0)

        return load_rows

    def _transpose(self) -> Any:
        C, K = self.chunk, self.K

        @T.inline
        def transpose(dst, src, m):
            for kk in T.serial(K):
                for i in T.vectorized(C):
                    dst[kk, i] = src[i, kk]

        return transpose

    def _scale_rows(self) -> Any:
        @T.inline
        def scale_rows(A, w, m):
            for i in T.serial(m):
                for kk in T.vectorized(A.shape[1]):
                    A[i, kk] = A[i, kk] * w[i]

        return scale_rows

    def _mask(self) -> Any:
        """A[i, j] = b_i A[i, j] below the diagonal, zero on and above it; gram_channel leaves zeros above."""
        mr = self.mr

        @T.inline
        def mask(A, b, m):
            for i in T.serial((m + mr - 1) // mr * mr):
                for jb in T.serial(i // BLOCK + 1):
                    for j in T.vectorized(BLOCK):
                        A[i, jb * BLOCK + j] = T.Select(jb * BLOCK + j < i, A[i, jb * BLOCK + j] * b[i], T.float32(0))

        return mask

    def _gram_channel(self) -> Any:
        """Lower triangles of A[i, j] = sum_k k_i k_j exp(G_i - G_j) and P with q_i for k_i, gates per channel k.

        Off the diagonal blocks both factors are taken relative to the gate at the first token of the row block, which lies
        between the two tokens: neither exponent exceeds zero for decaying gates. Inside a diagonal block no such reference
        exists, and every pair gets its own exponent.
        """
        mr, K, exp = self.mr, self.K, self.exp
        micro, (clear, _, write) = self._micro(BLOCK), self._put(BLOCK)
        lanes = max(n for n in (1, 2, 4, 8, 16) if K % n == 0)

        @T.inline
        def gram_channel(A, P, kr, qr, right, G, m):
            acc = local_array(mr, BLOCK)
            left = local_array(mr, K)
            pa = local_array(lanes)
            pp = local_array(lanes)
            e = local_array(lanes)

            @T.inline
            def strip(C, rows, ib, io):
                """C[block row ib, all block columns before it] from rows relative to the block's first token."""
                for r in T.serial(mr):
                    for kk in T.vectorized(K):
                        left[r, kk] = rows[ib * BLOCK + io * mr + r, kk] * exp(
                            G[ib * BLOCK + io * mr + r, kk] - G[ib * BLOCK, kk]
                        )
                for jb in T.serial(ib):
                    clear(acc)
                    micro(acc, left, right, 0, jb * BLOCK, K)
                    write(C, acc, ib * BLOCK + io * mr, jb * BLOCK)

            @T.inline
            def diagonal(i, j):
                for lane in T.vectorized(lanes):
                    pa[lane] = T.float32(0)
                    pp[lane] = T.float32(0)
                for c in T.serial(K // lanes):
                    for lane in T.vectorized(lanes):
                        e[lane] = kr[j, c * lanes + lane] * exp(G[i, c * lanes + lane] - G[j, c * lanes + lane])
                    for lane in T.vectorized(lanes):
                        pa[lane] = pa[lane] + kr[i, c * lanes + lane] * e[lane]
                        pp[lane] = pp[lane] + qr[i, c * lanes + lane] * e[lane]
                A[i, j] = sum_lanes(pa, lanes)
                P[i, j] = sum_lanes(pp, lanes)

            for ib in T.serial((m + BLOCK - 1) // BLOCK):
                for j in T.serial(ib * BLOCK):
                    for kk in T.vectorized(K):
                        right[kk, j] = kr[j, kk] * exp(G[ib * BLOCK, kk] - G[j, kk])
                for io in T.serial(BLOCK // mr):
                    strip(A, kr, ib, io)
                    strip(P, qr, ib, io)
                for i in T.serial(BLOCK):
                    for j in T.vectorized(BLOCK):
                        A[ib * BLOCK + i, ib * BLOCK + j] = T.float32(0)
                        P[ib * BLOCK + i, ib * BLOCK + j] = T.float32(0)
                    for j in T.serial(i + 1):
                        diagonal(ib * BLOCK + i, ib * BLOCK + j)

        return gram_channel

    def _micro(self, nr: int, *, transposed: bool = False, negative: bool = False) -> Any:
        """acc[r, :] += or -= A[i0 + r, kk] * B[kk, j0 + :] over kk < depth; A[kk, i0 + r] if transposed."""
        mr = self.mr

        @T.inline
        def micro(acc, A, B, i0, j0, depth):
            for kk in T.serial(depth):
                for r in T.unroll(mr):
                    for j in T.vectorized(nr):
                        if transposed:
                            acc[r, j] = acc[r, j] + A[kk, i0 + r] * B[kk, j0 + j]
                        elif negative:
                            acc[r, j] = acc[r, j] - A[i0 + r, kk] * B[kk, j0 + j]
                        else:
                            acc[r, j] = acc[r, j] + A[i0 + r, kk] * B[kk, j0 + j]

        return micro

    def _put(self, nr: int) -> tuple[Any, Any, Any]:
        """Macros that clear, fetch and write back the accumulators."""
        mr = self.mr

        @T.inline
        def clear(acc):
            for r in T.unroll(mr):
                for j in T.vectorized(nr):
                    acc[r, j] = T.float32(0)

        @T.inline
        def fetch(acc, C, i0, j0):
            for r in T.unroll(mr):
                for j in T.vectorized(nr):
                    acc[r, j] = C[i0 + r, j0 + j]

        @T.inline
        def write(C, acc, i0, j0):
            for r in T.unroll(mr):
                for j in T.vectorized(nr):
                    C[i0 + r, j0 + j] = acc[r, j]

        return clear, fetch, write

    def _gram(self) -> Any:
        mr, nr, K = self.mr, self.square_nr, self.K
        micro, (clear, _, write) = self._micro(nr), self._put(nr)

        @T.inline
        def gram(C, A, Bt, m):
            acc = local_array(mr, nr)
            for io in T.serial((m + mr - 1) // mr):
                for jo in T.serial((io * mr + mr + nr - 1) // nr):
                    clear(acc)
                    micro(acc, A, Bt, io * mr, jo * nr, K)
                    write(C, acc, io * mr, jo * nr)

        return gram

    def _decay(self) -> Any:
        exp, mr = self.exp, self.mr

        @T.inline
        def decay(C, G, b, m, strict):
            for i in T.serial((m + mr - 1) // mr * mr):
                for jb in T.serial(i // BLOCK + 1):
                    for j in T.vectorized(BLOCK):
                        if strict:
                            C[i, jb * BLOCK + j] = T.Select(
                                jb * BLOCK + j < i,
                                C[i, jb * BLOCK + j] * b[i] * exp(G[i] - G[jb * BLOCK + j]),
                                T.float32(0),
                            )
                        else:
                            C[i, jb * BLOCK + j] = T.Select(
                                jb * BLOCK + j <= i, C[i, jb * BLOCK + j] * exp(G[i] - G[jb * BLOCK + j]), T.float32(0)
                            )

        return decay

    def _gemm(self) -> Any:
        mr, nr, K, VT = self.mr, self.nr, self.K, self.v_tile
        micro, (clear, _, write) = self._micro(nr), self._put(nr)

        @T.inline
        def gemm(C, A, B, m):
            acc = local_array(mr, nr)
            for jo in T.serial(VT // nr):
                for io in T.serial((m + mr - 1) // mr):
                    clear(acc)
                    micro(acc, A, B, io * mr, jo * nr, K)
                    write(C, acc, io * mr, jo * nr)

        return gemm

    def _gemm_lower(self) -> Any:
        mr, nr, VT = self.mr, self.nr, self.v_tile
        micro, (_, fetch, write) = self._micro(nr), self._put(nr)

        @T.inline
        def gemm_lower(C, P, U, m):
            acc = local_array(mr, nr)
            for jo in T.serial(VT // nr):
                for io in T.serial((m + mr - 1) // mr):
                    fetch(acc, C, io * mr, jo * nr)
                    micro(acc, P, U, io * mr, jo * nr, (io + 1) * mr)
                    write(C, acc, io * mr, jo * nr)

        return gemm_lower

    def _gemm_update(self) -> Any:
        mr, nr, VT, K = self.mr, self.nr, self.v_tile, self.K
        micro, (_, _, write) = self._micro(nr, transposed=True), self._put(nr)

        @T.inline
        def gemm_update(S, d, A, U, m):
            acc = local_array(mr, nr)
            for jo in T.serial(VT // nr):
                for io in T.serial(K // mr):
                    for r in T.unroll(mr):
                        for j in T.vectorized(nr):
                            acc[r, j] = S[io * mr + r, jo * nr + j] * d[io * mr + r]
                    micro(acc, A, U, io * mr, jo * nr, m)
                    write(S, acc, io * mr, jo * nr)

        return gemm_update

    def _solve(self) -> Any:
        mr, nr, VT = self.mr, self.nr, self.v_tile
        micro, (_, fetch, write) = self._micro(nr, negative=True), self._put(nr)

        @T.inline
        def solve(A, R, m):
            acc = local_array(mr, nr)
            one = local_array(VT)
            for ib in T.serial((m + BLOCK - 1) // BLOCK):
                for jo in T.serial(VT // nr):
                    for io in T.serial(T.min(T.int64(BLOCK // mr), (m - ib * BLOCK + mr - 1) // mr)):
                        fetch(acc, R, ib * BLOCK + io * mr, jo * nr)
                        micro(acc, A, R, ib * BLOCK + io * mr, jo * nr, ib * BLOCK)
                        write(R, acc, ib * BLOCK + io * mr, jo * nr)
                for i in T.serial(T.min(T.int64(BLOCK), m - ib * BLOCK)):
                    for j in T.vectorized(VT):
                        one[j] = R[ib * BLOCK + i, j]
                    for kk in T.serial(i):
                        for j in T.vectorized(VT):
                            one[j] = one[j] - A[ib * BLOCK + i, ib * BLOCK + kk] * R[ib * BLOCK + kk, j]
                    for j in T.vectorized(VT):
                        R[ib * BLOCK + i, j] = one[j]

        return solve
