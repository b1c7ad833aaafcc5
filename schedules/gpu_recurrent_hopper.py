"""Design space of the token recurrence on sm_90, whose copy engine brings the states of many sequences."""

from __future__ import annotations

import math
from typing import Any

from tvm_gdn.schedules.gpu_bulk import BulkColumnTiles, BulkTiles
from tvm_gdn.schedules.gpu_plans import Plan, PlannedTiles
from tvm_gdn.schedules.gpu_recurrent import WARP, RecurrentGpu

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Threads of a block, and copies of a state.
THREADS, PIECES = (32, 64, 128, 256), (1, 2, 4)
#: More heads than calls have.
EVERY = 1 << 30
#: Heads of all sequences up to which states are in registers; threads along V, columns of each and workers per block there. By
#: whether the pool is fp32.
FEW = {True: (512, 4, 4, 2), False: (512, 4, 8, 2)}


@schedule("recurrent", "cuda-sm90")
class RecurrentHopper(RecurrentGpu):
    """States of many sequences by the copy engine, those of few in the registers of many small blocks, as plans of one kernel.

    Steps of more than one token keep a state of less than fp32 in registers: it must not be rounded between tokens.
    """

    @classmethod
    def placed(cls, geometry: Geometry) -> bool:
        """Whether states come from a pool, go back there, and nowhere else."""
        others = ("conv_state", "final_state", "intermediate_states_buffer", "retrieve_parent_token")
        kept = geometry.attr.get("output_final_state") or any(name in geometry.dtype for name in others)
        return "initial_state_source" in geometry.dtype and not kept

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Those of states in registers, heads up to which they are there; threads of a block beyond that, copies of a state."""
        knobs = super().knobs(geometry)
        if not cls.placed(geometry):
            return knobs
        knobs.pop("place", None)
        return {**knobs, "few": (0, 32, 64, 128, 256, 512, EVERY), "threads": THREADS, "pieces": PIECES}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """The copy engine where the shape allows it."""
        if not cls.placed(geometry):
            return super().default(geometry)
        usual = {**cls.in_registers(geometry), "few": EVERY, "threads": WARP, "pieces": 1}
        threads = math.gcd(geometry.axis["K"], geometry.axis["V"], 128)
        try:
            # One copy brings a whole state: two or four are 1 to 5 % slower at 32 to 256 sequences of 32 heads.
            cls._bulk(geometry, threads, pieces=1)
        except ValueError:
            return usual
        few, lanes, columns, group = FEW[cls._wide(geometry)]
        K, V = geometry.axis["K"], geometry.axis["V"]
        if K % (WARP // lanes) or not cls._fits(geometry, lanes, columns):
            few, lanes, columns, group = 0, *(usual[name] for name in ("column_lanes", "columns", "group"))
        group = math.gcd(group, V // (lanes * columns))
        return {"column_lanes": lanes, "columns": columns, "group": group, "few": few, "threads": threads, "pieces": 1}

    @staticmethod
    def _wide(geometry: Geometry) -> bool:
        return geometry.dtype["initial_state_source"] == "float32"

    @staticmethod
    def _bulk(geometry: Geometry, threads: int, pieces: int) -> BulkTiles:
        kind = BulkColumnTiles if geometry.attr.get("state_v_first") else BulkTiles
        pool, gates = geometry.dtype["initial_state_source"], bool(geometry.attr.get("channel_gate"))
        return kind(
            geometry.axis["K"], geometry.axis["V"], pool=pool, threads=threads, pieces=pieces, channel_gate=gates
        )  # fmt: skip

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> Any:
        """Tile operations of all plans."""
        if not cls.placed(geometry):
            return RecurrentGpu.tiles(geometry, **knobs)
        most, threads, pieces = (knobs.pop(name) for name in ("few", "threads", "pieces"))
        in_registers = RecurrentGpu.tiles(geometry, **knobs)
        if most == EVERY:
            return in_registers
        rounded = not cls._wide(geometry) and "mixed_qkv" not in geometry.dtype
        plans = [Plan(in_registers, most=most)] if most else []
        plans.append(Plan(cls._bulk(geometry, threads, pieces), single=rounded))
        if rounded:
            plans.append(Plan(RecurrentGpu.tiles(geometry, **cls.in_registers(geometry))))
        return PlannedTiles(*plans)
