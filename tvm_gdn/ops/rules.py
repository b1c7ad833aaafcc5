"""Rules of arguments that shapes and dtypes cannot state.

They run only after a kernel refused a call (to name the argument), or before it on accelerators when checks are on: reading
slot ids and sequence bounds there would synchronize the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from tvm_gdn import env
from tvm_gdn.errors import ArgumentError

#: Stands for an absent `cache_steps` in a kernel's arguments.
NO_STEPS = -(2**31)


def check_recurrent(args: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Check heads, sequence bounds, slots, verification arguments.

    Parameters
    ----------
    args : mapping
        Arguments by name, as given to the torch operator.
    sizes : mapping
        Axis sizes found in their shapes.

    Raises
    ------
    ArgumentError
        Names the argument, what is allowed, and what to do.
    """
    _check_heads(sizes)
    lengths = _lengths(args, sizes)
    sequences = len(lengths)
    check_slots(args, "initial_state_indices", "initial_state_source", sequences, not args.get("disable_state_update"))
    check_slots(args, "intermediate_state_indices", "intermediate_states_buffer", sequences, True)
    for name in ("initial_state", "final_state"):
        states = args.get(name)
        if states is not None and states.shape[0] != sequences:
            raise ArgumentError(f"{name} has {states.shape[0]} states for {sequences} sequences; pass one state per sequence")
    _check_verify(args, lengths)


def readable(tensor: torch.Tensor) -> bool:
    """Whether a rule may look at a tensor's values; on accelerators that waits for the device, and ends a graph's capture."""
    return tensor.device.type == "cpu" or env.checks_enabled()


def _check_heads(sizes: Mapping[str, int]) -> None:
    for axis, name in (("K", "q"), ("V", "v")):
        if sizes[axis] == 0:
            raise ArgumentError(f"{'initial_state_source' if 'R' in sizes else name} has {axis} = 0; it must be at least 1")
    if "R" in sizes:
        K, V, HV = sizes["K"], sizes["V"], sizes["HV"]
        rest = sizes["R"] - HV * V
        if rest <= 0 or rest % (2 * K) or HV % (rest // (2 * K)):
            raise ArgumentError(
                f"mixed_qkv has rows of {sizes['R']} elements; with HV = {HV} (A_log) and K = {K}, V = {V} (the pool) a row "
                f"is 2*H*K + HV*V with HV a multiple of H"
            )
    elif sizes["H"] == 0 or sizes["HV"] % sizes["H"]:
        raise ArgumentError(f"v has {sizes['HV']} heads, q and k have {sizes['H']}; HV must be a multiple of H")


def _lengths(args: Mapping[str, Any], sizes: Mapping[str, int]) -> list[int]:
    cu_seqlens = args.get("cu_seqlens")
    if cu_seqlens is None:
        return [sizes.get("T", 1)] * sizes["B"]
    if sizes["B"] != 1:
        raise ArgumentError(f"cu_seqlens needs q, k and v of batch size 1 (packed sequences), q has {sizes['B']}")
    return check_bounds("cu_seqlens", cu_seqlens, sizes["T"])


def check_bounds(name: str, tensor: torch.Tensor, tokens: int) -> list[int]:
    """Check the bounds of packed sequences.

    Parameters
    ----------
    name : str
        The argument's.
    tensor : torch.Tensor
        ``[N + 1]`` bounds.
    tokens : int
        What the last must be.

    Returns
    -------
    list of int
        Lengths of the sequences.

    Raises
    ------
    ArgumentError
        They do not run from 0 to `tokens`, or decrease.
    """
    if not readable(tensor):
        return [0] * (tensor.shape[0] - 1)
    bounds = tensor.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens:
        raise ArgumentError(f"{name} must start with 0 and end with the number of tokens, {tokens}; got {_short(bounds)}")
    for n, (low, high) in enumerate(pairwise(bounds)):
        if high < low:
            raise ArgumentError(f"{name} must never decrease; entries {n} and {n + 1} are {low} and {high}")
    return [high - low for low, high in pairwise(bounds)]


def check_slots(
    args: Mapping[str, Any], indices_name: str, pool_name: str, sequences: int, written: bool = False, pad: int = -1
) -> None:
    """Check one slot per sequence, within the pool.

    Parameters
    ----------
    args : mapping
        Arguments by name.
    indices_name, pool_name : str
        The arguments with the slots and with the pool.
    sequences : int
        How many slots there must be.
    written : bool
        Whether two sequences must not share a slot.
    pad : int
        The slot id of padding.

    Raises
    ------
    ArgumentError
        Slots without a pool, too few of them, one outside the pool, or a shared one.
    """
    indices, pool = args.get(indices_name), args.get(pool_name)
    if indices is None:
        if pool is not None and pool.shape[0] < sequences:
            raise ArgumentError(
                f"{pool_name} has {pool.shape[0]} slots for {sequences} sequences; pass {indices_name} or a larger {pool_name}"
            )
        return
    if pool is None:
        raise ArgumentError(f"{indices_name} needs {pool_name}")
    if indices.shape[0] != sequences:
        raise ArgumentError(f"{indices_name} has {indices.shape[0]} entries for {sequences} sequences; pass one per sequence")
    owners: dict[int, int] = {}
    for n, slot in enumerate(indices.tolist() if readable(indices) else ()):
        if slot != pad and not 0 <= slot < pool.shape[0]:
            raise ArgumentError(
                f"{indices_name}[{n}] = {slot}; allowed: 0 to {pool.shape[0] - 1} ({pool_name} has {pool.shape[0]} slots), "
                f"or {pad} for padding"
            )
        if written and slot != pad and owners.setdefault(slot, n) != n:
            raise ArgumentError(
                f"{indices_name}[{owners[slot]}] and {indices_name}[{n}] are both {slot}; sequences of one call must not write "
                "to one slot: give each its own, or -1 for padding"
            )


def _check_verify(args: Mapping[str, Any], lengths: list[int]) -> None:
    buffer, parents = args.get("intermediate_states_buffer"), args.get("retrieve_parent_token")
    steps = args.get("cache_steps")
    longest = max(lengths, default=0)
    if buffer is not None:
        if longest > buffer.shape[1]:
            raise ArgumentError(
                f"intermediate_states_buffer holds {buffer.shape[1]} steps, a sequence has {longest} tokens; enlarge axis 1"
            )
        if steps not in {None, NO_STEPS, buffer.shape[1]}:
            raise ArgumentError(
                f"cache_steps = {steps} differs from the {buffer.shape[1]} steps of intermediate_states_buffer; leave it None"
            )
    if parents is None:
        return
    if buffer is None:
        raise ArgumentError("retrieve_parent_token needs intermediate_states_buffer, from which parents' states are read")
    if parents.shape[0] != len(lengths) or parents.shape[1] < longest:
        raise ArgumentError(
            f"retrieve_parent_token has shape {tuple(parents.shape)}; allowed: [{len(lengths)}, at least {longest}]"
        )
    if not readable(parents):
        return
    for n, (row, length) in enumerate(zip(parents.tolist(), lengths, strict=True)):
        for t in range(1, length):
            if not -1 <= row[t] < t:
                raise ArgumentError(
                    f"retrieve_parent_token[{n}, {t}] = {row[t]}; a parent is an earlier step (0 to {t - 1}), or -1 for none"
                )


def _short(values: list[int]) -> str:
    text = ", ".join(map(str, values[:8]))
    return f"[{text}, ...]" if len(values) > 8 else f"[{text}]"


def has_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor share memory, judged by its strides."""
    span = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False
