"""The experts against a loop over tokens in float64: storage, packs, padding, regimes, threads, errors."""

from __future__ import annotations

import re

import pytest
import torch

import tvm_gdn
from tvm_gdn import cases, check, dispatch, reference, reference_moe
from tvm_gdn.errors import ArgumentError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.packed_experts import pack_experts
from tvm_gdn.target import named, resolve

E, INNER, D, K = 7, 40, 100, 3
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
#: mean|out - ref| / mean|ref| by scheme and group: the issue of this operator asks for 1, 3, 25 and 16 %. Groups of 128 cannot
#: have 16 %: sixteen levels for 128 normal weights err by 9.7 % with the best of all scales, three times per output.
BOUND = {
    ("bf16", 0): 0.01, ("int8", 0): 0.03, ("int4", 0): 0.25, ("int4_kgroup", 32): 0.16, ("int4_kgroup", 64): 0.16,
    ("int4_kgroup", 128): 0.175,
}  # fmt: skip
SMALL, WIDE = {"T": 1, "k": K, "E": E, "D": D, "I": INNER}, {"T": 1, "k": K, "E": E, "D": 256, "I": 200}
BF16 = {"dtype": "bfloat16", "scale_dtype": "float32"}
KERNELS = [
    *(("fused_experts", {**SMALL, "dtype": str(dtype)[6:]}) for dtype in LIMIT),
    ("fused_experts", {**SMALL, "D": 24, "dtype": "float32"}),
    ("fused_experts", {**WIDE, **BF16}),
    *(
        ("fused_experts_packed", {**SMALL, "dtype": dtype, "scheme": scheme})
        for dtype, scheme in (("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16"))
    ),
    ("fused_experts_packed", {**WIDE, **BF16, "scheme": "bf16"}),
    ("fused_experts_quantized", {**SMALL, **BF16, "scheme": "int8"}),
    *(("fused_experts_quantized", {**WIDE, **BF16, "dtype": dtype, "scheme": "int8"}) for dtype in ("float32", "bfloat16")),
    ("fused_experts_quantized", {**WIDE, **BF16, "scheme": "int4"}),
    *(
        (
            "fused_experts_quantized",
            {**WIDE, "dtype": "bfloat16", "scale_dtype": "bfloat16", "scheme": "int4_kgroup", "group": group},
        )
        for group in (32, 64, 128)
    ),
]


