"""The gate formulas in TensorIR, shared by the gating operator and by the recurrences that compute gates themselves."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def gate_macros() -> tuple[Any, Any]:
    """Macros ``log_decay(m, at, scratch, A_log, beta, threshold)`` and ``sigmoid(m, at)`` on fp32 scratch scalars m.

    `log_decay` replaces m[at] = x by -exp(A_log) * softplus(x), linear where beta * x exceeds the threshold. log1p(e) is
    written as log(1+e) * e / ((1+e) - 1), which keeps full relative precision for tiny e (Kahan's form; Goldberg 1991,
    theorem 4) and needs no log1p, which not every target has.
    """

    @T.inline
    def log_decay(m, at, scratch, A_log, beta, threshold):
        if beta * m[at] <= threshold:
            m[scratch] = T.exp(beta * m[at])
            if m[scratch] + T.float32(1) == T.float32(1):
                m[at] = m[scratch] / beta
            else:
                m[at] = T.log(m[scratch] + T.float32(1)) * (m[scratch] / ((m[scratch] + T.float32(1)) - T.float32(1))) / beta
        m[at] = T.float32(0) - T.exp(A_log) * m[at]

    @T.inline
    def sigmoid(m, at):
        m[at] = T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - m[at]))

    return log_decay, sigmoid
