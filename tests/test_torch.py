"""The operators as torch sees them: schema, fake kernels, torch.compile, torch.export, autograd modes."""

from __future__ import annotations

import pytest
import torch
from calls import (
    BUFFER,
    GATING,
    PACKED,
    POOL,
    RECURRENT,
    SIGMOID,
    UPDATE,
    call,
    draw,
    every_case,
    function,
    same_bits,
    usual_kernel,
)
from compilers import needs_cxx
from torch._subclasses.fake_tensor import FakeTensorMode

import tvm_gdn
from tvm_gdn import cases, torch_ops
from tvm_gdn.autograd import BackwardError
from tvm_gdn.check import geometry_of
from tvm_gdn.ops import OPS
from tvm_gdn.packed_experts import PackedExperts

POOLED = {"B": 3, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 6, "with": POOL, "use_qk_l2norm_in_kernel": True}
VARLEN = {
    "lengths": (5, 0, 3, 1), "H": 2, "HV": 4, "K": 32, "V": 64, "S": 9, "with": (*POOL, "cu_seqlens"),
    "index_dtype": "int32",
}  # fmt: skip
TREE = {
    "B": 2, "T": 4, "H": 1, "HV": 2, "K": 32, "V": 48, "S": 3, "with": (*POOL, *BUFFER, "retrieve_parent_token"),
    "disable_state_update": True, "dtype": "bfloat16",
}  # fmt: skip
SEPARATE = {"B": 2, "T": 7, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
SEPARATE_VARLEN = {
    "lengths": (3, 0, 4), "H": 2, "HV": 4, "K": 32, "V": 256, "with": ("initial_state", "cu_seqlens"),
    "output_final_state": True,
}  # fmt: skip
NO_FINAL = {"B": 2, "T": 4, "H": 2, "HV": 2, "K": 8, "V": 8, "with": ("initial_state",)}
PACKED_STEP = {"B": 5, "H": 2, "HV": 4, "K": 128, "V": 64, "S": 7, "with": POOL}
GATES = {"M": 9, "HV": 6, "dtype": "bfloat16", "dtypes": {"A_log": "float32", "dt_bias": "bfloat16"}}

CALLS = {
    "gating": (GATING, GATES),
    "recurrent": (RECURRENT, SEPARATE),
    "recurrent-varlen-v-first": (RECURRENT, {**SEPARATE_VARLEN, "state_v_first": True}),
    "recurrent-no-final": (RECURRENT, NO_FINAL),
    "update": (UPDATE, POOLED),
    "update-varlen-v-first": (UPDATE, {**VARLEN, "state_v_first": True}),
    "update-tree": (UPDATE, TREE),
    "update-no-pool": (UPDATE, {"B": 2, "T": 3, "H": 1, "HV": 1, "K": 256, "V": 128}),
    "sigmoid": (SIGMOID, POOLED),
    "sigmoid-varlen": (SIGMOID, VARLEN),
    "packed": (PACKED, PACKED_STEP),
    "packed-v-first": (PACKED, {**PACKED_STEP, "state_v_first": True}),
}
CALLS |= {op: usual_kernel(op) for op in OPS if op not in {name for name, _ in CALLS.values()}}
each_call = pytest.mark.parametrize("kernel", CALLS.values(), ids=CALLS)


def arguments(op, case):
    a = draw(op, case)
    if a.get("intermediate_states_buffer") is not None:
        a["intermediate_states_buffer"].zero_()  # opcheck compares tensors, and NaN differs from itself
    return a


def compiled_call(callee, a, **options):
    torch._dynamo.reset()
    return torch.compile(callee, fullgraph=True, **options)(**a)


def assert_same_results(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert same_bits(got[name], value), name
        assert value.abs().max() > 0


@each_call
def test_opcheck(kernel):
    op, case = kernel
    checks = torch.library.opcheck(getattr(torch.ops.tvm_gdn, op).default, tuple(arguments(op, case).values()))
    assert set(checks.values()) == {"SUCCESS"}


@each_call
def test_compile_fullgraph_equals_eager(kernel):
    op, case = kernel
    a = arguments(op, case)
    before = cases.clone(a)
    want = call(op, cases.clone(a))
    result = compiled_call(function(op), a, backend="aot_eager")
    values = result if isinstance(result, tuple) else (result,)
    got = {o.name: value for o, value in zip(OPS[op].outputs, values, strict=True) if value is not None}
    got |= {name: a[name] for name in want if name not in got}
    assert_same_results(got, want)
    for tensor in OPS[op].tensors:
        if not tensor.mutated and a[tensor.name] is not None:
            assert same_bits(a[tensor.name], before[tensor.name])


@needs_cxx
@pytest.mark.parametrize("kernel", [CALLS["update"], CALLS["recurrent"]], ids=["update", "recurrent"])
def test_inductor_with_symbolic_sizes(kernel):
    op, case = kernel
    torch._dynamo.reset()

    def layer(a):
        a = {**a, "v": a["v"] * 2}
        result = function(op)(**a)
        return result[0] + 1 if isinstance(result, tuple) else result + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for sizes in ({}, {"B": 5, "T": 3}):
        a = draw(op, {**case, **sizes})
        other = cases.clone(a)
        assert same_bits(compiled(a), layer(other))
        if op == UPDATE:
            assert same_bits(a["initial_state_source"], other["initial_state_source"])


def test_compile_of_the_one_token_batch():
    a = draw(UPDATE, {**VARLEN, "lengths": (1,) * 5})
    a |= {name: a[name].transpose(0, 1) for name in ("q", "k", "v", "g", "beta")}
    want = call(UPDATE, cases.clone(a))
    got = compiled_call(tvm_gdn.fused_recurrent_gated_delta_rule_update, a, backend="aot_eager")
    assert_same_results({"o": got, "initial_state_source": a["initial_state_source"]}, want)


@each_call
def test_export_keeps_the_operator_as_one_node(kernel):
    op, case = kernel

    class Layer(torch.nn.Module):
        def forward(self, a):
            result = function(op)(**a)
            return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]

    a = arguments(op, case)
    want = call(op, cases.clone(a))
    program = torch.export.export(Layer(), (cases.clone(a),))
    target = getattr(torch.ops.tvm_gdn, op).default
    assert [node.target for node in program.graph.nodes if "tvm_gdn" in str(node.target)] == [target]
    values = program.module()(a)
    got = dict(zip([o.name for o in OPS[op].outputs if o.name in want], values, strict=True))
    written = {tensor.name: a[tensor.name] for tensor in OPS[op].tensors if tensor.mutated and a[tensor.name] is not None}
    assert_same_results(got | written, want)


@pytest.mark.parametrize("kernel", every_case())
def test_fake_outputs_are_like_real_ones(kernel):
    op, case = kernel
    a = draw(op, case)
    target = getattr(torch.ops.tvm_gdn, op)
    real = target(*cases.clone(a).values())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = target(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in a.values()))
    meta = target(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in a.values()))
    for results in (fake, meta):
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (results, real)), strict=True)
        for symbolic, value in pairs:
            assert (symbolic.shape, symbolic.dtype) == (value.shape, value.dtype)
            # The stride of an axis of one element says nothing.
            strides = zip(value.shape, symbolic.stride(), value.stride(), strict=True)
            assert all(size == 1 or one == other for size, one, other in strides)
    assert (meta if isinstance(meta, torch.Tensor) else meta[0]).device.type == "meta"


