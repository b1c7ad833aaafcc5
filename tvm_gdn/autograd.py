"""What happens when a gradient is asked of an operator that has none: an error at backward, never a silent None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvm_gdn.errors import TvmGdnError


class BackwardError(TvmGdnError, NotImplementedError):
    """Backward through an operator that only has a forward."""


def forward_only(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose outputs work anywhere in a forward, and raise if a gradient reaches them.

    The check is a hook on the outputs and not an Autograd kernel, which would cost every call twice what the call costs.
    """

    def refuse(gradient: torch.Tensor) -> None:
        del gradient
        raise BackwardError(
            f"{name} has no backward yet; call it under torch.no_grad() or on detached tensors, or train with "
            f"tvm_gdn.reference.{name}, which is differentiable"
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        result = operator(*args, **kwargs)
        for output in result if isinstance(result, tuple) else (result,):
            if output.requires_grad and not torch.compiler.is_compiling():
                output.register_hook(refuse)
        return result

    return call
