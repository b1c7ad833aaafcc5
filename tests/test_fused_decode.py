"""The fused decode step against torch's convolution and the float64 oracle, against the operators it is made of, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import PACKED, call, draw, oracle, same_bits

import tvm_gdn
from tvm_gdn.errors import ArgumentError
from tvm_gdn.parity import rms_ratio

FUSED = "fused_conv_gated_delta_rule_update"
SLOTS = ("conv_state_indices", "initial_state_indices")
STEP = {"B": 3, "H": 2, "HV": 4, "K": 16, "V": 24, "S": 5, "SC": 6, "with": SLOTS}
BIASED = {**STEP, "L": 5, "W": 3, "with": (*SLOTS, "conv_bias"), "state_v_first": True}
#: As many taps as a convolution may have; models have four.
LONG = {**STEP, "W": 8, "L": 7, "with": (*SLOTS, "conv_bias")}
SPLIT = {"D": 160, "B": 3, "with": ("conv_state_indices",), "activation": "silu"}
KERNELS = [(FUSED, STEP), (FUSED, BIASED), (FUSED, LONG), (PACKED, {**STEP, "with": SLOTS[1:]}), ("causal_conv1d_update", SPLIT)]
CONV = ("conv_state", "conv_weight", "conv_bias", "activation", "conv_state_indices", "pad_slot_id")


def convolved(arguments):
    """The rows behind the convolution in float64 with torch's own function, and the convolution states afterwards."""
    row, weight, states = (arguments[name].double() for name in ("mixed_qkv", "conv_weight", "conv_state"))
    slots = arguments["conv_state_indices"].tolist()
    history = torch.stack([states[0] * 0 if slot == arguments["pad_slot_id"] else states[slot] for slot in slots])
    inputs = torch.cat([history, row[:, :, None]], 2)
    bias = None if arguments["conv_bias"] is None else arguments["conv_bias"].double()
    out = F.conv1d(inputs[:, :, -weight.shape[1] :], weight[:, None], bias, groups=weight.shape[0])[:, :, 0]
    after = arguments["conv_state"].clone()
    for n, slot in enumerate(slots):
        if slot != arguments["pad_slot_id"]:
            after[slot] = inputs[n, :, 1:].to(after.dtype)
    return F.silu(out), after


@pytest.mark.parametrize("case", [STEP, BIASED, LONG], ids=["plain", "biased", "long"])
@pytest.mark.parametrize("change", ["", "padding", "other pad", "strided", "states transposed"])
def test_against_torch_and_oracle(case, change):
    a = draw(FUSED, case, seed=3)
    if change == "padding":
        a["conv_state_indices"][1] = a["initial_state_indices"][1] = -1
    elif change == "other pad":
        a["pad_slot_id"] = int(a["conv_state_indices"][0])
    elif change == "strided":
        a["mixed_qkv"] = torch.cat([a["mixed_qkv"], a["mixed_qkv"] * 7], 1)[:, : a["mixed_qkv"].shape[1]]
        a["a"], a["b"] = (torch.stack([a[name], a[name] * 7], 2)[..., 0] for name in "ab")
    elif change == "states transposed":
        a["conv_state"] = a["conv_state"].transpose(1, 2).contiguous().transpose(1, 2)
        a["conv_weight"] = a["conv_weight"].T.contiguous().T
    row, conv_state = convolved(a)
    rest = {name: value for name, value in a.items() if name not in CONV}
    want = oracle(PACKED, {**rest, "mixed_qkv": row})
    got = call(FUSED, a)
    for name, value in want.items():
        assert rms_ratio(got[name], value) < 1e-5, name
    assert same_bits(got["conv_state"], conv_state)


def test_steps_equal_those_of_the_separate_operators():
    a = draw(FUSED, STEP, seed=4)
    pools = a["conv_state"].clone(), a["initial_state_source"].clone()
    for step in range(6):
        a["mixed_qkv"] = draw(FUSED, STEP, seed=10 + step)["mixed_qkv"]
        o = call(FUSED, a)["o"]
        row = tvm_gdn.causal_conv1d_update(a["mixed_qkv"], pools[0], a["conv_weight"], None, "silu", a["conv_state_indices"])
        gates = (a[name] for name in ("a", "b", "A_log", "dt_bias"))
        want = tvm_gdn.packed_decode_gated_delta_rule(row, *gates, pools[1], a["initial_state_indices"])
        assert rms_ratio(o, want) < 1e-6
    assert same_bits(a["conv_state"], pools[0])
    assert rms_ratio(a["initial_state_source"], pools[1]) < 1e-6


def test_an_empty_batch():
    a = draw(FUSED, {**STEP, "B": 0}, seed=5)
    before = a["initial_state_source"].clone()
    assert call(FUSED, a)["o"].shape == (0, 1, 4, 24)
    assert same_bits(a["initial_state_source"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"conv_state": torch.zeros(6, 160, 2)}, "conv_state holds 2 inputs"),
        ({"conv_weight": torch.zeros(161, 4)}, "conv_weight has 161 on axis 0"),
        ({"conv_state": torch.zeros(160, 3).expand(6, 160, 3)}, "conv_state has overlapping elements"),
        ({"conv_state_indices": torch.tensor([0, 6, 1])}, r"conv_state_indices\[1\] = 6; allowed: 0 to 5"),
        ({"conv_state_indices": torch.tensor([2, 0, 2])}, r"conv_state_indices\[0\] and conv_state_indices\[2\] are both 2"),
        ({"initial_state_indices": torch.tensor([2, 0, 2])}, r"initial_state_indices\[0\] and initial_state_indices\[2\]"),
        ({"mixed_qkv": torch.zeros(3, 161)}, "other arguments have R|mixed_qkv has rows of 161"),
        ({"a": torch.zeros(3, 5)}, r"b has 4 on axis 1 \(HV\), other arguments have HV = 5"),
    ],
)
def test_errors_name_the_argument_and_nothing_is_written(change, message):
    a = draw(FUSED, STEP)
    call(FUSED, a)
    before = {name: a[name].clone() for name in ("conv_state", "initial_state_source")}
    with pytest.raises(ArgumentError, match=message):
        tvm_gdn.fused_conv_gated_delta_rule_update(**{**a, **change})
    assert all(same_bits(a[name], value) for name, value in before.items())
