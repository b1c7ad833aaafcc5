"""Integers of kernels."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def int64(buffer: Any, *index: Any) -> Any:
    """Element of an index tensor."""
    return T.Cast("int64", buffer[index])


def quotient(number: Any, by: Any, limit: Any) -> Any:
    """Quotient of int64 numbers that are not negative, in 32 bits where they have no more.

    In 64 bits a division costs a GPU as much as the rest of a row.

    Parameters
    ----------
    number, by : PrimExpr
        Dividend and divisor.
    limit : PrimExpr
        No dividend is larger.

    Returns
    -------
    PrimExpr
    """
    short = T.Cast("int64", T.truncdiv(T.Cast("int32", number), T.Cast("int32", by)))
    return T.if_then_else(limit <= T.int64(2**31 - 1), short, T.truncdiv(number, by))