def make(tokens, dtype=torch.float32, seed=0, experts=E, hidden=D, inner=INNER, k=K):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng).to(dtype)
    w13 = (torch.randn(experts, 2 * inner, hidden, generator=rng) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inner, generator=rng) * inner**-0.5).to(dtype)
    ids = torch.stack([torch.randperm(experts, generator=rng)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k)
    return x, w13, w2, torch.rand(tokens, k, generator=rng), ids.long()


def as_int8(row):
    """A row in steps of its largest element / 127, in fp32: rows of bf16 have many elements halfway between two steps."""
    largest, steps = row.float().abs().max().clamp(min=1e-30), torch.tensor(127.0)
    return (row.float() * (steps / largest)).round().double() * (largest / steps).double()


def loop(x, w13, w2, weights, ids, rounded=lambda row: row):
    """Token by token, choice by choice; `rounded`: what becomes of the left rows of both products."""
    x, w13, w2, weights = (t.double() for t in (x, w13, w2, weights))
    inner = w2.shape[2]
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if 0 <= e < w13.shape[0]:
                row = rounded(x[t])
                gate, up = w13[e, :inner] @ row, w13[e, inner:] @ row
                out[t] += weights[t, j] * (w2[e] @ rounded(gate * torch.sigmoid(gate) * up))
    return out


def error(out, ref):
    assert out.isfinite().all()
    return ((out.double() - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_numbers(dtype, packed):
    """Few rows per expert and many, odd sizes; one kernel for every number of tokens."""
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    for tokens in (1, 5, 63, 200):
        x, w13, w2, weights, ids = make(tokens, dtype, tokens)
        args = (pack_experts(w13, w2, name),) if packed else (w13, w2)
        out = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)
        assert out.dtype == dtype
        assert error(out, loop(x, w13, w2, weights, ids)) < LIMIT[dtype]
    assert dispatch.served_by("fused_experts_packed" if packed else "fused_experts").startswith("compiled")


@pytest.mark.parametrize(("scheme", "group"), BOUND)
def test_accuracy_of_schemes(scheme, group, capsys):
    """Weights of a normal distribution, bf16 activations, one token and many."""
    for tokens in (1, 65, 129):
        x, w13, w2, weights, ids = make(tokens, torch.bfloat16, 3, experts=4, hidden=256, inner=200)
        ref = loop(x, w13, w2, weights, ids)
        pack = pack_experts(w13, w2, scheme, group=group or 32)
        out = tvm_gdn.fused_experts(x, pack, topk_weights=weights, topk_ids=ids)
        found = ((out.double() - ref).abs().mean() / ref.abs().mean()).item()
        with capsys.disabled():
            print(f" {scheme} {group} T={tokens}: {found:.2%}", end="")
        assert 1e-4 < found < BOUND[scheme, group]
        # Rounded rows aside, the kernel computes what the pack says, with few rows per expert and with many.
        assert error(out, loop(x, *pack.unpack(), weights, ids)) < (0.025 if "int" in scheme else 5e-3)


@pytest.mark.parametrize("scheme", [None, "bf16", "int8"])
def test_routing_at_its_extremes(scheme):
    """No tokens, nobody routed, padding inside, all tokens to one expert, one expert twice: the same kernel for all."""
    x, w13, w2, weights, ids = make(65, torch.bfloat16)
    args = (w13, w2) if scheme is None else (pack_experts(w13, w2, scheme),)
    limit = 0.03 if scheme == "int8" else LIMIT[torch.bfloat16]

    def run(rows, choices, w=weights):
        return tvm_gdn.fused_experts(x[:rows], *args, topk_weights=w[:rows], topk_ids=choices[:rows])

    assert run(0, ids).shape == (0, D)
    assert torch.equal(run(65, torch.full_like(ids, -1)), torch.zeros_like(x))
    padded = ids.clone()
    padded[::3, 1] = -1
    padded[1::3, 0] = E
    padded[5] = 2**40
    unused = weights.where((padded >= 0) & (padded < E), float("nan"))
    assert error(run(65, padded, unused), loop(x, w13, w2, weights, padded)) < limit
    one = torch.full_like(ids, E - 1)
    one[:, 1:] = -1
    assert error(run(65, one), loop(x, w13, w2, weights, one)) < limit
    twice = torch.zeros_like(ids)
    assert error(run(65, twice), loop(x, w13, w2, weights, twice)) < limit


@pytest.mark.parametrize("scheme", [None, "bf16", "int8"])
def test_nan_stays_in_its_row(scheme):
    x, w13, w2, weights, ids = make(65, torch.bfloat16)
    args = (w13, w2) if scheme is None else (pack_experts(w13, w2, scheme),)
    clean = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)
    x[11, 5] = float("nan")
    x[40, 99] = float("inf")
    out = tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)
    assert out[[11, 40]].isnan().all(1).all()
    kept = [row for row in range(65) if row not in (11, 40)]
    assert torch.equal(out[kept], clean[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_between_two_integers(dtype):
    """Rows of which all elements but the largest stand halfway between 63 and 64: the kernel, the reference and fp32 agree."""
    x, w13, w2, weights, _ = make(128, dtype, hidden=256, inner=200, k=1)
    largest = 1 + torch.arange(128)[:, None] / 128  # every mantissa that bf16 has
    x = torch.where(torch.arange(256) == torch.arange(128)[:, None], largest, x.sign() * largest / 2).to(dtype)
    ids = torch.zeros(128, 1, dtype=torch.long)
    pack = pack_experts(w13, w2, "int8")
    out = tvm_gdn.fused_experts(x, pack, topk_weights=weights, topk_ids=ids)
    own = reference.fused_experts(x, *pack.unpack(), weights, ids, exact=True, rows=reference_moe._in_127ths)
    for ref in (loop(x, *pack.unpack(), weights, ids, as_int8), own):
        errors = (out.double() - ref).square().mean(1).sqrt() / ref.square().mean(1).sqrt()
        assert errors.max() < 6e-3  # rounded in float64, 23 of the rows go to the other integers and err by up to 3.8 %


def test_threads_and_order_do_not_matter():
    x, w13, w2, weights, ids = make(200, torch.bfloat16)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 7):  # of 7 some have no output columns
            torch.set_num_threads(threads)
            outs.append(tvm_gdn.fused_experts(x, w13, w2, weights, ids))
    finally:
        torch.set_num_threads(before)
    assert error(outs[0], loop(x, w13, w2, weights, ids)) < LIMIT[torch.bfloat16]
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    flipped = tvm_gdn.fused_experts(x, w13, w2, weights.flip(1), ids.flip(1))
    assert torch.equal(outs[0], flipped)


def test_blocks_of_an_expert_share_a_workers_memory_of_h():
    """Quantized: experts of two blocks after one of a single row, of which a worker has all columns or, with more threads, some."""
    x, w13, w2, weights, _ = make(621, torch.bfloat16, 3, experts=5)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 3, 4]), torch.tensor([1, 270, 17, 333]))[:, None]
    pack = pack_experts(w13, w2, "int8")
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(tvm_gdn.fused_experts(x, pack, topk_weights=weights[:, :1], topk_ids=ids))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert error(outs[0], loop(x, *pack.unpack(), weights[:, :1], ids)) < 0.025


