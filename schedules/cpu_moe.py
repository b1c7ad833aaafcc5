"""Tile operations of the experts on CPUs: staged rows, register-blocked products of packed or raw weights.

One micro-kernel serves every packed scheme: `rows` x 32 accumulators, one line of weights times a broadcast word of each row at a
time; as many rows, or half, or a half of that, and so on, so that a decode step does not pay for rows that are not there. Raw
weights (rows contiguous along the reduction axis) are multiplied vector by vector, and the vectors summed at the end.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array, prefetch, sum_lanes, transpose_16
from tvm_gdn.schedules.cpu_team import TeamTiles
from tvm_gdn.schedules.moe_weights import LANES

#: Bytes between staged rows beyond the row itself: rows a power of two apart would share a set of the L1 cache.
PAD_BYTES = 64
#: Lines of weights per iteration of the innermost loop.
UNROLLED = 8
#: Cache lines of a step of packed weights.
STEP_LINES = 32
#: Steps of packed weights (2 KiB) that memory is asked for ahead of their use.
AHEAD = 8
#: Raw rows of weights that are multiplied at once.
RAW_ROWS = 4
#: No instruction, but an array that it is given is in memory then. LLVM would keep results in registers until they are used,
#: through every height of the micro-kernel, and spill accumulators in its innermost loop instead.
SETTLE = """
define void @tvm_gdn_settle(ptr %p) alwaysinline {
  call void asm sideeffect "", "r,~{memory}"(ptr %p)
  ret void
}
"""


def _lanes(vector: Any) -> Any:
    """Indices of the lanes of a vector among several."""
    return T.ramp(vector * LANES, 1, LANES)


def _clear(acc: Any, height: int, vectors: int) -> None:
    """Accumulators = 0."""
    with T.unroll(height) as r:
        for c in range(vectors):
            T.buffer_store(acc, T.broadcast(T.Cast(acc.dtype, 0), LANES), [r, _lanes(c)])


class ExpertTiles(TeamTiles):
    """Tile operations of one geometry.

    Parameters
    ----------
    weights : object
        How weights are multiplied (`moe_weights`).
    few : int
        Of raw weights: most rows of an expert that are multiplied without laying the weights out anew.
    raw : bool
        Whether weights are rows along the reduction axis instead of packed.
    block : int
        Rows of one expert that are staged together.
    columns : int
        Most output columns that are summed up at once, a multiple of 32.
    rows : int
        Most rows of the micro-kernel.
    vectors : int
        Accumulators of 16 columns that the registers hold.
    asked : int
        Cache lines of every step of weights that few rows ask for.
    overlap : bool
        Whether passes over a group of weights ask for the next group.
    floor : int
        Reading weights takes as long as multiplying them with so many blocks of 16 rows.
    hints : bool
        Whether the compiler has an instruction that asks memory for data.
    """

    def __init__(
        self,
        weights: Any,
        *,
        block: int,
        columns: int,
        rows: int,
        floor: int,
        vectors: int = 24,
        asked: int = 1,
        overlap: bool = False,
        few: int = 4,
        raw: bool = False,
        hints: bool = True,
    ) -> None:
        self.weights, self.block, self.columns, self.floor = weights, block, columns, floor
        self.operand, self.prelude, self.k_step = weights.operand, weights.prelude + SETTLE, weights.k_step
        self.quantized, self.zero = weights.quantized, weights.zero
        self.pad = PAD_BYTES // {"float32": 4, "bfloat16": 2, "int8": 1}[self.operand]
        self.top, self.few, self.raw, self.hints, self.vectors, self.asked = rows, few, raw, hints, vectors, asked
        self.overlap = overlap
        self.raw_rows = RAW_ROWS if vectors >= RAW_ROWS**2 else RAW_ROWS // 2
        self.product = self._raw_product() if raw else self._product()

    def begin(self, steps: int) -> None:
        """What a worker does before its first product."""
        if self.raw:
            self.panel = T.alloc_buffer((1, 1, steps, 512), "int32")

    def end(self) -> None:
        """What a worker does after its last product."""

    def ask(self, W: Any, e: Any, n: Any, s: Any, lines: int = 1) -> None:
        """Ask for packed weights some steps ahead: one line can make the CPU's own prefetcher fetch the rest (20 % faster)."""
        if self.hints and not self.raw:
            for line in range(lines):
                prefetch(W[e, n, s + AHEAD, line * (STEP_LINES // lines) * LANES], 2)

    def _ask_next(self, W: Any, after: Any, s: Any, turn: Any, turns: Any, steps: int) -> None:
        """Pass `turn` of `turns` over a group of weights, at step s: ask memory for its share of the group after it."""
        if self.hints and not self.raw:
            share = (STEP_LINES + turns - 1) // turns
            with T.serial(share) as line:
                prefetch(W[after[0], after[1], 0, ((turn * steps + s) * share + line) * LANES], 2)

    def integers(self, count: int) -> Any:
        """int32 scratch."""
        return local_array(count, dtype="int32")

    def rows(self, count: Any, columns: int) -> Any:
        """Staged rows of the products' left operand, each padded."""
        return T.alloc_buffer((count, columns + self.pad), self.operand)

    def words(self, A: Any) -> Any:
        """Rows of elements as what is multiplied: fp32 numbers, or words of several elements."""
        if self.operand == "float32":
            return A
        *outer, last = A.shape
        return T.decl_buffer((*outer, last // self.weights.per), "int32", data=A.data, align=4)

    def _blocks(self, micro: Any, top: int) -> Any:
        """Macro that gives rows to the micro-kernel of the least height that holds them."""

        def shortest(height: int) -> Any:
            below = shortest(height // 2) if height > 1 else None

            @T.inline
            def choose(left, args):
                if below is None:
                    micro(height, *args)
                elif left > height // 2:
                    micro(height, *args)
                else:
                    below(left, args)

            return choose

        return shortest(top)

    def groups(self, scale: Any, steps: int) -> int:
        """Groups of the reduction axis per step that have a scale of their own; 0: one scale for all steps."""
        count = int(scale.shape[2]) if self.quantized else 1
        return 0 if count == 1 else count // int(steps)

    def _run(
        self, acc: Any, A: Any, first: Any, W: Any, e: Any, n: Any, s: Any, line: Any, count: int, height: int, halves: Any
    ) -> None:
        """Accumulators += `count` lines of step s, from `line` on, times `height` rows."""
        weights, width = self.weights, len(halves) * LANES
        each = min(count, weights.folds or count)
        for start in range(0, count, each):
            sums = local_array(height, width, dtype="int32") if weights.folds else acc
            if weights.folds:
                _clear(sums, height, len(halves))
            with T.unroll(each) as i:
                at = line + start + i
                words = local_array(len(halves), LANES, dtype="int32")
                for c, half in enumerate(halves):
                    T.buffer_store(words, weights.line(W, e, n, s, at, half), [c, _lanes(0)])
                with T.unroll(height) as r:
                    for c in range(len(halves)):
                        k = s * self.k_step + at * weights.per
                        total = weights.dot(sums[r, _lanes(c)], A, first + r, k, words[c, _lanes(0)])
                        T.buffer_store(sums, total, [r, _lanes(c)])
            if weights.folds:
                with T.unroll(height) as r:
                    for c in range(len(halves)):
                        T.buffer_store(acc, weights.fold(acc[r, _lanes(c)], sums[r, _lanes(c)]), [r, _lanes(c)])

    def _micro(self) -> Any:
        """C[r, :] = rows first + r of A times the 32 columns of group n, r < height; by halves if registers are few."""
        weights, groups, run, vectors = self.weights, self.groups, self._run, self.vectors
        lines, quantized, overlap = weights.lines, weights.quantized, self.overlap

        @T.inline
        def ask(halves, W, e, n, s, steps, place):
            if not overlap:
                self.ask(W, e, n, s, self.asked if len(halves) == 2 else 1)
            else:
                if place[0] == 0:
                    self.ask(W, e, n, s, self.asked)
                if place[1] > 1:
                    self._ask_next(W, place[2], s, place[0], place[1], steps)

        @T.inline
        def part(height, halves, C, A, sums, first, W, scale, e, n, steps, place):
            acc = local_array(height, len(halves) * LANES, dtype=weights.sum)
            _clear(acc, height, len(halves))
            if groups(scale, steps) == 0:
                for s in T.serial(steps):
                    ask(halves, W, e, n, s, steps, place)
                    for turn in T.serial(lines // UNROLLED):
                        run(acc, A, first, W, e, n, s, turn * UNROLLED, UNROLLED, height, halves)
                for r in T.unroll(height):
                    for c in T.unroll(len(halves)):
                        if quantized:
                            C[r, _lanes(halves[0] + c)] = T.Cast(
                                "float32x16", acc[r, _lanes(c)] - T.broadcast(sums[first + r, 0], LANES)
                            ) * T.Cast("float32x16", scale[e, n, 0, _lanes(halves[0] + c)])
                        else:
                            C[r, _lanes(halves[0] + c)] = acc[r, _lanes(c)]
            else:
                scaled = local_array(height, len(halves) * LANES)
                _clear(scaled, height, len(halves))
                for s in T.serial(steps):
                    ask(halves, W, e, n, s, steps, place)
                    for g in T.serial(groups(scale, steps)):
                        run(
                            acc, A, first, W, e, n, s, g * (lines // groups(scale, steps)), lines // groups(scale, steps), height,
                            halves,
                        )  # fmt: skip
                        for r in T.unroll(height):
                            for c in T.unroll(len(halves)):
                                scaled[r, _lanes(c)] = scaled[r, _lanes(c)] + T.Cast(
                                    "float32x16",
                                    acc[r, _lanes(c)] - T.broadcast(sums[first + r, s * (groups(scale, steps)) + g], LANES),
                                ) * T.Cast("float32x16", scale[e, n, s * (groups(scale, steps)) + g, _lanes(halves[0] + c)])
                        _clear(acc, height, len(halves))
                for r in T.unroll(height):
                    for c in T.unroll(len(halves)):
                        C[r, _lanes(halves[0] + c)] = scaled[r, _lanes(c)]

        @T.inline
        def micro(height, *args: Any):
            if 2 * height <= vectors:
                part(height, (0, 1), *args)
            else:
                part(height, (0,), *args)
                part(height, (1,), *args)

        return micro

    def _product(self) -> Any:
        top, choose = self.top, self._blocks(self._micro(), self.top)

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, after, sink):
            C = local_array(top, 2 * LANES)
            for b in T.serial((m + top - 1) // top):
                # Which of how many passes over the group this is, and the group after it.
                choose(
                    T.min(m - b * top, top),
                    (C, self.words(A), sums, first + b * top, W, scale, e, n, steps, (b, (m + top - 1) // top, after)),
                )
                T.evaluate(T.call_extern("void", "tvm_gdn_settle", T.address_of(C[0, 0])))
                sink(C, b * top, T.min(m - b * top, top))

        return product

    def _raw_product(self) -> Any:
        """Few rows: vectors along the reduction axis. Many: the weights of 32 columns are laid out as if packed, for all rows."""
        few, many = self._along_rows(), self._product()

        @T.inline
        def product(A, sums, first, m, W, scale, e, n, steps, shift, after, sink):
            if m <= self.few:
                few(A, first, m, W, e, n, steps, shift, sink)
            else:
                self._lay_out(W, e, n, shift)
                many(A, sums, first, m, self.panel, scale, 0, 0, steps, shift, after, sink)

        return product

    def _lay_out(self, W: Any, e: Any, n: Any, shift: int) -> None:
        """Write the panel: steps of 32 raw rows, transposed word by word."""
        W = self.words_of(W)
        count, last = W.shape[2], W.shape[1] - 1
        lanes = T.ramp(0, 1, LANES)

        def word(row: Any, at: Any) -> Any:
            value = W[e, T.min(row, last), at]
            kind = "int32x16" if isinstance(at, type(lanes)) else "int32"
            return value if self.operand != "float32" else T.reinterpret(kind, T.Cast(kind.replace("int", "float"), value))

        for half in range(2):
            base = n * LANES + half * shift
            with T.serial(int(count) // LANES) as s:
                transpose_16(
                    lambda r, base=base, s=s: word(base + r, T.ramp(s * LANES, 1, LANES)),
                    lambda c, column, s=s, half=half: T.buffer_store(
                        self.panel, column, [0, 0, s, T.ramp((half * LANES + c) * LANES, 1, LANES)]
                    ),
                    "int32",
                )
            if int(count) % LANES:
                done = int(count) // LANES * LANES
                with T.serial(LANES) as c:
                    with T.serial(LANES) as r:
                        value = T.if_then_else(done + c < count, word(base + r, T.min(done + c, count - 1)), 0)
                        T.buffer_store(self.panel, value, [0, 0, done // LANES, (half * LANES + c) * LANES + r])

    def words_of(self, W: Any) -> Any:
        """Raw weights as `words` has rows: as they are where products are in fp32."""
        return W if self.operand == "float32" else self.words(W)

    def _along_rows(self) -> Any:
        weights, run = self.weights, self.weights.run
        raw_rows = self.raw_rows
        limit = min(self.few, raw_rows)

        @T.inline
        def columns(height, C, A, elements, first, W, raw, e, base, at, K):
            """C[:, at : at + raw_rows] for rows base to base + raw_rows of the raw weights."""
            acc = local_array(height, raw_rows * LANES)
            for r in T.unroll(height):
                for c in T.unroll(raw_rows):
                    acc[r, T.ramp(c * LANES, 1, LANES)] = T.broadcast(T.float32(0), LANES)
            for k in T.serial(K // run):
                for r in T.unroll(height):
                    for c in T.unroll(raw_rows):
                        acc[r, T.ramp(c * LANES, 1, LANES)] = weights.dot_row(
                            acc[r, T.ramp(c * LANES, 1, LANES)], A, first + r, W, e, T.min(base + c, raw.shape[1] - 1), k * run
                        )
            for r in T.unroll(height):
                for c in T.unroll(raw_rows):
                    part = local_array(LANES)
                    part[T.ramp(0, 1, LANES)] = acc[r, T.ramp(c * LANES, 1, LANES)]
                    C[r, at + c] = sum_lanes(part, LANES)
                    for k in T.serial(K % run):
                        C[r, at + c] = C[r, at + c] + T.Cast("float32", elements[first + r, K // run * run + k]) * T.Cast(
                            "float32", raw[e, T.min(base + c, raw.shape[1] - 1), K // run * run + k]
                        )

        @T.inline
        def micro(height, C, A, elements, first, W, raw, e, n, shift, K):
            for half in T.serial(2):
                for q in T.serial(LANES // raw_rows):
                    base = n * LANES + half * shift + q * raw_rows
                    columns(height, C, A, elements, first, W, raw, e, base, half * LANES + q * raw_rows, K)

        choose = self._blocks(micro, limit)

        @T.inline
        def product(A, first, m, W, e, n, steps, shift, sink):
            C = local_array(limit, 2 * LANES)
            for b in T.serial((m + limit - 1) // limit):
                choose(
                    T.min(m - b * limit, limit),
                    (C, self.words(A), A, first + b * limit, self.words_of(W), W, e, n, shift, int(W.shape[2])),
                )
                sink(C, b * limit, T.min(m - b * limit, limit))

        return product
