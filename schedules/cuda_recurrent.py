"""Design space of the token recurrence on CUDA GPUs.

No target uses it yet: packing and loading GPU images, and parity on the device, come with the GPU targets. Until then a test
lowers it to CUDA C, so that the one definition keeps serving both.
"""

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
    """Token recurrence: one warp per tile of value columns, the state in registers for the whole sequence.

    Measured on an H100 SXM (2026-11-21, CUDA graphs, packed decode, bf16 data, fp32 state, H 16, HV 32, K = V = 128), batch
    1 / 8 / 32 / 256: 4.3 / 10.3 / 57.5 / 395 us with 8 x 4 columns; a device copy of the states takes 1.7 / 7.8 / 46.4 / 442.
    """

    @staticmethod
    def _fits(geometry: Geometry, lanes: int, columns: int) -> bool:
        K, V = geometry.axis["K"], geometry.axis["V"]
        return V % (lanes * columns) == 0 and K % (WARP // lanes) == 0 and K * lanes * columns // WARP <= MAX_ELEMENTS

    @staticmethod
    def knobs(geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Threads along V, and columns per thread."""
        fits, columns = RecurrentCuda._fits, (1, 2, 4)
        lanes = tuple(n for n in (1, 2, 4, 8, 16, 32) if any(fits(geometry, n, c) for c in columns))
        return {"column_lanes": lanes, "columns": tuple(c for c in columns if any(fits(geometry, n, c) for n in lanes))}

    @staticmethod
    def default(geometry: Geometry) -> dict[str, Any]:
        """Vectors as wide as V allows, then as many threads along V."""
        knobs = RecurrentCuda.knobs(geometry)
        pairs = [(c, n) for c in knobs["columns"] for n in knobs["column_lanes"] if RecurrentCuda._fits(geometry, n, c)]
        columns, lanes = max(pairs)
        return {"column_lanes": lanes, "columns": columns}

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
