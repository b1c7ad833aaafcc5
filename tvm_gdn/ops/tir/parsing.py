"""What kernels' definitions decide while TVM parses them."""

from __future__ import annotations

from typing import Any


def pick(condition: bool, yes: Any, no: Any) -> Any:
    """One of two values: an expression where TVMScript's ``if`` would be a statement."""
    return yes if condition else no
