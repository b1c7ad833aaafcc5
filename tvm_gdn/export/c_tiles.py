"""What the portable CPU tile operations must not do in C: vector shuffles and vector indices, and their own exp and log.

`install` replaces those few operations by scalar loops for the whole process, which is the generator's own (`c_source.py`).
"""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any


def install() -> None:
    """Scalar forms of the operations of `schedules/cpu.py` and `schedules/cpu_chunk.py`; exp and log of the C library."""
    from tvm.script import tirx as T

    from tvm_gdn import schedule
    from tvm_gdn.schedules import cpu_chunk
    from tvm_gdn.schedules.cpu import CpuTiles, local_array

    block, ceil_div = cpu_chunk.BLOCK, cpu_chunk.ceil_div

    def transpose(_self: Any, dst: Any, src: Any, rows: Any) -> None:
        with T.serial(ceil_div(src.rows if rows is None else rows, block)) as b, T.serial(src.cols) as c, T.serial(block) as i:
            dst.put(src.get(b * block + i, c), c, b, block, i)

    def invert_diagonal(_self: Any, dst: Any, a: Any, rows: Any) -> None:
        x = local_array(block, block)
        with T.serial(ceil_div(rows, block)) as b:
            with T.serial(block) as i, T.serial(block) as j:
                T.buffer_store(x, T.Select(i == j, T.float32(1), T.float32(0)), [i, j])
            with T.serial(block) as k, T.serial(block - 1 - k) as below, T.serial(block) as j:
                i = k + 1 + below
                T.buffer_store(x, x[i, j] - a.get(b * block + i, b, block, k) * x[k, j], [i, j])
            with T.serial(block) as i, T.serial(block) as j:
                dst.put(x[i, j], b * block + i, b, block, j)

    CpuTiles.exp, CpuTiles.log = staticmethod(T.exp), staticmethod(T.log)
    # C code aligns nothing: `ALIGN` in c_source.py stands for the LLVM function of that name.
    vars(cpu_chunk)["import_llvm"] = lambda _text: None
    cpu_chunk.ChunkTiles._transpose = transpose
    cpu_chunk.ChunkTiles.invert_diagonal = invert_diagonal
    schedule._load_spaces()
    for name, module in list(sys.modules.items()):
        if name.startswith("tvm_gdn.schedules.") and hasattr(module, "sum_lanes"):
            vars(module)["sum_lanes"] = lambda part, lanes: functools.reduce(operator.add, (part[i] for i in range(lanes)))
