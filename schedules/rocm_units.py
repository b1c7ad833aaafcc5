"""AMD's matrix units: which thread of a wave has which numbers of a product of 16 x 16 x 16, or x 32 of bytes.

`MFMA` (gfx90a, gfx942): waves of 64, of whose threads four share a row of an operand. `WMMA` (gfx1100): waves of 32; a thread
has a whole row of an operand, the one 16 threads further the same. A product is a function per number of its result (C's calls
have no vectors): `schedules/rocm_lowering.py` makes one instruction of them, in C form they are functions of the emulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

Expr = Any

#: Rows and columns of a product; 32-bit words of an operand's row.
BLOCK, ROW = 16, 8


@dataclass(frozen=True)
class MatrixUnit:
    """How products are spread over a wave.

    Attributes
    ----------
    name : str
        Its instruction, and the beginning of its functions' names.
    wave : int
        Threads that multiply together.
    held : int
        Numbers of a result that a thread has, all of column ``lane % 16``.
    words : int
        Words that a thread has of either operand, of row ``lane % 16``.
    apart : int
        Rows from one of its numbers to the next.
    """

    name: str
    wave: int
    held: int
    words: int
    apart: int

    def lane(self, thread: Expr) -> Expr:
        """Number of a thread in its wave."""
        return T.Cast("int32", thread) % self.wave

    def word(self, lane: Expr) -> Expr:
        """First of a thread's words in its row of an operand."""
        return lane // BLOCK * self.words if self.words < ROW else 0

    def rows(self, lane: Expr) -> list[Expr]:
        """Rows of a thread's numbers of a result."""
        first = lane // BLOCK * (self.held if self.apart == 1 else 1)
        return [first + e * self.apart for e in range(self.held)]

    def gathered(self, row: Expr) -> Expr:
        """Where row i of the left operand has to come from for a thread's numbers to be neighbours, `held` of them, in order."""
        return row if self.apart == 1 else row // self.apart + row % self.apart * self.held

    def product(self, suffix: str, left: list[Expr], right: list[Expr], sums: list[Expr]) -> list[Expr]:
        """A thread's numbers of left times right, plus sums."""
        dtype = "int32" if suffix.startswith("_bytes") else "float32"
        name = f"tvm_gdn_{self.name}{suffix}"
        return [T.Bind(T.call_extern(dtype, name, *left, *right, *sums, e)) for e in range(self.held)]


MFMA = MatrixUnit("mfma", wave=64, held=4, words=2, apart=1)
WMMA = MatrixUnit("wmma", wave=32, held=8, words=8, apart=2)
#: Ends of functions' names by dtype of both operands.
SUFFIXES = {"bfloat16": "", "float16": "_half", "int8": "_bytes"}
