"""Times the experts next to torch's grouped_mm and SGLang's fused_moe on a CUDA device.

    python tools/device_experts.py OUT.json [--models qwen3-next qwen3-moe] [--tokens 1 16 128] [--schemes bf16 int8 int4]

Captured graphs and eager calls, in interleaved rounds of one process, each contender's error to the float64 reference beside its
time, and the floor: bytes of the touched weights at a copy's bandwidth, or the products at the device's peak (``--tflops``). Few
tokens take turns through several routings, so that weights come from memory. Peers that are not installed, or fail, are named
with the reason; of SGLang there are two, its `fused_experts_impl` and its Triton kernels alone, which need less of its package.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import dispatch, reference
from tvm_gdn.bench import contenders, device, layers, machine
from tvm_gdn.bench.side_by_side import InTurn
from tvm_gdn.bench.timing import ratio
from tvm_gdn.packed_experts import STEP

SECONDS = 0.3
#: Tokens whose outputs are compared with the reference, and tokens up to which the routing changes from call to call.
CHECKED, FEW = 16, 16
SGLANG = ("sglang.srt.layers.moe.fused_moe_triton.fused_moe", "sglang.kernels.ops.moe.fused_moe_triton.fused_moe")
SGLANG_KERNELS = "sglang.kernels.ops.moe.fused_moe_triton_kernels"
Run = Callable[..., torch.Tensor]


def raw(w13: torch.Tensor, w2: torch.Tensor) -> Run:
    """Ours, on the weights as they are."""
    return lambda x, share, ids: tvm_gdn.fused_experts(x, w13, w2, share, ids)


def packed(scheme: str, w13: torch.Tensor, w2: torch.Tensor) -> Run:
    """Ours, on packed weights."""
    pack = tvm_gdn.pack_experts(w13.cpu(), w2.cpu(), scheme)
    pack = replace(pack, **{name: tensor.to(w13.device) for name, tensor in pack.tensors().items() if tensor is not None})
    return lambda x, share, ids: tvm_gdn.fused_experts(x, pack, topk_weights=share, topk_ids=ids)


def grouped_mm(w13: torch.Tensor, w2: torch.Tensor) -> Run:
    """Torch's grouped product of sorted rows, offsets on the device."""
    experts, inner = w13.shape[0], w2.shape[2]
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def run(x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order = ids.flatten().argsort()
        counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, ids.flatten().long(), torch.ones_like(ids.flatten(), dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = order // ids.shape[1]
        both = product(x[rows], w13.transpose(1, 2), offs=ends)
        hidden = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
        out = product(hidden, w2.transpose(1, 2), offs=ends)
        back = torch.empty_like(out)
        back[order] = out
        return (back.view(*ids.shape, -1).float() * share[..., None]).sum(1).to(x.dtype)

    return run


def sglang(w13: torch.Tensor, w2: torch.Tensor) -> Run:
    """SGLang's Triton kernels."""
    errors = []
    for name in SGLANG:
        try:
            function = importlib.import_module(name).fused_experts_impl
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
            continue
        return lambda x, share, ids: function(x, w13, w2, share, ids, inplace=False, activation="silu")
    raise RuntimeError("; ".join(errors))


def sglang_kernels(file: Path | None, w13: torch.Tensor, w2: torch.Tensor) -> Run:
    """The same where only SGLang's files of Triton kernels are importable: its four launches, rows aligned before they are timed.

    Its own alignment is CUDA code of its package; here torch makes it, once per routing. Tiles are those of one of its
    configuration files, by the nearest number of tokens, or its defaults for 16-bit weights.
    """
    import triton.language as tl

    kernels = importlib.import_module(SGLANG_KERNELS)
    experts, inner = w13.shape[0], w2.shape[2]
    tuned = {int(tokens): tiles for tokens, tiles in json.loads(file.read_text(encoding="utf-8")).items()} if file else {}
    aligned: dict[int, tuple[torch.Tensor, ...]] = {}

    def align(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
        """Pairs of each expert side by side, padded to whole blocks; every block's expert; how many rows there are."""
        counts = ids.flatten().bincount(minlength=experts)
        blocks = -(-counts // block)
        starts, total = (blocks.cumsum(0) - blocks) * block, int(blocks.sum()) * block
        order = ids.flatten().argsort(stable=True)
        owners = ids.flatten()[order].long()
        rank = torch.arange(len(order), device=ids.device) - (counts.cumsum(0) - counts)[owners]
        rows = torch.full((total,), ids.numel(), dtype=torch.int32, device=ids.device)
        rows[starts[owners] + rank] = order.int()
        owner = torch.arange(experts, dtype=torch.int32, device=ids.device).repeat_interleave(blocks)
        return rows, owner, torch.tensor([total], dtype=torch.int32, device=ids.device)

    def run(x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
        tiles = dict(zip(names, (16, 32, 64, 1) if len(ids) <= experts else (64, 64, 32, 8), strict=True))
        if tuned:
            tiles = dict(tuned[min(tuned, key=lambda tokens: abs(tokens - len(ids)))])
        if ids.data_ptr() not in aligned:
            aligned[ids.data_ptr()] = (*align(ids, tiles["BLOCK_SIZE_M"]), ids)  # kept: no other ids get this address
        rows, owner, total, _ = aligned[ids.data_ptr()]
        pairs, width = ids.numel(), w2.shape[1]
        both, hidden, parts = (x.new_empty(shape) for shape in ((pairs, 2 * inner), (pairs, inner), (*ids.shape, width)))
        out = torch.empty_like(x)
        options = {
            "compute_type": tl.bfloat16, "use_fp8_w8a8": False, "use_int8_w8a8": False, "use_int8_w8a16": False,
            "use_int4_w4a16": False, "per_channel_quant": False, "block_shape": None, "filter_expert": False,
        }  # fmt: skip
        none = (None, None, None)
        launch = kernels.invoke_fused_moe_kernel
        launch(x, w13, None, both, *none, share, ids, rows, owner, total, False, ids.shape[1], tiles, **options)
        kernels.act_and_mul_triton(both, hidden, tiles)
        launch(hidden, w2, None, parts, *none, share, ids, rows, owner, total, True, 1, tiles, **options)
        kernels.moe_sum_reduce_triton(parts, out, 1.0)
        return out

    return run


CONTENDERS = {"tvm_gdn": raw, "grouped_mm": grouped_mm, "sglang": sglang}


def measure(
    model: str, tokens: int, weights: Any, runs: Mapping[str, Run], missing: Mapping[str, str], tflops: float
) -> dict[str, Any]:
    """One row: errors, then times."""
    sizes = layers.MODELS[model]
    drawn = [tuple(tensor.cuda() for tensor in layers.routing(sizes, tokens, seed)) for seed in range(8 if tokens <= FEW else 1)]
    x, share, ids = (tensor[:CHECKED] for tensor in drawn[0])
    used, local = ids.unique(return_inverse=True)
    chosen = (x, weights[0][used], weights[1][used], share, local.view(ids.shape))
    want = reference.fused_experts(*(tensor.cpu() for tensor in chosen), exact=True).cuda()
    errors, notes, calls = {}, dict(missing), {}
    for name, run in runs.items():
        try:
            out = run(*drawn[0])[:CHECKED].double()
            for routing in drawn[1:]:
                run(*routing)
            errors[name] = float((out - want).square().mean().sqrt() / want.square().mean().sqrt())
            calls[name] = InTurn([lambda run=run, routing=routing: run(*routing) for routing in drawn])
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    touched = sum(int(ids.unique().numel()) for _, _, ids in drawn) / len(drawn)
    moved = int(touched * (weights[0][0].nbytes + weights[1][0].nbytes) + 2 * drawn[0][0].nbytes)
    flops = 6 * tokens * sizes["k"] * sizes["D"] * sizes["I"]
    calls["copy"] = contenders.copy_call(min(moved, 8 << 30), "cuda")
    times, refused = device.graphs(calls, SECONDS)
    eager = device.eager({name: call for name, call in calls.items() if name != "copy"}, SECONDS)
    copied = min(moved, 8 << 30) / times["copy"].us
    row = {
        "model": model, "tokens": tokens, "touched": touched, "bytes": moved, "flops": flops, "errors": errors,
        "served_by": dispatch.served_by("fused_experts"), "notes": {**notes, **refused},
        "floor_us": {"memory": moved / copied, "products": flops / tflops / 1e6},
        "graph_us": {name: timing.to_json() for name, timing in times.items()},
        "eager_us": {name: timing.to_json() for name, timing in eager.items()},
        "ours_over_peer": {name: ratio(times["tvm_gdn"], times[name]) for name in times if name != "tvm_gdn"},
    }  # fmt: skip
    text = "  ".join(
        f"{name} {times[name].us:.1f}" + (f" (eager {eager[name].us:.1f})" if name in eager else "") for name in times
    )
    print(f"{model} T={tokens} floor {max(row['floor_us'].values()):.1f}: {text}; {errors} {row['notes'] or ''}", flush=True)
    return row


def main() -> None:
    """Run what the arguments name and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["qwen3-next", "qwen3-moe"], choices=sorted(layers.MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--tflops", type=float, default=790.0, help="products' peak of the device, bf16")
    parser.add_argument("--schemes", nargs="*", default=["bf16"], choices=sorted(STEP), help="packs to time as well")
    parser.add_argument("--sglang-tiles", type=Path, help="a configuration file of SGLang's for the device and the one model")
    args = parser.parse_args()
    makers = CONTENDERS | {"sglang's kernels": partial(sglang_kernels, args.sglang_tiles)}
    makers |= {f"tvm_gdn {scheme}": partial(packed, scheme) for scheme in args.schemes}

    rows = []
    for model in args.models:
        sizes = layers.MODELS[model]
        weights = tuple(
            torch.randn(shape, dtype=torch.bfloat16, device="cuda") * shape[-1] ** -0.5
            for shape in ((sizes["E"], 2 * sizes["I"], sizes["D"]), (sizes["E"], sizes["D"], sizes["I"]))
        )
        first = tuple(tensor.cuda() for tensor in layers.routing(sizes, 1))

        def ready(make: Callable[..., Run], weights: tuple[torch.Tensor, ...] = weights, first: Any = first) -> Run | str:
            try:
                run = make(*weights)
                run(*first)
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:300]}"
            return run

        # Packing and first calls, of which each compiles its kernel in a process of its own, side by side.
        with ThreadPoolExecutor() as pool:
            made = dict(zip(makers, pool.map(ready, makers.values()), strict=True))
        runs = {name: run for name, run in made.items() if not isinstance(run, str)}
        missing = {name: why for name, why in made.items() if isinstance(why, str)}
        rows += [measure(model, tokens, weights, runs, missing, args.tflops) for tokens in args.tokens]
    found = {**machine.stamp(), "device": torch.cuda.get_device_name(), "rows": rows}
    args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
