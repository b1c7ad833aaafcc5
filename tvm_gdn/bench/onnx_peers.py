"""Contrib kernels of onnxruntime on tensors of this package: one node per session, weights handed over without a copy on disk.

Sessions run on threads of their own, as many as torch has. Idle, they would spin on the cores of the next contender: not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvm_gdn.errors import TvmGdnError

Feeds = Mapping[str, torch.Tensor]
#: Routing weights reach the node as logits of all experts; those that were not chosen get this.
UNCHOSEN = -1e4


def available() -> str:
    """Why the kernels cannot run here; empty if they can."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"not installed ({error}): pip install onnx onnxruntime"
    return ""


def session(
    op: str, feeds: Feeds, results: tuple[str, ...], order: tuple[str, ...] = (), weights: Feeds | None = None, **attributes: Any
) -> Callable[[Feeds], list[torch.Tensor]]:
    """A session of one ``com.microsoft`` node.

    Parameters
    ----------
    op : str
        The operator.
    feeds : mapping
        Inputs of a call by name, whose dtypes and ranks count; the sizes of the first axis may change from call to call.
    results : tuple of str
        Names of the outputs.
    order : tuple of str
        Inputs of the node in order, "" for one that is left out; default: as in `feeds`.
    weights : mapping, optional
        Inputs that never change; the node may lay them out anew.
    **attributes
        Of the node.

    Returns
    -------
    function
        Of feeds; returns the outputs. It keeps `weights` alive.

    Raises
    ------
    TvmGdnError
        onnx or onnxruntime is not installed.
    """
    reason = available()
    if reason:
        raise TvmGdnError(f"onnxruntime is {reason}")
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}
    arrays = {name: value.contiguous().numpy() for name, value in (weights or {}).items()}
    placeholders = []
    for name, value in (weights or {}).items():
        # Bytes of large weights do not fit in a protobuf: they are said to lie elsewhere, and then handed over.
        proto = TensorProto(name=name, data_type=kinds[value.dtype], dims=value.shape, data_location=TensorProto.EXTERNAL)
        proto.external_data.add(key="location", value="handed over")
        placeholders.append(proto)
    node = helper.make_node(op, list(order or feeds), list(results), domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info(n, kinds[x.dtype], [None, *x.shape[1:]]) for n, x in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "peer", inputs, outputs, initializer=placeholders)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    if arrays:
        options.add_external_initializers(list(arrays), values)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    runner = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return functools.partial(_run, runner, values)


def _run(runner: Any, weights: list[Any], given: Feeds) -> list[torch.Tensor]:
    del weights  # an argument so that they live as long as the session
    return [torch.from_numpy(out) for out in runner.run(None, {name: value.numpy() for name, value in given.items()})]


def linear_attention(
    values: Mapping[str, torch.Tensor | None], heads: tuple[int, int], scale: float
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """``LinearAttention``: `values` q, k, v, state, g, beta in this order, of four axes; None for one that is left out."""
    feeds = {n: (x if n == "state" else x.flatten(2)).contiguous() for n, x in values.items() if x is not None}
    v = values["v"]
    assert v is not None
    rule = "delta" if values["g"] is None else "gated_delta"
    order = tuple(name if name in feeds else "" for name in values)
    run = session(
        "LinearAttention",
        feeds,
        ("o", "final"),
        order,
        q_num_heads=heads[0],
        kv_num_heads=heads[1],
        update_rule=rule,
        scale=scale,
    )

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        o, final = run(feeds)
        return o.view(v.shape), final

    return call


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None, activation: str | None
) -> Callable[[], torch.Tensor]:
    """``CausalConvWithState`` on x ``[B, D, T]``, weight ``[D, W]``, state ``[B, D, W - 1]`` or None; it returns a new state."""
    feeds = {"x": x.contiguous(), "w": weight.unsqueeze(1).contiguous()}
    feeds |= {name: value.contiguous() for name, value in (("b", bias), ("s", state)) if value is not None}
    order = tuple(name if name in feeds else "" for name in "xwbs")
    run = session("CausalConvWithState", feeds, ("y", "present"), order, activation=activation or "none")
    return lambda: run(feeds)[0]


def quantize(weights: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[E, N, K]`` as ``QMoE`` reads them: integers with their middle added, low nibble first; scales per block of K."""
    middle = 1 << (bits - 1)
    experts, rows, columns = weights.shape
    numbers = torch.empty(experts, rows, columns * bits // 8, dtype=torch.uint8)
    scales = torch.empty(experts, rows, columns // (block or columns))
    for expert in range(experts):
        parts = weights[expert].float().view(rows, -1, block or columns)
        scale = parts.abs().amax(-1, keepdim=True) / (middle - 1)
        whole = (parts / scale).round().clamp(-middle, middle - 1).add(middle).to(torch.uint8).view(rows, columns)
        numbers[expert] = whole if bits == 8 else whole[:, 0::2] | (whole[:, 1::2] << 4)
        scales[expert] = scale.squeeze(-1)
    return numbers, scales if block else scales.squeeze(-1)


def experts(
    w13: torch.Tensor, w2: torch.Tensor, k: int, bits: int = 0, block: int = 0
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``MoE`` in fp32, or ``QMoE`` with weights of `bits`; of x, routing weights that sum to one, and ids.

    The node chooses the experts once more: it gets the logarithms of the routing weights as logits.
    """
    count, inner, D = w13.shape[0], w13.shape[1] // 2, w13.shape[2]
    # It wants rows of gate and up in turns.
    turns = torch.stack([w13[:, :inner], w13[:, inner:]], 2).view(count, 2 * inner, D)
    feeds = {"x": torch.empty(1, D), "r": torch.empty(1, count)}
    options: dict[str, Any] = {
        "k": k, "activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
    }  # fmt: skip
    if bits:
        (a, a_scale), (b, b_scale) = quantize(turns, bits, block), quantize(w2, bits, block)
        weights = {"w1": a, "s1": a_scale, "w2": b, "s2": b_scale}
        options |= {"expert_weight_bits": bits, **({"block_size": block, "accuracy_level": 4} if block else {})}
        run = session("QMoE", feeds, ("y",), ("x", "r", "w1", "s1", "", "w2", "s2"), weights, **options)
    else:
        run = session("MoE", feeds, ("y",), ("x", "r", "w1", "", "w2"), {"w1": turns.float(), "w2": w2.float()}, **options)

    def call(x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((x.shape[0], count), UNCHOSEN).scatter_(1, ids.long(), share.log())
        return run({"x": x.float(), "r": logits})[0]

    return call
