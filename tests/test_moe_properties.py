"""The experts over drawn tokens, experts, choices and sizes, all schemes; transformers' eager experts; layers of published models.

Hidden and inner sizes are part of a kernel, so the default run draws everything else on the geometries that other tests compile;
``--slow`` draws sizes too.
"""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_moe_experts import BF16, BOUND, LIMIT, SMALL, WIDE, as_int8, error, loop, make

import tvm_gdn
from tvm_gdn.bench.layers import MODELS
from tvm_gdn.packed_experts import GROUPS, STEP, pack_experts

#: Scheme (None: raw weights), dtype of the activations, D, I.
GEOMETRIES = [
    (None, torch.float32, 100, 40),
    (None, torch.bfloat16, 100, 40),
    ("bf16", torch.bfloat16, 100, 40),
    ("fp16", torch.float16, 100, 40),
    ("int8", torch.bfloat16, 256, 200),
    ("int4", torch.bfloat16, 256, 200),
    ("int4_kgroup", torch.bfloat16, 256, 200),
]
#: Of these, ids are int32 in every other example; the others are called with int64, as other tests call them.
BOTH_INDICES = {GEOMETRIES[0], GEOMETRIES[4]}
KERNELS = [
    ("fused_experts", {**SMALL, "dtype": "float32", "index_dtype": "int32"}),
    ("fused_experts_quantized", {**WIDE, **BF16, "scheme": "int8", "index_dtype": "int32"}),
]
#: The reference rounds rows to int8 as the kernel does, on the packed weights: what is left is bf16's rounding of outputs, and
#: elements of h that lie between two integers and went to the other one.
QUANTIZED = 5e-3


