"""Design space of the token recurrence on GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tvm_gdn.schedules.gpu_registers import RecurrentWarpTiles
from tvm_gdn.schedules.gpu_staged import StagedWarpTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Threads that a worker may have: a warp on most devices, a half of one where warps have 64.
WARP = 32
#: fp32 state elements that one thread may hold in registers.
MAX_ELEMENTS = 128
#: Where a one-token step has its state.
PLACES = REGISTERS, SHARED = "registers", "shared"
#: Threads along V, columns of each and workers per block that did best with states in shared memory; by whether the pool is fp32.
STAGED = {True: (8, 4, 2), False: (4, 8, 4)}


@schedule("recurrent", "cuda")
@schedule("recurrent", "generic-cuda")
class RecurrentGpu:
    """Token recurrence: one warp per tile of value columns, the state in registers or, for one token, in shared memory.

    Measured on an H200 (2026-11-21, CUDA graphs, packed decode, bf16 data, H 16, HV 32, K = V = 128), batch 1 / 32 / 256, fp32
    pool: 5.1 / 41.3 / 286 us with 8 x 4 columns in shared memory, 4.5 / 41.9 / 293 in registers; bf16 pool: 5.2 / 17.7 / 174 us
    with 4 x 8 columns in shared memory, 4.0 / 20.1 / 200 in registers.
    """

    #: Whether states may pass through shared memory.
    stages = True
    #: Elements that move at once at most, None where the dtype decides it; whether device code may call C functions.
    widest: int | None = None
    functions = True
    #: Tile operations by where states are.
    made: Mapping[str, Any] = MappingProxyType({REGISTERS: RecurrentWarpTiles, SHARED: StagedWarpTiles})

    @staticmethod
    def _fits(geometry: Geometry, lanes: int, columns: int) -> bool:
        K, V = geometry.axis["K"], geometry.axis["V"]
        elements = K // math.gcd(K, WARP // lanes) * columns
        return V % (lanes * columns) == 0 and (elements <= MAX_ELEMENTS or columns == 1)

    @classmethod
    def placed(cls, geometry: Geometry) -> bool:
        """Whether there is a choice of where states are during a step."""
        return cls.stages and "mixed_qkv" in geometry.dtype and "conv_state" not in geometry.dtype

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Threads along V, columns per thread, workers per block, and for one-token steps where states are."""
        fits, columns = RecurrentGpu._fits, (1, 2, 4, 8, 16)
        lanes = tuple(n for n in (1, 2, 4, 8, 16, 32) if any(fits(geometry, n, c) for c in columns))
        return {
            "column_lanes": lanes,
            "columns": tuple(c for c in columns if any(fits(geometry, n, c) for n in lanes)),
            "group": (1, 2, 4, 8),
            **({"place": PLACES} if cls.placed(geometry) else {}),
        }

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """A step's state in shared memory; otherwise as many threads as the shape allows, 16-byte vectors, threads along V."""
        staged = cls._staged(geometry) if cls.placed(geometry) else None
        if staged is not None:
            return staged
        return {**cls.in_registers(geometry), **({"place": REGISTERS} if cls.placed(geometry) else {})}

    @classmethod
    def in_registers(cls, geometry: Geometry) -> dict[str, Any]:
        """Knobs of states in registers."""
        knobs = cls.knobs(geometry)
        choices = [
            (n * math.gcd(geometry.axis["K"], WARP // n), -abs(c - 4), n, c)
            for c in knobs["columns"]
            for n in knobs["column_lanes"]
            if RecurrentGpu._fits(geometry, n, c)
        ]
        _, _, lanes, columns = max(choices)
        # Side by side in a block only where a worker is a whole warp: shuffles are a warp's.
        whole = lanes * math.gcd(geometry.axis["K"], WARP // lanes) == WARP
        return {
            "column_lanes": lanes,
            "columns": columns,
            "group": math.gcd(2, geometry.axis["V"] // (lanes * columns)) if whole else 1,
        }

    @classmethod
    def _staged(cls, geometry: Geometry) -> dict[str, Any] | None:
        """Knobs of a step with its state in shared memory; of K-first states, since none of V-first ones was measured so."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        lanes, columns, group = STAGED[geometry.dtype["initial_state_source"] == "float32"]
        if geometry.attr.get("state_v_first") or K % (WARP // lanes) or K * lanes > WARP * WARP or V % (lanes * columns):
            return None
        return {"column_lanes": lanes, "columns": columns, "group": math.gcd(group, V // (lanes * columns)), "place": SHARED}

    @classmethod
    def tiles(
        cls,
        geometry: Geometry,
        *,
        column_lanes: int,
        columns: int,
        group: int,
        place: str = REGISTERS,
        widest: int | None = None,
        functions: bool | None = None,
    ) -> RecurrentWarpTiles:
        """Tile operations; `widest` and `functions` are no knobs: other languages than CUDA C set them."""
        K, V, v_first = geometry.axis["K"], geometry.axis["V"], bool(geometry.attr.get("state_v_first"))
        # Rows of V-first states are side by side: neighbouring threads then read neighbouring pieces.
        usual = 4 if v_first and geometry.dtype.get("initial_state_source", "float32") == "float32" else 8
        if V % (column_lanes * columns):
            raise ValueError(f"{column_lanes} threads of {columns} columns do not divide V = {V}")
        row_lanes = math.gcd(K, WARP // column_lanes)
        if group > 1 and (row_lanes * column_lanes < WARP or not cls._side_by_side(V // (column_lanes * columns), group)):
            raise ValueError(
                f"{row_lanes} x {column_lanes} threads of {columns} columns cannot stand {group} to a block at V = {V}"
            )
        pool = {"pool": geometry.dtype["initial_state_source"]} if place == SHARED else {}
        made: RecurrentWarpTiles = cls.made[place](
            K,
            V,
            group=group,
            row_lanes=row_lanes,
            column_lanes=column_lanes,
            columns=columns,
            v_first=v_first,
            widest=widest or cls.widest or usual,
            functions=cls.functions if functions is None else functions,
            **pool,
        )
        return made

    @staticmethod
    def _side_by_side(tiles: int, group: int) -> bool:
        """Whether so many workers of a head's tiles may share a block: a block has tiles of one head."""
        return tiles % group == 0


@schedule("recurrent", "musa")
class RecurrentMusa(RecurrentGpu):
    """Copies are waited for there, so that states gain nothing in shared memory."""

    stages = False


@schedule("recurrent", "rocm")
class RecurrentRocm(RecurrentGpu):
    """Vectors are the code generator's own: it takes no C functions, and has none longer than four of 16 bits."""

    stages = False
    widest, functions = 4, False
