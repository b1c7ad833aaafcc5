"""Packed sequences in a patched model of transformers: several sequences in one row, told apart by their bounds.

transformers hands a layer the bounds as ``cu_seq_lens_q`` or the number of each token's sequence as ``seq_idx``, and lets
its attention find the sequences by position ids that start again. `complete` makes whichever was given into all of them,
so that attention, convolution and recurrence keep the same sequences apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tvm_gdn.errors import ArgumentError


def bounds(kwargs: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
    """``[N + 1]`` of N packed sequences, from what a layer is given; None for one sequence a row.

    Parameters
    ----------
    kwargs : dict
        Keywords of the layer's or model's forward.
    x : torch.Tensor
        ``[B, T, ...]``, input of the layer or model.

    Raises
    ------
    ArgumentError
        Bounds of one sequence that are not ``[0, T]``, several rows, or malformed numbers of sequences.
    """
    given: torch.Tensor | None = kwargs.get("cu_seq_lens_q")
    if given is None and kwargs.get("seq_idx") is not None:
        given = _changes("seq_idx", kwargs["seq_idx"])
    if given is None:
        return None
    if given.numel() > 2:
        if x.shape[0] != 1:
            raise ArgumentError(
                f"cu_seq_lens_q: packed sequences stand in one row, input_ids has {x.shape[0]}; flatten it to [1, tokens]"
            )
        return given
    if given.device.type == "cpu" and not torch.compiler.is_compiling() and given.tolist() != [0, x.shape[0] * x.shape[1]]:
        raise ArgumentError(f"cu_seq_lens_q is {given.tolist()}; for one sequence it is [0, {x.shape[0] * x.shape[1]}]")
    return None


def refuse_cache(given: torch.Tensor | None) -> None:
    """Refuse a cache beside several sequences: it holds one state for the row."""
    if given is not None:
        raise ArgumentError(
            f"cu_seq_lens_q: a cache holds one state for a row, not those of {given.numel() - 1} packed sequences; pass"
            " use_cache=False and no cache, or one sequence a row"
        )


def _changes(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """Bounds of the runs of equal numbers in ``[1, T]``."""
    if numbers.ndim != 2 or numbers.shape[0] != 1:
        raise ArgumentError(f"{name} has shape {tuple(numbers.shape)}; packed sequences stand in one row: [1, tokens]")
    inner = (numbers[0, 1:] != numbers[0, :-1]).nonzero().flatten() + 1
    ends = numbers.new_tensor([0]), numbers.new_tensor([numbers.shape[1]])
    return torch.cat([ends[0], inner, ends[1]]).int()


def _positions(given: torch.Tensor) -> torch.Tensor:
    """Position ids ``[1, T]`` that start at 0 in every sequence."""
    lengths = given.diff().long()
    starts = given[:-1].long().repeat_interleave(lengths)
    return (torch.arange(len(starts), device=given.device) - starts).unsqueeze(0)


def complete(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of a decoder stack: bounds, position ids and ``use_cache=False`` where sequences are packed."""
    # "past_key_values" is its name up to transformers 5.23; later ones take both.
    if len(args) > 1 or any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
        return None
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        return None
    given = bounds(kwargs, tokens)
    positions, mask, use_cache = (kwargs.get(name) for name in ("position_ids", "attention_mask", "use_cache"))
    if given is None and mask is None and positions is not None and not torch.compiler.is_compiling():
        # As transformers' masks do: position ids that start again mean packed sequences where there is no cache.
        config: Any = module.config
        if positions.ndim == 2 and positions.shape[0] == 1 and (use_cache is False or not getattr(config, "use_cache", True)):
            sequence = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
            given = bounds({"cu_seq_lens_q": _changes("position_ids", sequence)}, tokens)
    if given is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if not bool(mask.all()):
            raise ArgumentError("attention_mask: packed sequences have no padding; pass no mask, or one sequence a row")
        mask = None  # with a mask transformers' attention would not look for packed sequences
    return args, {
        **kwargs,
        "cu_seq_lens_q": given,
        "position_ids": _positions(given) if positions is None else positions,
        "attention_mask": mask,
        "use_cache": False if use_cache is None else use_cache,
    }
