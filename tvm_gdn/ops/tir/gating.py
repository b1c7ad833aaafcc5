"""Gate parameters in TensorIR: g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b), in fp32."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.gates import gate_macros
from tvm_gdn.spec import Geometry


def gating(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Dtypes of A_log, a, b and dt_bias.
    tiles : object
        The target's loops: `workers` over row blocks of `rows_per_worker`, `lanes` that share a block's heads, `vector` heads
        at once.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    dtype = geometry.dtype
    data = dtype["a"]
    block, lanes, threads = tiles.rows_per_worker, tiles.vector, tiles.warp
    macros = {width: gate_macros(tiles, width) for width in (1, lanes)}

    @T.prim_func(s_tir=True)
    def kernel(
        A_log_: T.handle,
        a_: T.handle,
        b_: T.handle,
        dt_bias_: T.handle,
        g_: T.handle,
        beta_: T.handle,
        softplus_beta: T.float32,
        softplus_threshold: T.float32,
    ):
        T.func_attr({"global_symbol": "kernel"})
        M, HV = T.int64(), T.int64()
        a0, a1, b0, b1 = T.int64(), T.int64(), T.int64(), T.int64()
        A_log = T.match_buffer(A_log_, (HV,), dtype["A_log"], align=2)
        a = T.match_buffer(a_, (M, HV), data, strides=(a0, a1), align=2)
        b = T.match_buffer(b_, (M, HV), data, strides=(b0, b1), align=2)
        dt_bias = T.match_buffer(dt_bias_, (HV,), dtype["dt_bias"], align=2)
        g = T.match_buffer(g_, (M, HV), "float32", align=2)
        beta = T.match_buffer(beta_, (M, HV), data, align=2)

        a_rows = T.decl_buffer((M, HV), data, data=a.data, strides=(a0, T.int64(1)))
        b_rows = T.decl_buffer((M, HV), data, data=b.data, strides=(b0, T.int64(1)))

        @T.inline
        def heads(a_in, b_in, w, first, width, log_decay, sigmoid):
            x, A, bias = tiles.scalars(width), tiles.scalars(width), tiles.scalars(width)
            for lane in T.vectorized(width):
                A[lane] = tiles.exp(T.Cast("float32", A_log[first + lane]))
                bias[lane] = T.Cast("float32", dt_bias[first + lane])
            for r in T.serial(T.min(T.int64(block), M - w * block)):
                for lane in T.vectorized(width):
                    x[lane] = T.Cast("float32", a_in[w * block + r, first + lane]) + bias[lane]
                log_decay(x, A, softplus_beta, softplus_threshold)
                for lane in T.vectorized(width):
                    g[w * block + r, first + lane] = x[lane]
                for lane in T.vectorized(width):
                    x[lane] = T.Cast("float32", b_in[w * block + r, first + lane])
                sigmoid(x)
                for lane in T.vectorized(width):
                    beta[w * block + r, first + lane] = T.Cast(data, x[lane])

        @T.inline
        def rows(a_in, b_in, w, lane):
            for part in T.serial((HV // lanes + threads - 1) // threads):
                if part * threads + lane < HV // lanes:
                    heads(a_in, b_in, w, (part * threads + lane) * lanes, lanes, macros[lanes][0], macros[lanes][1])
            if lane == 0:
                for h in T.serial(HV % lanes):
                    heads(a_in, b_in, w, HV // lanes * lanes + h, 1, macros[1][0], macros[1][1])

        for w in tiles.workers((M + block - 1) // block):
            for lane in tiles.lanes():
                # Vector loads where the heads are contiguous; element by element where they are strided.
                if a1 == 1 and b1 == 1:
                    rows(a_rows, b_rows, w, lane)
                else:
                    rows(a, b, w, lane)

    return kernel