def test_no_memory_is_taken_row_by_row():
    """TVMScript makes memory from the heap of a name that is assigned: of a row's name, ten times what summing up the row takes."""
    from tvm_gdn import build

    op, case = next(kernel for kernel in KERNELS if kernel[0] == "fused_experts_quantized")
    geometry = check.geometry_of(OPS[op], cases.draw(OPS[op], case))
    traced = build.scheduled(build.Request(OPS[op], geometry, None), resolve("x86-avx2"))
    text = next(part.script() for part in traced if hasattr(part, "script"))
    loops: list[tuple[int, str]] = []
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        loops = [loop for loop in loops if loop[0] < depth]
        if line.lstrip().startswith("for "):
            loops.append((depth, line.split()[1]))
        if re.match(r" +\w+: T\.\w+ = ", line):
            assert not any(name.startswith(("r", "t")) for _, name in loops), line


@pytest.mark.parametrize(
    ("target", "instructions"),
    [("x86-avx2", ["tvm_gdn_dot_pairs"]), ("x86-avx512-bf16", ["vpdpbusd"]), ("x86-amx", ["vpdpbusd", "tdpbsud"])],
)
def test_integers_are_multiplied_as_integers(target, instructions):
    """int8 is no float product of widened weights: what multiplies are dot products of bytes, or on AVX2 of 16 bits each."""
    from tvm_gdn import build

    op, case = next(kernel for kernel in KERNELS if kernel[1].get("scheme") == "int8")
    geometry = check.geometry_of(OPS[op], cases.draw(OPS[op], case))
    text = build.scheduled(build.Request(OPS[op], geometry, None), resolve(target))[1].script()
    assert all(name in text for name in instructions)
    assert "dpbf16" not in text


def test_output_of_one_group_of_columns():
    """D of 24: the threads beyond the first have no output columns."""
    x, w13, w2, weights, ids = make(5, hidden=24, inner=40)
    assert error(tvm_gdn.fused_experts(x, w13, w2, weights, ids), loop(x, w13, w2, weights, ids)) < 1e-5


def test_strided_arguments():
    x, w13, w2, weights, ids = make(63)
    wide = torch.randn(63, 2 * D)
    wide[:, :D] = x
    out = tvm_gdn.fused_experts(wide[:, :D], w13, w2, weights.t().contiguous().t(), ids.t().contiguous().t())
    assert error(out, loop(x, w13, w2, weights, ids)) < LIMIT[torch.float32]
    assert torch.equal(out, tvm_gdn.fused_experts(x, w13, w2, weights, ids))


