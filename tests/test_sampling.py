"""What of a large matrix every run has: every value, every pair where that is asked for, and the same items in every run."""

from __future__ import annotations

from itertools import product

import sampling
from calls import ALGORITHMS, every_case

from tvm_gdn.ops import OPS


def test_every_value_occurs_in_few_items():
    items = [{"a": a, "b": b, "c": c} for a, b, c in product(range(4), range(3), (None, "x"))]
    chosen = [items[place] for place in sampling.places(items)]
    assert len(chosen) == 4
    assert all({item[name] for item in chosen} == {item[name] for item in items} for name in "abc")
    pairs = [items[place] for place in sampling.places(items, pairs=True)]
    for left, right in ("ab", "ac", "bc"):
        assert {(item[left], item[right]) for item in pairs} == {(item[left], item[right]) for item in items}
    assert 12 <= len(pairs) < len(items)
    # What an item does not name is a value of its own; equals do not come twice.
    assert sampling.places([{"a": 1}, {"a": 1}, {"b": 1}]) == {0, 2}
    assert sampling.values_of({"kernel": ("op", {"K": 3}), "n": 1}) == {("kernel", "op"): "op", ("kernel", "K"): 3, "n": 1}


def test_a_run_has_every_operator_and_every_value_of_an_algorithms_cases():
    every = [parameter.values[0] for parameter in every_case()]
    usual = [parameter.values[0] for parameter in every_case() if not parameter.marks]
    assert {op for op, _ in usual} == set(OPS) and {OPS[op].algorithm for op in ALGORITHMS} == {s.algorithm for s in OPS.values()}
    assert len(usual) < len(every) / 2

    def values(kernels, algorithm):
        return {
            (key, repr(value))
            for op, case in kernels
            if OPS[op].algorithm == algorithm
            for key, value in case.items()
            if key != "with"
        }

    def dtypes(kernels):
        return {(op, case.get("dtype"), case.get("state_dtype")) for op, case in kernels}

    for spec in OPS.values():
        assert values(usual, spec.algorithm) == values(every, spec.algorithm)
        given = [
            {name for op, case in kernels if OPS[op].algorithm == spec.algorithm for name in case.get("with", ())}
            for kernels in (usual, every)
        ]
        assert given[0] == given[1]
    for column in (1, 2):
        assert {(row[0], row[column]) for row in dtypes(usual)} == {(row[0], row[column]) for row in dtypes(every)}
