"""Verification of speculated tokens in ONNX: a chain or a tree of a fixed number of steps, without a loop, in any profile.

It is the chunk's formulas (`onnx_rules.py`) with "is an ancestor of" in the place of "comes before": the state after a step is
the initial state and what the step and its ancestors wrote, each decayed along the path between them.
"""

from __future__ import annotations

import numpy as np

from tvm_gdn.export.onnx_graph import Graph


def ancestors(graph: Graph, parents: str | None, stored: str | None, steps: int) -> tuple[str, str | None]:
    """Which step follows which, ``[N, 1, steps, steps]``, 1 for a step's ancestors and itself; and which see the initial state.

    Parameters
    ----------
    graph : Graph
    parents : str or None
        ``[N, steps]``, int64, negative or step 0: the initial state; None: a chain.
    stored : str or None
        ``[N]``, bool: the sequences that store their states. A step of another one that has a parent starts from zeros.
    steps : int

    Returns
    -------
    follows : str
    rooted : str or None
        ``[N, 1, steps, 1]``, 0 for the steps that start from zeros.
    """
    if parents is None:
        return graph.constant(np.tri(steps)[None, None]), None
    columns = graph.constant(np.arange(steps)[None, None], np.int64)
    equal = graph.Cast(graph.Equal(graph.Unsqueeze(parents, graph.ints(2)), columns), to=1)
    step = graph.Mul(equal, graph.constant(np.tri(steps, k=-1)[None]))
    rooted = None
    if stored is not None:
        kept = graph.Unsqueeze(graph.Cast(stored, to=1), graph.ints(1, 2))
        lost = graph.Mul(graph.ReduceSum(step, graph.ints(2), keepdims=1), graph.Sub(graph.constant(1.0), kept))
        rooted = graph.Unsqueeze(graph.Sub(graph.constant(1.0), lost), graph.ints(1))
        step = graph.Mul(step, kept)
    # (I + P)(I + P^2)(I + P^4)...: one ancestor at every distance.
    follows, reach = graph.Add(step, graph.constant(np.eye(steps)[None])), 2
    while reach < steps:
        step = graph.MatMul(step, step)
        follows, reach = graph.Add(follows, graph.MatMul(follows, step)), 2 * reach
    return graph.Unsqueeze(follows, graph.ints(1)), rooted


def verification(
    graph: Graph, tensors: tuple[str, str, str, str, str, str], tree: tuple[str, str | None], shape: tuple[int, int, int, int]
) -> tuple[str, str]:
    """Outputs ``[N, T, HV, V]``, and the states after every step ``[N, T, HV, K, V]``.

    tensors: q, k, v, g, beta, state as in `onnx_rules.py`, one gate per head; tree: of `ancestors`; shape: HV, K, V, T.
    """
    (q, k, v, g), beta, S = (graph.Transpose(x, perm=[0, 2, 1, 3]) for x in tensors[:4]), tensors[4], tensors[5]
    beta = graph.Unsqueeze(graph.Transpose(beta, perm=[0, 2, 1]), graph.ints(3))
    (follows, rooted), (HV, K, V, T) = tree, shape
    G = graph.MatMul(follows, g)
    apart = graph.Where(graph.Cast(follows, to=9), graph.Sub(G, transposed(graph, G)), graph.constant(-1e30))
    D, start = graph.Exp(apart), graph.Exp(G)
    if rooted is not None:
        start = graph.Mul(start, rooted)
    before = graph.Mul(graph.Mul(graph.MatMul(k, transposed(graph, k)), D), graph.constant(np.tri(T, k=-1)))
    R = graph.Mul(graph.Sub(v, graph.MatMul(graph.Mul(k, start), S)), beta)
    U = graph.MatMul(inverse(graph, graph.Mul(before, beta), T), R)
    seen = graph.Mul(graph.MatMul(q, transposed(graph, k)), D)
    o = graph.Add(graph.MatMul(graph.Mul(q, start), S), graph.MatMul(seen, U))
    wrote = graph.Mul(graph.Unsqueeze(k, graph.ints(4)), graph.Unsqueeze(U, graph.ints(3)))
    flat = graph.ints(0, HV, -1, K * V)
    states = graph.Add(graph.MatMul(D, graph.Reshape(wrote, flat)), graph.Mul(start, graph.Reshape(S, flat)))
    states = graph.Transpose(graph.Reshape(states, graph.ints(0, HV, T, K, V)), perm=[0, 2, 1, 3, 4])
    return graph.Transpose(o, perm=[0, 2, 1, 3]), states


def transposed(graph: Graph, x: str) -> str:
    """The last two of four axes in turn."""
    return str(graph.Transpose(x, perm=[0, 1, 3, 2]))


def inverse(graph: Graph, A: str, C: int) -> str:
    """(I + A)^-1 of strictly lower-triangular A by doubling blocks: X = X - X (A in the blocks that join) X, log2 C times.

    Powers of A would overflow fp32 for repeated keys; inverses of diagonal blocks do not.
    """
    X, size, rows = graph.constant(np.eye(C)), 1, np.arange(C)
    while size < C:
        upper, pair = rows // size, rows // (2 * size)
        joins = (pair[:, None] == pair[None, :]) & (upper[:, None] > upper[None, :])
        X = graph.Sub(X, graph.MatMul(graph.MatMul(X, graph.Mul(A, graph.constant(joins))), X))
        size *= 2
    return X
