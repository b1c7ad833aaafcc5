"""Tile operations of the chunked delta rules on GPUs: products on 16 x 8 x 16 bf16 matrix fragments with fp32 accumulators.

A worker is a block of threads. Shared tiles live in one arena of dynamic shared memory; tiles of products over value columns, and
states, live in accumulator registers (`Fragments`): element e of fragment (a, b) belongs to one thread, as mma.m16n8k16 has it.

Numbers. An operand is one to three bf16 arrays whose sum is the tile: one for bf16 data (exact), two for fp16 data (exact) and
for everything computed from 16-bit data (error 2^-17), three for fp32 (2^-24). A product adds the terms that matter. So one
instruction serves every dtype within the contract's tolerances.

The functions that are called by name (`tvm_gdn_mma` and others) stand in `csrc/device_functions.h`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles, aligned

from tvm_gdn.errors import TargetError
from tvm_gdn.ops.tir.chunk import chunk as chunk_rule
from tvm_gdn.ops.tir.chunk import chunk_lengths
from tvm_gdn.ops.tir.tiles import GRANULE, ElementFunction, Expr
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

BLOCK = 16
WARP = 32
#: Pairs of parts up to which each has sums of its own.
APART = 3
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def ceil_div(x: Any, n: int) -> Any:
    """Quotient rounded up."""
    return (x + (n - 1)) // n


def padded(n: int, unit: int = BLOCK) -> int:
    """Size rounded up."""
    return -(-n // unit) * unit


def when(condition: Any, body: Any) -> None:
    """Emit `body` under a condition; none if it holds while the kernel is built."""
    if condition is True:
        body()
        return
    with T.If(condition):
        with T.Then():
            body()


@dataclass
class Storage:
    """Where a shared tile's numbers are: `offset` bytes into the arena; allocated at its first use."""

    rows: int
    cols: int
    offset: int = -1
    size: int = 0
    stride: int = 0
    dtype: str = "float32"
    version: int = 0
    packed: Packed | None = None


@dataclass(frozen=True)
class Tile:
    """A shared tile or a block of one; `turned` tiles are ``(n, 1)`` storage seen as ``(1, n)`` or the reverse."""

    storage: Storage
    rows: int
    cols: int
    row: Expr = 0
    col: Expr = 0
    turned: bool = False


@dataclass
class Fragments:
    """A tile in accumulator registers: this thread's share of ``[rows, cols]`` in fragments of 16 x 8."""

    buffer: Any
    rows: int
    cols: int
    version: int = 0
    packed: Packed | None = None


@dataclass(frozen=True)
class Window:
    """A strided window of a tensor in global memory."""

    buffer: Any
    rows: int
    cols: int


@dataclass
class Packed:
    """The bf16 arrays of an operand: `offset` bytes into the arena, `plane` elements from one to the next."""

    parts: int
    offset: int
    stride: int
    plane: int
    exact: bool
    version: int = -1


@dataclass(frozen=True)
class Operand:
    """A tile as operand of products."""

    tile: Any
    side: str
    transposed: bool
    rows: int
    cols: int
    packed: Packed = field(repr=False)


