"""A graph of ONNX nodes under construction: operators are called as Python methods and give value names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: SPEC dtype -> ONNX element type.
ELEMENT = {"float32": 1, "float16": 10, "bfloat16": 16, "int32": 6, "int64": 7, "int8": 3, "uint8": 2, "bool": 9}


class Graph:
    """Nodes, constants, inputs and outputs in the order in which they are made.

    ``graph.MatMul(a, b)`` adds a node and returns its output's name; ``outputs=2`` returns a tuple; ``domain=`` names a domain.
    Constants become initializers, equal ones share one.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._root: Graph = parent._root if parent else self
        self._constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[Any] = []
        self._count = 0

    def __getattr__(self, op: str) -> Any:
        if not op[0].isupper():
            raise AttributeError(op)
        return lambda *inputs, **attributes: self.node(op, inputs, **attributes)

    def node(self, op: str, inputs: Sequence[str], *, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; its output's name, or a tuple of names."""
        from onnx import helper

        names = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def fresh(self, hint: str) -> str:
        """A value name that occurs nowhere else."""
        self._root._count += 1
        return f"{hint}_{self._root._count}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Name of a constant; it lives in the outermost graph, where inner ones see it."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype=dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        root = self._root
        if key not in root._constants:
            root._constants[key] = root.fresh("const")
            root.initializers.append(numpy_helper.from_array(array, root._constants[key]))
        return root._constants[key]

    def ints(self, *values: int) -> str:
        """Name of an int64 vector: shapes, axes."""
        return self.constant(values, np.int64)

    def add_input(self, name: str, dtype: str, shape: Sequence[int | str | None]) -> str:
        """Declare an input."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, ELEMENT[dtype], list(shape)))
        return name

    def add_output(self, name: str, value: str, dtype: str, shape: Sequence[int | str | None]) -> None:
        """Declare an output that is `value`."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, ELEMENT[dtype], list(shape)))

    def cast(self, value: str, source: str, target: str) -> str:
        """The value in another dtype; itself where that is no change."""
        return value if source == target else str(self.Cast(value, to=ELEMENT[target]))

    def proto(self, name: str) -> Any:
        """The finished GraphProto."""
        from onnx import helper

        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
