"""Tiles of the chunked delta rules on GPUs: where they are, and which thread has which element.

Shared tiles live in one arena of dynamic shared memory, each from its first use on; tiles of products over value columns, and
states, live in accumulator registers (`Fragments`): element e of fragment (a, b) belongs to one thread, as mma.m16n8k16 has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.gpu import WarpTiles

from tvm_gdn.ops.tir.tiles import GRANULE, Expr

BLOCK = 16
WARP = 32
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


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


def fragment_elements(lane: Expr, mi: Expr, ni: Expr) -> list[tuple[Expr, Expr]]:
    """Rows and columns of a thread's four elements of the fragment (mi, ni) of 16 x 8."""
    lane = T.Cast("int32", lane) % WARP
    row, col = mi * BLOCK + lane // 4, ni * 8 + lane % 4 * 2
    return [(row, col), (row, col + 1), (row + 8, col), (row + 8, col + 1)]


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
    #: Whether one part is enough where data is bf16.
    coarse: bool = False


@dataclass(frozen=True)
class Operand:
    """A tile as operand of products."""

    tile: Any
    side: str
    transposed: bool
    rows: int
    cols: int
    packed: Packed = field(repr=False)


class FragmentTiles(WarpTiles):
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
    together : int
        Value heads of one q/k head that such a block takes.
    arenas : mapping, optional
        Bytes of shared memory of blocks without and with a state; what `used` says after a kernel was built.
    """

    span = 1

    #: Numbers of a fragment that a thread has.
    held = 4

    #: Whether products go on behind the call that begins them, until their result is read.
    deferred = False

    #: Groups of threads that may do different things at the same time.
    teams: tuple[int, ...] = (0,)

    #: Whether products read nothing but what was written for them.
    whole = False

    #: Whether a thread keeps what it multiplies with next itself.
    held_right = False

    #: Chunks whose data is there or arrives at a time.
    stages = 2

    def __init__(
        self, K: int, V: int, *, v_tile: int, chunk: int, warps: int, data: str, v_first: bool, ahead: int = 0, together: int = 1
    ) -> None:
        super().__init__(warps * WARP)
        self.ahead, self.sizes = ahead > 0, {False: ahead or warps, True: warps}
        self.states, self.together = True, together
        self.K, self.V, self.v_tile, self.chunk = K, V, v_tile, chunk
        self.warps, self.threads, self.data, self.v_first = warps, warps * WARP, data, v_first
        self.arenas, self.used = {False: 0, True: 0}, {False: 0, True: 0}
        #: Bytes at whose multiple the arena begins: shared memory does at one of 16.
        self.align = {False: 16, True: 16}
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
        size = max(self.arenas[states] - (self.align[states] - 16), 16)
        self._clear_piece = self._arena(size)
        if not states:
            # Loads and products write all that is read.
            return
        self._state = self.tile(self.K, self.v_tile, "register")
        if self.whole:
            return
        # What products round up to is multiplied by zeros; what an earlier block left there may be no number.
        with T.serial(ceil_div(size // 16, self.threads)) as step:
            index = T.Bind(T.Cast("int32", step * self.threads + lane))

            when(index < size // 16, lambda: self._clear_piece(index))
        self.sync()

    def _arena(self, size: int) -> Callable[[Expr], None]:
        """Allocate `size` bytes of shared memory, with a view per dtype; a function that clears a piece of 16 of them."""
        align = self.align[self.states]
        memory = T.alloc_buffer((size + align - 16,), "uint8", scope="shared.dyn")
        first: Any = 0
        if align > 16:
            first = T.Bind(T.call_extern("int32", "tvm_gdn_to_multiple", T.address_of(memory[0]), align))

        def view(dtype: str, itemsize: int) -> Any:
            offset = {"elem_offset": first // itemsize} if align > 16 else {}
            return T.decl_buffer((size // itemsize,), dtype, data=memory.data, scope="shared.dyn", **offset)

        self.views = {dtype: view(dtype, itemsize) for dtype, itemsize in ITEMSIZE.items()}
        words = view("uint32", 4)

        def clear(piece: Expr) -> None:
            with T.vectorized(4) as word:
                T.buffer_store(words, T.uint32(0), [piece * 4 + word])

        return clear

    def _read(self, dtype: str, place: Expr) -> Expr:
        """An element of shared memory in fp32, counted in elements of its dtype."""
        value = self.views[dtype][place]
        return value if dtype == "float32" else T.Cast("float32", value)

    def _write(self, dtype: str, place: Expr, value: Expr) -> None:
        """The same, written."""
        T.buffer_store(self.views[dtype], value if dtype == "float32" else T.Cast(dtype, value), [place])

    def sync(self, *, loads: bool = True, warp: bool = False, team: bool = False) -> None:
        """A barrier of the block, after this thread's copies have arrived; `warp`: of the warp, for what none copies.

        `team`: of the threads that do what stands here, where there are several teams.
        """
        del team
        if warp:
            T.evaluate(T.call_extern("int32", "tvm_gdn_warp_sync"))
            return
        self._arrive(loads)
        T.evaluate(T.tvm_storage_sync("shared"))

    def _arrive(self, loads: bool) -> None:
        """What this thread copied is there, and what it wrote is there for others behind the next barrier."""
        if loads and self.copying:
            self.copying = False
            T.evaluate(T.call_extern("int32", "tvm_gdn_copied"))

    def team(self, number: int) -> Any:
        """What only that group of threads does; there is one."""
        del number
        return contextlib.nullcontext()

    def clear(self, *tiles: Tile) -> None:
        """Zero above the diagonal of tiles of which `load` only brings the rest: it brings zeros too."""

    def asked(self) -> None:
        """All copies that the next barrier waits for have been asked for: nothing to do."""

    @property
    def bytes(self) -> dict[bool, int]:
        """Shared memory of blocks without and with a state, as the last kernel used it."""
        return {states: used + self.align[states] - 16 for states, used in self.used.items()}

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
            return Fragments(T.alloc_buffer((mi * ni * self.held,), "float32", scope="local"), rows, cols)
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
            storage.stride = storage.cols + 16 // ITEMSIZE[dtype]
            elements = padded(storage.rows) * storage.stride
        storage.size = elements * ITEMSIZE[dtype]
        storage.offset = self._allocate(storage.size)

    def _index(self, tile: Tile, i: Expr, j: Expr) -> Expr:
        storage = tile.storage
        i, j = 0 if tile.rows == 1 else i, 0 if tile.cols == 1 else j
        if tile.turned:
            i, j = j, i
        place = (tile.row + i) * storage.stride + tile.col + j if storage.cols > 1 else tile.row + i
        return storage.offset // ITEMSIZE[storage.dtype] + place

    def _get(self, tile: Any, i: Expr, j: Expr, slot: Expr = None) -> Expr:
        """Element (i, j) in fp32; of a register tile the one in `slot`."""
        if isinstance(tile, Fragments):
            return tile.buffer[slot]
        if isinstance(tile, Window):
            return T.Cast("float32", tile.buffer[i, j])
        self._place(tile.storage)
        return self._read(tile.storage.dtype, self._index(tile, i, j))

    def _put(self, tile: Any, value: Expr, i: Expr, j: Expr, slot: Expr = None) -> None:
        if isinstance(tile, Fragments):
            tile.version += 1
            T.buffer_store(tile.buffer, value, [slot])
        elif isinstance(tile, Window):
            T.buffer_store(tile.buffer, T.Cast(tile.buffer.dtype, value), [i, j])
        else:
            self._place(tile.storage)
            tile.storage.version += 1
            self._write(tile.storage.dtype, self._index(tile, i, j), value)

    # Fragments.
    def _grid(self, rows: int, cols: int) -> tuple[int, int, int, int]:
        """Fragments of a thread along rows and columns, and warps along rows and columns."""
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, 8)
        along = 1
        while along * 2 <= min(high, self.warps):
            along *= 2
        across = self.warps // along
        return ceil_div(high, along), ceil_div(wide, across), along, across

    def _warp(self, rows: int) -> Expr:
        """Number of this thread's warp among those that share so many rows."""
        del rows
        return T.Cast("int32", self.lane) // WARP

    def _fragments(self, rows: int, cols: int, body: Any, limit: Expr | None = None) -> None:
        """Call ``body(a, b, mi, ni)`` for this warp's fragments: number among its own, and place in the tile."""
        high, wide = ceil_div(rows, BLOCK), ceil_div(cols, 8)
        count_a, count_b, along, across = self._grid(rows, cols)
        warp = T.Bind(self._warp(rows))
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
        return fragment_elements(self.lane, mi, ni)

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
                    when(inside, lambda i=i, j=j, e=e: body(i, j, (a * per_row + b) * self.held + e))

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
