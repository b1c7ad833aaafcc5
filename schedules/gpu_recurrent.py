"""Design space of the token recurrence on GPUs."""

from __future__ import annotations

import math
from typing import Any

from tvm_gdn.schedules.gpu import RecurrentWarpTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Threads that a worker may have: a warp on most devices, a half of one where warps have 64.
WARP = 32
#: fp32 state elements that one thread may hold in registers.
MAX_ELEMENTS = 128


@schedule("recurrent", "cuda")
@schedule("recurrent", "rocm")
@schedule("recurrent", "musa")
@schedule("recurrent", "generic-cuda")
class RecurrentGpu:
    """Token recurrence: one warp per tile of value columns, the state in registers for the whole sequence.

    Measured on an H100 SXM (2026-11-21, CUDA graphs, packed decode, bf16 data, fp32 state, H 16, HV 32, K = V = 128), batch
    1 / 8 / 32 / 256: 4.3 / 10.3 / 57.5 / 395 us with 8 x 4 columns; a device copy of the states takes 1.7 / 7.8 / 46.4 / 442.
    """

    @staticmethod
    def _fits(geometry: Geometry, lanes: int, columns: int) -> bool:
        K, V = geometry.axis["K"], geometry.axis["V"]
        elements = K // math.gcd(K, WARP // lanes) * columns
        return V % (lanes * columns) == 0 and (elements <= MAX_ELEMENTS or columns == 1)

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Threads along V, columns per thread, and workers per block."""
        fits, columns = RecurrentGpu._fits, (1, 2, 4, 8, 16)
        lanes = tuple(n for n in (1, 2, 4, 8, 16, 32) if any(fits(geometry, n, c) for c in columns))
        return {
            "column_lanes": lanes,
            "columns": tuple(c for c in columns if any(fits(geometry, n, c) for n in lanes)),
            "group": (1, 2, 4, 8),
        }

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """As many threads at work as the shape allows, then 16-byte vectors, then as many threads along V."""
        knobs = RecurrentGpu.knobs(geometry)
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

    @staticmethod
    def tiles(geometry: Geometry, *, column_lanes: int, columns: int, group: int, widest: int = 4) -> RecurrentWarpTiles:
        """Tile operations in registers; `widest` is no knob: exports to other languages than CUDA C set it to 1."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        if V % (column_lanes * columns):
            raise ValueError(f"{column_lanes} threads of {columns} columns do not divide V = {V}")
        row_lanes = math.gcd(K, WARP // column_lanes)
        if group > 1 and (row_lanes * column_lanes < WARP or V // (column_lanes * columns) % group):
            raise ValueError(
                f"{row_lanes} x {column_lanes} threads of {columns} columns cannot stand {group} to a block at V = {V}"
            )
        return RecurrentWarpTiles(
            K,
            V,
            group=group,
            row_lanes=row_lanes,
            column_lanes=column_lanes,
            columns=columns,
            v_first=bool(geometry.attr.get("state_v_first")),
            widest=widest,
        )
