"""What a benchmark compares on one case: this package, its bare kernel, and those who compute the same.

Every contender is a callable without arguments on tensors that exist already, as a decode loop has them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvm_gdn import cases, dispatch, reference, torch_ops
from tvm_gdn.bench import peers
from tvm_gdn.check import geometry_of, scalar_value
from tvm_gdn.errors import TvmGdnError
from tvm_gdn.spec import OpSpec, Scalar

Call = Callable[[], object]

#: Transformers' functions of the delta rule, by algorithm.
_RECURRENCES = {"recurrent": "torch_recurrent_gated_delta_rule", "chunk": "torch_chunk_gated_delta_rule"}


def steady(spec: OpSpec, case: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Arguments of a case on which thousands of calls stay in the range that models have."""
    arguments = cases.draw(spec, case, device=device)
    if spec.steady is not None and any(tensor.mutated for tensor in spec.tensors):
        spec.steady(arguments)
    return arguments


def public_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call:
    """The package's public function, called as a user would: by position, defaults left out."""
    import tvm_gdn

    function = getattr(tvm_gdn, spec.name)
    positional, keywords = [], {}
    for parameter in inspect.signature(function).parameters.values():
        value = arguments.get(parameter.name, parameter.default)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            positional.append((value, value is parameter.default))
        elif value is not parameter.default:
            keywords[parameter.name] = value
    while positional and positional[-1][1]:
        positional.pop()
    return functools.partial(function, *(value for value, _ in positional), **keywords)


def kernel_call(spec: OpSpec, arguments: Mapping[str, Any]) -> tuple[dispatch.Served, Call | None]:
    """What serves the case, and its kernel on outputs that exist already (None where the reference serves it)."""
    geometry = geometry_of(spec, arguments)
    served = dispatch.lookup(spec, geometry, device_of(arguments))
    if served.kernel is None:
        return served, None
    values = []
    for arg in spec.inputs:
        if not isinstance(arg, Scalar):
            values += [arguments[arg.name]] if arg.name in geometry.dtype else []
        elif arg.passed and not arg.static:
            values.append(scalar_value(arg, arguments[arg.name], geometry.axis))
    allocated = allocation_call(spec, arguments)()
    outputs = allocated if isinstance(allocated, tuple) else (allocated,)
    values += [value for o, value in zip(spec.outputs, outputs, strict=True) if not o.when or arguments[o.when]]
    return served, functools.partial(served.kernel, *values)


def device_of(arguments: Mapping[str, Any]) -> str:
    """Torch device type of a call's tensors."""
    return next(value.device.type for value in arguments.values() if isinstance(value, torch.Tensor))


def operator_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call:
    """The torch operator, without the public function around it."""
    return functools.partial(getattr(torch.ops.tvm_gdn, spec.name), *arguments.values())


def allocation_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Nothing but the allocation of the operator's outputs."""
    return functools.partial(torch_ops.fake_function(spec), *arguments.values())


def reference_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call:
    """The torch-native reference in the tensors' own precision."""
    return functools.partial(getattr(reference, spec.name), **spec.for_reference(arguments))


def copy_call(moved: int, device: str = "cpu") -> Call:
    """A plain torch copy that moves as many bytes: half of them read, half of them written."""
    source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def compiled_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call | None:
    """`torch.compile` of transformers' function or of the reference; the first call compiles."""
    if spec.algorithm in peers.FUNCTIONS:
        return peers.compiled_call(spec, arguments)
    if arguments.get("q") is not None and arguments["q"].shape[1] != 1:
        # It unrolls the loop over the tokens: with hundreds of them it compiles for hours.
        return None
    torch.compiler.reset()
    compiled = torch.compile(getattr(reference, spec.name), dynamic=False)
    return functools.partial(compiled, **spec.for_reference(arguments))


