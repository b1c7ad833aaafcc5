"""Portable fallback of the experts on CPUs: one row and one column at a time, raw and packed weights, nothing to tune."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_team import TeamTiles
from tvm_gdn.schedules.generic_tiles import Portable

from tvm_gdn.packed_experts import STEP, ZERO
from tvm_gdn.schedule import NoKnobs, schedule
from tvm_gdn.spec import Geometry

#: Columns of a group, and of either half of it.
COLUMNS, HALF = 32, 16


class PortableExpertTiles(Portable, TeamTiles):
    """Tile operations of the experts of one geometry; see `tvm_gdn/ops/tir/moe_experts.py`.

    Parameters
    ----------
    scheme : str
        How packed weights are stored (`tvm_gdn/packed_experts.py` states the layout); empty: raw weights, rows along the
        reduction axis.
    """

    prelude, pad, floor = "", 0, 2
    block, columns = 32, 64

    def __init__(self, scheme: str) -> None:
        self.scheme, self.zero = scheme, ZERO.get(scheme, 0)
        self.quantized, self.k_step = scheme in ZERO, STEP.get(scheme, HALF)
        self.operand = "int8" if self.quantized else "float32"
        self.product = self._product()

    def begin(self, steps: int) -> None:
        """Nothing to prepare."""

    def end(self) -> None:
        """Nothing to give back."""

    def integers(self, count: int) -> Any:
        """int32 scratch."""
        return local_array(count, dtype="int32")

    def rows(self, count: Any, columns: int) -> Any:
        """Staged rows of the products' left operand."""
        return T.alloc_buffer((count, columns), self.operand)

    def weight(self, W: Any, e: Any, n: Any, shift: int, half: int, column: Any, k: Any) -> Any:
        """Element k of a column: fp32, or the stored integer."""
        if not self.scheme:
            row = T.min(n * HALF + half * shift + column, W.shape[1] - 1)
            # Staged rows are longer than raw ones, and zero there.
            return T.Cast("float32", W[e, row, T.min(k, W.shape[2] - 1)])
        wide = self.k_step == STEP["int4"]
        per = self.k_step // (2 * HALF if wide else HALF)
        line, part = k % self.k_step // per, T.Cast("int32", k % per)
        word = W[e, n, k // self.k_step, (line if wide else half * HALF + line) * HALF + column]
        if wide:
            return T.bitwise_and(T.shift_right(word, part * 8 + 4 * half), 15)
        if self.quantized:
            return T.bitwise_and(T.shift_right(word, part * 8), 255)
        if per == 1:
            return T.reinterpret("float32", word)
        bits = T.bitwise_and(T.shift_right(word, part * 16), 65535)
        if self.scheme == "bf16":
            return T.reinterpret("float32", T.shift_left(bits, 16))
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))

    def _product(self) -> Any:
        quantized, k_step = self.quantized, self.k_step

        def groups(scale: Any) -> int:
            """Scales along the reduction axis."""
            return int(scale.shape[2]) if quantized else 1

        @T.inline
        def column(C, acc, A, sums, row, W, scale, e, n, steps, shift, half, c):
            """One element of C: groups of the reduction axis, each with its own scale."""
            C[0, half * HALF + c] = T.float32(0)
            for g in T.serial(groups(scale)):
                acc[0] = T.Cast(acc.dtype, 0)
                for i in T.serial(steps * k_step // groups(scale)):
                    acc[0] = acc[0] + T.Cast(acc.dtype, A[row, g * (steps * k_step // groups(scale)) + i]) * self.weight(
                        W, e, n, shift, half, c, g * (steps * k_step // groups(scale)) + i
                    )
                if quantized:
                    C[0, half * HALF + c] = C[0, half * HALF + c] + T.Cast("float32", acc[0] - sums[row, g]) * T.Cast(
                        "float32", scale[e, n, g, half * HALF + c]
                    )
                else:
                    C[0, half * HALF + c] = acc[0]

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, after, sink):
            C = local_array(1, COLUMNS)
            acc = local_array(1, dtype="int32" if quantized else "float32")
            for r in T.serial(m):
                for c in T.serial(HALF):
                    column(C, acc, A, sums, first + r, W, scale, e, n, steps, shift, 0, c)
                    column(C, acc, A, sums, first + r, W, scale, e, n, steps, shift, 1, c)
                sink(C, r, 1)

        return product


@schedule("moe_experts", "generic-cpu")
class ExpertsGeneric(NoKnobs):
    """Experts, element by element."""

    @staticmethod
    def tiles(geometry: Geometry) -> PortableExpertTiles:
        """Scalar loops."""
        return PortableExpertTiles(geometry.attr.get("scheme", ""))
