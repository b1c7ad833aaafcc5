"""Elementwise maths of the experts, for every form of their loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T


def silu_product(gate: Any, up: Any, exp: Callable[[Any], Any]) -> Any:
    """The product silu(gate) * up."""
    return gate / (T.float32(1) + exp(-gate)) * up