def transformers_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call | None:
    """The chunked form or the recurrence of transformers on the same tensors; None where it has no counterpart.

    It takes gates that are computed and one state per sequence. Next to operators that do this inside it has a head
    start: gates, splitting and the look-up of slots are done before the clock starts.

    Raises
    ------
    TvmGdnError
        transformers is not installed.
    """
    if spec.algorithm in peers.FUNCTIONS:
        return peers.transformers_call(spec, arguments)
    if spec.algorithm not in _RECURRENCES or "kda" in spec.name or not {"g", "a"} & set(arguments):
        return None
    # Without its wrapper, which would hand the call to another package where one is installed.
    function = inspect.unwrap(getattr(peers.modeling(), _RECURRENCES[spec.algorithm]))
    pool = arguments.get("initial_state_source")
    if pool is None:
        state = arguments.get("initial_state")
    else:
        slots = arguments.get("initial_state_indices")
        state = pool if slots is None else pool[slots.clamp_min(0)]
    q, k, v = (arguments[name] for name in "qkv") if "q" in arguments else _unpacked(arguments)
    g, beta = (arguments["g"], arguments["beta"]) if "g" in arguments else _gates(arguments, q.shape[:2])
    if spec.algorithm == "chunk":
        # The layer repeats q and k to the value heads before it calls the chunked form, which does not.
        q, k = (x.repeat_interleave(v.shape[-2] // q.shape[-2], dim=-2) for x in (q, k))
    return functools.partial(
        function,
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=arguments["use_qk_l2norm_in_kernel"],
    )


def _unpacked(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mixed: torch.Tensor = arguments["mixed_qkv"]
    K, V = arguments["initial_state_source"].shape[-2:]
    heads = arguments["A_log"].shape[0]
    keys = (mixed.shape[1] - heads * V) // 2
    q, k, v = mixed.split([keys, keys, heads * V], dim=1)
    return q.unflatten(1, (1, -1, K)), k.unflatten(1, (1, -1, K)), v.unflatten(1, (1, heads, V))


def _gates(arguments: Mapping[str, Any], lead: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    g, beta = reference.fused_gdn_gating(arguments["A_log"], arguments["a"], arguments["b"], arguments["dt_bias"])
    return g.view(*lead, -1), beta.view(*lead, -1)


def onnxruntime_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call | None:
    """`com.microsoft.LinearAttention` of onnxruntime on the same tensors; None where it has no counterpart.

    It computes in fp32, for dense batches, from q and k that are normalized already: that is done before the clock starts. It
    runs on threads of its own, as many as torch has.

    Raises
    ------
    TvmGdnError
        onnx or onnxruntime is not installed.
    """
    dense = arguments.get("cu_seqlens") is None and not arguments.get("state_v_first")
    if spec.algorithm != "chunk" or not dense or "initial_state" not in arguments or arguments["q"].dtype != torch.float32:
        return None
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        raise TvmGdnError(f"--peers needs onnxruntime ({error}): pip install onnx onnxruntime") from error
    q, k, v, beta = (arguments[name] for name in ("q", "k", "v", "beta"))
    g = arguments.get("g")
    if arguments["use_qk_l2norm_in_kernel"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    values = {"q": q, "k": k, "v": v, "state": arguments.get("initial_state"), "g": g, "beta": beta}
    feeds = {n: (x if n == "state" else x.flatten(2)).contiguous().numpy() for n, x in values.items() if x is not None}
    node = helper.make_node(
        "LinearAttention", [name if name in feeds else "" for name in values], ["o", "final"], domain="com.microsoft",
        q_num_heads=q.shape[2], kv_num_heads=v.shape[2], update_rule="delta" if g is None else "gated_delta",
        scale=arguments["scale"] or q.shape[-1] ** -0.5,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("o", "final")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "peer", inputs, outputs), opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle threads would otherwise spin on the cores of the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = v.shape

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        o, final = session.run(None, feeds)
        return torch.from_numpy(o).view(shape), torch.from_numpy(final)

    return call


#: Others that compute the same, for `tvm_gdn bench --peers`.
PEERS: dict[str, Callable[[OpSpec, Mapping[str, Any]], Call | None]] = {
    "torch_compile": compiled_call,
    "transformers": transformers_call,
    "onnxruntime": onnxruntime_call,
}
