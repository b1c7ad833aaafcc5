"""What happens when a gradient is asked of an operator that has none: an error at backward, never a silent None."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tvm_gdn.errors import TvmGdnError


class BackwardError(TvmGdnError, NotImplementedError):
    """Backward through an operator that only has a forward."""


def forward_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a public function: its outputs work anywhere in a forward, and raise if a gradient reaches them.

    The check is a hook on the outputs and not an Autograd kernel, which would cost every call twice what the call costs.
    """

    def refuse(gradient: torch.Tensor) -> None:
        del gradient
        raise BackwardError(
            f"{function.__name__} has no backward yet; call it under torch.no_grad() or on detached tensors, or train with "
            f"tvm_gdn.reference.{function.__name__}, which is differentiable"
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for output in result if isinstance(result, tuple) else (result,):
            if output is not None and output.requires_grad and not torch.compiler.is_compiling():
                output.register_hook(refuse)
        return result

    return call