@pytest.mark.parametrize("op", OPS)
def test_a_call_allocates_what_the_fake_kernel_says(op):
    """What is known of a geometry's calls is written into their function; the fake kernel asks the arguments for all of it."""
    spec = OPS[op]
    for case in spec.cases:
        a = draw(op, case)
        taken = []
        allocate = torch_ops.call_function(spec, geometry_of(spec, a), lambda *values, taken=taken: taken.append(values), "cpu")
        results = [f(*a.values()) for f in (allocate, torch_ops.fake_function(spec))]
        made, fake = (x if isinstance(x, tuple) else (x,) for x in results)
        for output, one, other in zip(spec.outputs, made, fake, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), (output.name, case)
            assert any(one is value for value in taken[0]) == (not output.when or a[output.when])


def test_public_functions_on_the_meta_device():
    for op, case in CALLS.values():
        a = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments(op, case).items()}
        result = function(op)(**a)
        for x in result if isinstance(result, tuple) else (result,):
            assert x is None or x.device.type == "meta"


@each_call
def test_inference_mode_and_no_grad(kernel):
    op, case = kernel
    a = arguments(op, case)
    want = call(op, cases.clone(a))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_same_results(call(op, cases.clone(a)), want)
    with torch.inference_mode():
        inside = cases.clone(a)  # inference tensors: in-place updates outside are refused by torch, inside they work
        assert_same_results(call(op, inside), want)


@each_call
def test_inputs_that_require_grad(kernel):
    op, case = kernel
    a = arguments(op, case)
    want = call(op, cases.clone(a))
    written = {tensor.name for tensor in OPS[op].tensors if tensor.mutated}
    leaves = {
        name: x.clone().requires_grad_(name not in written and x.is_floating_point())
        for name, x in a.items()
        if isinstance(x, torch.Tensor)
    }
    got = call(op, {**a, **leaves})
    for name, value in want.items():
        assert same_bits(got[name].detach(), value)
    if op in tvm_gdn.__all__:
        differentiable = any(leaf.requires_grad for leaf in leaves.values())
        for name in {name for name in set(got) - written if differentiable and got[name].is_floating_point()}:
            with pytest.raises(BackwardError, match=op):
                got[name].sum().backward()
    assert all(x.grad is None for x in leaves.values())


def test_a_gradient_is_refused_in_the_words_of_the_function_that_was_called():
    """Operators on pools and on packs have no function of their own."""
    op, case = usual_kernel("chunk_kda_update")
    a = draw(op, case)
    given = {name: a[name] for name in ("k", "v", "g", "beta", "initial_state_indices", "cu_seqlens", "state_v_first")}
    o, _ = tvm_gdn.chunk_kda(a["q"].requires_grad_(), initial_state=a["initial_state_source"], **given)
    want = call(op, {**draw(op, case), "use_qk_l2norm_in_kernel": False, "scale": None})["o"]
    assert same_bits(o.detach(), want)
    a = draw(*usual_kernel("fused_experts_packed"))
    pack = PackedExperts(a["w13"], a["w2"], None, None, a["scheme"], 0, a["x"].shape[1], 0)
    rows = tvm_gdn.fused_experts(a["x"].requires_grad_(), pack, topk_weights=a["topk_weights"], topk_ids=a["topk_ids"])
    for value, name in ((o, "chunk_kda"), (rows, "fused_experts")):
        with pytest.raises(BackwardError, match=rf"^{name} has no backward yet.*reference\.{name},"):
            value.sum().backward()


def test_schemas_name_what_they_write():
    for op, spec in OPS.items():
        schema = getattr(torch.ops.tvm_gdn, op).default._schema
        assert [argument.name for argument in schema.arguments] == [argument.name for argument in spec.inputs]
        written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
        assert written == {tensor.name for tensor in spec.tensors if tensor.mutated}
