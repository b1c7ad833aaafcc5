"""Design spaces of the experts on CPUs: how weights are multiplied, how the work is cut."""

from __future__ import annotations

from typing import Any

from tvm_gdn.schedules.cpu_moe import ExpertTiles
from tvm_gdn.schedules.moe_weights import DotBf16, Float, Int4, Int8
from tvm_gdn.schedules.x86_amx_moe import AmxExpertTiles

from tvm_gdn.schedule import schedule
from tvm_gdn.spec import Geometry

#: Bytes of staged rows that leave most of an L2 cache to the weights.
STAGED_BYTES = 1 << 20


def weights_of(geometry: Geometry, *, bf16: bool = False, dots: str = "") -> Any:
    """How the weights of a geometry are multiplied, given what the target's vector unit has.

    The dtype of the activations decides the precision: fp32 activations are multiplied in fp32 whatever the weights are.
    """
    scheme = geometry.attr.get("scheme")
    if scheme in {"int4", "int4_kgroup"}:
        return Int4(dots)
    if scheme == "int8":
        return Int8(dots)
    if bf16 and geometry.dtype["x"] == "bfloat16" and (scheme == "bf16" or _is_raw_bf16(geometry)):
        return DotBf16()
    return Float(scheme or "fp32")


def _is_raw_bf16(geometry: Geometry) -> bool:
    """Raw weights of pairs: rows that hold a whole number of them."""
    axis = geometry.axis
    return geometry.dtype["w13"] == "bfloat16" and axis.get("I", 1) % 2 == 0 and axis["D"] % 2 == 0


def _is_raw(geometry: Geometry) -> bool:
    return "scheme" not in geometry.attr


