"""Every case of every SPEC, compiled, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from calls import every_case

from tvm_gdn import cases, parity
from tvm_gdn.ops import OPS


@pytest.mark.parametrize("kernel", every_case())
def test_case(kernel, device):
    spec, case = OPS[kernel[0]], kernel[1]
    result = parity.check_case(spec, case, device=device)
    assert result.served.startswith("compiled")
    assert result.passed, (result.errors, result.limits)

    arguments = cases.draw(spec, case)
    want = parity.expected(spec, arguments)
    assert set(result.limits) == set(want)
    assert any(value.nan_to_num(1).any() for value in want.values())
    for name, limit in result.limits.items():
        if not want[name].nan_to_num(1).any():
            continue  # zeros are right: the only expert's id, the entropy of one expert
        # A kernel that writes zeros, or that leaves a state as it was, must not pass.
        assert parity.rms_ratio(want[name].where(~want[name].isfinite(), 0.0), want[name]) > limit
        if name in arguments and not arguments.get("disable_state_update"):
            assert parity.rms_ratio(arguments[name], want[name]) > limit


@pytest.mark.parametrize("op", OPS)
def test_comparison_sees_one_wrong_element(op):
    spec = OPS[op]
    want = parity.expected(spec, cases.draw(spec, spec.cases[0]))
    for name, value in want.items():
        for wrong in (float("nan"), float("inf"), 1.0) if value.is_floating_point() else (1,):
            out = value.clone(memory_format=torch.contiguous_format)
            out.view(-1)[-1] += wrong
            assert parity.rms_ratio(out, value) > parity.limit(spec, name, torch.float32)
