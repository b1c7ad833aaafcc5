"""The experts on devices: device code run emulated against a loop over tokens in float64, at sizes that are no multiple of a tile.

One kernel serves every number of tokens and every routing; copies arrive in the emulation when a thread waits for them, and threads run
in random order.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
import test_moe_route
import torch
from compilers import needs_cxx
from test_moe_experts import BOUND, LIMIT, E, error, loop, make

import tvm_gdn
from tvm_gdn import build, cases, check, dispatch, load, pack, reference, schedule, torch_ops
from tvm_gdn.errors import TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.ops.tir import moe_grid, moe_grid_rows
from tvm_gdn.packed_experts import pack_experts
from tvm_gdn.target import named, resolve

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture
def on(monkeypatch):
    """Calls run emulated on a target."""

    def choose(target):
        monkeypatch.setenv("TVM_GDN_TARGET", f"emulated:{target}")
        dispatch.reset()

    yield choose
    monkeypatch.undo()
    dispatch.reset()


def run(x, weights, *args, ids):
    return tvm_gdn.fused_experts(x, *args, topk_weights=weights, topk_ids=ids)


def shifted(w):
    """The same tensor at an odd address."""
    flat = torch.empty(w.numel() + 1, dtype=w.dtype)
    flat[1:] = w.flatten()
    return flat[1:].view(w.shape)


def check_numbers(dtype, packed, hidden, inner, counts):
    name = NAMES[dtype]
    for tokens in counts:
        x, w13, w2, weights, ids = make(tokens, dtype, tokens, hidden=hidden, inner=inner)
        args = (pack_experts(w13, w2, name),) if packed else (w13, w2)
        out = run(x, weights, *args, ids=ids)
        assert out.dtype == dtype
        found = error(out, loop(x, w13, w2, weights, ids))
        assert found < LIMIT[dtype], (tokens, found)
        # A sum of one order: whatever order threads ran in, and wherever a pair stood among its expert's rows.
        assert torch.equal(out, run(x, weights, *args, ids=ids))
    assert "emulated" in dispatch.served_by("fused_experts_packed" if packed else "fused_experts")


@needs_cxx
@pytest.mark.parametrize(
    "target", ["cuda-sm80", "rocm-gfx942", "musa-mp31", pytest.param("rocm-gfx1100", marks=pytest.mark.slow)]
)
def test_numbers(on, target):
    """Few rows per expert and many, D and I no multiples of a tile; rows in pieces of 16 bytes."""
    on(target)
    check_numbers(torch.bfloat16, False, 104, 40, (1, 5, 63))


@needs_cxx
def test_products_of_four_warps(tmp_path, monkeypatch):
    """Hopper's plans of 16 and of 64 rows from one kernel, and of up to 144 in blocks that go through all tiles.

    Pairs that are not sorted; put in order by one block, and by many. An expert's rows in one tile and in several; weights and rows
    that begin anywhere.
    """
    monkeypatch.setattr(moe_grid_rows, "MOST_ALONE", 100)
    monkeypatch.setattr(moe_grid, "MOST_ALONE", 100)
    spec, shape = geometry(D=104, I=72, ids="int64")
    goal = resolve("emulated:cuda-sm90")
    space, _ = schedule.find_space(spec.algorithm, goal)
    knobs = {**space.default(shape), "most": 2, "more": 8, "blocks": 3}
    built = build.compile_kernel(build.Request(spec, shape, knobs), goal, tmp_path)
    pack.write(tmp_path / "pack", goal, [], [built], build.build_launcher(tmp_path, goal))
    stored = pack.read(tmp_path / "pack")
    kernel = load.load_kernel(stored, stored.manifest.kernels[0])
    call = torch_ops.call_function(spec, shape, kernel, "cpu")
    for tokens in (3, 17, 22, 70, 400):
        x, w13, w2, weights, ids = make(tokens, torch.bfloat16, tokens, hidden=104, inner=72)
        out = call(x, w13, w2, weights, ids)
        assert error(out, loop(x, w13, w2, weights, ids)) < LIMIT[torch.bfloat16]
        assert torch.equal(out, call(x, shifted(w13), shifted(w2), weights, ids))


@needs_cxx
def test_routing_at_its_extremes(on):
    """No tokens, nobody routed, padding inside, all tokens to one expert, one expert twice: the same kernel for all."""
    on("cuda-sm80")
    x, w13, w2, weights, ids = make(65, torch.bfloat16, hidden=104)

    def call(rows, choices, w=weights):
        return run(x[:rows], w[:rows], w13, w2, ids=choices[:rows])

    assert call(0, ids).shape == (0, 104)
    assert torch.equal(call(65, torch.full_like(ids, -1)), torch.zeros_like(x))
    padded = ids.clone()
    padded[::3, 1] = -1
    padded[1::3, 0] = E
    padded[5] = 2**40
    unused = weights.where((padded >= 0) & (padded < E), float("nan"))
    for rows in (17, 65):
        want = loop(x[:rows], w13, w2, weights[:rows], padded[:rows])
        assert error(call(rows, padded, unused), want) < LIMIT[torch.bfloat16]
    one = torch.full_like(ids, E - 1)
    one[:, 1:] = -1
    for rows in (17, 65):
        assert error(call(rows, one), loop(x[:rows], w13, w2, weights, one[:rows])) < LIMIT[torch.bfloat16]
    twice = torch.zeros_like(ids)
    assert error(call(65, twice), loop(x, w13, w2, weights, twice)) < LIMIT[torch.bfloat16]
    x[11, 5] = float("nan")
    clean = call(65, ids)
    assert clean[11].isnan().all()
    assert clean[[row for row in range(65) if row != 11]].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm80", "rocm-gfx942"])
def test_misaligned_and_strided_arguments(on, target):
    """Rows that begin anywhere are read element by element, by the same kernel."""
    on(target)
    x, w13, w2, weights, ids = make(33, torch.bfloat16, hidden=104)
    whole = run(x, weights, w13, w2, ids=ids)
    wide = torch.randn(33, 211).bfloat16()
    wide[:, 3:107] = x
    moved = run(wide[:, 3:107], weights.t().contiguous().t(), shifted(w13), shifted(w2), ids=ids.t().contiguous().t())
    assert torch.equal(moved, whole)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90", "musa-mp31", "rocm-gfx942", "rocm-gfx1100"])
@pytest.mark.parametrize(
    ("dtype", "packed", "hidden", "inner"),
    [
        (torch.bfloat16, False, 51, 33),
        (torch.bfloat16, True, 100, 40),
        (torch.float16, False, 136, 72),
        (torch.float16, True, 100, 72),
        (torch.float32, False, 100, 40),
        (torch.float32, True, 100, 40),
    ],
)
def test_sizes(on, target, dtype, packed, hidden, inner):
    on(target)
    check_numbers(dtype, packed, hidden, inner, (1, 65, 200))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm80", "musa-mp31", "rocm-gfx942", "rocm-gfx1100"])
@pytest.mark.parametrize(("scheme", "group"), [("int8", 0), ("int4", 0), ("int4_kgroup", 32), ("int4_kgroup", 128)])
def test_integers(on, target, scheme, group):
    """What the pack says, but for the rows' own rounding; few rows per expert and many; NaN stays in its row."""
    on(target)
    for tokens in (1, 129):
        x, w13, w2, weights, ids = make(tokens, torch.bfloat16, 3, experts=4, hidden=264, inner=200)
        pack = pack_experts(w13, w2, scheme, group=group or 32)
        out = run(x, weights, pack, ids=ids)
        assert error(out, loop(x, *pack.unpack(), weights, ids)) < 0.025
        assert torch.equal(out, run(x, weights, pack, ids=ids))
    # The pack's own error: a mean over many outputs.
    ref = loop(x, w13, w2, weights, ids)
    assert ((out.double() - ref).abs().mean() / ref.abs().mean()).item() < BOUND[scheme, group]
    x[11, 5] = float("nan")
    spoiled = run(x, weights, pack, ids=ids)
    assert spoiled[11].isnan().all()
    kept = [row for row in range(129) if row != 11]
    assert torch.equal(spoiled[kept], out[kept])
    assert "emulated" in dispatch.served_by("fused_experts_quantized")


