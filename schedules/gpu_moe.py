"""Design spaces of the experts on GPUs: plans for few rows per expert and for many."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.gpu_moe_integers import IntegerGridTiles
from tvm_gdn.schedules.gpu_moe_tiles import ExpertGridTiles, Plan

from tvm_gdn.errors import TargetError
from tvm_gdn.packed_experts import ZERO
from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry


@schedule("moe_experts", "cuda")
class ExpertsGpu:
    """Tiles of 16 rows that stream weights, and tiles of 64 that multiply; 99 KiB of shared memory."""

    #: Bytes of shared memory that a block may have.
    shared = 99 * 1024

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per expert where the plans meet; columns and stages of both; rows of the second."""
        del geometry
        return {
            "most": (2, 5, 10, 16, 24),
            "few_columns": (32, 64),
            "few_stages": (2, 3, 4),
            "rows": (32, 64, 128),
            "columns": (64, 128),
            "stages": (2, 3, 4),
        }

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """As many stages as fit."""
        found = {"most": 10, "few_columns": 32, "few_stages": 4, "rows": 64, "columns": 64, "stages": 4}
        for name in ("few_stages", "stages"):
            for count in (4, 3, 2):
                found[name] = count
                if cls._bytes(geometry, cls.plans(geometry, **found)[name == "stages"]) <= cls.shared:
                    break
        return found

    @classmethod
    def _bytes(cls, geometry: Geometry, plan: Plan) -> int:
        scheme = geometry.attr.get("scheme", "")
        return plan.bytes("int8" if scheme in ZERO else geometry.dtype["x"], scheme)

    @classmethod
    def plans(
        cls, geometry: Geometry, *, most: int, few_columns: int, few_stages: int, rows: int, columns: int, stages: int
    ) -> tuple[Plan, Plan]:
        """The plans that knobs stand for."""
        deep = 4 if geometry.attr.get("scheme") in ZERO else 1 if geometry.dtype["x"] == "float32" else 2
        few = Plan(16, few_columns, 64 * deep, few_stages, 4, most)
        return few, Plan(rows, columns, 32 * deep, stages, 8)

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ExpertGridTiles:
        """Tile operations on matrix fragments, or in fp32."""
        plans = cls.plans(geometry, **knobs)
        for plan in plans:
            if not plan.fits():
                raise TargetError(f"{plan}: warps and fragments do not come out even")
            if cls._bytes(geometry, plan) > cls.shared:
                raise TargetError(f"{plan} needs {cls._bytes(geometry, plan)} bytes of shared memory, a block has {cls.shared}")
        integers = geometry.attr.get("scheme") in ZERO
        return IntegerGridTiles(geometry, plans) if integers else ExpertGridTiles(geometry, plans)


@schedule("moe_experts", "cuda-sm90")
class ExpertsHopper(ExpertsGpu):
    """Two blocks to a multiprocessor of 227 KiB."""

    shared = 113 * 1024


@schedule("moe_experts", "musa")
class ExpertsSmall(ExpertsGpu):
    """With 64 KiB of shared memory."""

    shared = 64 * 1024
