"""A whole decode step between the projections: the kernel skeleton of `delta_rule.py` on a row that it convolves itself."""

from __future__ import annotations

from typing import Any

from tvm_gdn.ops.tir.delta_rule import delta_rule
from tvm_gdn.spec import Geometry


def fused_decode(geometry: Geometry, tiles: Any) -> Any:
    """Build the kernel of one geometry (see `delta_rule`)."""
    return delta_rule(geometry, tiles)
