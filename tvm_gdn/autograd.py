"""What happens when a gradient is asked of an operator that has none: an error at backward, never a silent None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvm_gdn.errors import TvmGdnError


class BackwardError(TvmGdnError, NotImplementedError):
    """Backward through an operator that only has a forward."""


def _refusal(name: str) -> Callable[[torch.Tensor], None]:
    def refuse(gradient: torch.Tensor) -> None:
        del gradient
        raise BackwardError(
            f"{name} has no backward yet; call it under torch.no_grad() or on detached tensors, or train with "
            f"tvm_gdn.reference.{name}, which is differentiable"
        )

    return refuse


def _is_watched(output: torch.Tensor) -> bool:
    return output.requires_grad and not torch.compiler.is_compiling()


def forward_only(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose outputs work anywhere in a forward, and raise if a gradient reaches them.

    The check is a hook on the outputs and not an Autograd kernel, which would cost every call twice what the call costs.
    """
    refuse = _refusal(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = operator(*args, **kwargs)
        for output in result if isinstance(result, tuple) else (result,):
            if _is_watched(output):
                output.register_hook(refuse)
        return result

    return call


def in_words_of(name: str, output: torch.Tensor) -> torch.Tensor:
    """An operator's output that names another function if a gradient reaches it: the one that the user called.

    A view, since of an output's own hooks the operator's comes first.
    """
    if not _is_watched(output):
        return output
    view = output.view_as(output)
    view.register_hook(_refusal(name))
    return view