@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert(gated):
    x, w13, w2, _, _ = make(65)
    gate = torch.randn(1, D) if gated else None
    out = tvm_gdn.shared_expert(x, w13[0], w2[0], gate)
    share = torch.sigmoid(x.double() @ gate.double().T) if gated else torch.ones(65, 1).double()
    assert error(out, loop(x, w13[:1], w2[:1], share, torch.zeros(65, 1))) < 1e-5
    assert torch.allclose(tvm_gdn.shared_expert(x, pack_experts(w13[:1], w2[:1], "fp32"), gate=gate), out, atol=1e-5)
    with pytest.raises(ArgumentError, match="pack of 7 experts"):
        tvm_gdn.shared_expert(x, pack_experts(w13, w2, "fp32"))


def test_errors_name_the_argument():
    x, w13, w2, weights, ids = make(5)
    with pytest.raises(TvmGdnError, match="w2"):
        tvm_gdn.fused_experts(x, w13, w2[:, :, :-1], weights, ids)
    with pytest.raises(TvmGdnError, match="w13 has dtype"):
        tvm_gdn.fused_experts(x, w13.bfloat16(), w2, weights, ids)
    with pytest.raises(TvmGdnError, match="activation"):
        tvm_gdn.fused_experts(x, w13, w2, weights, ids, activation="gelu")
    with pytest.raises(TvmGdnError, match="topk_ids"):
        tvm_gdn.fused_experts(x, w13, w2, weights, ids[:, :2])
    pack = pack_experts(w13, w2, "fp32")
    with pytest.raises(ArgumentError, match="holds both"):
        tvm_gdn.fused_experts(x, pack, w2, weights, ids)
    with pytest.raises(ArgumentError, match=r"^fused_experts: .*pass x of the width that was packed"):
        tvm_gdn.fused_experts(x[:, :64], pack, topk_weights=weights, topk_ids=ids)


@pytest.mark.parametrize(("scheme", "group"), [("int8", 0), ("int4_kgroup", 32)])
def test_the_matrix_unit_emulated(scheme, group, monkeypatch):
    """Products of bytes as the matrix unit makes them, on any CPU: 3, 16, 17 and 33 rows of an expert, and none."""
    monkeypatch.setenv("TVM_GDN_TARGET", "x86-amx-emulated")
    if named("x86-amx-emulated").missing():
        pytest.skip("needs AVX2")
    dispatch.reset()
    x, w13, w2, weights, _ = make(69, torch.bfloat16, 2, experts=5)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 3, 4]), torch.tensor([3, 16, 17, 33]))[:, None]
    pack = pack_experts(w13, w2, scheme, group=group or 32)
    out = tvm_gdn.fused_experts(x, pack, topk_weights=weights[:, :1], topk_ids=ids)
    assert dispatch.served_by("fused_experts_quantized").startswith("compiled (x86-amx-emulated")
    assert error(out, loop(x, *pack.unpack(), weights[:, :1], ids)) < 0.025
    monkeypatch.undo()
    dispatch.reset()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4", "int4_kgroup"])
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 768), (33, 17), (130, 31), (512, 1000)])
def test_sizes(scheme, hidden, inner):
    """Sizes that are and are no multiples of tiles; the packed weights themselves are the reference."""
    for tokens in (1, 63, 500):
        x, w13, w2, weights, ids = make(tokens, torch.bfloat16, 1, experts=5, hidden=hidden, inner=inner)
        pack = pack_experts(w13, w2, scheme)
        ref = loop(x[:20], *pack.unpack(), weights, ids[:20])
        out = tvm_gdn.fused_experts(x, pack, topk_weights=weights, topk_ids=ids)
        assert error(out[:20], ref) < (0.03 if "int" in scheme else 5e-3)


@pytest.mark.parametrize(
    "x, w13", [(torch.zeros(2, 4, 8), torch.zeros(12, 8)), (None, torch.zeros(12, 8)), (torch.zeros(4, 8), None)]
)
def test_a_shared_expert_names_what_is_wrong(x, w13):
    with pytest.raises(ArgumentError, match=r"shared_expert: (x is|w13 is)"):
        tvm_gdn.shared_expert(x, w13, torch.zeros(8, 6))
