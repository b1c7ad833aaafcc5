"""Slots that two sequences of one call name, looked for in the host part of a kernel."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

#: What a table of slots costs beside its bytes, in comparisons of two slots (0.15 us).
TABLE_COST = 512


@T.inline
def find_shared(found: Any, slots: Any, count: Any, size: Any, pad: Any) -> None:
    """Set found[0] to 1 if two sequences name one slot, else to 0; slots are in range already or `pad`, which is nobody's.

    A few are compared with each other, many are ticked off in a table with a byte for every slot of the pool.
    """
    found[0] = T.float32(0)
    if count * count <= size + TABLE_COST:
        for n in T.serial(count):
            for other in T.serial(n):
                if T.Cast("int64", slots[n]) != pad and slots[n] == slots[other]:
                    found[0] = T.float32(1)
    else:
        taken = T.alloc_buffer((size,), "int8")
        for slot in T.serial(size):
            taken[slot] = T.int8(0)
        for n in T.serial(count):
            if T.Cast("int64", slots[n]) != pad:
                if taken[slots[n]] != 0:
                    found[0] = T.float32(1)
                taken[slots[n]] = T.int8(1)