def options(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip


@st.composite
def routings(draw, most=80):
    """Tokens, experts, choices, and what the ids look like."""
    experts = draw(st.integers(1, 12))
    return {
        "tokens": draw(st.integers(0, most)), "experts": experts, "k": draw(st.integers(1, min(experts, 5))),
        "seed": draw(st.integers(0, 2**16)), "ids": draw(st.sampled_from(["distinct", "one", "padding", "mixed", "any"])),
    }  # fmt: skip


def ids_of(kind, tokens, experts, k, seed):
    """Ids as the routing kinds say; -1, E and beyond are padding."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "one":
        return torch.full((tokens, k), seed % experts)
    if kind == "padding":
        return torch.full((tokens, k), -1).where(torch.rand(tokens, k, generator=rng) < 0.5, experts)
    if kind == "distinct":
        return torch.rand(tokens, experts, generator=rng).argsort(-1)[:, :k]
    low, high = (-2, experts + 2) if kind == "mixed" else (0, experts)
    return torch.randint(low, high, (tokens, k), generator=rng)


def check(scheme, dtype, hidden, inner, found, group=None, index=None):
    tokens, experts, k, seed = (found[name] for name in ("tokens", "experts", "k", "seed"))
    x, w13, w2, weights, _ = make(tokens, dtype, seed, experts, hidden, inner, k)
    ids = ids_of(found["ids"], tokens, experts, k, seed)
    index = index or (torch.int32 if seed % 2 and (scheme, dtype, hidden, inner) in BOTH_INDICES else torch.int64)
    # Whatever stands at the place of a padding entry must not be read.
    weights = weights.where((ids >= 0) & (ids < experts), float("nan"))
    if scheme is None:
        args, dense = (w13, w2), (w13, w2)
    else:
        pack = pack_experts(w13, w2, scheme, **({"group": group} if group else {}))
        args, dense = (pack,), pack.unpack()
    out = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids.to(index))
    assert out.shape == x.shape
    assert out.dtype == dtype
    integers = scheme is not None and "int" in scheme
    ref = loop(x, *dense, weights, ids, as_int8) if integers else loop(x, *dense, weights, ids)
    if not ref.any():
        assert not out.any()
        return
    nobody = ~((ids >= 0) & (ids < experts)).any(1)
    assert not out[nobody].any()
    assert error(out, ref) < (QUANTIZED if integers else LIMIT[dtype])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0] or 'raw'}-{str(g[1])[6:]}")
@options(12)
@given(found=routings())
def test_any_routing(geometry, found):
    check(*geometry, found)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0] or 'raw'}-{str(g[1])[6:]}")
@pytest.mark.parametrize(
    ("tokens", "ids"), [(0, "distinct"), (1, "padding"), (65, "padding"), (65, "one"), (1, "one"), (63, "mixed")]
)
def test_routing_at_its_ends(geometry, tokens, ids):
    """No tokens, only padding, everything to one expert, some ids -1 and E."""
    check(*geometry, {"tokens": tokens, "experts": 7, "k": 3, "seed": 11, "ids": ids})


def drawn_sizes(count):
    """Scheme, dtype and sizes around the multiples of tiles and steps; the same list in every process."""
    rng = random.Random(6)
    schemes = [(None, torch.float32), (None, torch.bfloat16), (None, torch.float16), ("fp32", torch.float32), ("fp16", torch.float16),
               *((scheme, dtype) for scheme in ("bf16", "int8", "int4", "int4_kgroup") for dtype in (torch.bfloat16, torch.float32))]  # fmt: skip
    for n in range(count):
        scheme, dtype = schemes[n % len(schemes)]
        hidden, inner = (
            max(1, rng.choice((0, 32, 64, 128, 256, 512)) + rng.choice((-17, -1, 0, 1, 7, 16, 31))) for _ in range(2)
        )
        yield scheme, dtype, hidden, inner, rng.choice(GROUPS) if scheme == "int4_kgroup" else None


SIZES = list(drawn_sizes(39))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", SIZES, ids=lambda g: f"{g[0] or 'raw'}-{str(g[1])[6:]}-D{g[2]}-I{g[3]}")
@options(25)
@given(found=routings(300))
def test_any_size(geometry, found):
    scheme, dtype, hidden, inner, group = geometry
    check(scheme, dtype, hidden, inner, found, group, (torch.int32, torch.int64)[inner % 2])  # half the kernels to compile


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, *STEP])
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_models(model, scheme, capsys):
    """The layers' own sizes with few experts, against float64 on the weights before packing."""
    hidden, inner, k = (MODELS[model][name] for name in "DIk")
    k = min(k, 4)
    for tokens in (1, 63):
        dtype = torch.float32 if scheme == "fp32" else torch.float16 if scheme == "fp16" else torch.bfloat16
        x, w13, w2, weights, ids = make(tokens, dtype, 5, experts=6, hidden=hidden, inner=inner, k=k)
        args = (w13, w2) if scheme is None else (pack_experts(w13, w2, scheme),)
        out = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)[:5]
        ref = loop(x[:5], w13, w2, weights[:5], ids[:5])
        found = ((out.double() - ref).abs().mean() / ref.abs().mean()).item()
        with capsys.disabled():
            print(f" {model} {scheme or 'raw'} T={tokens}: {found:.2%}", end="")
        assert 0 < found < BOUND.get((scheme, 32 if scheme == "int4_kgroup" else 0), 0.01)


@pytest.mark.parametrize(("scheme", "group"), [(None, 0), *BOUND])
def test_against_the_eager_experts_of_transformers(scheme, group, capsys):
    """Another implementation's loop over experts, on the same weights, in fp32; the metric and the bounds of quantized experts."""
    pytest.importorskip("transformers.models.qwen3_moe")
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    x, w13, w2, weights, ids = make(65, torch.bfloat16, 4, experts=4, hidden=256, inner=200)
    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=200, num_experts=4))
    module.config._experts_implementation_internal = "eager"
    module.gate_up_proj.data, module.down_proj.data = w13.float(), w2.float()
    with torch.no_grad():
        want = module(x.float(), ids, weights)
    args = (w13, w2) if scheme is None else (pack_experts(w13, w2, scheme, group=group or 32),)
    out = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)
    found = ((out.float() - want).abs().mean() / want.abs().mean()).item()
    with capsys.disabled():
        print(f" {scheme or 'raw'} {group}: {found:.2%}", end="")
    assert 1e-4 < found < BOUND.get((scheme, group), 0.01)
