"""What the chunked delta rules compute ahead of states on GPUs: products of which half is wanted, and inverses of triangles.

Tiles stay where they are: parts of fp32 tiles are made in registers as fragments are loaded, and sums of one product are the left
operand of the next without a way through shared memory. Blocks of 16 x 16 go to the warps in turn.

Fragments are those of mma.m16n8k16; the functions that are called by name stand in `csrc/device_functions.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import move
from tvm_gdn.schedules.gpu_elements import ElementTiles
from tvm_gdn.schedules.gpu_fragments import BLOCK, ITEMSIZE, WARP, Operand, Packed, Tile, Window, ceil_div, when

from tvm_gdn.ops.tir.tiles import ElementFunction, Expr


class TriangleTiles(ElementTiles):
    """Tile operations on triangles, and what they share with other products."""

    #: Whether `squares`, `triangles`, `chain` and `keep` are there.
    chained = True

    def squares(self, dst: Tile, operand: Operand, finish: Callable[[Expr], Expr], *, turn: int = 0) -> None:
        """``dst[i, 0] = finish(sum_j x[i, j]^2)``: the diagonal of X X^T, whose right fragments are the left ones' registers.

        `turn`: the how many-th of such operations beside each other this is; each begins with the warps that the last left idle.
        """
        packed, lane = operand.packed, T.Cast("int32", self.lane) % WARP
        terms = self._terms(packed, packed)
        left, right = self._registers("uint32", 4 * packed.parts), self._registers("uint32", 4 * packed.parts)
        sums = self._registers("float32", 8)

        def block(number: Expr) -> None:
            for e in range(8):
                T.buffer_store(sums, T.float32(0), [e])
            with T.unroll(ceil_div(operand.cols, BLOCK)) as k:
                for part in range(packed.parts):
                    self._load_fragment("a", operand, left, part * 4, part, number * BLOCK, k * BLOCK)
                    for e in range(4):
                        T.buffer_store(right, left[part * 4 + e % 2 * 2 + e // 2], [part * 4 + e])
                for x, y in terms:
                    for n in range(2):
                        self._multiply(sums, n * 4, left, x * 4, right, y * 4 + n * 2)

            def diagonal() -> None:
                for n in range(2):
                    own = T.Select(lane // 4 % 2 == 0, sums[n * 6], sums[n * 6 + 1])
                    self._put(dst, finish(own), number * BLOCK + lane // 4 + n * 8, 0)

            when(lane // 8 == lane % 4, diagonal)

        blocks = ceil_div(operand.rows, BLOCK)
        self._in_turn(blocks, block, turn * blocks)

    def triangles(
        self,
        lefts: tuple[Operand, ...],
        right: Operand,
        of: Callable[[int], tuple[tuple[Any, ...], tuple[Tile, ...]]],
        each: Callable[[Callable[[int, Any], None]], None],
        *,
        common: ElementFunction,
        finish: Callable[..., tuple[Expr, ...]],
    ) -> None:
        """``results = finish(i, j, common(*sources), *(X right for X in lefts), *sources)``, in blocks on and below the diagonal.

        ``each(body)`` emits ``body(number, _)`` for every value head, ``of(number)`` are its results and sources. `common` is
        computed once for all results of an element; sources are ``(n, 1)`` or ``(1, n)``.
        """
        packs = [operand.packed for operand in lefts]
        width, parts, high = max(packed.parts for packed in packs), right.packed.parts, right.cols // BLOCK
        a, b = self._registers("uint32", 4 * width * len(lefts)), self._registers("uint32", 4 * parts)
        sums = self._registers("float32", 8 * len(lefts))
        shared = self.scalars(1)

        def block(number: Expr) -> None:
            mi = T.Bind(sum((T.Cast("int32", number >= n * (n + 1) // 2) for n in range(1, high)), T.int32(0)))
            ni = T.Bind(number - mi * (mi + 1) // 2)
            for e in range(8 * len(lefts)):
                T.buffer_store(sums, T.float32(0), [e])
            with T.unroll(ceil_div(right.rows, BLOCK)) as k:
                for part in range(parts):
                    self._load_fragment("b_pair", right, b, part * 4, part, k * BLOCK, ni * BLOCK, self._next_columns(right))
                for number_left, operand in enumerate(lefts):
                    for part in range(operand.packed.parts):
                        place = (number_left * width + part) * 4
                        self._load_fragment("a", operand, a, place, part, mi * BLOCK, k * BLOCK)
                for number_left, operand in enumerate(lefts):
                    for x, y in self._terms(operand.packed, right.packed):
                        for n in range(2):
                            place = (number_left * width + x) * 4
                            self._multiply(sums, number_left * 8 + n * 4, a, place, b, y * 4 + n * 2)
            each(lambda head, _: write(mi, ni, *of(head)))

        def write(mi: Expr, ni: Expr, results: tuple[Any, ...], sources: tuple[Tile, ...]) -> None:
            corners = [self._elements(mi, ni * 2 + n) for n in range(2)]
            values = self.scalars(4 * len(sources))
            # Before anything is written, behind which the compiler would load them again.
            for at, source in enumerate(sources):
                for e in range(2 if source.cols == 1 else 4):
                    i, j = corners[0][e * 2] if source.cols == 1 else corners[e // 2][e % 2]
                    T.buffer_store(values, self._get(source, i, j), [at * 4 + e])

            def element(n: int, e: int) -> tuple[Expr, ...]:
                i, j = corners[n][e]
                own = [values[at * 4 + (e // 2 if x.cols == 1 else n * 2 + e % 2)] for at, x in enumerate(sources)]
                T.buffer_store(shared, common(*own), [0])
                return finish(i, j, shared[0], *(sums[left * 8 + n * 4 + e] for left in range(len(lefts))), *own)

            for n in range(2):
                for e in (0, 2):
                    pairs = [self.scalars(2) for _ in results]
                    for other in range(2):
                        for to, value in zip(pairs, element(n, e + other), strict=True):
                            T.buffer_store(to, value, [other])
                    for dst, numbers in zip(results, pairs, strict=True):
                        self._put_pair(dst, numbers, *corners[n][e])

        self._in_turn(high * (high + 1) // 2, block)

    def _next_columns(self, operand: Operand) -> int:
        """Elements from a fragment of a right operand to the one beside it."""
        return 8 * (operand.packed.stride if operand.transposed else 1)

    def _put_pair(self, dst: Any, pair: Any, i: Expr, j: Expr) -> None:
        """Two neighbouring elements, as one word where that is known to be possible."""
        if isinstance(dst, Window) and dst.buffer.dtype == "bfloat16":
            T.evaluate(T.call_extern("int32", "tvm_gdn_split", T.address_of(dst.buffer[i, j]), 0, 1, pair[0], pair[1]))
        elif isinstance(dst, Tile) and dst.storage.dtype == "float32":
            self._place(dst.storage)
            dst.storage.version += 1
            move(T.address_of(self.views["float32"][self._index(dst, i, j)]), T.address_of(pair[0]), 8)
        else:
            for other in range(2):
                self._put(dst, pair[other], i, j + other)

    def chain(self, count: Expr, pieces: Callable[[Expr], tuple[Tile, ...]], finish: ElementFunction) -> None:
        """``dst = finish(i, j, (left middle) right)`` of `count` pieces ``(dst, left, middle, right)``, all at once.

        They are square fp32 tiles in shared memory, `left` and `right` lower triangular with zeros in their diagonal blocks.
        """
        size, parts = pieces(T.int32(0))[0].rows, self.parts
        high = size // BLOCK
        terms = self._terms(*(Packed(parts, 0, 0, 0, exact=False),) * 2)
        a, b = self._registers("uint32", 4 * parts), self._registers("uint32", 2 * parts)
        inner, outer = self._registers("float32", size // 2), self._registers("float32", size // 2)

        def fragment(name: str, registers: Any, tile: Tile, i: Expr, j: Expr) -> None:
            address = T.address_of(self.views["float32"][self._index(tile, i, j)])
            T.evaluate(T.call_extern("int32", f"tvm_gdn_split_{name}", registers.data, parts, address, tile.storage.stride))

        def multiply(sums: Any, at: int, tile: Tile, i: Expr, j: Expr) -> None:
            fragment("b", b, tile, i, j)
            for x, y in terms:
                self._multiply(sums, at, a, x * 4, b, y * 2)

        def block(number: Expr) -> None:
            dst, left, middle, right = pieces(number // high)
            mi = number % high
            for e in range(size // 2):
                T.buffer_store(inner, T.float32(0), [e])
                T.buffer_store(outer, T.float32(0), [e])

            def first_product(k: int) -> None:
                fragment("a", a, left, mi * BLOCK, k * BLOCK)
                for n in range(size // 8):
                    multiply(inner, n * 4, middle, k * BLOCK, n * 8)

            for k in range(high):
                when(True if k == 0 else mi >= k, lambda k=k: first_product(k))
            for k in range(high):
                T.evaluate(T.call_extern("int32", "tvm_gdn_split_sums", a.data, parts, inner.data, k * 8))
                for n in range(2 * (k + 1)):
                    multiply(outer, n * 4, right, k * BLOCK, n * 8)
            for n in range(size // 8):
                for e, (i, j) in enumerate(self._elements(mi, n)):
                    self._put(dst, finish(i, j, outer[n * 4 + e]), i, j)

        self._in_turn(count * high, block)

    def keep(self, windows: tuple[Window, ...], tile: Tile) -> None:
        """Windows of the kernel's own memory whose sum is a lower-triangular fp32 tile, each rounded to its dtype.

        Blocks above the diagonal are not written.
        """
        if any(window.buffer.dtype != "bfloat16" for window in windows):
            self.store(windows[0], tile)
            return
        lanes = 16 // ITEMSIZE["bfloat16"]
        pieces = tile.rows * tile.cols // lanes
        with T.serial(ceil_div(pieces, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // (tile.cols // lanes), index % (tile.cols // lanes) * lanes
            source = T.address_of(self.views["float32"][self._index(tile, i, j)])
            places = (*(T.address_of(window.buffer[i, j]) for window in windows), source)
            wanted = j // BLOCK <= i // BLOCK
            wanted = wanted if pieces % self.threads == 0 else T.And(index < pieces, wanted)
            when(wanted, lambda places=places: T.evaluate(T.call_extern("int32", "tvm_gdn_sum_of", *places)))

    def fill(self, window: Window, *sources: Tile, row: Callable[..., tuple[Expr, ...]], turn: int = 0) -> None:
        """Rows of a window of the kernel's own memory: ``row(*values)`` of sources ``(n, 1)`` or ``(1, 1)``, a thread per row.

        The last threads begin, which have less to do before; `turn` as in `squares`.
        """
        numbers, shift = self.scalars(window.cols), (turn + 1) * window.rows
        with T.serial(ceil_div(window.rows, self.threads)) as step:
            i = T.Bind(T.Cast("int32", step * self.threads + (self.lane + shift) % self.threads))

            def whole() -> None:
                for at, value in enumerate(row(*(self._get(source, i, 0) for source in sources))):
                    T.buffer_store(numbers, value, [at])
                for at in range(0, window.cols, 4):
                    move(T.address_of(window.buffer[i, at]), T.address_of(numbers[at]), 16)

            when(True if window.rows % self.threads == 0 else i < window.rows, whole)

    # What products share.
    def _in_turn(self, count: Expr, body: Callable[[Expr], None], first: int = 0) -> None:
        """Call ``body(number)`` for `count` pieces of work, a piece per warp at a time, beginning with the warp `first`."""
        warp = T.Bind((T.Cast("int32", self.lane) // WARP + -first % self.warps) % self.warps)
        with T.serial(ceil_div(count, self.warps)) as step:
            number = T.Bind(T.Cast("int32", step * self.warps) + warp)
            even = isinstance(count, int) and count % self.warps == 0
            when(True if even else number < T.Cast("int32", count), lambda: body(number))

    def _registers(self, dtype: str, count: int) -> Any:
        return T.alloc_buffer((count,), dtype, scope="local")

    @staticmethod
    def _multiply(sums: Any, at: int, left: Any, at_left: int, right: Any, at_right: int) -> None:
        # Whole arrays: by the address of an element TVM takes only that one for used, and cuts off the others.
        places = (sums.data, at, left.data, at_left, right.data, at_right)
        T.evaluate(T.call_extern("int32", "tvm_gdn_mma", *places))

    @staticmethod
    def _terms(a: Packed, b: Packed) -> list[tuple[int, int]]:
        """Pairs of parts whose products matter."""
        if a.exact and b.exact:
            return [(x, y) for x in range(a.parts) for y in range(b.parts)]
        depth = max(a.parts, b.parts)
        return [(x, y) for x in range(a.parts) for y in range(b.parts) if x + y < depth]

    def _load_fragment(
        self, side: str, operand: Operand, registers: Any, slot: int, part: int, row: Expr, col: Expr, *apart: Expr
    ) -> None:
        """Load a fragment of an operand's part at (row, col); `transposed` ones lie the other way round in memory."""
        packed = operand.packed
        if operand.transposed:
            row, col = col, row
        if isinstance(operand.tile, Tile) and packed.parts == 1 and packed.exact:
            row, col = operand.tile.row + row, operand.tile.col + col
        place = packed.offset // 2 + part * packed.plane + row * packed.stride + col
        name = f"tvm_gdn_load_{side}{'_turned' if operand.transposed else ''}"
        address = T.address_of(self.views["bfloat16"][place])
        T.evaluate(T.call_extern("int32", name, registers.data, slot, address, packed.stride, *apart))