@schedule("moe_experts", "x86")
class ExpertsX86:
    """Vectors of 16 columns; fp32 multiply-add, bytes by integer multiplication."""

    bf16, dots = False, ""
    #: Rows of the micro-kernel, and accumulators of 16 columns that registers hold.
    rows, vectors = 4, 24
    #: Cache lines of every step of weights that few rows ask for.
    asked = 1

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Rows of the micro-kernel; rows staged at once; output columns summed up at once; what few rows cost."""
        del geometry
        return {
            "rows": (2, 4, 6, 8),
            "block": (32, 64, 128, 256),
            "columns": (64, 128, 256, 512),
            "floor": (1, 2, 6, 12),
        }

    @classmethod
    def _staged_bytes(cls, geometry: Geometry) -> int:
        """What staged rows take of the L2 cache."""
        del geometry
        return STAGED_BYTES

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """As many staged rows as leave most of the L2 cache to the weights."""
        size = 4 if geometry.dtype["x"] == "float32" else 2
        fitting = [
            rows for rows in cls.knobs(geometry)["block"] if rows * geometry.axis["D"] * size <= cls._staged_bytes(geometry)
        ]
        return {"rows": cls.rows, "block": max(fitting, default=32), "columns": 512, "floor": 2}

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ExpertTiles:
        """Tile operations on vectors."""
        weights = weights_of(geometry, bf16=cls.bf16, dots=cls.dots)
        return ExpertTiles(weights, raw=_is_raw(geometry), vectors=cls.vectors, asked=cls.asked, **knobs)


@schedule("moe_experts", "x86-avx2")
class ExpertsAvx2(ExpertsX86):
    """Bytes by products of pairs; 6 x 16 accumulators in 12 of 16 registers; a prefetcher that wants to be told every line."""

    dots, rows, vectors, asked = "avx2", 6, 6, 32


@schedule("moe_experts", "x86-avx512")
class ExpertsAvx512(ExpertsX86):
    """The same products on 32 registers."""

    dots = "avx2"


@schedule("moe_experts", "x86-avx512-bf16")
class ExpertsAvx512Bf16(ExpertsX86):
    """Dot products of bytes; of bf16 pairs too, or else products in fp32, whichever a CPU has at the higher rate."""

    dots = "vnni"
    #: Whether pairs have the higher rate. An Intel core does 64 operations per tick in fp32, 32 in pairs.
    paired = False

    @classmethod
    def _has_pairs(cls, geometry: Geometry) -> bool:
        return isinstance(weights_of(geometry, bf16=True), DotBf16)

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Those of every x86, and whether bf16 pairs are multiplied by dot products."""
        more = {"pairs": (False, True)} if cls._has_pairs(geometry) else {}
        return {**super().knobs(geometry), "asked": (1, 32), "overlap": (False, True), **more}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Rows in fp32 take twice the memory, and eight of them share a widened line of weights; raw weights stay pairs."""
        given = {**super().default(geometry), "asked": 32, "overlap": True}
        if not cls._has_pairs(geometry):
            return given
        if cls.paired or _is_raw(geometry):
            return {**given, "pairs": True}
        return {**given, "pairs": False, "rows": 8, "block": given["block"] // 2}

    @classmethod
    def tiles(cls, geometry: Geometry, *, pairs: bool = False, **knobs: Any) -> ExpertTiles:
        """Tile operations on vectors."""
        weights = weights_of(geometry, bf16=pairs, dots=cls.dots)
        return ExpertTiles(weights, raw=_is_raw(geometry), vectors=cls.vectors, **knobs)


@schedule("moe_experts", "x86-zen4")
class ExpertsZen4(ExpertsAvx512Bf16):
    """The same where pairs have the higher rate."""

    paired = True


@schedule("moe_experts", "x86-amx")
class ExpertsAmx(ExpertsX86):
    """Matrix tiles for many rows of an expert, dot products for few; fp32 and fp16 stay with the vector unit."""

    bf16, dots = True, "vnni"
    emulated = False

    @classmethod
    def _has_tiles(cls, geometry: Geometry) -> bool:
        return bool(weights_of(geometry, bf16=cls.bf16).matrix)

    @classmethod
    def _staged_bytes(cls, geometry: Geometry) -> int:
        """Half of it where tiles read rows once for 32 columns; raw weights are laid out anew for every block."""
        return STAGED_BYTES // 2 if cls._has_tiles(geometry) and not _is_raw(geometry) else STAGED_BYTES

    @classmethod
    def knobs(cls, geometry: Geometry) -> dict[str, tuple[Any, ...]]:
        """Those of the vector unit, and the threshold between the regimes."""
        more = {"few": (1, 2, 4, 8, 16)} if cls._has_tiles(geometry) else {}
        return {**super().knobs(geometry), **more}

    @classmethod
    def default(cls, geometry: Geometry) -> dict[str, Any]:
        """Up to 4 rows reading the weights takes longer than their products."""
        # Widening int4 for the tiles takes longer than the products of some more rows, and so does scaling groups of 32.
        few = 4 if geometry.attr.get("scheme") not in {"int4", "int4_kgroup"} else 16 if _words_per_scale(geometry) == 8 else 8
        more = {"few": few, "floor": 6} if cls._has_tiles(geometry) else {}
        return {**super().default(geometry), **more}

    @classmethod
    def tiles(cls, geometry: Geometry, **knobs: Any) -> ExpertTiles:
        """Tile operations on matrix tiles, where products have that form."""
        if not cls._has_tiles(geometry):
            return super().tiles(geometry, **knobs)
        weights = weights_of(geometry, bf16=cls.bf16, dots=cls.dots)
        depth = _words_per_scale(geometry)
        return AmxExpertTiles(weights, raw=_is_raw(geometry), depth=depth, emulated=cls.emulated, **knobs)


def _words_per_scale(geometry: Geometry) -> int:
    """Words of the reduction axis that one matrix product may add up: 16, or 8 where a scale belongs to 32 bytes."""
    axis = geometry.axis
    fine = any(axis.get(count, 1) >= 4 * axis.get(steps, 1) > 1 for count, steps in (("S13", "KD"), ("S2", "KI")))
    return 8 if fine else 16


@schedule("moe_experts", "x86-amx-emulated")
class ExpertsAmxEmulated(ExpertsAmx):
    """The same without the instructions: for tests on any CPU."""

    bf16, dots = False, ""
    emulated = True
