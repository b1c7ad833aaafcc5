"""Design spaces of the experts on GPUs: plans for few rows per expert and for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_gdn.schedules.gpu_moe_groups import WGMMA
from tvm_gdn.schedules.gpu_moe_integers import IntegerGridTiles
from tvm_gdn.schedules.gpu_moe_streams import StreamGridTiles
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
    #: Whether a kernel's blocks may begin before the kernel ahead of it ends, and ask for weights.
    early = False

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows per expert where the plans meet; columns and stages of both; rows of the second; dtype of rows to be summed."""
        return {
            "most": (2, 5, 10, 16, 24),
            "few_columns": (32, 64),
            "few_stages": (2, 3, 4),
            "rows": (32, 64, 128),
            "columns": (64, 128),
            "stages": (2, 3, 4),
            "partial": cls._partial(geometry),
        }

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """As many stages as fit."""
        found = {"most": 10, "few_columns": 32, "few_stages": 4, "rows": 64, "columns": 64, "stages": 4}
        found["partial"] = cls._partial(geometry)[0]
        for name in ("few_stages", "stages"):
            for count in (4, 3, 2):
                found[name] = count
                if cls._bytes(geometry, cls.plans(geometry, **found)[name == "stages"]) <= cls.shared:
                    break
        return found

    @staticmethod
    def _partial(geometry: Geometry) -> tuple[str, ...]:
        """Rows of bf16 data may have bf16 scratch; fp16 has too small a range for rows before they are weighted."""
        return ("bfloat16", "float32") if geometry.dtype["x"] == "bfloat16" else ("float32",)

    @classmethod
    def _bytes(cls, geometry: Geometry, plan: Plan) -> int:
        scheme = geometry.attr.get("scheme", "")
        return plan.bytes("int8" if scheme in ZERO else geometry.dtype["x"], scheme)

    @classmethod
    def plans(cls, geometry: Geometry, **knobs: Any) -> tuple[Plan, ...]:
        """The plans that knobs stand for."""
        deep = 4 if geometry.attr.get("scheme") in ZERO else 1 if geometry.dtype["x"] == "float32" else 2
        few = Plan(16, knobs["few_columns"], 64 * deep, knobs["few_stages"], 4, knobs["most"])
        return few, Plan(knobs["rows"], knobs["columns"], 32 * deep, knobs["stages"], 8)

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ExpertGridTiles:
        """Tile operations on matrix fragments, or in fp32."""
        plans = cls.plans(geometry, **knobs)
        for plan in plans:
            if not plan.fits():
                raise TargetError(f"{plan}: warps and fragments do not come out even")
            if cls._bytes(geometry, plan) > cls.shared:
                raise TargetError(f"{plan} needs {cls._bytes(geometry, plan)} bytes of shared memory, a block has {cls.shared}")
        tiles = cls.kind(geometry)(geometry, plans, knobs["partial"])
        tiles.early = cls.early
        return tiles

    @classmethod
    def kind(cls, geometry: Geometry) -> Callable[..., ExpertGridTiles]:
        """Tile operations by what is multiplied."""
        return IntegerGridTiles if geometry.attr.get("scheme") in ZERO else ExpertGridTiles


@schedule("moe_experts", "cuda-sm90")
class ExpertsHopper(ExpertsGpu):
    """With 227 KiB of shared memory, which two blocks share by default; raw 16-bit weights by products of four warps."""

    shared = 227 * 1024
    early = True

    @classmethod
    def _grouped(cls, geometry: Geometry) -> bool:
        return not geometry.attr.get("scheme") and geometry.dtype["x"] == geometry.dtype["w13"] == geometry.dtype["w2"] in WGMMA

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Of plans of 16, 64 and up to 160 rows: rows per expert where they meet, columns and stages.

        With more than `more` rows of an expert some warps copy while others multiply.
        """
        if not cls._grouped(geometry):
            return super().knobs(geometry)
        return {
            "most": (0, 0.25, 1, 2, 5, 10, 16),
            "few_columns": (16, 32, 64),
            "few_depth": (64, 128, 256, 512),
            "few_stages": (2, 3, 4, 5, 6, 8),
            "ahead": (False, True),
            "more": (0, 24, 32, 48, 64, 80, 96, 128, 192, 1 << 20),
            "middle_columns": (32, 64, 128),
            "middle_stages": (3, 4, 5, 6),
            "long_rows": (128, 144, 160),
            "long_stages": (3, 4),
            "copying": (4, 8),
            "blocks": (114, 132),
            "partial": cls._partial(geometry),
        }

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Five blocks of few rows to a multiprocessor, two of the middle, one of many."""
        if not cls._grouped(geometry):
            return super().default(geometry)
        return {
            "most": 0.25, "few_columns": 16, "few_depth": 128, "few_stages": 3, "more": 48, "middle_columns": 64,
            "middle_stages": 4, "ahead": False, "long_rows": 144, "long_stages": 4, "copying": 4, "blocks": 132,
            "partial": cls._partial(geometry)[0],
        }  # fmt: skip

    @classmethod
    def kind(cls, geometry: Geometry) -> Callable[..., ExpertGridTiles]:
        """Tile operations by what is multiplied."""
        return StreamGridTiles if cls._grouped(geometry) else super().kind(geometry)

    @classmethod
    def plans(cls, geometry: Geometry, **knobs: Any) -> tuple[Plan, ...]:
        """The plans that knobs stand for."""
        if not cls._grouped(geometry):
            return super().plans(geometry, **knobs)
        return (
            Plan(
                16, knobs["few_columns"], knobs["few_depth"], knobs["few_stages"], min(4, knobs["few_columns"] // 8),
                knobs["most"], knobs["ahead"],
            ),
            Plan(64, knobs["middle_columns"], 64, knobs["middle_stages"], 4, knobs["more"], knobs["ahead"], grouped=True),
            Plan(
                knobs["long_rows"], 128, 64, knobs["long_stages"], 8 + knobs["copying"], 0, knobs["ahead"], grouped=True,
                blocks=knobs["blocks"],
            ),
        )  # fmt: skip


@schedule("moe_experts", "musa")
class ExpertsSmall(ExpertsGpu):
    """With 64 KiB of shared memory."""

    shared = 64 * 1024
