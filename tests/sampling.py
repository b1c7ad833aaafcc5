"""Which items of a large matrix every run has; the others are slow.

One rule: always the item with the most values that none before it has, the first of equals, until every value of every argument
has occurred (``pairs=True``: every pair of values of two arguments). It is asked for by ``@pytest.mark.sampled`` on a parametrized
test, whose `kernel` arguments are taken apart into the values of their cases.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def places(items: Sequence[Mapping[Hashable, Any]], *, pairs: bool = False) -> set[int]:
    """Places of those items that the rule takes; what an item does not name is a value too."""
    names = sorted({name for item in items for name in item}, key=repr)
    single = [[(name, repr(item.get(name))) for name in names] for item in items]
    features = [set(combinations(values, 2)) if pairs and len(names) > 1 else set(values) for values in single]
    chosen: set[int] = set()
    while any(features):
        best = max(range(len(items)), key=lambda place: (len(features[place]), -place))
        chosen.add(best)
        features = [values - features[best] for values in features]
    return chosen


def values_of(arguments: Mapping[str, Any]) -> dict[Hashable, Any]:
    """What an item is told apart by: its arguments, the entries of those that are mappings, operator and case of a kernel."""
    found: dict[Hashable, Any] = {}
    for name, value in arguments.items():
        whole = {"op": value[0], **value[1]} if name == "kernel" else value
        found |= {(name, key): entry for key, entry in whole.items()} if isinstance(whole, Mapping) else {name: whole}
    return found


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what a run leaves out of its sampled tests."""
    matrices: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled") and "slow" not in item.keywords:
            matrices.setdefault((str(item.path), item.originalname), []).append(item)
    for matrix in matrices.values():
        options = matrix[0].get_closest_marker("sampled").kwargs
        chosen = places([values_of(item.callspec.params) for item in matrix], **options)
        for place, item in enumerate(matrix):
            if place not in chosen:
                item.add_marker("slow")
