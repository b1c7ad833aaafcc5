"""What transformers runs in the place of the convolution and of the gated norm, for `tvm_gdn bench --peers`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from tvm_gdn.errors import TvmGdnError
from tvm_gdn.spec import OpSpec

Call = Callable[[], object]


def modeling() -> ModuleType:
    """The modeling module of transformers whose functions are the peers.

    Raises
    ------
    TvmGdnError
        transformers is not installed.
    """
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next
    except ImportError as error:
        raise TvmGdnError(f"--peers needs transformers ({error}): pip install 'tvm_gdn[bench]'") from error
    return modeling_qwen3_next


def _conv(arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    weight, bias, activation = (arguments[name] for name in ("weight", "bias", "activation"))
    if "conv_state" in arguments:
        slots = arguments["conv_state_indices"]
        # One state per sequence, in order: the look-up of slots is done before the clock starts.
        state = arguments["conv_state"] if slots is None else arguments["conv_state"][slots.clamp_min(0)]
        function = inspect.unwrap(modeling().causal_conv1d_update)
        return function, {"hidden_states": arguments["x"], "conv_state": state, "weight": weight, "bias": bias,
                          "activation": activation}  # fmt: skip
    if arguments["query_start_loc"] is not None or arguments["conv_states"] is not None:
        return None
    function = inspect.unwrap(modeling().causal_conv1d_fn)
    return function, {"hidden_states": arguments["x"], "weight": weight, "bias": bias, "activation": activation}


def _norm(arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    x, weight, z = (arguments[name] for name in ("x", "weight", "z"))
    if z is None or not arguments["norm_before_gate"] or arguments["activation"] == "sigmoid":
        return None
    layer = modeling().Qwen3NextRMSNormGated(x.shape[-1], eps=arguments["eps"])
    layer.weight.data = weight
    return layer.requires_grad_(False).forward, {"hidden_states": x, "gate": z}


#: What makes the peer of an algorithm.
FUNCTIONS = {"conv": _conv, "norm": _norm}


def transformers_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call | None:
    """Transformers' function on the same tensors; None where it has no counterpart."""
    found = FUNCTIONS[spec.algorithm](arguments) if spec.algorithm in FUNCTIONS else None
    return None if found is None else functools.partial(found[0], **found[1])


def compiled_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call | None:
    """`torch.compile` of the same; the first call compiles."""
    found = FUNCTIONS[spec.algorithm](arguments) if spec.algorithm in FUNCTIONS else None
    if found is None:
        return None
    torch.compiler.reset()
    return functools.partial(torch.compile(found[0], dynamic=False), **found[1])
