"""Products of the experts on AMX: matrix tiles for many rows of an expert, dot products for few."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_moe import ExpertTiles
from tvm_gdn.schedules.moe_weights import LANES, signed_nibbles
from tvm_gdn.schedules.x86_matrix import ROWS, EmulatedMatrixUnit, MatrixUnit


class AmxExpertTiles(ExpertTiles):
    """Experts with at most `few` rows run on the micro-kernel of `ExpertTiles`, others on AMX tiles.

    Blocks of 32 rows times 32 columns stay in four registers for the whole reduction: rows and weights both come from the L2
    cache then, which feeds the unit at three quarters of its peak; visits to accumulators in memory cost more than they save.

    Parameters
    ----------
    few : int
        Most rows of an expert for the micro-kernel.
    depth : int
        Words of the reduction axis per product: 8 where a scale belongs to 32 bytes of it, else 16.
    emulated : bool
        Compute the same without AMX.
    """

    def __init__(self, weights: Any, *, few: int, depth: int = ROWS, emulated: bool = False, **options: Any) -> None:
        self.depth, self.unit = depth, EmulatedMatrixUnit() if emulated else MatrixUnit()
        self.widened = weights.lines == 2 * LANES
        super().__init__(weights, few=few, **options)

    def begin(self, steps: int) -> None:
        """Configure the tiles; memory for weights that have to be laid out anew."""
        super().begin(steps)
        self.unit.enter(self.depth, self.weights.sum)
        if self.widened:
            self.panel = T.alloc_buffer((1, 1, steps, 1024), "int32")

    def end(self) -> None:
        """Give the tiles up."""
        self.unit.leave()

    def _product(self) -> Any:
        few, many, limit = super()._product(), self._many(), self.few

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, sink):
            if m <= limit:
                few(A, sums, first, m, W, scale, e, n, steps, shift, sink)
            else:
                many(A, sums, first, m, W, scale, e, n, steps, sink)

        return product

    def _fetch(self, W: Any, e: Any, n: Any, s: Any) -> None:
        """What the first block of rows does with a step of weights: ask for a later one, and widen nibbles for all blocks."""
        self.ask(W, e, n, s)
        if self.widened:
            with T.serial(2 * LANES) as line:
                words = W[e, n, s, T.ramp(line * LANES, 1, LANES)]
                for half in range(2):
                    at = T.ramp((half * 2 * LANES + line) * LANES, 1, LANES)
                    T.buffer_store(self.panel, signed_nibbles(words, half), [0, 0, s, at])

    def _clear(self, height: int) -> None:
        for tile in range(2 * height):
            self.unit.clear(tile)

    def _multiply(self, A: Any, first: Any, W: Any, e: Any, n: Any, s: Any, start: Any, count: int, height: int) -> None:
        """Registers += `count` words, from `start` on, of step s of 16 `height` rows and of the weights."""
        unit, lines = self.unit, self.weights.lines
        for line in range(0, count, self.depth):
            for x in range(height):
                row = lambda r, x=x, line=line: [first + x * ROWS + r, s * lines + start + line]  # noqa: E731
                unit.load(4 + x, A, row, int(A.shape[1]))
            for y in range(2):
                column = lambda r, y=y, line=line: [e, n, s, (y * lines + start + line + r) * LANES]  # noqa: E731
                unit.load(6 + y, W, column, LANES)
            for x in range(height):
                for y in range(2):
                    unit.dot(2 * x + y, 4 + x, 6 + y, self.weights.matrix)

    def _store(self, C: Any, part: Any, height: int) -> None:
        for x in range(height):
            for y in range(2):
                row = lambda r, x=x, y=y: [(part * 2 + x) * ROWS + r, y * LANES]  # noqa: E731
                self.unit.store(2 * x + y, C, row, 2 * LANES)

    def _many(self) -> Any:
        """Blocks of 32 rows, two by two tiles, or of the last 16, one by two."""
        weights, lines, widened = self.weights, self.weights.lines, self.widened
        fetch, clear, multiply, store = self._fetch, self._clear, self._multiply, self._store

        @T.inline
        def whole(C, A, first, b, W, e, n, steps, height):
            """C = rows times weights."""
            clear(height)
            for s in T.serial(steps):
                if b == 0:
                    fetch(W, e, n, s)
                if widened:
                    multiply(A, first, self.panel, 0, 0, s, 0, lines, height)
                else:
                    multiply(A, first, W, e, n, s, 0, lines, height)
            store(C, 0, height)

        @T.inline
        def scaled(Y, C, sums, first, scale, e, n, height):
            """Y = what C stands for; the nibbles were made signed when they were widened."""
            for r in T.serial(height * ROWS):
                for c in T.unroll(2):
                    if widened:
                        Y[r, T.ramp(c * LANES, 1, LANES)] = T.Cast("float32x16", C[r, T.ramp(c * LANES, 1, LANES)]) * T.Cast(
                            "float32x16", scale[e, n, 0, T.ramp(c * LANES, 1, LANES)]
                        )
                    else:
                        Y[r, T.ramp(c * LANES, 1, LANES)] = T.Cast(
                            "float32x16", C[r, T.ramp(c * LANES, 1, LANES)] - T.broadcast(sums[first + r, 0], LANES)
                        ) * T.Cast("float32x16", scale[e, n, 0, T.ramp(c * LANES, 1, LANES)])

        @T.inline
        def add_group(Y, C, scale, e, n, group, height):
            """Y += the sums of a group times its scales; even and odd groups have their own sums."""
            factor = local_array(2 * LANES)
            for c in T.unroll(2):
                factor[T.ramp(c * LANES, 1, LANES)] = T.Cast("float32x16", scale[e, n, group, T.ramp(c * LANES, 1, LANES)])
            for r in T.serial(height * ROWS):
                for c in T.unroll(2):
                    Y[r, T.ramp(c * LANES, 1, LANES)] = (
                        Y[r, T.ramp(c * LANES, 1, LANES)]
                        + T.Cast("float32x16", C[group % 2 * (2 * ROWS) + r, T.ramp(c * LANES, 1, LANES)])
                        * factor[T.ramp(c * LANES, 1, LANES)]
                    )

        @T.inline
        def grouped(Y, C, A, first, b, W, scale, e, n, steps, groups, height):
            """Y = rows times weights; the vector unit scales a group while the matrix unit multiplies the next one."""
            for r in T.serial(height * ROWS):
                for c in T.unroll(2):
                    Y[r, T.ramp(c * LANES, 1, LANES)] = T.broadcast(T.float32(0), LANES)
            for s in T.serial(steps):
                if b == 0:
                    fetch(W, e, n, s)
                for g in T.serial(groups):
                    clear(height)
                    multiply(A, first, self.panel, 0, 0, s, g * (lines // groups), lines // groups, height)
                    store(C, (s * groups + g) % 2, height)
                    if s * groups + g > 0:
                        add_group(Y, C, scale, e, n, s * groups + g - 1, height)
            add_group(Y, C, scale, e, n, steps * groups - 1, height)

        @T.inline
        def block(C, Y, A, sums, first, b, W, scale, e, n, steps, height):
            if self.groups(scale, steps) > 0:
                grouped(Y, C, A, first, b, W, scale, e, n, steps, self.groups(scale, steps), height)
            else:
                whole(C, A, first, b, W, e, n, steps, height)
                if weights.quantized:
                    scaled(Y, C, sums, first, scale, e, n, height)

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, sink):
            C = local_array(4 * ROWS if widened else 2 * ROWS, 2 * LANES, dtype=weights.sum)
            Y = local_array(2 * ROWS, 2 * LANES)
            for b in T.serial((m + 2 * ROWS - 1) // (2 * ROWS)):
                if m - b * (2 * ROWS) > ROWS:
                    block(C, Y, self.words(A), sums, first + b * (2 * ROWS), b, W, scale, e, n, steps, 2)
                else:
                    block(C, Y, self.words(A), sums, first + b * (2 * ROWS), b, W, scale, e, n, steps, 1)
                if weights.quantized:
                    sink(Y, b * (2 * ROWS), T.min(m - b * (2 * ROWS), 2 * ROWS))
                else:
                    sink(C, b * (2 * ROWS), T.min(m - b * (2 * ROWS), 2 * ROWS))

        return product
