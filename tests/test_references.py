"""Against references that nobody here wrote: flash-linear-attention's naive functions, the ONNX project's node test cases.

Both are in the ``test`` extra (``pip install fla-core onnx``). The naive functions are loaded from their files, because the package
around them imports triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

import tvm_gdn
from tvm_gdn.parity import rms_ratio

B, T, H, HV, K, V = 2, 65, 2, 4, 64, 128
RULES = {
    "gated_delta_rule": "naive_recurrent_gated_delta_rule",
    "kda": "naive_recurrent_kda",
    "delta_rule": "delta_rule_recurrence",
}
NORMED = {"K": K, "V": V, "H": H, "HV": HV, "with": ("initial_state",), "output_final_state": True}
ONNX = {"K": 8, "V": 8, "H": 4, "HV": 4}
FLA = all(map(importlib.util.find_spec, ("fla", "einops")))
KERNELS = [(f"{form}_{rule}", {**NORMED, "B": B, "T": T}) for rule in RULES for form in ("chunk", "fused_recurrent") if FLA]
KERNELS += [
    (f"chunk_{rule}", {**ONNX, "B": 2, "T": 4, "with": given, "output_final_state": True})
    for rule in RULES
    for given in ((), ("initial_state",))
]
if importlib.util.find_spec("onnx"):
    ONE, HALF = {**ONNX, "K": 1, "V": 1, "H": 1, "HV": 1}, {"dtype": "float16", "dtypes": {"g": "float16", "beta": "float16"}}
    KERNELS += [
        (f"chunk_{rule}", {**sizes, "B": 1, "T": 1, "with": given, "output_final_state": True})
        for rule, sizes, given in (
            ("gated_delta_rule", ONE, ()),
            ("gated_delta_rule", ONE, ("initial_state",)),
            ("kda", ONE, ("initial_state",)),
            ("kda", {**ONNX, **HALF}, ()),
        )
    ]
    CONV = {"B": 1, "T": 2, "D": 2, "W": 4, "activation": None, "with": ("conv_states", "has_initial_state")}
    HALVES = {"dtype": "float16", "weight_dtype": "float16", "state_dtype": "float16"}
    KERNELS += [
        ("causal_conv1d_fn", {**CONV, **more})
        for more in ({}, {"W": 5}, {"with": (*CONV["with"], "bias")}, HALVES, {**HALVES, "activation": "silu"})
    ]


def naive(rule):
    """A function of fla/ops/<rule>/naive.py."""
    if not FLA:
        pytest.skip("flash-linear-attention is not installed: pip install fla-core")
    path = Path(importlib.util.find_spec("fla").submodule_search_locations[0]) / "ops" / rule / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, RULES[rule])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_flash_linear_attention(rule, form):
    function = naive(rule)
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K, generator=gen), dim=-1) for _ in range(2))
    v, beta = torch.randn(B, T, HV, V, generator=gen), torch.rand(B, T, HV, generator=gen)
    g = -torch.rand((B, T, HV, K) if rule == "kda" else (B, T, HV), generator=gen)
    state = torch.randn(B, HV, K, V, generator=gen)
    gates = () if rule == "delta_rule" else (g,)
    got = getattr(tvm_gdn, f"{form}_{rule}")(q, k, v, *gates, beta, initial_state=state, output_final_state=True)
    queries, keys = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    if rule == "delta_rule":
        heads_first = [x.transpose(1, 2) for x in (queries, keys, v, beta)]
        o, final = function(*heads_first, initial_state=state)
        want = o.transpose(1, 2), final
    else:
        want = function(queries, keys, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    for value, expected in zip(got, want, strict=True):
        assert rms_ratio(value, expected) < 1e-5


def onnx_cases(operator):
    """(name, attributes, inputs by name, outputs) of ONNX's own cases of an operator; none where it is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason="onnx is not installed"))]
    import onnx
    from onnx import numpy_helper
    from onnx.backend.test.case import node as collected

    def array(value):
        return torch.from_numpy((value if hasattr(value, "shape") else numpy_helper.to_array(value)).copy())

    found = []
    # Importing one operator's module makes its cases; collect_testcases makes thousands, for one operator per process.
    module = {"LinearAttention": "linear_attention", "CausalConvWithState": "causal_conv_with_state"}[operator]
    try:
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    except ModuleNotFoundError:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"this onnx has no cases of {operator}"))]
    for case in collected._NodeTestCases:
        node = case.model.graph.node[0]
        if len(case.model.graph.node) != 1 or node.op_type != operator:
            continue  # the same case with the operator written out in others
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        names = [name for name in node.input if name]
        inputs, outputs = ([array(x) for x in xs] for xs in case.data_sets[0])
        found.append(pytest.param((attributes, dict(zip(names, inputs, strict=True)), outputs), id=case.name))
    return found


@pytest.mark.parametrize("form", ["chunk", pytest.param("fused_recurrent", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", onnx_cases("LinearAttention"))
def test_onnx_linear_attention(case, form):
    attributes, inputs, outputs = case
    rule = attributes.get("update_rule", b"gated_delta").decode()
    if rule not in {"gated_delta", "delta"}:
        pytest.skip(f"{rule} is no delta rule")
    heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]

    def unpack(name, count):
        """[B, T, count * D] as [B, T, heads, D]: ONNX shares a state among q heads, the operators k heads among states."""
        x = inputs[name].unflatten(-1, (count, -1))
        return x.repeat_interleave(heads // count, 2)

    q, k, v = unpack("query", heads), unpack("key", kv_heads), unpack("value", kv_heads)
    beta = unpack("beta", inputs["beta"].shape[-1] if inputs["beta"].shape[-1] == 1 else kv_heads).squeeze(-1)
    state = inputs.get("past_state")
    state = None if state is None else state.repeat_interleave(heads // kv_heads, 1)
    scale = attributes.get("scale") or None
    operator, gates = "delta_rule", ()
    if rule == "gated_delta":
        per_channel = inputs["decay"].shape[-1] != kv_heads
        decay = unpack("decay", kv_heads)
        operator, gates = ("kda", (decay,)) if per_channel else ("gated_delta_rule", (decay.squeeze(-1),))
    function = getattr(tvm_gdn, f"{form}_{operator}")
    o, final = function(q, k, v, *gates, beta, scale, initial_state=state, output_final_state=True)
    half = outputs[0].dtype == torch.float16
    assert rms_ratio(o.flatten(-2), outputs[0]) < (2e-3 if half else 1e-5)
    assert rms_ratio(final[:, :: heads // kv_heads], outputs[1]) < (2e-3 if half else 1e-5)


@pytest.mark.parametrize("case", onnx_cases("CausalConvWithState"))
def test_onnx_causal_conv_with_state(case):
    attributes, inputs, outputs = case
    x, weight = inputs["input"], inputs["weight"].squeeze(1)
    activation = attributes.get("activation", b"none").decode()
    past = inputs.get("past_state")
    state = torch.zeros(x.shape[0], x.shape[1], weight.shape[1] - 1, dtype=x.dtype) if past is None else past.clone()
    flags = torch.full((x.shape[0],), past is not None)
    o = tvm_gdn.causal_conv1d_fn(
        x, weight, inputs.get("bias"), state, has_initial_state=flags, activation=None if activation == "none" else activation
    )
    half = x.dtype == torch.float16
    assert rms_ratio(o, outputs[0]) < (2e-3 if half else 1e-5)
    assert rms_ratio(state, outputs[1]) < (2e-3 if half else 1e-5)
