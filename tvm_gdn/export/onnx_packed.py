"""Packed sequences (`cu_seqlens`) in ONNX: a rectangle ``[sequences, longest]`` with a row of zeros where a sequence has ended.

`LinearAttention` and `CausalConvWithState` know no bounds, so every profile computes the rectangle. A token of zeros has no decay
and writes nothing, which is what keeps a state. The work is that of ``sequences * longest`` tokens.
"""

from __future__ import annotations

import numpy as np

from tvm_gdn.export.onnx_graph import Graph


class Packed:
    """Bounds of packed sequences, an input that this adds, and the way of tokens into the rectangle and back.

    Parameters
    ----------
    graph : Graph
    bounds : (str, str)
        Name and dtype of the bounds.
    x : str
        A value that has the tokens.
    axis : int
        Its axis of tokens.
    tokens : int
        Their number where it is fixed: then a sequence is as wide as all tokens, and every shape is known; 0: the longest
        sequence says how wide.
    """

    def __init__(self, graph: Graph, bounds: tuple[str, str], x: str, axis: int, tokens: int) -> None:
        self.graph = graph
        cu = graph.cast(graph.add_input(*bounds, ("bounds",)), bounds[1], "int64")
        first, end = (graph.Slice(cu, *map(graph.ints, at)) for at in ((0, -1, 0), (1, 2**63 - 1, 0)))
        #: Tokens of each sequence, ``[sequences]``.
        self.lengths = graph.Sub(end, first)
        if tokens:
            total = longest = graph.constant(tokens, np.int64)
            place = step = graph.constant(np.arange(tokens), np.int64)
        else:
            total = graph.Gather(graph.Shape(x), graph.constant(axis, np.int64))
            longest = graph.ReduceMax(self.lengths, keepdims=0)
            zero, one = (graph.constant(n, np.int64) for n in (0, 1))
            place, step = graph.Range(zero, total, one), graph.Range(zero, longest, one)
        rows, columns = graph.ints(1), graph.ints(0)
        inside = graph.Less(graph.Unsqueeze(step, columns), graph.Unsqueeze(self.lengths, rows))
        at = graph.Add(graph.Unsqueeze(first, rows), graph.Unsqueeze(step, columns))
        self._spread = graph.Where(inside, at, total)
        ended = graph.Cast(graph.GreaterOrEqual(graph.Unsqueeze(place, rows), graph.Unsqueeze(end, columns)), to=7)
        owner = graph.ReduceSum(ended, graph.ints(1), keepdims=0)
        within = graph.Sub(place, graph.Gather(first, owner))
        self._back = graph.Add(graph.Mul(owner, longest), within)

    def spread(self, x: str, row: tuple[int, ...]) -> str:
        """Tokens ``[1, T, *row]`` (fp32) -> ``[sequences, longest, *row]``, zeros where a sequence has ended."""
        graph = self.graph
        wide = graph.Concat(x, graph.constant(np.zeros((1, 1, *row))), axis=1)
        return str(graph.Squeeze(graph.Gather(wide, self._spread, axis=1), graph.ints(0)))

    def back(self, x: str, row: tuple[int, ...]) -> str:
        """``[sequences, longest, *row]`` -> ``[1, T, *row]``."""
        return str(self.graph.Gather(self.graph.Reshape(x, self.graph.ints(1, -1, *row)), self._back, axis=1))

    def last(self, x: str, count: int) -> str:
        """``[sequences, count + longest, width]`` -> the `count` rows before each sequence's end."""
        graph = self.graph
        at = graph.Add(graph.Unsqueeze(self.lengths, graph.ints(1)), graph.constant(np.arange(count)[None], np.int64))
        return str(graph.GatherND(x, graph.Unsqueeze(at, graph.ints(2)), batch_dims=1))
