"""The delta rule token by token: the kernel skeleton of `delta_rule.py` with its own steps."""

from __future__ import annotations

from typing import Any

from tvm_gdn.ops.tir.delta_rule import delta_rule
from tvm_gdn.spec import Geometry


def recurrent(geometry: Geometry, tiles: Any) -> Any:
    """Build the token-recurrent kernel of one geometry (see `delta_rule`)."""
    return delta_rule(geometry, tiles)
