"""State pools in ONNX: sequences read and write rows of a pool by slot ids, and the pool comes out as ``next_<name>``.

Standard operators of any opset: `Gather` and `ScatterND` on the pool with one row more, of zeros, which padding (-1) reads and
writes. Shapes stay static where the number of sequences is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_gdn.export import onnx_run
from tvm_gdn.export.onnx_graph import Graph


class Pool:
    """Rows of a pool that the sequences of a call own.

    Parameters
    ----------
    graph : Graph
    name, dtype : str
        The pool, an input that this adds.
    row : tuple of int
        Shape of a state.
    slots : tuple of (str, str), optional
        Name and dtype of the slot ids, an input that this adds; without them sequence n owns row n of the pool.
    rows_of : str
        A value whose first axis is the sequences.
    """

    def __init__(
        self, graph: Graph, name: str, dtype: str, row: tuple[int, ...], slots: tuple[str, str] | None, rows_of: str
    ) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype
        self.shape: tuple[int | str, ...] = (f"{name}_slots", *row)
        pool = graph.add_input(name, dtype, self.shape)
        if slots is None:
            sequences = graph.Gather(graph.Shape(rows_of), graph.constant(0, np.int64))
            ids = graph.Range(graph.constant(0, np.int64), sequences, graph.constant(1, np.int64))
        else:
            given = graph.cast(graph.add_input(slots[0], slots[1], ("batch",)), slots[1], "int64")
            last = graph.Gather(graph.Shape(pool), graph.constant(0, np.int64))
            ids = graph.Where(graph.Less(given, graph.constant(0, np.int64)), last, given)
        zeros = graph.cast(graph.ConstantOfShape(graph.ints(1, *row)), "float32", dtype)
        self.ids, self.pool = ids, graph.Concat(pool, zeros, axis=0)

    def read(self) -> str:
        """States of the sequences in fp32, padding's zero."""
        return self.graph.cast(self.graph.Gather(self.pool, self.ids, axis=0), self.dtype, "float32")

    def write(self, states: Any) -> None:
        """Add the output ``next_<name>``: the pool with these states (fp32) in their rows."""
        graph = self.graph
        rows = graph.cast(states, "float32", self.dtype)
        after = graph.ScatterND(self.pool, graph.Unsqueeze(self.ids, graph.ints(-1)), rows)
        kept = graph.Slice(after, graph.ints(0), graph.ints(-1), graph.ints(0))
        graph.add_output(onnx_run.next_name(self.name), kept, self.dtype, self.shape)
