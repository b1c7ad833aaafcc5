"""What the delta-rule operators' tensors hold in cases, and the sizes of their axes.

Beside axis sizes, dtypes and scalars, their cases may have ``lengths`` (of packed sequences, instead of B and T) and ``padding``
(some slots are -1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn.spec import Draw, named_sizes


def sizes(case: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes of a case: one sequence per batch item or per length, a slot each, room for every step."""
    found = named_sizes(case)
    if "lengths" in case:
        found |= {"B": 1, "T": sum(case["lengths"]), "N": len(case["lengths"])}
    found.setdefault("B", 1)
    found.setdefault("T", 1)
    found.setdefault("N", found["B"])
    found.setdefault("S", found["N"])
    longest = max(case.get("lengths", (found["T"],)), default=1)
    return found | {"C": found["N"] + 1, "P": max(longest, 1) + 1, "P2": max(longest, 1)}


def packed_sizes(case: Mapping[str, Any]) -> dict[str, int]:
    """`sizes`, and the length of a packed row of q, k and v."""
    found = sizes(case)
    return found | {"R": 2 * found["H"] * found["K"] + found["HV"] * found["V"]}


def bounds(draw: Draw) -> torch.Tensor:
    """Bounds of the packed sequences: one of all tokens where the case has no lengths."""
    return torch.tensor([0, *draw.case.get("lengths", (draw.sizes["T"],))]).cumsum(0)


def _slots(draw: Draw, pool: int) -> torch.Tensor:
    sequences = draw.sizes["N"]
    slots = torch.randperm(pool, generator=draw.rng)[:sequences]
    if draw.case.get("padding") and sequences > 1:
        slots[torch.randperm(sequences, generator=draw.rng)[: (sequences + 1) // 3]] = -1
    return slots


def slots(draw: Draw) -> torch.Tensor:
    """Slots of the state pool, each once; some -1 with ``padding``."""
    return _slots(draw, draw.sizes["S"])


def buffer_slots(draw: Draw) -> torch.Tensor:
    """Slots of the verification buffer."""
    return _slots(draw, draw.sizes["C"])


def parents(draw: Draw) -> torch.Tensor:
    """A random tree per row: an earlier step, or -1."""
    rows, steps = draw.shape
    found = torch.full(draw.shape, -1)
    for t in range(1, steps):
        found[:, t] = torch.randint(-1, t, (rows,), generator=draw.rng)
    return found


def log_decay(draw: Draw) -> torch.Tensor:
    """Between -1 and 0."""
    return -torch.rand(draw.shape, generator=draw.rng)


def strength(draw: Draw) -> torch.Tensor:
    """Between 0 and 1."""
    return torch.rand(draw.shape, generator=draw.rng)


def log_rate(draw: Draw) -> torch.Tensor:
    """Logarithm of a number between 1 and 16."""
    return torch.log(1 + 15 * torch.rand(draw.shape, generator=draw.rng))


def unit(draw: Draw) -> torch.Tensor:
    """Vectors of length 1."""
    return torch.nn.functional.normalize(torch.randn(draw.shape, generator=draw.rng), dim=-1)


def unset(draw: Draw) -> torch.Tensor:
    """NaN: what is read before it was written shows."""
    return torch.full(draw.shape, float("nan"))


def steady(arguments: dict[str, Any]) -> None:
    """Next to no decay: a timed loop applies it thousands of times to one state, which would reach denormal numbers.

    Those slow down every contender, and no model has them.
    """
    if arguments.get("g") is not None:
        arguments["g"].mul_(1e-6)
    if arguments.get("A_log") is not None:
        arguments["A_log"].fill_(-16.0)
