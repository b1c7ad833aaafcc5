"""Delta rule and convolution of a Qwen3-Next layer: this package and `contenders.PEERS`. Errors are RMS ratios to float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from tvm_gdn import cases, parity, reference
from tvm_gdn.bench import contenders, side_by_side
from tvm_gdn.bench.side_by_side import Contender, Report
from tvm_gdn.check import geometry_of
from tvm_gdn.ops import OPS
from tvm_gdn.spec import OpSpec

Case = dict[str, Any]
_HEADS = {"H": 16, "K": 128, "V": 128, "use_qk_l2norm_in_kernel": True}
#: Peers that take part; the others of `contenders.PEERS` compile for minutes.
PEERS = ("transformers", "onnxruntime")
PREFILL, DECODE, CONV, CONV_UPDATE = (
    "chunk_gated_delta_rule", "packed_decode_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update",
)  # fmt: skip


def prefill(tokens: int, heads: int, dtype: str) -> tuple[str, Case]:
    """Operator and case of a prefill of one sequence."""
    return PREFILL, {
        "B": 1,
        "T": tokens,
        "HV": heads,
        **_HEADS,
        "output_final_state": True,
        "with": ("initial_state",),
        "dtype": dtype,
    }


def decode(batch: int, dtype: str) -> tuple[str, Case]:
    """Operator and case of a decode step, fp32 states."""
    pool = ("initial_state_source", "initial_state_indices")
    return DECODE, {"B": batch, "S": batch, "HV": 32, **_HEADS, "state_dtype": "float32", "with": pool, "dtype": dtype}


def conv(batch: int, tokens: int, dtype: str) -> tuple[str, Case]:
    """Operator and case of the convolution before the delta rule; one token: its decode step."""
    size = {"D": 8192, "W": 4, "B": batch, "T": tokens, "activation": "silu", "dtype": dtype, "state_dtype": dtype}
    if tokens == 1:
        return CONV_UPDATE, {**size, "S": batch, "with": ("conv_state_indices",)}
    return CONV, {**size, "with": ()}


def measure(
    work: str, op: str, case: Case, report: Report, *, peers: Collection[str] = PEERS, **options: Any
) -> list[dict[str, Any]]:
    """Rows of one case.

    Parameters
    ----------
    work : str
        Name of the work.
    op, case
        As `prefill`, `decode`, `conv` give them.
    report : Report
        Told who is missing.
    peers : collection of str
        Others that take part, of `PEERS`.
    **options
        As in `side_by_side.measure`.
    """
    spec = OPS[op]
    drawn = cases.draw(spec, case)
    inputs = contenders.steady(spec, case)
    moved, flops = spec.cost(cases.sizes_of(spec, case), geometry_of(spec, inputs)) if spec.cost else (0, 0)
    check = _checker(spec, drawn)
    peak = getattr(torch, case["dtype"])
    label = cases.label({name: value for name, value in case.items() if name not in _LEFT_OUT})
    ours = parity.run(spec, cases.clone(drawn))
    found = [
        Contender("tvm_gdn", "", contenders.public_call(spec, inputs), check(next(iter(ours.values()))), moved, flops, peak, True)
    ]
    for name in PEERS:
        if name not in peers:
            continue
        try:
            call, once = contenders.PEERS[name](spec, inputs), contenders.PEERS[name](spec, cases.clone(drawn))
            got: Any = once() if once else None
        except Exception as error:
            report.missing[f"{name}, {op}"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if call is None or got is None:
            report.missing[f"{name}, {op} {case['dtype']}"] = "has no counterpart for this dtype on CPUs"
            continue
        found.append(Contender(name, "", call, check(got[0] if isinstance(got, tuple) else got), moved, flops, peak))
    return side_by_side.measure(found, work, label, copied=max(1, moved), **options)


_LEFT_OUT = {"S", "K", "V", "use_qk_l2norm_in_kernel", "output_final_state", "with", "state_dtype", "activation", "W"}


def _checker(spec: OpSpec, drawn: Mapping[str, Any]) -> Callable[[Any], float]:
    """Error of an output. Of a prefill the value heads of the first q/k head are checked: heads do not know each other."""
    if spec.name != PREFILL:
        want = next(iter(parity.expected(spec, drawn).values()))
        return lambda out: parity.rms_ratio(out.view(want.shape), want)
    share = drawn["v"].shape[2] // drawn["q"].shape[2]
    part = {name: drawn[name][:, :, :1] for name in "qk"} | {name: drawn[name][:, :, :share] for name in ("v", "g", "beta")}
    state = drawn["initial_state"][:, :share]
    o, _ = reference.chunk_gated_delta_rule(**spec.for_reference({**drawn, **part, "initial_state": state}), exact=True)
    return lambda out: parity.rms_ratio(out[:, :, :share], o)
