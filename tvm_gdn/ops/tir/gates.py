"""The gate formulas in TensorIR, shared by the gating operator and by the recurrences that compute gates themselves."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def gate_macros(tiles: Any, lanes: int) -> tuple[Any, Any]:
    """Macros that turn fp32 arrays of `lanes` elements into gates, in place.

    Parameters
    ----------
    tiles : object
        Supplies ``exp`` and ``log``.
    lanes : int
        Elements computed at once.

    Returns
    -------
    log_decay : macro ``(x, A, beta, threshold)``
        x = -A * softplus(x) with A = exp(A_log), linear where beta * x exceeds the threshold. log1p(e) is written as
        log(1+e) * (e / ((1+e) - 1)), which keeps full relative precision for tiny e (Kahan's form; Goldberg 1991, theorem 4)
        and needs no log1p, which not every target has.
    sigmoid : macro ``(x)``
        x = 1 / (1 + exp(-x)), with a division: a strength of -inf is exactly zero, and one ulp here shows in stored bf16.
    """
    one = T.float32(1)

    @T.inline
    def log_decay(x, A, beta, threshold):
        e = tiles.scalars(lanes)
        # 1+e goes through memory: TVM's simplifier takes (1 + e) - 1 for e, in floating point too.
        more = tiles.scalars(lanes)
        y = tiles.scalars(lanes)
        for lane in T.vectorized(lanes):
            e[lane] = tiles.exp(beta * x[lane])
        for lane in T.vectorized(lanes):
            more[lane] = one + e[lane]
        for lane in T.vectorized(lanes):
            y[lane] = tiles.log(more[lane])
        for lane in T.vectorized(lanes):
            y[lane] = T.Select(more[lane] == one, e[lane], y[lane] * (e[lane] / (more[lane] - one)))
        for lane in T.vectorized(lanes):
            # Far above 17 both sides are equal in fp32; the bound keeps exp finite under any threshold.
            x[lane] = T.Select(beta * x[lane] > T.min(threshold, T.float32(80)), x[lane], y[lane] / beta)
        for lane in T.vectorized(lanes):
            x[lane] = T.float32(0) - A[lane] * x[lane]

    @T.inline
    def sigmoid(x):
        for lane in T.vectorized(lanes):
            x[lane] = one / (one + tiles.exp(T.float32(0) - x[lane]))

    return log_decay, sigmoid
