"""Tile operations of the token recurrence on CPUs: the state is streamed through the caches in explicit vectors."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import CpuTiles, local_array, sum_lanes


class RecurrentTiles(CpuTiles):
    """Tile operations of the token recurrence for one geometry.

    Parameters
    ----------
    K, V, v_tile : int
        State rows, state columns, columns per worker.
    v_first : bool
        Whether states are stored ``[V, K]``; vectors then run along K and a product W^T x ends in a sum across lanes.
    lanes : int
        fp32 elements per vector in reductions across lanes; divides K.
    unroll : int
        Rows (K-first) or columns (V-first) unrolled per loop iteration.
    direct : bool
        Update states in the pool's own memory where that is exact.
    """

    def __init__(self, K: int, V: int, *, v_tile: int, v_first: bool, lanes: int, unroll: int, direct: bool) -> None:
        self.K, self.V, self.v_tile, self.v_first, self.direct = K, V, v_tile, v_first, direct
        self.vector = lanes
        self.dot = self._dot()
        self.load = self.store = self._copy(unroll)
        self.zero = self._zero()
        if v_first:
            self.gemv, self.ger_gemv = self._gemv_rows(unroll), self._ger_gemv_rows(unroll)
        else:
            self.gemv, self.ger_gemv = self._gemv_columns(unroll), self._ger_gemv_columns(unroll)

    def rows(self, count: int) -> Any:
        """Loop over the K axis of a vector."""
        return T.vectorized(count)

    def cols(self, count: int) -> Any:
        """Loop over the V axis of a vector."""
        return T.vectorized(count)

    def row(self, i: Any) -> Any:
        """Index on the K axis of local element i."""
        return i

    def col(self, j: Any) -> Any:
        """Index on the V axis of local element j."""
        return j

    def read(self, dst: Any, buffer: Any, *index: Any) -> None:
        """K elements of a tensor from `index` on, in fp32."""
        *outer, first = index
        with T.vectorized(self.K) as i:
            T.buffer_store(dst, T.Cast("float32", buffer[(*outer, first + i)]), [i])

    def k_vector(self) -> Any:
        """fp32 vector along K."""
        return local_array(self.K)

    def v_vector(self) -> Any:
        """fp32 vector along the worker's columns."""
        return local_array(self.v_tile)

    def state(self) -> Any:
        """fp32 state tile of the worker's own, indexed [row, column] whatever the storage order."""
        size = self.K * self.v_tile
        memory = local_array(size)
        strides = (1, self.K) if self.v_first else (self.v_tile, 1)
        return T.decl_buffer((self.K, self.v_tile), "float32", data=memory.data, strides=strides, scope="local")

    def view(self, buffer: Any, offset: Any, j0: Any) -> Any:
        """One head's state in a larger tensor as a [K, v_tile] tile: `offset` elements in, from column `j0`."""
        strides = (1, self.K) if self.v_first else (self.V, 1)
        return T.decl_buffer(
            (self.K, self.v_tile), buffer.dtype, data=buffer.data, elem_offset=offset + j0 * strides[1], strides=strides
        )

    def _dot(self) -> Any:
        lanes, chunks = self.vector, self.K // self.vector

        @T.inline
        def dot(m, at, x, y):
            """m[at] = sum_i x[i] * y[i]."""
            part = local_array(lanes)
            for lane in T.vectorized(lanes):
                part[lane] = T.float32(0)
            for c in T.serial(chunks):
                for lane in T.vectorized(lanes):
                    part[lane] = part[lane] + x[c * lanes + lane] * y[c * lanes + lane]
            m[at] = sum_lanes(part, lanes)

        return dot

    def _copy(self, unroll: int) -> Any:
        K, VT, v_first = self.K, self.v_tile, self.v_first

        @T.inline
        def copy(dst, src):
            """Convert src to dst's dtype: dst = src."""
            if v_first:
                for j in T.serial(VT):
                    for i in T.vectorized(K):
                        dst[i, j] = T.Cast(dst.dtype, src[i, j])
            else:
                for io in T.serial(K // unroll):
                    for ii in T.unroll(unroll):
                        for j in T.vectorized(VT):
                            dst[io * unroll + ii, j] = T.Cast(dst.dtype, src[io * unroll + ii, j])

        return copy

    def _zero(self) -> Any:
        K, VT, v_first = self.K, self.v_tile, self.v_first

        @T.inline
        def zero(W):
            if v_first:
                for j in T.serial(VT):
                    for i in T.vectorized(K):
                        W[i, j] = T.float32(0)
            else:
                for i in T.serial(K):
                    for j in T.vectorized(VT):
                        W[i, j] = T.float32(0)

        return zero

    def _gemv_columns(self, unroll: int) -> Any:
        K, VT, chains = self.K, self.v_tile, self._chains(unroll)
        finish = self._sum_chains(chains)

        @T.inline
        def gemv(acc, W, x):
            """Product acc = W^T x."""
            part = local_array(chains, VT)
            for c in T.unroll(chains):
                for j in T.vectorized(VT):
                    part[c, j] = T.float32(0)
            for io in T.serial(K // unroll):
                for ii in T.unroll(unroll):
                    for j in T.vectorized(VT):
                        part[ii % chains, j] = (
                            part[ii % chains, j] + T.Cast("float32", W[io * unroll + ii, j]) * x[io * unroll + ii]
                        )
            finish(acc, part)

        return gemv

    def _ger_gemv_columns(self, unroll: int) -> Any:
        K, VT, chains = self.K, self.v_tile, self._chains(unroll)
        finish = self._sum_chains(chains)

        @T.inline
        def ger_gemv(acc, W, d, x, u, y):
            """W = diag(d) W + x u^T; acc = W^T y, from the unrounded W."""
            new = local_array(VT)
            part = local_array(chains, VT)
            for c in T.unroll(chains):
                for j in T.vectorized(VT):
                    part[c, j] = T.float32(0)
            for io in T.serial(K // unroll):
                for ii in T.unroll(unroll):
                    for j in T.vectorized(VT):
                        new[j] = T.Cast("float32", W[io * unroll + ii, j]) * d[io * unroll + ii] + x[io * unroll + ii] * u[j]
                    for j in T.vectorized(VT):
                        W[io * unroll + ii, j] = T.Cast(W.dtype, new[j])
                    for j in T.vectorized(VT):
                        part[ii % chains, j] = part[ii % chains, j] + new[j] * y[io * unroll + ii]
            finish(acc, part)

        return ger_gemv

    def _chains(self, unroll: int) -> int:
        """Independent sums per column: a narrow tile alone cannot hide the latency of a chain of multiply-adds."""
        return max(c for c in (1, 2, 4) if unroll % c == 0 and (c == 1 or c * self.v_tile <= 8 * 16))

    def _sum_chains(self, chains: int) -> Any:
        VT = self.v_tile

        @T.inline
        def finish(acc, part):
            for j in T.vectorized(VT):
                acc[j] = part[0, j]
            for c in T.unroll(chains - 1):
                for j in T.vectorized(VT):
                    acc[j] = acc[j] + part[c + 1, j]

        return finish

    def _gemv_rows(self, unroll: int) -> Any:
        VT, lanes, chunks = self.v_tile, self.vector, self.K // self.vector

        @T.inline
        def gemv(acc, W, x):
            """Product acc = W^T x, vectors along K."""
            part = local_array(lanes)
            for jo in T.serial(VT // unroll):
                for ji in T.unroll(unroll):
                    for lane in T.vectorized(lanes):
                        part[lane] = T.float32(0)
                    for c in T.unroll(chunks):
                        for lane in T.vectorized(lanes):
                            part[lane] = (
                                part[lane] + T.Cast("float32", W[c * lanes + lane, jo * unroll + ji]) * x[c * lanes + lane]
                            )
                    acc[jo * unroll + ji] = sum_lanes(part, lanes)

        return gemv

    def _ger_gemv_rows(self, unroll: int) -> Any:
        VT, lanes, chunks = self.v_tile, self.vector, self.K // self.vector

        @T.inline
        def ger_gemv(acc, W, d, x, u, y):
            """W = diag(d) W + x u^T; acc = W^T y, from the unrounded W, vectors along K."""
            part = local_array(lanes)
            new = local_array(lanes)
            for jo in T.serial(VT // unroll):
                for ji in T.unroll(unroll):
                    for lane in T.vectorized(lanes):
                        part[lane] = T.float32(0)
                    for c in T.unroll(chunks):
                        for lane in T.vectorized(lanes):
                            new[lane] = (
                                T.Cast("float32", W[c * lanes + lane, jo * unroll + ji]) * d[c * lanes + lane]
                                + x[c * lanes + lane] * u[jo * unroll + ji]
                            )
                        for lane in T.vectorized(lanes):
                            W[c * lanes + lane, jo * unroll + ji] = T.Cast(W.dtype, new[lane])
                        for lane in T.vectorized(lanes):
                            part[lane] = part[lane] + new[lane] * y[c * lanes + lane]
                    acc[jo * unroll + ji] = sum_lanes(part, lanes)

        return ger_gemv
