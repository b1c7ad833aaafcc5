"""Tile operations of the experts on GPUs: see `tvm_gdn/ops/tir/moe_grid.py` for what they are for.

Products of 16-bit data are fragments of mma.m16n8k16 (`csrc/device_functions.h`; plain C++ where there is no PTX): bf16 and
fp16 each by an instruction of its own, both exact with fp32 sums. Rows of A, and of raw weights, come to registers by ldmatrix.
A word of packed weights is what a thread of such a fragment holds, two neighbours on the reduction axis of one column: it is
read as it is. fp32 data, and packed weights of another dtype than the activations, are multiplied in fp32 by the same threads,
element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import aligned
from tvm_gdn.schedules.gpu_fragments import BLOCK, WARP, fragment_elements, when
from tvm_gdn.schedules.gpu_grid import GridTiles
from tvm_gdn.schedules.gpu_moe_copies import SIZES, Expr, Ring, Rows

from tvm_gdn.packed_experts import STEP
from tvm_gdn.spec import Geometry

#: Words of a step of packed weights, of which a half belongs to 16 columns.
WORDS = 512
#: Instruction of the matrix unit by dtype of both operands.
MMA = {"bfloat16": "tvm_gdn_mma", "float16": "tvm_gdn_mma_half"}
SCHEMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Plan:
    """How a kernel's work is cut.

    Attributes
    ----------
    rows : int
        Rows of one expert in a tile: 16 or a multiple of 32.
    columns : int
        Columns of either half: a multiple of 16.
    depth : int
        Elements of the reduction axis in a stage: a multiple of 32.
    stages, warps : int
        Stages in shared memory, and warps of a block.
    most : number
        Mean number of rows per expert up to which the plan is taken; of the last plan of no meaning.
    ahead : bool
        Whether weights are asked for in 256 bytes by the cache.
    grouped : bool
        Whether four warps multiply together: 64 rows, and all columns; a stage has 128 bytes of each.
    blocks : int
        Blocks that go through all tiles, some threads copying while others multiply (`gpu_moe_streams.py`); 0: a block per tile.
    wave, fragment : int
        Threads of a warp, and columns of its fragments.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    most: float = 0
    ahead: bool = False
    grouped: bool = False
    blocks: int = 0
    wave: int = WARP
    fragment: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * self.wave

    @property
    def step(self) -> int:
        """Rows to whose multiple a tile's are rounded where an expert's are shared out evenly; other tiles are full."""
        return BLOCK if self.blocks else self.rows

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Fragments of a warp along rows, and along columns of either half; warps along rows, and along columns."""
        high = self.rows // BLOCK
        tall = min(2, high)
        along = high // tall
        across = self.warps // along
        return tall, self.columns // self.fragment // max(1, across), along, across

    def fits(self) -> bool:
        """Whether warps and fragments come out even."""
        if self.blocks:
            return self.warps in (12, 16) and self.rows % 16 == 0 < self.rows <= 160 and self.columns == 128 and self.depth == 64
        if self.grouped:
            return self.rows == 16 * self.warps and self.rows % 64 == 0 and self.columns in (32, 64, 128) and self.depth == 64
        tall, wide, along, across = self.grid
        fit = wide * across * self.fragment == self.columns > 0
        return fit and tall * along * BLOCK == self.rows and across * along == self.warps

    def bytes(self, dtype: str, scheme: str) -> int:
        """Shared memory of a block."""
        size = SIZES[dtype]
        if self.grouped:
            return self.stages * (self.rows + 2 * self.columns) * self.depth * size + 1023
        raw = 2 * self.columns * (self.depth * size + 16)
        weights = self.columns // BLOCK * (self.depth // STEP[scheme]) * WORDS * 4 if scheme else raw
        return self.stages * (self.rows * (self.depth * size + 16) + weights)


class ExpertGridTiles(GridTiles):
    """Tile operations of one geometry.

    Parameters
    ----------
    geometry : Geometry
        Dtypes, and scheme of packed weights.
    plans : tuple of Plan
        By rising number of rows per expert.
    partial : str
        Dtype of rows before their sum.
    """

    quantized = False
    sorters, adders = 1024, 256
    #: Elements of the reduction axis in a fragment.
    slice = BLOCK
    #: Numbers of a fragment that a thread has, and how many of them are neighbours in a row.
    held, beside = 4, 2

    def __init__(self, geometry: Geometry, plans: tuple[Plan, ...], partial: str = "float32") -> None:
        super().__init__()
        self.partial = partial
        self.plans, self.scheme, self.data = plans, geometry.attr.get("scheme", ""), geometry.dtype["x"]
        self.unit = MMA.get(self.data) if SCHEMES.get(self.scheme, self.data) == self.data else None

    @staticmethod
    def store_some(buffer: Any, index: list[Expr], values: list[Expr]) -> None:
        """Two or four neighbours from a multiple of their number on, at once."""
        some = T.alloc_buffer((len(values),), "float32", scope="local")
        for i, value in enumerate(values):
            T.buffer_store(some, value, [i])
        *outer, column = index
        with T.vectorized(len(values)) as i:
            T.buffer_store(buffer, T.Cast(buffer.dtype, some[i]), [*outer, column + i])

    def product(
        self, plan: Plan, A: Any, row_of: Callable[[Expr], Expr], m: Expr, W: Any, e: Expr, n: Expr, shift: int,
        sink: Callable[..., None], *, follow: bool = False,
    ) -> None:  # fmt: skip
        """Rows of A times columns of W[e], to the sink."""
        ring = self._ring(plan, self._left(plan, A, row_of, m), self._right(plan, W, e, n, shift))
        row, column = self._place(plan)
        sums = self._zeros(plan, "float32")
        compute = self._fragments if self.unit else self._elements
        ring.run(
            -(-int(A.shape[1]) // plan.depth), lambda _step, slot: compute(plan, ring, slot, sums, row, column, m),
            follow=self.follow if follow else None,
        )  # fmt: skip
        self._finish(plan, row, column, m, lambda at, _r, _half, _c: sums[at], sink)

    def _ring(self, plan: Plan, left: Rows, right: Rows) -> Ring:
        """The stages through which operands pass."""
        return Ring(self.lane, plan.threads, plan.stages, (left, right))

    def _place(self, plan: Plan) -> tuple[Expr, Expr]:
        """A warp's first fragment along rows, and along columns."""
        tall, wide, along, _ = plan.grid
        warp = T.Bind(T.Cast("int32", self.lane) // plan.wave)
        return T.Bind(warp % along * tall), T.Bind(warp // along * wide)

    def _zeros(self, plan: Plan, dtype: str) -> Any:
        """Sums of a thread's fragments: by row of fragments, column, half, element."""
        tall, wide, _, _ = plan.grid
        count = tall * wide * 2 * self.held
        sums = T.alloc_buffer((count,), dtype, scope="local")
        with T.unroll(count) as i:
            T.buffer_store(sums, T.Cast(dtype, 0), [i])
        return sums

    def _where(self, row: Expr, column: Expr) -> list[tuple[Expr, Expr]]:
        """Rows and columns of a thread's numbers of a fragment."""
        return fragment_elements(self.lane, row, column)

    def _over(self, plan: Plan, row: Expr, column: Expr, body: Callable[[int, Expr, Expr], None]) -> None:
        """Call ``body(at, r, c)`` for pairs of neighbours in a thread's fragments: `at` of a half, + held of the other."""
        tall, wide, _, _ = plan.grid
        for a in range(tall):
            for b in range(wide):
                places = self._where(row + a, column + b)
                for pair in range(0, self.held, 2):
                    body((a * wide + b) * 2 * self.held + pair, *places[pair])

    def _finish(
        self, plan: Plan, row: Expr, column: Expr, m: Expr, value: Callable[..., Expr], sink: Callable[..., None]
    ) -> None:  # fmt: skip
        """Give the sink ``value(at, r, half, c)`` of every element of a row that is there."""

        def pair(at: int, r: Expr, c: Expr) -> None:
            def body() -> None:
                sink(r, c, *([value(at + half * self.held + i, r, half, c + i) for i in range(2)] for half in range(2)))

            when(r < m, body)

        self._over(plan, row, column, pair)

    # Operands.
    def _left(self, plan: Plan, A: Any, row_of: Callable[[Expr], Expr], m: Expr) -> Rows:
        lanes = 16 // SIZES[A.dtype]
        # Which rows a thread copies does not change from stage to stage: their numbers are read once.
        across = plan.depth // lanes
        dtype = "int32" if plan.blocks else "int64"
        own = T.alloc_buffer((-(-plan.rows * across // plan.threads),), dtype, scope="local")
        for step in range(int(own.shape[0])):
            i = (T.Cast("int32", self.lane) + step * plan.threads) // across
            T.buffer_store(own, T.Cast(dtype, row_of(T.min(i, m - 1))), [step])

        def index(i: Expr, k: Expr, step: int | None) -> tuple[Expr, ...]:
            return row_of(T.min(i, m - 1)) if step is None else T.Cast("int64", own[step]), k

        limit = int(A.shape[1])
        # Scratch memory of bytes is the kernel's own, in rows of whole steps.
        fitting: Any = limit % lanes == 0
        if fitting and A.dtype != "int8":
            fitting = T.Bind(T.And(aligned(A, 0, 0, elements=lanes), aligned(A, 1, 0, elements=lanes)))
        return Rows(A, plan.rows, plan.depth, plan.depth + lanes, limit, index, lambda i: i < m, fitting)

    def _right(self, plan: Plan, W: Any, e: Expr, n: Expr, shift: int) -> Rows:
        if self.scheme:
            groups, steps = int(W.shape[1]), plan.depth // STEP[self.scheme]

            def word(i: Expr, k: Expr, _step: int | None) -> tuple[Expr, ...]:
                return e, T.min(n + i, groups - 1), k // WORDS, k % WORDS

            fitting = T.Bind(aligned(W, 0, 0, 0, 0, elements=4))
            limit = int(W.shape[2]) * WORDS
            return Rows(
                W,
                plan.columns // BLOCK,
                steps * WORDS,
                steps * WORDS,
                limit,
                word,
                lambda i: n + i < groups,
                fitting,
                ahead=plan.ahead,
            )
        lanes, last, C = 16 // SIZES[W.dtype], int(W.shape[1]) - 1, plan.columns

        # Rows of the first half end where those of the second begin, or where the tensor does.
        end = last + 1 if shift == C else shift
        full = (last + 1) % (2 * C) == 0 if shift == C else shift % C == 0

        def row(i: Expr) -> Expr:
            return n + i % C + T.Select(i < C, 0, shift)

        def there(i: Expr) -> Expr:
            return full or T.And(row(i) <= last, T.Or(i >= C, n + i < end))

        def index(i: Expr, k: Expr, _step: int | None) -> tuple[Expr, ...]:
            return e, row(i) if full else T.min(row(i), last), k

        fitting = int(W.shape[2]) % lanes == 0
        if fitting:
            fitting = T.Bind(aligned(W, 0, 0, 0, elements=lanes))
        return Rows(W, 2 * C, plan.depth, plan.depth + lanes, int(W.shape[2]), index, there, fitting, ahead=plan.ahead)

    # One step.
    def _fragments(self, plan: Plan, ring: Ring, slot: Expr, sums: Any, row: Expr, column: Expr, m: Expr) -> None:
        count = plan.depth // self.slice
        when(row * BLOCK < m, lambda: self._slices(plan, ring, slot, sums, row, column, 0, count))

    def _slices(self, plan: Plan, ring: Ring, slot: Expr, sums: Any, row: Expr, column: Expr, first: int, count: int) -> None:
        """Add the products of `count` slices of the reduction axis, from `first` on, to the sums of a warp's fragments."""
        tall, wide, _, _ = plan.grid
        left = T.alloc_buffer((4 * tall,), "uint32", scope="local")
        right = T.alloc_buffer((4 * wide,), "uint32", scope="local")
        view, base = ring.at(0, slot)
        stride = ring.operands[0].stride
        for kk in range(first, first + count):
            for a in range(tall):
                place = T.address_of(view[base + (row + a) * BLOCK * stride + kk * self.slice])
                # Strides are in pairs of bytes there.
                T.evaluate(T.call_extern("int32", "tvm_gdn_load_a", left.data, a * 4, place, stride * SIZES[view.dtype] // 2))
            for b in range(wide):
                self._load_right(plan, ring, slot, right, b, column + b, kk)
            for a in range(tall):
                for b in range(wide):
                    for half in range(2):
                        at = ((a * wide + b) * 2 + half) * 4
                        places = (sums.data, at, left.data, a * 4, right.data, b * 4 + half * 2)
                        T.evaluate(T.call_extern("int32", self.unit, *places))

    def _load_right(self, plan: Plan, ring: Ring, slot: Expr, registers: Any, b: int, column: Expr, kk: int) -> None:
        """Fragments of both halves: 8 columns from ``8 column`` on, 16 elements from ``16 kk`` on."""
        view, base = ring.at(1, slot)
        stride = ring.operands[1].stride
        if not self.scheme:
            place = T.address_of(view[base + column * 8 * stride + kk * BLOCK])
            apart = plan.columns * stride
            T.evaluate(T.call_extern("int32", "tvm_gdn_load_b_pair_turned", registers.data, b * 4, place, stride, apart))
            return
        lane = T.Cast("int32", self.lane) % WARP
        first = T.Bind(base + column // 2 * stride + column % 2 * 8 + lane // 4 + lane % 4 * 16)
        for half in range(2):
            for n in range(2):
                line = kk // 2 * WORDS + (half * 16 + kk % 2 * 8 + n * 4) * 16
                T.buffer_store(registers, T.reinterpret("uint32", view[first + line]), [b * 4 + half * 2 + n])

    def _elements(self, plan: Plan, ring: Ring, slot: Expr, sums: Any, row: Expr, column: Expr, m: Expr) -> None:
        tall, wide, _, _ = plan.grid
        stride, held, beside = ring.operands[0].stride, self.held, self.beside
        for a in range(tall):
            for b in range(wide):
                places = self._where(row + a, column + b)

                def element(k: Expr, a: int = a, b: int = b, places: Any = places) -> None:
                    x = [T.Bind(ring.number(0, slot, places[i][0] * stride + k)) for i in range(0, held, beside)]
                    for half in range(2):
                        w = [T.Bind(self._weight(plan, ring, slot, half, places[i][1], k)) for i in range(beside)]
                        for i in range(held):
                            at = ((a * wide + b) * 2 + half) * held + i
                            T.buffer_store(sums, sums[at] + x[i // beside] * w[i % beside], [at])

                with T.serial(plan.depth) as k:
                    when((row + a) * BLOCK < m, lambda k=k, element=element: element(k))

    def _weight(self, plan: Plan, ring: Ring, slot: Expr, half: int, c: Expr, k: Expr) -> Expr:
        """Element k of column c of a half, in fp32."""
        stride = ring.operands[1].stride
        if not self.scheme:
            return ring.number(1, slot, (half * plan.columns + c) * stride + k)
        step, per = STEP[self.scheme], STEP[self.scheme] // BLOCK
        line = half * 16 + k % step // per
        word = ring.word(1, slot, c // 16 * stride + k // step * WORDS + line * 16 + c % 16)
        if per == 1:
            return T.reinterpret("float32", word)
        bits = T.bitwise_and(T.shift_right(word, k % 2 * 16), 65535)
        if self.scheme == "bf16":
            return T.reinterpret("float32", T.shift_left(bits, 16))
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))
