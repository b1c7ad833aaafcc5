"""State pools in ONNX: sequences read and write rows of a pool by slot ids, and the pool comes out as ``next_<name>``.

Buffers of verification stand here too. Standard operators of any opset: `Gather` and `ScatterND` on the pool with one row more,
of zeros, which padding (-1) reads and writes. Shapes stay static where the number of sequences is.
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
    count : str
        Name of that axis.
    """

    def __init__(
        self,
        graph: Graph,
        name: str,
        dtype: str,
        row: tuple[int, ...],
        slots: tuple[str, str] | None,
        rows_of: str,
        count: str = "batch",
    ) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype
        self.shape: tuple[int | str, ...] = (f"{name}_slots", *row)
        pool = graph.add_input(name, dtype, self.shape)
        ids, self.real = _rows(graph, pool, slots, rows_of, count)
        zeros = graph.cast(graph.ConstantOfShape(graph.ints(1, *row)), "float32", dtype)
        self.ids, self.pool = ids, graph.Concat(pool, zeros, axis=0)

    def read(self) -> str:
        """States of the sequences in fp32, padding's zero."""
        return self.graph.cast(self.graph.Gather(self.pool, self.ids, axis=0), self.dtype, "float32")

    def write(self, states: Any, where: str | None = None) -> None:
        """Add the output ``next_<name>``: the pool with these states (fp32) in their rows; of the sequences `where` says so."""
        graph = self.graph
        rows = graph.cast(states, "float32", self.dtype)
        ids = self.ids if where is None else graph.Where(where, self.ids, _count(graph, self.name))
        after = graph.ScatterND(self.pool, graph.Unsqueeze(ids, graph.ints(-1)), rows)
        kept = graph.Slice(after, graph.ints(0), graph.ints(-1), graph.ints(0))
        graph.add_output(onnx_run.next_name(self.name), kept, self.dtype, self.shape)


class Buffer:
    """States after every step of a verification, ``[slots, steps, HV, K, V]``: written, never read.

    The parameters are those of `Pool`, `row` the shape of one state.
    """

    def __init__(
        self, graph: Graph, name: str, dtype: str, row: tuple[int, ...], slots: tuple[str, str] | None, rows_of: str
    ) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype
        self.shape: tuple[int | str, ...] = (f"{name}_slots", f"{name}_steps", *row)
        self.buffer = graph.add_input(name, dtype, self.shape)
        #: Sequences that store their states, ``[batch]``, bool; None: all.
        self.ids, self.real = _rows(graph, self.buffer, slots, rows_of, "batch")

    def write(self, states: Any, steps: int) -> None:
        """Add the output ``next_<name>``: the buffer with the states ``[batch, steps, *row]`` (fp32) in its first steps."""
        graph, first = self.graph, self.graph.ints(0)
        # A row more for the sequences that store nothing; what stands in it does not matter.
        wide = graph.Concat(self.buffer, graph.Slice(self.buffer, first, graph.ints(1), first), axis=0)
        slot = graph.Unsqueeze(self.ids, graph.ints(1, 2))
        step = graph.constant(np.stack([np.zeros(steps), np.arange(steps)], -1)[None], np.int64)
        at = graph.Add(graph.Mul(slot, graph.constant([[[1, 0]]], np.int64)), step)
        after = graph.ScatterND(wide, at, graph.cast(states, "float32", self.dtype))
        kept = graph.Slice(after, first, graph.ints(-1), first)
        graph.add_output(onnx_run.next_name(self.name), kept, self.dtype, self.shape)


def _rows(graph: Graph, pool: str, slots: tuple[str, str] | None, rows_of: str, count: str) -> tuple[Any, str | None]:
    """Row of each sequence, one past the end for padding; and which are none. Without slots row n, and None."""
    zero = graph.constant(0, np.int64)
    if slots is None:
        return graph.Range(zero, _count(graph, rows_of), graph.constant(1, np.int64)), None
    given = graph.cast(graph.add_input(slots[0], slots[1], (count,)), slots[1], "int64")
    real = graph.GreaterOrEqual(given, zero)
    return graph.Where(real, given, _count(graph, pool)), real


def _count(graph: Graph, x: str) -> Any:
    """Size of the first axis."""
    return graph.Gather(graph.Shape(x), graph.constant(0, np.int64))
