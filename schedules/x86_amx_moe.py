"""Products of the experts on AMX: matrix tiles for many rows of an expert, dot products for few."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array
from tvm_gdn.schedules.cpu_moe import ExpertTiles
from tvm_gdn.schedules.moe_weights import LANES, signed_nibbles
from tvm_gdn.schedules.x86_matrix import ROWS, EmulatedMatrixUnit, MatrixUnit


class _Scaled:
    """What integer sums of a block stand for, element by element: scaled, and without what unsigned weights added to them."""

    def __init__(self, sums: Any, zeros: Any, first: Any, scale: Any, e: Any, n: Any) -> None:
        self.sums, self.zeros, self.first, self.scale, self.group = sums, zeros, first, scale, (e, n)

    def __getitem__(self, index: tuple[Any, Any]) -> Any:
        r, c = index
        total = self.sums[r, c] if self.zeros is None else self.sums[r, c] - self.zeros[self.first + r, 0]
        return T.Cast("float32", total) * T.Cast("float32", self.scale[(*self.group, 0, c)])


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
        self.unit.enter(self.depth, self.weights.sum, range(8) if self.widened else (0, 1, 2, 3, 4, 6, 7))
        if self.widened:
            self.panel = T.alloc_buffer((1, 1, steps, 1024), "int32")

    def end(self) -> None:
        """Give the tiles up."""
        self.unit.leave()

    def _product(self) -> Any:
        few, many, limit = super()._product(), self._many(), self.few

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, after, sink):
            if m <= limit:
                few(A, sums, first, m, W, scale, e, n, steps, shift, after, sink)
            else:
                # Numbers that stay in memory would be read again for every tile.
                row: T.let[T.int64] = first
                rows: T.let[T.int64] = m
                expert: T.let[T.int64] = T.Cast("int64", e)
                group: T.let[T.int64] = T.Cast("int64", n)
                many(A, sums, row, rows, W, scale, expert, group, steps, after, sink)

        return product

    def _fetch(self, W: Any, e: Any, n: Any, s: Any) -> None:
        """What the first block of rows does with a step of weights: ask for a later one, or widen nibbles for all blocks."""
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

    def _multiply(self, A: Any, first: Any, W: Any, e: Any, n: Any, s: Any, height: int) -> None:
        """Registers += step s of 16 `height` rows times step s of the weights."""
        unit, lines = self.unit, self.weights.lines
        for line in range(0, lines, self.depth):
            for y in range(2):
                column = lambda r, y=y, line=line: [e, n, s, (y * lines + line + r) * LANES]  # noqa: E731
                unit.load(6 + y, W, column, LANES)
            # The second rows take the first ones' register: a core whose other thread is awake has few to rename them to.
            for x in range(height):
                row = lambda r, x=x, line=line: [first + x * ROWS + r, s * lines + line]  # noqa: E731
                unit.load(4, A, row, int(A.shape[1]))
                for y in range(2):
                    unit.dot(2 * x + y, 4, 6 + y, self.weights.matrix)

    def _store(self, C: Any, height: int) -> None:
        for x in range(height):
            for y in range(2):
                row = lambda r, x=x, y=y: [x * ROWS + r, y * LANES]  # noqa: E731
                self.unit.store(2 * x + y, C, row, 2 * LANES)

    def _group_sums(self, C: Any, A: Any, first: Any, s: Any, y: Any, groups: int) -> None:
        """C[s % 2, g] = the sums of every group g of step s: 16 rows times half y of the panel's columns."""
        unit, lines = self.unit, self.weights.lines
        for g in range(groups):
            unit.clear(g)
            for line in range(g * (lines // groups), (g + 1) * (lines // groups), self.depth):
                a, b = 4 + line // self.depth % 2, 6 + line // self.depth % 2
                unit.load(a, A, lambda r, line=line: [first + r, s * lines + line], int(A.shape[1]))
                unit.load(b, self.panel, lambda r, line=line: [0, 0, s, (y * lines + line + r) * LANES], LANES)
                unit.dot(g, a, b, self.weights.matrix)
            unit.store(g, C, lambda r, g=g: [s % 2 * groups + g, r, 0], LANES)

    def _many(self) -> Any:
        """Products of many rows; of weights with a scale per group, in another order."""
        whole, grouped, groups = self._whole(), self._grouped(), self.groups

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, after, sink):
            if groups(scale, steps) > 0:
                grouped(A, first, m, W, scale, e, n, steps, groups(scale, steps), after, sink)
            else:
                whole(A, sums, first, m, W, scale, e, n, steps, after, sink)

        return product

    def _whole(self) -> Any:
        """Blocks of 32 rows, two by two tiles, or of the last 16, one by two."""
        weights, widened = self.weights, self.widened
        fetch, ask_next = self._fetch, self._ask_next
        clear, multiply, store = self._clear, self._multiply, self._store

        @T.inline
        def block(C, A, first, b, blocks, W, e, n, steps, after, height):
            """C = rows times weights."""
            clear(height)
            for s in T.serial(steps):
                if b == 0:
                    fetch(W, e, n, s)
                if blocks > 1:
                    ask_next(W, after, s, b, blocks, steps)
                if widened:
                    multiply(A, first, self.panel, 0, 0, s, height)
                else:
                    multiply(A, first, W, e, n, s, height)
            store(C, height)

        def result(C, sums, first, scale, e, n):
            return _Scaled(C, None if widened else sums, first, scale, e, n) if weights.quantized else C

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, after, sink):
            C = local_array(2 * ROWS, 2 * LANES, dtype=weights.sum)
            blocks: T.let[T.int64] = (m + 2 * ROWS - 1) // (2 * ROWS)
            for b in T.serial(blocks):
                if m - b * (2 * ROWS) > ROWS:
                    block(C, self.words(A), first + b * (2 * ROWS), b, blocks, W, e, n, steps, after, 2)
                else:
                    block(C, self.words(A), first + b * (2 * ROWS), b, blocks, W, e, n, steps, after, 1)
                sink(result(C, sums, first + b * (2 * ROWS), scale, e, n), b * (2 * ROWS), T.min(m - b * (2 * ROWS), 2 * ROWS))

        return product

    def _grouped(self) -> Any:
        """Blocks of 16 rows by 16 columns, whose scaled sums stay in vector registers.

        The vector unit scales the groups of a step while the matrix unit multiplies those of the next one. Scaled sums of more
        tiles would not fit the registers, and loading and storing them would take three times as long as the products.
        """
        fetch, ask_next, group_sums = self._fetch, self._ask_next, self._group_sums

        @T.inline
        def add_scaled(acc, C, scale, e, n, s, y, groups):
            for g in T.unroll(groups):
                factor = local_array(LANES)
                factor[T.ramp(0, 1, LANES)] = T.Cast("float32x16", scale[e, n, s * groups + g, T.ramp(y * LANES, 1, LANES)])
                for r in T.unroll(ROWS):
                    acc[r, T.ramp(0, 1, LANES)] = (
                        acc[r, T.ramp(0, 1, LANES)]
                        + T.Cast("float32x16", C[s % 2 * groups + g, r, T.ramp(0, 1, LANES)]) * factor[T.ramp(0, 1, LANES)]
                    )

        @T.inline
        def product(A, first, m, W, scale, e, n, steps, groups, after, sink):
            C = local_array(2 * groups, ROWS, LANES, dtype="int32")
            Y = local_array(ROWS, 2 * LANES)
            blocks: T.let[T.int64] = (m + ROWS - 1) // ROWS
            for s in T.serial(steps):
                fetch(W, e, n, s)
            for b in T.serial(blocks):
                for y in T.serial(2):
                    acc = local_array(ROWS, LANES)
                    for r in T.unroll(ROWS):
                        acc[r, T.ramp(0, 1, LANES)] = T.broadcast(T.float32(0), LANES)
                    group_sums(C, self.words(A), first + b * ROWS, 0, y, groups)
                    for s in T.serial(steps - 1):
                        ask_next(W, after, s, b * 2 + y, blocks * 2, steps)
                        group_sums(C, self.words(A), first + b * ROWS, s + 1, y, groups)
                        add_scaled(acc, C, scale, e, n, s, y, groups)
                    add_scaled(acc, C, scale, e, n, steps - 1, y, groups)
                    for r in T.unroll(ROWS):
                        Y[r, T.ramp(y * LANES, 1, LANES)] = acc[r, T.ramp(0, 1, LANES)]
                sink(Y, b * ROWS, T.min(m - b * ROWS, ROWS))

        return product
