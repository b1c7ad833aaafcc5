"""Layers of experts that are measured: sizes of published models, weights, routings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

#: Sizes of a layer. ``drawn``, where it is given: so many experts have numbers of their own, the others, in memory of their own,
#: repeat them; nothing that is timed can tell, and drawing and packing take that much less.
MODELS = {
    "qwen3-moe": {"D": 2048, "I": 768, "E": 128, "k": 8},
    "qwen3-next": {"D": 2048, "I": 512, "E": 512, "k": 10},
    "deepseek-v3": {"D": 7168, "I": 2048, "E": 256, "k": 8},
}
#: What the model suite of a neighbour measures. The pasts are keys and values of attention, which experts do not see.
SUITE = (
    ("prefill 64 (past 512)", 64),
    ("prefill 128 (past 0)", 128),
    ("prefill 256 (past 0)", 256),
    ("prefill 256 (past 256)", 256),
    ("decode of 16 requests", 16),
)
WARMUP, RUNS = 10, 100

Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weights(sizes: dict[str, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights ``[E, 2 I, D]`` and ``[E, D, I]``, experts side by side; the same numbers in every process."""
    w13 = torch.empty(sizes["E"], 2 * sizes["I"], sizes["D"], dtype=dtype)
    w2 = torch.empty(sizes["E"], sizes["D"], sizes["I"], dtype=dtype)

    def draw(number: int) -> None:
        rng = torch.Generator().manual_seed(number)
        for expert in (w13[number], w2[number]):
            expert.copy_(torch.randn(expert.shape, generator=rng) * expert.shape[-1] ** -0.5)

    drawn = sizes.get("drawn", sizes["E"])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(drawn)))
    for experts in (w13, w2):
        repeat(experts, drawn)
    return w13, w2


def repeat(experts: torch.Tensor, drawn: int) -> None:
    """Fill the experts behind the first `drawn` with the numbers of those."""
    for part in experts[drawn:].split(drawn):
        part.copy_(experts[: part.shape[0]])


def routing(sizes: dict[str, int], tokens: int, seed: int = 0) -> Routing:
    """Normal rows in bf16, and the choices that `moe_route` makes of normal logits: rows, weights, ids."""
    import tvm_gdn

    rng = torch.Generator().manual_seed(1000 * tokens + seed)
    x = torch.randn(tokens, sizes["D"], generator=rng).bfloat16()
    share, ids = tvm_gdn.moe_route(torch.randn(tokens, sizes["E"], generator=rng), sizes["k"])
    return x, share, ids
