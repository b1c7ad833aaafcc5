"""Rows of which a worker has all pieces, and moves them as its code generator does."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


class WholeRows:
    """What an algorithm over rows asks about the pieces of a row."""

    @staticmethod
    def turns(count: int) -> int:
        """Pieces of `count` that a member of the worker has at most."""
        return count

    @staticmethod
    def piece(turn: Any) -> Any:
        """The piece that is a member's at a turn."""
        return turn

    @staticmethod
    def has(turn: Any, count: int) -> Any:
        """Whether there is such a piece among `count`."""
        del turn, count
        return True

    @staticmethod
    def every(count: int) -> Any:
        """Loop over pieces."""
        return T.serial(count)

    @staticmethod
    def total(acc: Any) -> None:
        """Sum of acc[0] over a worker's members, of which there is one."""

    @staticmethod
    def read(dst: Any, to: Any, source: Any, index: tuple[Any, ...], count: int) -> None:
        """Read `count` neighbouring elements in fp32."""
        *outer, first = index
        with T.vectorized(count) as lane:
            T.buffer_store(dst, T.Cast("float32", source[(*outer, first + lane)]), [to + lane])

    @staticmethod
    def write(dst: Any, index: tuple[Any, ...], source: Any, at: Any, count: int) -> None:
        """Write `count` neighbouring elements, rounded."""
        *outer, first = index
        with T.vectorized(count) as lane:
            T.buffer_store(dst, T.Cast(dst.dtype, source[at + lane]), [*outer, first + lane])
