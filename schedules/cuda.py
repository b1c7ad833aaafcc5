"""Design spaces of CUDA GPUs."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu import RecurrentWarpTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

WARP = 32
#: fp32 state elements that one thread may hold in registers.
MAX_ELEMENTS = 128


@schedule("recurrent", "cuda")
class RecurrentCuda:
    """Token recurrence: one warp per tile of value columns, the state in registers for the whole sequence."""

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Threads along V, and columns per thread."""
        K, V = geometry.axis["K"], geometry.axis["V"]
        columns = tuple(c for c in (1, 2, 4) if V % c == 0)
        lanes = tuple(
            lanes
            for lanes in (1, 2, 4, 8, 16, 32)
            if V % (lanes * max(columns)) == 0 and K % (WARP // lanes) == 0 and K * lanes * max(columns) // WARP <= MAX_ELEMENTS
        )
        return {"column_lanes": lanes, "columns": columns}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Four columns per thread where they divide V; four threads along V."""
        knobs = RecurrentCuda.knobs(geometry)
        return {"column_lanes": max(c for c in knobs["column_lanes"] if c <= 4), "columns": max(knobs["columns"])}

    @staticmethod
    def tiles(geometry: Geometry, *, column_lanes: int, columns: int) -> RecurrentWarpTiles:
        """Tile operations in registers."""
        return RecurrentWarpTiles(
            geometry.axis["K"],
            geometry.axis["V"],
            column_lanes=column_lanes,
            columns=columns,
            v_first=bool(geometry.attr.get("state_v_first")),
            warp=WARP,
        )