class GpuChunkTiles(WarpTiles):
    """Tile operations of one geometry; see `tvm_gdn/ops/tir/tiles.py`.

    Parameters
    ----------
    K, V, v_tile : int
        State rows, state columns, columns per worker.
    chunk : int
        Tokens per chunk.
    warps : int
        Warps per worker: a power of two.
    data : str
        Dtype of q, k and v.
    v_first : bool
        Whether states are stored ``[V, K]``.
    ahead : int
        Warps of blocks that compute what does not depend on states first, a block per chunk; 0 for one pass.
    arenas : mapping, optional
        Bytes of shared memory of blocks without and with a state; what `used` says after a kernel was built.
    """

    span = 1

    def __init__(self, K: int, V: int, *, v_tile: int, chunk: int, warps: int, data: str, v_first: bool, ahead: int = 0) -> None:
        super().__init__(warps * WARP)
        self.ahead, self.sizes = ahead > 0, {False: ahead or warps, True: warps}
        self.states = True
        self.K, self.V, self.v_tile, self.chunk = K, V, v_tile, chunk
        self.warps, self.threads, self.data, self.v_first = warps, warps * WARP, data, v_first
        self.arenas, self.used = {False: 0, True: 0}, {False: 0, True: 0}
        self.parts = 3 if data == "float32" else 2

    # Mapping of the work.
    def lanes(self, *, states: bool = True) -> Any:
        """The threads of a block with a state, or of one without."""
        self.states, self.warps = states, self.sizes[states]
        self.threads = self.warps * WARP
        return T.thread_binding(self.threads, thread="threadIdx.x")

    def enter(self, lane: Expr) -> None:
        """Allocate the arena and the worker's state."""
        states = self.states
        self.lane, self.copying = lane, False
        self.free: list[tuple[int, int]] = []
        self.used[states] = 0
        size = max(self.arenas[states], 16)
        memory = T.alloc_buffer((size,), "uint8", scope="shared.dyn")
        self.views = {
            dtype: T.decl_buffer((size // itemsize,), dtype, data=memory.data, scope="shared.dyn")
            for dtype, itemsize in _ITEMSIZE.items()
        }
        self.words = T.decl_buffer((size // 4,), "uint32", data=memory.data, scope="shared.dyn")
        if states:
            self._state = self.tile(self.K, self.v_tile, "register")
        # What products round up to is multiplied by zeros; what an earlier block left there may be no number.
        with T.serial(ceil_div(size // 16, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + lane))

            def clear() -> None:
                with T.vectorized(4) as word:
                    T.buffer_store(self.words, T.uint32(0), [index * 4 + word])

            when(index < size // 16, clear)
        self.sync()

    def sync(self, *, loads: bool = True) -> None:
        """A barrier of the block, after this thread's copies have arrived."""
        if loads and self.copying:
            self.copying = False
            T.evaluate(T.call_extern("int32", "tvm_gdn_copied"))
        T.evaluate(T.tvm_storage_sync("shared"))

    # Tiles.
    def _allocate(self, size: int) -> int:
        for number, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[number] = (offset + padded(size, 16), room - padded(size, 16))
                return offset
        offset = self.used[self.states]
        self.used[self.states] = padded(offset + size, 16)
        return offset

    def release(self, *tiles: Tile) -> None:
        """Give the memory of shared tiles to those that are first used from here on; a barrier stands in between."""
        pieces = sorted([*self.free, *((tile.storage.offset, padded(tile.storage.size, 16)) for tile in tiles)])
        joined: list[tuple[int, int]] = []
        for offset, room in pieces:
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((offset, room))
        self.free = sorted(joined, key=lambda piece: piece[1])

    def integers(self, count: int) -> Any:
        """int64 scratch of a thread."""
        return T.alloc_buffer((count,), "int64", scope="local")

    def leave(self) -> None:
        """Nothing is held."""

    def _rounded(self, rows: Expr | None) -> Expr | None:
        """Rows that are computed where `rows` are wanted: the same for all operations."""
        return None if rows is None else T.min(T.int64(self.chunk), ceil_div(rows, GRANULE) * GRANULE)

    def tile(self, rows: int, cols: int, place: str = "shared", dtype: str = "float32") -> Tile | Fragments:
        """Shared memory, or accumulator registers."""
        if place == "register":
            mi, ni, _, _ = self._grid(rows, cols)
            return Fragments(T.alloc_buffer((mi * ni * 4,), "float32", scope="local"), rows, cols)
        return Tile(Storage(rows, cols, dtype=dtype), rows, cols)

    def state(self, index: Expr) -> Fragments:
        """The worker's one state."""
        del index
        return self._state

    def window(self, buffer: Any, offset: Expr, rows: int, cols: int, strides: tuple[Expr, Expr]) -> Window:
        """Window of a tensor."""
        return Window(
            T.decl_buffer((rows, cols), buffer.dtype, data=buffer.data, elem_offset=offset, strides=strides), rows, cols
        )

    def view(self, buffer: Any, offset: Expr, j0: Expr) -> Window:
        """State in global memory."""
        strides = (1, self.K) if self.v_first else (self.V, 1)
        return self.window(buffer, offset + j0 * strides[1], self.K, self.v_tile, strides)

    def block(self, tile: Tile, row: Expr, col: Expr, rows: int, cols: int) -> Tile:
        """Part of a shared tile."""
        return Tile(tile.storage, rows, cols, tile.row + row, tile.col + col)

    def turn(self, tile: Tile) -> Tile:
        """The same numbers along the other axis."""
        return Tile(tile.storage, tile.cols, tile.rows, tile.row, tile.col, not tile.turned)

    def _place(self, storage: Storage) -> None:
        """Give a tile its memory, at its first use."""
        dtype = storage.dtype
        if storage.offset >= 0:
            return
        if storage.rows == 1 or storage.cols == 1:
            storage.stride, elements = 1, storage.rows * storage.cols
        elif dtype == "bfloat16":
            # Products read it as it is: whole fragments, rows that fall on different banks.
            storage.stride = padded(storage.cols) + 8
            elements = padded(storage.rows) * storage.stride
        else:
            storage.stride = storage.cols + 16 // _ITEMSIZE[dtype]
            elements = padded(storage.rows) * storage.stride
        storage.size = elements * _ITEMSIZE[dtype]
        storage.offset = self._allocate(storage.size)

    def _index(self, tile: Tile, i: Expr, j: Expr) -> Expr:
        storage = tile.storage
        i, j = 0 if tile.rows == 1 else i, 0 if tile.cols == 1 else j
        if tile.turned:
            i, j = j, i
        place = (tile.row + i) * storage.stride + tile.col + j if storage.cols > 1 else tile.row + i
        return storage.offset // _ITEMSIZE[storage.dtype] + place

    def _get(self, tile: Any, i: Expr, j: Expr, slot: Expr = None) -> Expr:
        """Element (i, j) in fp32; of a register tile the one in `slot`."""
        if isinstance(tile, Fragments):
            return tile.buffer[slot]
        if isinstance(tile, Window):
            return T.Cast("float32", tile.buffer[i, j])
        self._place(tile.storage)
        value = self.views[tile.storage.dtype][self._index(tile, i, j)]
        return value if tile.storage.dtype == "float32" else T.Cast("float32", value)

    def _put(self, tile: Any, value: Expr, i: Expr, j: Expr, slot: Expr = None) -> None:
        if isinstance(tile, Fragments):
            tile.version += 1
            T.buffer_store(tile.buffer, value, [slot])
        elif isinstance(tile, Window):
            T.buffer_store(tile.buffer, T.Cast(tile.buffer.dtype, value), [i, j])
        else:
            self._place(tile.storage)
            tile.storage.version += 1
            dtype = tile.storage.dtype
            T.buffer_store(self.views[dtype], value if dtype == "float32" else T.Cast(dtype, value), [self._index(tile, i, j)])

    # Fragments.
    def _grid(self, rows: int, cols: int) -> tuple[int, int, int, int]:
        """Fragments of a thread along rows and columns, and warps along rows and columns."""
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, 8)
        along = 1
        while along * 2 <= min(high, self.warps):
            along *= 2
        across = self.warps // along
        return ceil_div(high, along), ceil_div(wide, across), along, across

    def _fragments(self, rows: int, cols: int, body: Any, limit: Expr | None = None) -> None:
        """Call ``body(a, b, mi, ni)`` for this warp's fragments: number among its own, and place in the tile."""
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, 8)
        count_a, count_b, along, across = self._grid(rows, cols)
        warp = T.Bind(T.Cast("int32", self.lane) // WARP)
        for a in range(count_a):
            mi = warp % along + a * along
            bound: Any = True if (a + 1) * along <= high else mi < high
            if limit is not None:
                bound = T.Cast("int64", mi) * BLOCK < limit
            for b in range(count_b):
                ni = warp // along + b * across
                inside: Any = True if (b + 1) * across <= wide else ni < wide
                when(bound, lambda a=a, b=b, mi=mi, ni=ni, inside=inside: when(inside, lambda: body(a, b, mi, ni)))

    def _elements(self, mi: Expr, ni: Expr) -> list[tuple[Expr, Expr]]:
        """Rows and columns of this thread's four elements of a fragment."""
        lane = T.Cast("int32", self.lane) % WARP
        row, col = mi * BLOCK + lane // 4, ni * 8 + lane % 4 * 2
        return [(row, col), (row, col + 1), (row + 8, col), (row + 8, col + 1)]

    def _over(self, dst: Any, body: Any, rows: Expr | None = None, *, cut: bool = False) -> None:
        """Call ``body(i, j, slot)`` for this thread's elements of a tile; `cut`: only those inside it."""
        rows = self._rounded(rows)
        if isinstance(dst, Fragments):
            _, per_row, _, _ = self._grid(dst.rows, dst.cols)

            def fragment(a: int, b: int, mi: Expr, ni: Expr) -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    inside = True
                    if cut and (dst.rows % BLOCK or dst.cols % 8):
                        inside = T.And(i < dst.rows, j < dst.cols)
                    when(inside, lambda i=i, j=j, e=e: body(i, j, (a * per_row + b) * 4 + e))

            self._fragments(dst.rows, dst.cols, fragment, rows)
            return
        total = dst.rows * dst.cols
        count = ceil_div(total, self.threads)
        if rows is not None:
            count = ceil_div(rows * dst.cols, self.threads)
        with T.serial(count) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            even = rows is None and total % self.threads == 0
            when(True if even else index < total, lambda: body(index // dst.cols, index % dst.cols, None))

    # Elements.
    def map(self, dst: Any, function: ElementFunction, *sources: Any, rows: Expr | None = None, lower: bool = False) -> None:
        """Elements of registers, or shared elements thread by thread."""
        del lower

        def element(i: Expr, j: Expr, slot: Expr) -> None:
            self._put(dst, function(i, j, *(self._get(source, i, j, slot) for source in sources)), i, j, slot)

        self._over(dst, element, rows)

    def zero(self, dst: Any) -> None:
        """All elements of the tile zero."""
        self.map(dst, lambda _i, _j: T.float32(0))

    def load(self, dst: Any, src: Window, rows: Expr | None = None) -> None:
        """Zero where there is no token; tensor data stays in its dtype where products can read it so."""
        if isinstance(dst, Tile):
            self._load_shared(dst, src, rows)
            return

        def element(i: Expr, j: Expr, slot: Expr) -> None:
            self._put(dst, T.float32(0), i, j, slot)
            inside = [] if rows is None else [T.Cast("int64", i) < rows]
            inside += [i < dst.rows] if dst.rows % BLOCK else []
            inside += [j < dst.cols] if dst.cols % 8 else []
            condition: Any = True
            for part in inside:
                condition = part if condition is True else T.And(condition, part)
            when(condition, lambda: self._put(dst, self._get(src, i, j), i, j, slot))

        self._over(dst, element)

    def _load_shared(self, dst: Tile, src: Window, rows: Expr | None) -> None:
        dtype = src.buffer.dtype
        self.copying = True
        self._place(dst.storage)
        storage, limit = dst.storage, dst.rows if rows is None else rows
        storage.version += 1
        view = self.views[storage.dtype]
        # Products on bf16 read the padding too.
        wide = storage.stride - 8 if storage.dtype == "bfloat16" and dst.cols > 1 else dst.cols

        def plain() -> None:
            count = ceil_div(dst.rows * wide, self.threads)
            with T.serial(count) as step:
                index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                i, j = index // wide, index % wide

                def element() -> None:
                    inside = T.Cast("int64", i) < limit
                    inside = inside if wide == dst.cols else T.And(inside, j < dst.cols)
                    place = self._index(dst, i, j)
                    T.buffer_store(view, T.Cast(storage.dtype, T.float32(0)), [place])
                    when(inside, lambda: T.buffer_store(view, T.Cast(storage.dtype, src.buffer[i, j]), [place]))

                when(True if dst.rows * wide % self.threads == 0 else index < dst.rows * wide, element)

        lanes = 16 // _ITEMSIZE[dtype] if dtype in _ITEMSIZE else 1
        pieces = dst.rows * dst.cols // lanes
        if storage.dtype != dtype or wide != dst.cols or dst.cols % lanes or pieces % self.threads:
            plain()
            return
        with T.If(T.And(aligned(src.buffer, 0, 0, elements=lanes), aligned(src.buffer, 1, 0, elements=lanes))):
            with T.Then():
                with T.unroll(pieces // self.threads) as step:
                    index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                    i, j = index // (dst.cols // lanes), index % (dst.cols // lanes) * lanes
                    to, source = T.address_of(view[self._index(dst, i, j)]), T.address_of(src.buffer[i, j])
                    inside = T.Cast("int32", T.Cast("int64", i) < limit)
                    T.evaluate(T.call_extern("int32", "tvm_gdn_copy", to, source, inside))
            with T.Else():
                plain()

    def store(self, dst: Window, src: Any, rows: Expr | None = None) -> None:
        """Rounded to the tensor's dtype."""
        if isinstance(src, Tile) and rows is None and src.cols > 1 and src.storage.dtype == dst.buffer.dtype:
            lanes = 16 // _ITEMSIZE[dst.buffer.dtype]
            if src.cols % lanes == 0:
                self._store_shared(dst, src, lanes)
                return

        if isinstance(src, Fragments) and dst.buffer.dtype == "bfloat16" and src.cols % 8 == 0 and src.rows % BLOCK == 0:
            even = T.And(aligned(dst.buffer, 0, 0, elements=2), aligned(dst.buffer, 1, 0, elements=2))
            with T.If(even):
                with T.Then():
                    self._store_pairs(dst, src, rows)
                with T.Else():
                    self._store_elements(dst, src, rows)
            return
        self._store_elements(dst, src, rows)

    def _store_elements(self, dst: Window, src: Any, rows: Expr | None) -> None:
        def element(i: Expr, j: Expr, slot: Expr) -> None:
            inside: Any = True if rows is None else T.Cast("int64", i) < rows
            when(inside, lambda: self._put(dst, self._get(src, i, j, slot), i, j))

        self._over(src, element, cut=True)

    def _store_pairs(self, dst: Window, src: Fragments, rows: Expr | None) -> None:
        """Two neighbouring bf16 numbers as one word."""
        per_row = self._grid(src.rows, src.cols)[1]

        def fragment(a: int, b: int, mi: Expr, ni: Expr) -> None:
            slot, places = (a * per_row + b) * 4, self._elements(mi, ni)
            for e in (0, 2):
                i, j = places[e]
                pair = (T.address_of(dst.buffer[i, j]), 0, 1, src.buffer[slot + e], src.buffer[slot + e + 1])
                inside: Any = True if rows is None else T.Cast("int64", i) < rows
                when(inside, lambda pair=pair: T.evaluate(T.call_extern("int32", "tvm_gdn_split", *pair)))

        self._fragments(src.rows, src.cols, fragment)

    def _store_shared(self, dst: Window, src: Tile, lanes: int) -> None:
        """A whole shared tile, 16 bytes at once; into memory of the kernel's own, which is aligned."""
        pieces = src.rows * src.cols // lanes
        self._place(src.storage)
        with T.serial(ceil_div(pieces, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // (src.cols // lanes), index % (src.cols // lanes) * lanes
            to, source = T.address_of(dst.buffer[i, j]), T.address_of(self.views[src.storage.dtype][self._index(src, i, j)])
            when(
                True if pieces % self.threads == 0 else index < pieces,
                lambda: T.evaluate(T.call_extern("int32", "tvm_gdn_move", to, source)),
            )

    def row_sum(self, dst: Tile, function: ElementFunction, *sources: Any, rows: Expr | None = None, finish: Any = None) -> None:
        """Four threads per row, neighbours on neighbouring columns."""
        cols, part = sources[0].cols, self.scalars(1)
        lane, limit = T.Cast("int32", self.lane), dst.rows if rows is None else rows
        with T.serial(ceil_div(dst.rows * 4, self.threads)) as step:
            row = T.Bind((T.Cast("int32", step * self.threads) + lane) // 4)
            # No condition around the shuffles: all threads of a warp take part.
            safe = row if dst.rows * 4 % self.threads == 0 else T.min(row, dst.rows - 1)
            T.buffer_store(part, T.float32(0), [0])
            for first in range(0, cols, 4):
                j = lane % 4 + first

                def add(j: Expr = j) -> None:
                    value = function(safe, j, *(self._get(source, safe, j) for source in sources))
                    T.buffer_store(part, part[0] + value, [0])

                when(True if first + 4 <= cols else j < cols, add)
            for bit in (1, 2):
                other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), part[0], bit, WARP, WARP)
                T.buffer_store(part, part[0] + other, [0])
            own = T.And(lane % 4 == 0, T.Cast("int64", row) < limit)
            when(own, lambda: self._put(dst, part[0] if finish is None else finish(part[0]), row, 0))

    def scan(self, dst: Tile, src: Window, rows: Expr) -> None:
        """One column: a warp, by shuffles. Several: a thread per column, row by row."""
        total = self.scalars(3)
        if dst.cols > 1:
            with T.serial(ceil_div(dst.cols, self.threads)) as step:
                j = T.Bind(T.Cast("int32", step * self.threads + self.lane))
                with T.If(j < dst.cols):
                    with T.Then():
                        T.buffer_store(total, T.float32(0), [0])
                        with T.serial(dst.rows) as i:
                            when(i < rows, lambda: T.buffer_store(total, total[0] + self._get(src, i, j), [0]))
                            self._put(dst, total[0], i, j)
            return
        lane = T.Cast("int32", self.lane)
        with T.If(lane < WARP):
            with T.Then():
                T.buffer_store(total, T.float32(0), [1])
                for first in range(0, dst.rows, WARP):
                    row = lane + first
                    T.buffer_store(total, T.float32(0), [0])
                    inside = T.Cast("int64", row) < rows
                    inside = inside if first + WARP <= dst.rows else T.And(inside, row < dst.rows)
                    when(inside, lambda row=row: T.buffer_store(total, self._get(src, row, 0), [0]))
                    for bit in (1, 2, 4, 8, 16):
                        # In a variable of its own: a condition around a shuffle would leave threads out of it.
                        T.buffer_store(total, T.tvm_warp_shuffle_up(T.uint32(0xFFFFFFFF), total[0], bit, WARP, WARP), [2])
                        T.buffer_store(total, total[0] + T.Select(lane >= bit, total[2], T.float32(0)), [0])
                    T.buffer_store(total, total[0] + total[1], [0])
                    keep = True if first + WARP <= dst.rows else row < dst.rows
                    when(keep, lambda row=row: self._put(dst, total[0], row, 0))
                    last = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), total[0], WARP - 1, WARP, WARP)
                    T.buffer_store(total, last, [1])

    def pair_sum(self, dst: Tile, function: ElementFunction, left: tuple[Tile, ...], right: tuple[Tile, ...], rows: Expr) -> None:
        """A thread per pair of rows."""
        cols = left[0].cols
        part = self.scalars(1)
        pairs = BLOCK * BLOCK
        with T.serial(ceil_div(ceil_div(rows, BLOCK) * pairs, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            b, i, j = index // pairs, index // BLOCK % BLOCK, index % BLOCK
            with T.If(T.Cast("int64", b) * BLOCK < rows):
                with T.Then():
                    T.buffer_store(part, T.float32(0), [0])
                    with T.If(j <= i):
                        with T.Then():
                            with T.serial(cols) as c:
                                x = [self._get(tile, b * BLOCK + i, c) for tile in left]
                                y = [self._get(tile, b * BLOCK + j, c) for tile in right]
                                T.buffer_store(part, part[0] + function(*x, *y), [0])
                    self._put(dst, part[0], b * BLOCK + i, b * BLOCK + j)

    # Products.
    def operand(self, tile: Any, side: str, *, transpose: bool = False) -> Operand:
        """Operands of one tile share their bf16 arrays, whatever their side: fragments are loaded either way round."""
        rows, cols = (tile.cols, tile.rows) if transpose else (tile.rows, tile.cols)
        owner = tile if isinstance(tile, Fragments) else tile.storage
        whole = isinstance(tile, Fragments) or (tile.rows, tile.cols) == (owner.rows, owner.cols)
        if whole and owner.packed is not None:
            return Operand(tile, side, transpose, rows, cols, owner.packed)
        packed = Packed(0, -1, 0, 0, False)
        if whole:
            owner.packed = packed
        return Operand(tile, side, transpose, rows, cols, packed)

    def pack(self, *operands: Operand, rows: Expr | None = None, lower: bool = False) -> None:
        """Split the tile into bf16 parts; tensor data in bf16 is its own operand."""
        del lower
        operand, rows = operands[0], self._rounded(rows)
        tile, packed = operand.tile, operand.packed
        source = tile if isinstance(tile, Fragments) else tile.storage
        if packed.offset >= 0 and packed.version == source.version:
            return
        native = isinstance(tile, Tile) and tile.storage.dtype == "bfloat16" and tile.cols > 1
        if packed.offset < 0:
            self._place_packed(packed, tile, native)
        packed.version = source.version
        if native:
            return
        base, wide = packed.offset // 2, padded(tile.cols)

        def split(place: Expr, first: Expr, second: Expr) -> None:
            """Neighbouring elements, as one word in every part."""
            address = T.address_of(self.views["bfloat16"][place])
            T.evaluate(T.call_extern("int32", "tvm_gdn_split", address, packed.plane, packed.parts, first, second))

        if isinstance(tile, Fragments):
            # Rows and columns of the last fragments that lie outside the tile hold zeros: products of zeros, or zeros loaded.
            per_row = self._grid(tile.rows, tile.cols)[1]

            def fragment(a: int, b: int, mi: Expr, ni: Expr) -> None:
                slot, places = (a * per_row + b) * 4, self._elements(mi, ni)
                for e in (0, 2):
                    i, j = places[e]
                    split(base + i * packed.stride + j, tile.buffer[slot + e], tile.buffer[slot + e + 1])

            self._fragments(tile.rows, tile.cols, fragment, rows)
            if wide > padded(tile.cols, 8):
                self._clear(packed, padded(tile.rows), padded(tile.cols, 8), wide)
            return
        pairs = wide // 2
        count = padded(tile.rows) * pairs if rows is None else rows * pairs
        with T.serial(ceil_div(count, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            i, j = index // pairs, index % pairs * 2

            def value(j: Expr) -> Expr:
                inside: Any = True
                if tile.rows % BLOCK:
                    inside = i < tile.rows
                if tile.cols % BLOCK:
                    inside = j < tile.cols if inside is True else T.And(inside, j < tile.cols)
                return self._get(tile, i, j) if inside is True else T.if_then_else(inside, self._get(tile, i, j), T.float32(0))

            even = padded(tile.rows) * pairs % self.threads == 0
            when(
                True if even else index < padded(tile.rows) * pairs,
                lambda: split(base + i * packed.stride + j, value(j), value(j + 1)),
            )

    def _place_packed(self, packed: Packed, tile: Any, native: bool) -> None:
        if native:
            storage = tile.storage
            packed.parts, packed.offset, packed.stride, packed.exact = 1, storage.offset, storage.stride, True
            return
        data = isinstance(tile, Tile) and tile.storage.dtype == "float16"
        packed.parts, packed.exact = 2 if data else self.parts, data
        packed.stride = padded(tile.cols) + 8
        packed.plane = padded(tile.rows) * packed.stride
        packed.offset = self._allocate(packed.parts * packed.plane * 2)

    def _clear(self, packed: Packed, high: int, first: int, wide: int) -> None:
        """Zero in the columns that pad the last fragment along the depth."""
        width = wide - first
        with T.serial(ceil_div(high * width, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))

            def element() -> None:
                place = packed.offset // 2 + index // width * packed.stride + first + index % width
                for part in range(packed.parts):
                    T.buffer_store(self.views["bfloat16"], T.Cast("bfloat16", T.float32(0)), [place + part * packed.plane])

            when(index < high * width, element)

    def mma(
        self,
        dst: Any,
        a: Operand,
        b: Operand,
        *,
        rows: Expr | None = None,
        cols: Expr | None = None,
        depth: Expr | None = None,
        lower: str | None = None,
        start: ElementFunction | None = None,
        finish: ElementFunction | None = None,
        sources: tuple[Any, ...] = (),
        coarse: bool = False,
    ) -> None:
        """Fragment by fragment, in accumulators of its own."""
        terms, rows = self._terms(a.packed, b.packed), self._rounded(rows)
        if coarse and self.data == "bfloat16":
            terms = terms[:1]
        high, wide = ceil_div(dst.rows, BLOCK), ceil_div(dst.cols, 8)
        count_a, count_b, along, across = self._grid(dst.rows, dst.cols)
        parts = sorted({y for _, y in terms})
        # Sums of their own for every pair of parts: products that wait for one another would stand still most of the time.
        sets = len(terms) if len(terms) <= APART else 1
        left = self._registers("uint32", 4 * a.packed.parts)
        right = self._registers("uint32", 2 * (count_b + 1) * len(parts))
        acc = self._registers("float32", 4 * count_b * sets)
        warp = T.Bind(T.Cast("int32", self.lane) // WARP)

        def row_of_fragments(na: int, mi: Expr) -> None:
            columns = [(nb, warp // along + nb * across) for nb in range(count_b)]

            def wanted(nb: int, ni: Expr) -> Expr:
                inside: Any = True if (nb + 1) * across <= wide else ni < wide
                if lower == "result":
                    inside = ni * 8 < (mi + 1) * BLOCK if inside is True else T.And(inside, ni * 8 < (mi + 1) * BLOCK)
                if cols is not None:
                    near = T.Cast("int64", ni) * 8 < cols
                    inside = near if inside is True else T.And(inside, near)
                return inside

            def begin(nb: int, ni: Expr) -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * count_b + nb) * 4 + e, self._clamped(dst, i, j)
                    first: Any = T.float32(0)
                    if start is not None:
                        values = [self._get(source, ci, cj, slot) for source in sources]
                        first = start(i, j, self._get(dst, ci, cj, slot), *values)
                    T.buffer_store(acc, first, [nb * 4 + e])
                    for other in range(1, sets):
                        T.buffer_store(acc, T.float32(0), [(other * count_b + nb) * 4 + e])

            def end(nb: int, ni: Expr) -> None:
                for e, (i, j) in enumerate(self._elements(mi, ni)):
                    slot, (ci, cj) = (na * count_b + nb) * 4 + e, self._clamped(dst, i, j)
                    last: Any = acc[nb * 4 + e]
                    for other in range(1, sets):
                        last = last + acc[(other * count_b + nb) * 4 + e]
                    if finish is not None:
                        last = finish(i, j, last, *(self._get(source, ci, cj, slot) for source in sources))
                    inside: Any = True
                    if isinstance(dst, Tile) and (dst.rows % BLOCK or dst.cols % 8):
                        inside = T.And(i < dst.rows, j < dst.cols)
                    when(inside, lambda last=last, i=i, j=j, slot=slot: self._put(dst, last, i, j, slot))

            def load_right(nb: int, ni: Expr, kk: int) -> None:
                """All parts of a fragment; of a single part, those of two fragments where both are wanted anyway."""
                slot = nb * len(parts) * 2
                if len(parts) == 1 and wanted(nb, ni) is True and nb % 2 == 0 and nb + 1 < count_b:
                    if wanted(nb + 1, columns[nb + 1][1]) is True:
                        apart = across * 8 * (b.packed.stride if b.transposed else 1)
                        self._load_fragment("b_pair", b, right, slot, parts[0], kk * BLOCK, ni * 8, apart)
                        return
                if len(parts) == 1 and wanted(nb, ni) is True and nb % 2 and wanted(nb - 1, columns[nb - 1][1]) is True:
                    return
                for at in range(0, len(parts) - 1, 2):
                    self._load_fragment("b_pair", b, right, slot + at * 2, parts[at], kk * BLOCK, ni * 8, b.packed.plane)
                if len(parts) % 2:
                    self._load_fragment("b", b, right, slot + (len(parts) - 1) * 2, parts[-1], kk * BLOCK, ni * 8)

            def multiply(nb: int, number: int, x: int, y: int) -> None:
                own = number if sets > 1 else 0
                # Whole arrays: by the address of an element TVM takes only that one for used, and cuts off the others.
                places = (
                    acc.data,
                    (own * count_b + nb) * 4,
                    left.data,
                    x * 4,
                    right.data,
                    (nb * len(parts) + parts.index(y)) * 2,
                )
                T.evaluate(T.call_extern("int32", "tvm_gdn_mma", *places))

            for nb, ni in columns:
                when(wanted(nb, ni), lambda nb=nb, ni=ni: begin(nb, ni))

            def step(kk: int) -> None:
                for x in sorted({x for x, _ in terms}):
                    self._load_fragment("a", a, left, x * 4, x, mi * BLOCK, kk * BLOCK)
                # Loads of all columns first, then products that do not wait for one another.
                for nb, ni in columns:
                    when(wanted(nb, ni), lambda nb=nb, ni=ni: load_right(nb, ni, kk))
                for number, (x, y) in enumerate(terms):
                    for nb, ni in columns:
                        when(wanted(nb, ni), lambda nb=nb, number=number, x=x, y=y: multiply(nb, number, x, y))

            for kk in range(padded(a.cols) // BLOCK):
                inside: Any = True if depth is None else kk * BLOCK < depth
                if lower == "left":
                    inside = kk <= mi if inside is True else T.And(inside, kk <= mi)
                when(inside, lambda kk=kk: step(kk))
            for nb, ni in columns:
                when(wanted(nb, ni), lambda nb=nb, ni=ni: end(nb, ni))

        for na in range(count_a):
            mi = warp % along + na * along
            bound: Any = True if (na + 1) * along <= high else mi < high
            if rows is not None:
                bound = T.Cast("int64", mi) * BLOCK < rows
            when(bound, lambda na=na, mi=mi: row_of_fragments(na, mi))

    def _registers(self, dtype: str, count: int) -> Any:
        return T.alloc_buffer((count,), dtype, scope="local")

    @staticmethod
    def _clamped(dst: Any, i: Expr, j: Expr) -> tuple[Expr, Expr]:
        """Elements that pad a fragment read some element of the tile: their result is not kept."""
        i = i if dst.rows % BLOCK == 0 else T.min(i, dst.rows - 1)
        return i, j if dst.cols % 8 == 0 else T.min(j, dst.cols - 1)

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

    def invert_diagonal(self, dst: Tile, a: Tile, rows: Expr) -> None:
        """A thread per column of a block: forward substitution in registers."""
        x = self.scalars(BLOCK)
        blocks = dst.rows // BLOCK
        with T.serial(ceil_div(blocks * BLOCK, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + self.lane))
            b, j = index // BLOCK, index % BLOCK
            inside = T.Cast("int64", b) * BLOCK < rows
            with T.If(inside if blocks * BLOCK % self.threads == 0 else T.And(inside, b < blocks)):
                with T.Then():
                    for i in range(BLOCK):
                        T.buffer_store(x, T.Select(j == i, T.float32(1), T.float32(0)), [i])
                        for k in range(i):
                            T.buffer_store(x, x[i] - self._get(a, b * BLOCK + i, b * BLOCK + k) * x[k], [i])
                    for i in range(BLOCK):
                        self._put(dst, x[i], b * BLOCK + i, b * BLOCK + j)


def sized(geometry: Geometry, **options: Any) -> GpuChunkTiles:
    """Tile operations with an arena of the size that the algorithm turns out to use."""
    K, V, data = geometry.axis["K"], geometry.axis["V"], geometry.dtype["v"]
    tiles = GpuChunkTiles(K, V, data=data, v_first=bool(geometry.attr.get("state_v_first")), **options)
    chunk_rule(geometry, tiles)
    tiles.arenas = dict(tiles.used)
    return tiles


@schedule("chunk", "cuda")
class ChunkGpu:
    """Chunked delta rules: a block per tile of value columns, the state in registers for the whole sequence."""

    #: Bytes of shared memory that a block may have.
    shared = 99 * 1024
    #: Warps of blocks that compute what does not depend on states first.
    ahead = 8

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Tokens per chunk, value columns and warps per block, and warps of the blocks ahead."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        tiles = tuple(d for d in (8, 16, 32, 64) if V % d == 0) or (max(d for d in range(1, 33) if V % d == 0),)
        return {"chunk": chunk_lengths(K, (16, 32, 64)), "v_tile": tiles, "warps": (4, 8), "ahead": (0, 4, 8)}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The longest chunk that fits, with 32 columns where V has them."""
        v_tile = max(d for d in cls.knobs(geometry)["v_tile"] if d <= 32)
        channel = bool(geometry.attr.get("channel_gate"))
        for chunk_size in sorted(cls.knobs(geometry)["chunk"], reverse=True):
            for columns in sorted({v_tile, *(d for d in cls.knobs(geometry)["v_tile"] if d < v_tile)}, reverse=True):
                # With less to do per chunk, four warps wait less for each other than eight.
                warps = 8 if chunk_size > 16 and (channel or not cls.ahead) else 4
                knobs = {"chunk": chunk_size, "v_tile": columns, "warps": warps, "ahead": cls.ahead}
                if (columns == v_tile or chunk_size == 16) and max(sized(geometry, **knobs).arenas.values()) <= cls.shared:
                    return knobs
        raise TargetError(f"K = {geometry.axis['K']} needs more than {cls.shared} bytes of shared memory")

    @classmethod
    def tiles(cls, geometry: Geometry, *, chunk: int, v_tile: int, warps: int, ahead: int) -> GpuChunkTiles:
        """Tile operations on matrix fragments."""
        found = sized(geometry, chunk=chunk, v_tile=v_tile, warps=warps, ahead=ahead)
        size = max(found.arenas.values())
        if size > cls.shared:
            raise TargetError(f"chunk {chunk} and v_tile {v_tile} need {size} bytes of shared memory, a block has {cls.shared}")
        return found


@schedule("chunk", "cuda-sm90")
class ChunkHopper(ChunkGpu):
    """With 227 KiB of shared memory."""

    shared = 227 * 1024


@schedule("chunk", "musa")
class ChunkSmall(ChunkGpu):
    """With 64 KiB of shared memory."""

    shared, ahead = 64 * 1024, 0
