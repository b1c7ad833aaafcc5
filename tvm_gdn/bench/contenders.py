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
from tvm_gdn.bench import onnx_peers, peers
from tvm_gdn.check import geometry_of, scalar_value
from tvm_gdn.spec import OpSpec, Scalar

Call = Callable[[], object]

#: Transformers' functions of the delta rule, by algorithm.
_RECURRENCES = {"recurrent": "torch_recurrent_gated_delta_rule", "chunk": "torch_chunk_gated_delta_rule"}


def steady(spec: OpSpec, case: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Arguments of a case on which thousands of calls stay in the range that models have."""
    return settled(spec, cases.draw(spec, case, device=device))


def settled(spec: OpSpec, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of one call, changed so that thousands of calls on them stay in that range."""
    if spec.steady is not None and any(tensor.mutated for tensor in spec.tensors):
        spec.steady(arguments)
    return arguments


def public_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call:
    """The package's public function, called as a user would: by position, defaults left out.

    An operator that public functions lead to for some of their arguments (pools, packed weights) has none of its own name.
    """
    import tvm_gdn

    function = getattr(tvm_gdn, spec.name, None)
    if function is None:
        return operator_call(spec, arguments)
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
    return functools.partial(torch_ops.allocation_function(spec, device_of(arguments)), *arguments.values())


def reference_call(spec: OpSpec, arguments: Mapping[str, Any]) -> Call:
    """The torch-native reference in the tensors' own precision."""
    return functools.partial(getattr(reference, spec.name), **spec.for_reference(arguments))


def copy_call(moved: int, device: str = "cpu") -> Call:
    """What torch does with as many bytes, half of them read, half of them written."""
    source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    if device == "cpu":
        return functools.partial(target.copy_, source)
    # A copy in a captured graph may become the copy engine's, two thirds as fast as a kernel (H200, 1 GB).
    return functools.partial(torch.neg, source, out=target)


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
    found = _plain(spec, arguments)
    if found is None or "g" not in found:
        return None
    # Without its wrapper, which would hand the call to another package where one is installed.
    function = inspect.unwrap(getattr(peers.modeling(), _RECURRENCES[spec.algorithm]))
    q, k, v = (found[name] for name in "qkv")
    # The layer repeats q and k to the value heads; some versions of the recurrence do it themselves where they have to.
    q, k = (x.repeat_interleave(v.shape[-2] // q.shape[-2], dim=-2) for x in (q, k))
    return functools.partial(
        function,
        q,
        k,
        v,
        found["g"],
        found["beta"],
        initial_state=found["state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=arguments["use_qk_l2norm_in_kernel"],
    )


def _plain(spec: OpSpec, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Separate q, k, v, gates and one state per sequence, as peers take them; None where it is another rule or layout.

    Without a gate there is no ``g``.
    """
    packs = arguments.get("cu_seqlens") is not None or arguments.get("state_v_first")
    if spec.algorithm not in _RECURRENCES or "kda" in spec.name or packs:
        return None
    pool = arguments.get("initial_state_source")
    if pool is None:
        state = arguments.get("initial_state")
    else:
        slots = arguments.get("initial_state_indices")
        state = pool if slots is None else pool[slots.clamp_min(0)]
    q, k, v = (arguments[name] for name in "qkv") if "q" in arguments else _unpacked(arguments)
    found = {"q": q, "k": k, "v": v, "state": state}
    if "a" in arguments:
        return found | dict(zip(("g", "beta"), _gates(arguments, q.shape[:2]), strict=True))
    return found | {name: arguments[name] for name in ("g", "beta") if name in arguments}


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
    """`com.microsoft.LinearAttention` or `CausalConvWithState` on the same tensors; None where there is no counterpart.

    They compute in fp32, for dense batches; q and k are normalized, gates computed and slots looked up before the clock starts.

    Raises
    ------
    TvmGdnError
        onnx or onnxruntime is not installed.
    """
    if spec.algorithm == "conv":
        return _onnx_conv(arguments)
    found = _plain(spec, arguments)
    if found is None or found["q"].dtype != torch.float32:
        return None
    q, k = found["q"], found["k"]
    if arguments["use_qk_l2norm_in_kernel"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    values = {"q": q, "k": k, "v": found["v"], "state": found["state"], "g": found.get("g"), "beta": found["beta"]}
    scale = arguments.get("scale") or q.shape[-1] ** -0.5
    return onnx_peers.linear_attention(values, (q.shape[2], found["v"].shape[2]), scale)


def _onnx_conv(arguments: Mapping[str, Any]) -> Call | None:
    x, weight, bias, activation = (arguments[name] for name in ("x", "weight", "bias", "activation"))
    if x.dtype != torch.float32 or arguments.get("query_start_loc") is not None or arguments.get("conv_states") is not None:
        return None
    state = arguments.get("conv_state")
    if state is None:
        return onnx_peers.causal_conv(x if x.ndim == 3 else x.unsqueeze(0), weight, bias, None, activation)
    slots = arguments["conv_state_indices"]
    state = (state if slots is None else state[slots.clamp_min(0)])[..., 1 - weight.shape[1] :]
    call = onnx_peers.causal_conv(x if x.ndim == 3 else x.unsqueeze(-1), weight, bias, state, activation)
    return lambda: call().view(x.shape)


#: Others that compute the same, for `tvm_gdn bench --peers`.
PEERS: dict[str, Callable[[OpSpec, Mapping[str, Any]], Call | None]] = {
    "torch_compile": compiled_call,
    "transformers": transformers_call,
    "onnxruntime": onnxruntime_call,
}
