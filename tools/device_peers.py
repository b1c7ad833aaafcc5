"""Times this package next to kernels of others on a CUDA device: SGLang's packed decode, flash-linear-attention, torch.

    python tools/device_peers.py OUT.json [decode] [update] [fused] [prefill] [kda] [conv] [norm]

Captured graphs and eager calls, in interleaved rounds of one process, each contender's error to the float64 reference beside its
time. Peers that are not installed, or that fail, are named with the reason. Qwen3-Next's heads: H 16, HV 32, K = V = 128.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import cases, dispatch, kernel_cache, parity
from tvm_gdn.bench import contenders, machine
from tvm_gdn.bench import device as bench_device
from tvm_gdn.bench.timing import ratio
from tvm_gdn.check import geometry_of
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.ops import OPS
from tvm_gdn.target import resolve

SECONDS = 0.3
#: Seconds of a first call, mostly a peer's autotuning, from which on it is told.
LONG = 2.0
HEADS = {"H": 16, "HV": 32, "K": 128, "V": 128, "dtype": "bfloat16"}
POOL = ("initial_state_source", "initial_state_indices")
Peer = Callable[[Mapping[str, Any]], Callable[[], Any]]


def sglang_packed(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """SGLang's packed decode; it keeps states V-first."""
    from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule_packed_decode as function

    pool = arguments["initial_state_source"].transpose(-1, -2).contiguous()
    B, HV, V = arguments["a"].shape[0], arguments["A_log"].shape[0], pool.shape[-2]
    out = arguments["mixed_qkv"].new_empty(B, 1, HV, V)
    names = ("mixed_qkv", "a", "b", "A_log", "dt_bias")

    def call() -> torch.Tensor:
        return function(
            *(arguments[name] for name in names), pool.shape[-1] ** -0.5, pool, out,
            arguments["initial_state_indices"], use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    return call


def sglang_update(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """SGLang's steps on a pool, whose states are V-first; gates are given."""
    from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule_update as function

    a = arguments
    pool = a["initial_state_source"].transpose(-1, -2).contiguous()
    call = torch.no_grad()(function)
    return lambda: call(
        *(a[name] for name in ("q", "k", "v", "g", "beta")), pool.shape[-1] ** -0.5, pool, a["initial_state_indices"],
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def _fla_chunks(function: Callable[..., Any], a: Mapping[str, Any]) -> Callable[[], Any]:
    call = torch.no_grad()(function)
    return lambda: call(
        a["q"], a["k"], a["v"], a["g"], a["beta"], initial_state=a["initial_state"], output_final_state=True,
        use_qk_l2norm_in_kernel=a["use_qk_l2norm_in_kernel"],
    )  # fmt: skip


def fla_chunk(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Flash-linear-attention's chunked form."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _fla_chunks(chunk_gated_delta_rule, arguments)


def fla_kda(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The same with a gate per channel; its gates are given, as ours are."""
    from fla.ops.kda import chunk_kda

    return _fla_chunks(chunk_kda, arguments)


def fla_conv(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Flash-linear-attention's convolution of whole sequences, channels innermost."""
    from fla.modules.causal_conv1d import causal_conv1d as function

    a = arguments
    call = torch.no_grad()(function)
    return lambda: call(a["x"].transpose(1, 2), a["weight"], activation=a["activation"])[0].transpose(1, 2)


def fla_conv_update(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Flash-linear-attention's convolution of one token; its states hold the token too."""
    from fla.modules.causal_conv1d import causal_conv1d_update as function

    a = arguments
    x, slots = a["x"].squeeze(2), a["conv_state_indices"].long()
    cache = torch.nn.functional.pad(a["conv_state"][slots], (1, 0)).contiguous()
    call = torch.no_grad()(function)
    return lambda: call(x, cache, weight=a["weight"], activation=a["activation"])[0].unsqueeze(2)


def sglang_conv(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """SGLang's convolution of packed sequences on a pool of states; lengths are known to the host."""
    from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_fn as function

    a = arguments
    bounds, slots = (a[name].int() for name in ("query_start_loc", "cache_indices"))
    lengths = bounds.diff().tolist()
    return lambda: function(
        a["x"], a["weight"], None, a["conv_states"], bounds, lengths, slots, a["has_initial_state"], a["activation"]
    )


def sglang_conv_update(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """SGLang's convolution of one token on a pool of states."""
    from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_update as function

    a = arguments
    slots = a["conv_state_indices"].int()
    return lambda: function(a["x"], a["conv_state"], a["weight"], None, a["activation"], conv_state_indices=slots)


def separate_steps(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The two operators that the fused step is made of."""
    a = arguments

    def call() -> torch.Tensor:
        row = tvm_gdn.causal_conv1d_update(
            a["mixed_qkv"], a["conv_state"], a["conv_weight"], None, a["activation"], a["conv_state_indices"]
        )
        return tvm_gdn.packed_decode_gated_delta_rule(
            row, *(a[name] for name in ("a", "b", "A_log", "dt_bias", *POOL)),
            use_qk_l2norm_in_kernel=a["use_qk_l2norm_in_kernel"],
        )  # fmt: skip

    return call


def torch_conv(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Torch's own: a grouped convolution and SiLU."""
    x, weight = arguments["x"], arguments["weight"]
    D, W = weight.shape
    call = torch.no_grad()(torch.nn.functional.conv1d)
    return lambda: torch.nn.functional.silu(call(x, weight[:, None], padding=W - 1, groups=D)[..., : x.shape[2]])


def fla_norm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Flash-linear-attention's gated norm."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated as function

    a = arguments
    call = torch.no_grad()(function)
    return lambda: call(a["x"], a["z"], a["weight"], None, activation="swish", eps=a["eps"])


def compare(
    op: str, case: Mapping[str, Any], peers: Mapping[str, Callable[..., Any]], check: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One shape: errors (on the shape `check` where the reference would take too long), then times."""
    spec = OPS[op]
    notes: dict[str, str] = {}
    small = cases.draw(spec, check or case)
    want = next(iter(parity.expected(spec, small).values()))
    on_device = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in cases.clone(small).items()}
    errors = {}
    for name, make in peers.items():
        try:
            begun = time.perf_counter()
            got = make(cases.clone(on_device))()
            errors[name] = parity.rms_ratio(got[0] if isinstance(got, tuple) else got, want)
            if time.perf_counter() - begun > LONG:
                notes[name] = f"the first call took {time.perf_counter() - begun:.0f} s"
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    result = parity.run(spec, cases.clone(on_device))
    errors["tvm_gdn"] = parity.rms_ratio(next(iter(result.values())), want)
    inputs = contenders.steady(spec, case, "cuda")
    geometry = geometry_of(spec, inputs)
    moved, flops = spec.cost(cases.sizes_of(spec, case), geometry) if spec.cost else (0, 0)
    calls: dict[str, Callable[[], Any]] = {"tvm_gdn": contenders.public_call(spec, inputs)}
    calls |= {name: make(inputs) for name, make in peers.items() if name in errors}
    if moved:
        calls["copy"] = contenders.copy_call(moved, "cuda")
    times, refused = bench_device.graphs(calls, SECONDS)
    eager = bench_device.eager({name: call for name, call in calls.items() if name != "copy"}, SECONDS)
    row = {
        "op": op, "case": cases.label(case), "served_by": dispatch.served_by(op, geometry, "cuda"), "errors": errors,
        "notes": {**notes, **refused}, "bytes": moved, "flops": flops,
        "graph_us": {name: timing.to_json() for name, timing in times.items()},
        "eager_us": {name: timing.to_json() for name, timing in eager.items()},
        "ours_over_peer": {name: ratio(times["tvm_gdn"], times[name]) for name in times if name not in {"tvm_gdn"}},
    }  # fmt: skip
    text = "  ".join(
        f"{name} {times[name].us:.1f}" + (f" (eager {eager[name].us:.1f})" if name in eager else "") for name in times
    )
    print(f"{op} {row['case']}: {text}; errors { ({k: f'{v:.1e}' for k, v in errors.items()}) } {row['notes'] or ''}", flush=True)
    return row


def wanted_rows(modes: Collection[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, Peer], dict[str, Any] | None]]:
    """Operator, shape, peers and shape for the errors of every row."""
    few = lambda case: {**case, "B": min(case["B"], 8), "S": min(case["S"], 8)}  # noqa: E731
    states = ("float32", "bfloat16")
    step = {**HEADS, "use_qk_l2norm_in_kernel": True}
    if "decode" in modes:
        for state, batch in product(states, (1, 8, 32, 128, 256)):
            case = {**step, "B": batch, "S": batch, "state_dtype": state, "with": POOL}
            yield "packed_decode_gated_delta_rule", case, {"sglang": sglang_packed}, few(case)
    if "update" in modes:
        for state, batch in product(states, (1, 32, 256)):
            case = {**step, "B": batch, "T": 1, "S": batch, "state_dtype": state, "with": POOL}
            yield "fused_recurrent_gated_delta_rule_update", case, {"sglang": sglang_update}, few(case)
    if "fused" in modes:
        for state, batch in product(states, (1, 8, 32, 256)):
            case = {**step, "W": 4, "B": batch, "S": batch, "SC": batch, "state_dtype": state, "conv_state_dtype": "bfloat16"}
            case["with"] = ("conv_state_indices", "initial_state_indices")
            yield "fused_conv_gated_delta_rule_update", case, {"separate": separate_steps}, {**few(case), "SC": min(batch, 8)}
    rules = {"prefill": ("chunk_gated_delta_rule", fla_chunk), "kda": ("chunk_kda", fla_kda)}
    for mode, tokens in product(rules.keys() & modes, (1024, 8192, 32768)):
        op, peer = rules[mode]
        case = {**step, "B": 1, "T": tokens, "state_dtype": "float32", "with": ("initial_state",), "output_final_state": True}
        yield op, case, {"fla": peer}, {**case, "T": 1000}
    if "conv" in modes:
        conv = {"D": 8192, "W": 4, "dtype": "bfloat16", "state_dtype": "bfloat16", "activation": "silu"}
        for batch in (1, 8, 32, 128, 256):
            case = {**conv, "B": batch, "T": 1, "S": batch, "with": ("conv_state_indices",)}
            yield "causal_conv1d_update", case, {"fla": fla_conv_update, "sglang": sglang_conv_update}, few(case)
        for tokens in (1024, 8192):
            case = {**conv, "B": 1, "T": tokens, "with": ()}
            yield "causal_conv1d_fn", case, {"fla": fla_conv, "torch": torch_conv}, {**case, "T": 100}
        packed = {**conv, "with": ("conv_states", "query_start_loc", "cache_indices", "has_initial_state")}
        case = {**packed, "lengths": (4000, 1, 2500, 1200, 491)}
        yield "causal_conv1d_fn", case, {"sglang": sglang_conv}, {**packed, "lengths": (40, 1, 30)}
    if "norm" in modes:
        for tokens in (1, 32, 256, 1024, 8192):
            case = {"M": tokens, "G": HEADS["HV"], "D": 128, "with": ("z",), "dtype": "bfloat16"}
            yield "rms_norm_gated", case, {"fla": fla_norm}, {**case, "M": min(tokens, 64)}


def main() -> None:
    """Run what the arguments name and write everything as JSON."""
    rows = list(wanted_rows(sys.argv[2:] or ["decode", "prefill"]))
    wanted = [(OPS[op], geometry_of_case(OPS[op], case)) for op, case, _, _ in rows]
    missing = kernel_cache.prebuild(wanted, resolve("cuda"))
    print("\n".join(missing) or "kernels are compiled", flush=True)
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(compare(*row))
        # What is there when time runs out is kept.
        text = json.dumps({**machine.stamp(), "device": torch.cuda.get_device_name(), "rows": found}, indent=1)
        Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