def geometry(**attrs):
    case = {"T": 3, "k": 2, "E": 4, "D": 2048, "I": 512, "dtype": "bfloat16", **attrs}
    spec = OPS["fused_experts_quantized" if attrs.get("scheme") == "int8" else "fused_experts"]
    return spec, check.geometry_of(spec, cases.draw(spec, case))


@pytest.mark.parametrize(
    "target", ["cuda-sm80", "cuda-sm90", "musa-mp22", "musa-mp31", "rocm-gfx90a", "rocm-gfx942", "rocm-gfx1100"]
)
@pytest.mark.parametrize("case", [{}, {"dtype": "float32"}, {"scheme": "int8", "scale_dtype": "float32"}])
def test_blocks_fit(target, case):
    """Shared memory of the defaults and of every choice that is not refused."""
    spec, shape = geometry(**case)
    space, _ = schedule.find_space(spec.algorithm, named(target))
    knobs, default = space.knobs(shape), space.default(shape)
    assert schedule.fits(default, knobs)
    for name, choices in knobs.items():
        for value in choices:
            try:
                tiles = space.tiles(shape, **{**default, name: value})
            except TargetError:
                assert value != default[name]
                continue
            assert all(plan.fits() and space._bytes(shape, plan) <= space.shared for plan in tiles.plans)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(
    ("target", "case", "pointers"),
    [
        ("cuda-sm80", {}, (4, 4, 4, 1, 3, 3, 4, 6, 7, 7, 6, 6, 4)),
        ("cuda-sm90", {}, (4, 4, 4, 1, 3, 3, 4, 6, 7, 7, 7, 6, 6, 6, 4)),
        ("cuda-sm80", {"scheme": "int8", "scale_dtype": "float32"}, (4, 7, 4, 7, 4, 1, 3, 3, 4, 6, 4, 10, 10, 4, 9, 9, 4)),
        ("cuda-sm90", {"scheme": "int8", "scale_dtype": "float32"}, (4, 7, 4, 7, 4, 1, 3, 3, 4, 6, 4, 10, 10, 4, 9, 9, 4)),
    ],
)
def test_machine_code_spills_nothing(tmp_path, target, case, pointers):
    """At a reference model's width, as the compiler reports it."""
    spec, shape = geometry(**case)
    goal = resolve(target)
    (built,) = build.run_builder([build.Request(spec, shape)], goal, tmp_path)
    assert built.image.read_bytes()[:4] == b"\x7fELF", built
    # A variable of the host would be one more: memory that the host writes, which an emulation does not mind.
    assert tuple(line.split()[1].count("p") for line in built.table) == pointers
    arch = dict(goal.codegen)["arch"]
    command = ["nvcc", "-w", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", f"-gencode=arch=compute_{arch[3:]},code={arch}"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "again"), str(built.image.with_suffix(".cu"))], capture_output=True, text=True, check=True
    )
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) == len(pointers)
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr


@pytest.mark.slow
def test_routing_operators(on):
    """A token per warp, a block per expert: the checks of the CPU's kernels, and more pairs than a block's threads read at once."""
    on("cuda-sm80")
    test_moe_route.test_softmax(65, torch.bfloat16)
    test_moe_route.test_deepseek_groups(True)
    test_moe_route.test_nan_is_chosen_first_and_propagates("softmax")
    test_moe_route.test_sort_and_stats(torch.int64)
    test_moe_route.test_stats_of_nobody()
    ids = torch.randint(-1, 30, (700, 7), generator=torch.Generator().manual_seed(0))
    for choices in (ids, torch.full_like(ids, 3)):
        for found, want in zip(tvm_gdn.moe_sort(choices, 29), reference.moe_sort(choices, 29), strict=True):
            assert torch.equal(found, want)
    for name in ("moe_route", "moe_sort", "expert_stats"):
        assert dispatch.served_by(name).startswith("compiled (emulated:cuda-sm80, default")
