"""Experts of one layer: this package's schemes, and whoever computes the same. Errors are mean|out - ref| / mean|ref|."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

import tvm_gdn
from tvm_gdn import large_pages, reference
from tvm_gdn.bench import kt_kernel, layers, machine, onnx_peers, side_by_side
from tvm_gdn.bench.layers import Routing
from tvm_gdn.bench.side_by_side import Contender, InTurn, Report
from tvm_gdn.errors import TvmGdnError

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Who else can take part.
PEERS = ("transformers", "onnxruntime", "kt-kernel")
#: Tokens whose outputs are compared with the float64 reference.
CHECKED = 4
#: Up to so many tokens the routing changes from call to call.
FEW = 16
#: batched_mm gathers the weights of every (token, choice) pair; more than so many bytes of them are not asked for.
GATHERED = 2 << 30
#: What a scheme's products multiply.
PEAK = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int8, "int4_kgroup": torch.int8}
#: Bits and block of the onnxruntime kernel that is compared with a scheme; 0 bits: MoE in fp32.
ONNX = {"fp32": (0, 0), "int8": (8, 128), "int4": (4, 0), "int4_kgroup": (4, 32)}


class Layer:
    """A layer's weights in every form that somebody needs, drawn and packed once for all cases.

    Parameters
    ----------
    sizes : dict
        As in `layers.MODELS`.
    schemes : sequence of str
        Schemes of `pack_experts`.
    peers : collection of str
        Others that take part, of `PEERS`.
    report : Report
        Told who is missing.
    builds : collection of str
        Builds of kt-kernel.
    kt_threads : collection of int
        Numbers of kt-kernel's threads, a contender each; default: as many as this process has, but one fewer than cores.
    kt_cores : sequence of int
        Cores of kt-kernel's threads, one more than threads; it binds them to the machine's first cores otherwise.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        schemes: Sequence[str],
        peers: Collection[str],
        report: Report,
        *,
        builds: Collection[str] = tuple(kt_kernel.KINDS),
        kt_threads: Collection[int] = (),
        kt_cores: Sequence[int] = (),
    ) -> None:
        self.sizes, self.report = sizes, report
        self.took: dict[str, tuple[int, float]] = {}
        self.runs: dict[str, tuple[str, Run, float]] = {}
        self.children: dict[str, kt_kernel.Layer] = {}
        # They load while this process packs.
        for build in builds if "kt-kernel" in peers else ():
            self._kt_kernel(build, [scheme for scheme in schemes if scheme in kt_kernel.KINDS[build]], kt_threads, kt_cores)
        self.w13, self.w2 = layers.weights(sizes, torch.bfloat16)
        plain = (self.w13.nbytes + self.w2.nbytes) / sizes["E"]
        for scheme in schemes:
            packed = self._pack(scheme)
            self.runs[f"tvm_gdn {scheme}"] = scheme, functools.partial(_packed, packed), packed.nbytes / sizes["E"]
        if "bf16" in schemes:
            self.runs["tvm_gdn raw bf16"] = "bf16", self._raw, plain
        if "bf16" in schemes and "transformers" in peers:
            self._transformers(plain)
        for scheme in schemes if "onnxruntime" in peers else ():
            self._onnxruntime(scheme)
        for name, child in list(self.children.items()):
            try:
                child.ready()
            except TvmGdnError as error:
                self._lose(name, error)

    def _pack(self, scheme: str) -> tvm_gdn.PackedExperts:
        drawn, experts = self.sizes.get("drawn", self.sizes["E"]), self.sizes["E"]
        # What has more digits than the drawn weights is packed from them all the same: fp32 products of bf16 numbers.
        w13, w2 = (w[:drawn].float() if scheme == "fp32" else w[:drawn] for w in (self.w13, self.w2))
        packed = tvm_gdn.pack_experts(w13, w2, scheme)
        if drawn == experts:
            return packed
        whole: dict[str, Any] = {}
        for name, part in packed.tensors().items():
            if part is not None:
                whole[name] = large_pages.empty((experts, *part.shape[1:]), part.dtype)
                whole[name][:drawn] = part
                layers.repeat(whole[name], drawn)
        return dataclasses.replace(packed, **whole)

    def _raw(self, x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return tvm_gdn.fused_experts(x, self.w13, self.w2, share, ids)

    def _transformers(self, plain: float) -> None:
        try:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        except ImportError as error:
            self.report.missing["transformers"] = f"not installed ({error}): pip install 'tvm_gdn[bench]'"
            return
        sizes = self.sizes
        with torch.device("meta"):
            config = Qwen3MoeConfig(hidden_size=sizes["D"], moe_intermediate_size=sizes["I"], num_experts=sizes["E"])
            module = Qwen3MoeExperts(config).eval()
        module.gate_up_proj = torch.nn.Parameter(self.w13, requires_grad=False)
        module.down_proj = torch.nn.Parameter(self.w2, requires_grad=False)
        for name in ("eager", "grouped_mm", "batched_mm"):
            self.runs[f"transformers {name}"] = "bf16", functools.partial(_module, module, name), plain

    def _onnxruntime(self, scheme: str) -> None:
        name = "onnxruntime MoE fp32" if scheme == "fp32" else f"onnxruntime QMoE {scheme}"
        if scheme not in ONNX:
            self.report.missing[f"onnxruntime {scheme}"] = "its MoE kernels take fp32, int8 and int4 on CPUs"
            return
        reason = onnx_peers.available()
        if reason:
            self.report.missing["onnxruntime"] = reason
            return
        bits, block = ONNX[scheme]
        each = self.w13[0].numel() + self.w2[0].numel()
        moved = each * (bits / 8 + (4 / block if block else 0)) if bits else 4 * each
        try:
            run = onnx_peers.experts(self.w13, self.w2, self.sizes["k"], bits, block)
        except Exception as error:
            self.report.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return
        self.runs[name] = scheme, run, moved

    def _kt_kernel(self, build: str, schemes: list[str], threads: Collection[int], cores: Sequence[int]) -> None:
        reason = kt_kernel.missing(build)
        if reason:
            self.report.missing[f"kt-kernel {build}"] = reason
            return
        spare = len(cores) or machine.cores()
        for count in (threads or [max(1, min(torch.get_num_threads(), spare - 1))]) if schemes else ():
            name = f"kt-kernel {build}" + (f" ({count} threads)" if threads else "")
            self.children[name] = kt_kernel.Layer(build, schemes, self.sizes, count, cores)

    def _lose(self, name: str, error: TvmGdnError) -> None:
        self.report.missing[name] = str(error)
        self.children.pop(name).close()

    def close(self) -> None:
        """End the children."""
        for child in self.children.values():
            child.close()

    def contenders(self, tokens: int, most: float = float("inf")) -> tuple[list[Contender], dict[str, Any]]:
        """Everybody on `tokens` tokens, checked, but peers that may take more than `most` seconds; the load of the experts."""
        drawn = [layers.routing(self.sizes, tokens, seed) for seed in range(4 if tokens <= FEW else 1)]
        loads = [tvm_gdn.expert_stats(ids, self.sizes["E"]) for _, _, ids in drawn]
        touched = sum(int((counts > 0).sum()) for counts, _, _ in loads) / len(loads)
        flops = 6.0 * tokens * self.sizes["k"] * self.sizes["D"] * self.sizes["I"]
        expected = self._expected(drawn[0])
        found = []

        def slow(name: str) -> bool:
            before, ms = self.took.get(name, (tokens, 0.0))
            estimate = ms / 1e3 * max(1.0, tokens / before)
            if estimate > most:
                self.report.missing[f"{name}, T {tokens}"] = (
                    f"left out: took {ms:.0f} ms at T {before}, so up to {estimate:.1f} s a call"
                )
            return estimate > most

        def add(name: str, scheme: str, calls: Sequence[Callable[[], object]], each: float) -> None:
            error = _error(calls[0](), expected)
            ours = name == f"tvm_gdn {scheme}"
            found.append(Contender(name, scheme, InTurn(calls), error, touched * each, flops, PEAK[scheme], ours))

        for name, (scheme, run, each) in self.runs.items():
            if name == "transformers batched_mm" and tokens * self.sizes["k"] * each > GATHERED:
                self.report.missing[f"{name}, T {tokens}"] = (
                    f"gathers {tokens * self.sizes['k'] * each / 2**30:.0f} GiB of weights"
                )
                continue
            if not name.startswith("tvm_gdn") and slow(name):
                continue
            x_of = torch.Tensor.float if scheme == "fp32" or name.startswith("onnxruntime") else torch.Tensor.bfloat16
            add(name, scheme, [functools.partial(run, x_of(x), share, ids) for x, share, ids in drawn], each)
        each_of = {scheme: each for scheme, _, each in self.runs.values()}
        for name, child in list(self.children.items()):
            for scheme in child.schemes:
                if slow(f"{name} {scheme}"):
                    continue
                try:
                    # Its layouts hold as many bytes as ours, but for scales.
                    add(f"{name} {scheme}", scheme, [kt_kernel.Call(child, scheme, drawn)], each_of[scheme])
                except TvmGdnError as error:
                    self._lose(name, error)
                    break
        counts, imbalance, entropy = loads[0]
        return found, {
            "tokens": tokens, "touched_experts": touched, "imbalance": imbalance.item(), "entropy": entropy.item(),
            "tokens_per_expert": counts.tolist(),
        }  # fmt: skip

    def _expected(self, routing: Routing) -> torch.Tensor:
        x, share, ids = (value[:CHECKED] for value in routing)
        used, local = ids.unique(return_inverse=True)
        weights = self.w13[used.long()], self.w2[used.long()]
        return reference.fused_experts(x, *weights, share, local.view(ids.shape), exact=True)

    def measure(self, tokens: int, case: str, **options: Any) -> list[dict[str, Any]]:
        """Rows of one case; options as in `side_by_side.measure`."""
        found, facts = self.contenders(tokens, options.get("most", float("inf")))
        rows = side_by_side.measure(found, "experts", case, facts=facts, **options)
        for row in rows:
            row["tokens_per_s"] = 1e3 * tokens / row["ms"]["median"]
            self.took[row["contender"]] = tokens, row["ms"]["median"]
        return rows


def _packed(pack: Any, x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = tvm_gdn.fused_experts(x, pack, topk_weights=share, topk_ids=ids)
    return out


def _module(module: Any, name: str, x: torch.Tensor, share: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    module.config._experts_implementation_internal = name
    out: torch.Tensor = module(x, ids.long(), share.to(x.dtype))
    return out


def _error(out: Any, expected: torch.Tensor) -> float:
    out = out[:CHECKED].double()
    return float((out - expected).abs().mean() / expected.abs().mean())
