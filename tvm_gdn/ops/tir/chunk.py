"""The chunked gated delta rule in TensorIR (WY / UT-transform form): one definition over tile operations.

A chunk of C tokens, in fp32, with G the cumulated log-decays within the chunk, S the state before it, rows of K, Q, V the
tokens::

    A = strictly_lower(beta_i * exp(G_i - G_j) * k_i.k_j)            tiles.gram, tiles.decay
    P = lower(exp(G_i - G_j) * q_i.k_j)
    R = beta * (V - exp(G) * (K S))                                  tiles.gemm
    U = (I + A)^-1 R                                                 tiles.solve
    O = exp(G) * (Q S) + P U                                         tiles.gemm, tiles.gemm_lower
    S = exp(G_C) * S + (exp(G_C - G) * K)^T U                        tiles.gemm_update

which equals the token recurrence in exact arithmetic. Only differences of cumulated gates are exponentiated, each between a
token and an earlier one (or the chunk's start): decays of any size give factors of at most one, never an overflow.
Source of the maths: Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484) and Gated Delta
Networks (arXiv:2412.06464).

How a target plugs in. Its tiles object states the chunk size (`chunk`) and a worker's value columns (`v_tile`), allocates the
tiles wherever it likes (stack, shared memory, registers) and supplies, for a chunk with `m` valid tokens:

- `k_rows()`, `k_columns()`, `v_rows()`, `square()`, `per_token()`: tiles ``[C, K]``, its transpose, ``[C, v_tile]``, ``[C, C]``
  and ``[C]``, all fp32 or what the target multiplies in; tokens from m on are zero in the K tiles;
- `load_rows(dst, src, row, t0, h, m, scale, l2norm)`: dst[i, :] = scale * src[row, t0 + i, h, :], l2-normalized if asked;
  `transpose(dst, src, m)`;
- `gram(C, A, Bt, m)`: lower triangle of C = A Bt; `decay(C, G, b, m, strict)`: C[i, j] *= b_i exp(G_i - G_j) below the diagonal,
  zero above it (and on it, if strict);
- `gemm(C, A, B, m)`: C = A B; `gemm_lower(C, P, U, m)`: C += P U for lower-triangular P;
  `gemm_update(S, d, A, U, m)`: S = d S + A^T U;
- `solve(A, R, m)`: R = (I + A)^-1 R for strictly lower-triangular A, by substitution or by an explicit inverse;
- `exp(x)` and the loops `tokens(m)` and `cols(n)`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.delta_rule import delta_rule
from tvm_gdn.spec import Geometry


def chunk(geometry: Geometry, tiles: Any) -> Any:
    """Build the chunked kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Static axes K and V, dtypes of the tensors present, ``state_v_first`` and ``output_final_state``.
    tiles : object
        The target's tile operations.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    return delta_rule(geometry, tiles, _chunks(geometry, tiles))


def _chunks(geometry: Geometry, tiles: Any) -> Any:
    K, VT, C = geometry.axis["K"], tiles.v_tile, tiles.chunk
    data = geometry.dtype["v"]
    gated = "g" in geometry.dtype
    channel_gate = bool(geometry.attr.get("channel_gate", False))

    @T.inline
    def chunks(S, q, k, v, g, beta, o, row, first, length, h, hv, j0, scale, l2norm):
        kr, kc, qr = tiles.k_rows(), tiles.k_columns(), tiles.k_rows()
        A, P = tiles.square(), tiles.square()
        R, out = tiles.v_rows(), tiles.v_rows()
        b, end = tiles.per_token(), tiles.per_channel()
        if channel_gate:
            G, kg = tiles.k_rows(), tiles.k_rows()
        else:
            G, eg, w = tiles.per_token(), tiles.per_token(), tiles.per_token()
        total = tiles.scalars(1)

        @T.inline
        def load(t0, m):
            """Tokens from m on neither decay nor write."""
            tiles.load_rows(kr, k, row, t0, h, m, T.float32(1), l2norm)
            tiles.load_rows(qr, q, row, t0, h, m, scale, l2norm)
            for i in T.serial(T.int64(C)):
                b[i] = T.float32(0)
                if i < m:
                    b[i] = T.Cast("float32", beta[row, t0 + i, hv])

        @T.inline
        def head_gate(t0, m):
            total[0] = T.float32(0)
            for i in T.serial(T.int64(C)):
                if gated:
                    if i < m:
                        total[0] = total[0] + T.Cast("float32", g[row, t0 + i, hv])
                G[i] = total[0]
            for i in tiles.cols(C):
                eg[i] = tiles.exp(G[i])
                w[i] = tiles.exp(total[0] - G[i])
            for kk in tiles.cols(K):
                end[kk] = eg[C - 1]
            tiles.transpose(kc, kr, m)
            tiles.gram(A, kr, kc, m)
            tiles.gram(P, qr, kc, m)
            tiles.decay(A, G, b, m, True)
            tiles.decay(P, G, b, m, False)
            tiles.gemm(R, kr, S, m)
            tiles.gemm(out, qr, S, m)
            tiles.scale_rows(R, eg, m)
            tiles.scale_rows(out, eg, m)
            tiles.scale_rows(kr, w, m)

        @T.inline
        def channel_gates(t0, m):
            for kk in tiles.cols(K):
                end[kk] = T.float32(0)
            for i in T.serial(T.int64(C)):
                if i < m:
                    for kk in tiles.cols(K):
                        end[kk] = end[kk] + T.Cast("float32", g[row, t0 + i, hv, kk])
                for kk in tiles.cols(K):
                    G[i, kk] = end[kk]
            tiles.gram_channel(A, P, kr, qr, kc, G, m)
            tiles.mask(A, b, m)
            for i in T.serial(m):
                for kk in tiles.cols(K):
                    kg[i, kk] = kr[i, kk] * tiles.exp(G[i, kk])
                    qr[i, kk] = qr[i, kk] * tiles.exp(G[i, kk])
                    kr[i, kk] = kr[i, kk] * tiles.exp(end[kk] - G[i, kk])
            tiles.gemm(R, kg, S, m)
            tiles.gemm(out, qr, S, m)
            for kk in tiles.cols(K):
                end[kk] = tiles.exp(end[kk])

        for c in T.serial((length + C - 1) // C):
            t0: T.let[T.int64] = first + c * C
            m: T.let[T.int64] = T.min(T.int64(C), length - c * C)
            load(t0, m)
            if channel_gate:
                channel_gates(t0, m)
            else:
                head_gate(t0, m)
            # Here A, P are decayed and masked, R = K S and out = Q S decayed, kr = K decayed to the chunk's end.
            for i in T.serial(m):
                for j in tiles.cols(VT):
                    R[i, j] = b[i] * (T.Cast("float32", v[row, t0 + i, hv, j0 + tiles.col(j)]) - R[i, j])
            tiles.solve(A, R, m)
            tiles.gemm_lower(out, P, R, m)
            for i in T.serial(m):
                for j in tiles.cols(VT):
                    o[row, t0 + i, hv, j0 + tiles.col(j)] = T.Cast(data, out[i, j])
            tiles.gemm_update(S, end, kr, R, m)

    return chunks
