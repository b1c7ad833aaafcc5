"""Packing expert weights: layout, quantization error, in place, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tvm_gdn import large_pages
from tvm_gdn.errors import ArgumentError, ArgumentTypeError, PackError
from tvm_gdn.packed_experts import STEP, PackedExperts, pack_experts, unpack


def weights(experts=3, hidden=100, inner=40, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * inner, hidden, generator=rng).to(dtype)
    return w13, torch.randn(experts, hidden, inner, generator=rng).to(dtype)


def rms(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


@pytest.mark.parametrize(("scheme", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize(("hidden", "inner"), [(100, 40), (51, 33), (128, 64)])
def test_floating_schemes_keep_every_number(scheme, dtype, hidden, inner):
    w13, w2 = weights(hidden=hidden, inner=inner, dtype=dtype)
    got13, got2 = pack_experts(w13, w2, scheme).unpack()
    assert torch.equal(got13, w13.float())
    assert torch.equal(got2, w2.float())


def test_layout_number_by_number():
    """Where single weights stand, from the text of the module."""
    w13, w2 = weights(hidden=128, inner=128)
    words = pack_experts(w13, w2, "bf16").w13.view(torch.bfloat16)
    e, gate, k = 1, 37, 75  # group 2, column 5; step 2, pair 5, second of the pair
    assert words[e, 2, 2, (0 * 16 + 5) * 32 + 5 * 2 + 1] == w13[e, gate, k].bfloat16()
    assert words[e, 2, 2, (1 * 16 + 5) * 32 + 5 * 2 + 1] == w13[e, 128 + gate, k].bfloat16()
    pack = pack_experts(w13, w2, "int8")
    stored = pack.w2.view(torch.uint8)[2, 3, 1, (1 * 16 + 2) * 64 + 7 * 4 + 3]  # column 3 * 32 + 16 + 7, element 64 + 2 * 4 + 3
    scale = w2[2, 119].abs().max() / 127
    assert stored.item() - 128 == round((w2[2, 119, 75] / scale).item())
    assert pack.w2_scale[2, 3, 0, 16 + 7] == scale
    nibbles = pack_experts(w13, w2, "int4").w2.view(torch.uint8)[2, 3, 0, 18 * 64 + 7 * 4 + 3]
    both = pack_experts(w13, w2, "int4").unpack()[1][2, [103, 119], 75]
    factors = pack_experts(w13, w2, "int4").w2_scale[2, 3, 0, [7, 23]]
    assert torch.allclose(torch.tensor([(nibbles & 15) - 8.0, (nibbles >> 4) - 8.0]) * factors, both)


@pytest.mark.parametrize(("scheme", "group", "limit"), [
    ("int8", 0, 0.009), ("int4", 0, 0.11), ("int4_kgroup", 32, 0.082), ("int4_kgroup", 64, 0.091), ("int4_kgroup", 128, 0.098),
])  # fmt: skip
def test_quantization_error(scheme, group, limit):
    """Normal weights: 4 bits with one scale cost 10.7 % at best (Max, 1960), small groups less."""
    w13, w2 = weights(2, 512, 256)
    pack = pack_experts(w13, w2, scheme, group=group or 32)
    for got, want in zip(pack.unpack(), (w13, w2), strict=True):
        assert limit / 3 < rms(got, want) < limit


def least_error(rows):
    """Least square errors of rows ``[R, K]`` in integers -8 to 7 with any real scale of either sign.

    A scale's integers change where an element over it is halfway between two; between such scales they stand still, and have the
    error ``x.x - (x.q)^2 / q.q`` at best.
    """
    halves = torch.arange(-8, 7, dtype=rows.dtype) + 0.5
    found = []
    for x in torch.cat([rows, -rows]):
        ends = (x[:, None] / halves).flatten()
        ends = torch.cat([ends.new_zeros(1), ends[ends > 0].sort()[0], 2 * ends[ends > 0].max()[None]])
        q = (x / ((ends[1:] + ends[:-1]) / 2)[:, None]).round().clamp(-8, 7)
        gained = (q @ x).square() / q.square().sum(-1).clamp(min=1)
        found.append(x.square().sum() - gained.max())
    return torch.stack(found).view(2, -1).amin(0)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_no_scales_are_much_better(group):
    """Groups are within half a percent of the least error that 4 bits and a scale can have: 9.7 % for 128 normal weights."""
    w13, w2 = weights(1, 128, 128)
    for got, want in zip(pack_experts(w13, w2, "int4_kgroup", group=group).unpack(), (w13, w2), strict=True):
        got, want = (w.double().reshape(-1, group)[:100] for w in (got, want))
        least = (least_error(want).sum() / want.square().sum()).sqrt()
        assert 0.07 < least <= rms(got, want) < 1.005 * least


@pytest.mark.parametrize(
    ("scheme", "hidden", "inner"),
    [*((scheme, 256, 128) for scheme in STEP), *((scheme, 65, 129) for scheme in ("int8", "int4", "int4_kgroup"))],
)
def test_in_place_and_threads_change_nothing(scheme, hidden, inner):
    w13, w2 = weights(5, hidden, inner, torch.float32)
    want = pack_experts(w13, w2, scheme, jobs=1)
    threaded = pack_experts(w13, w2, scheme, jobs=3)
    first, second = w13.clone(), w2.clone()
    got = pack_experts(first, second, scheme, in_place=True)
    assert got.w13.data_ptr() == first.data_ptr()
    for name, tensor in want.tensors().items():
        for other in (threaded, got):
            assert tensor is None or torch.equal(tensor, other.tensors()[name])


def test_in_place_needs_room():
    w13, w2 = weights(hidden=100, inner=40, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="w13 cannot be packed in place"):
        pack_experts(w13, w2, "bf16", in_place=True)


def test_zero_and_constant_channels():
    w13, w2 = torch.zeros(1, 64, 128), torch.full((1, 128, 32), 3.0)
    for scheme in ("int8", "int4", "int4_kgroup"):
        got13, got2 = pack_experts(w13, w2, scheme).unpack()
        assert torch.equal(got13, w13)
        assert rms(got2, w2) < 2e-3


def test_errors():
    w13, w2 = weights()
    with pytest.raises(ArgumentError, match="scheme is 'int2'"):
        pack_experts(w13, w2, "int2")
    with pytest.raises(ArgumentError, match="group is 48"):
        pack_experts(w13, w2, "int4_kgroup", group=48)
    with pytest.raises(ArgumentError, match="w2 must be"):
        pack_experts(w13, w2[:, :-1], "bf16")
    with pytest.raises(ArgumentTypeError, match="w13 has dtype torch"):
        pack_experts(w13.int(), w2, "bf16")


@pytest.mark.parametrize("scheme", STEP)
def test_files_keep_everything(scheme, tmp_path):
    pack = pack_experts(*weights(), scheme)
    pack.save(tmp_path / "experts.safetensors")
    got = PackedExperts.load(tmp_path / "experts.safetensors")
    assert (got.scheme, got.group, got.hidden, got.intermediate) == (pack.scheme, pack.group, 100, 40)
    for name, tensor in pack.tensors().items():
        assert tensor is None or torch.equal(tensor, got.tensors()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["experts.safetensors"]


def _altered(path, **changes):
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors = {name: changes.pop(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {**metadata, **changes})


def test_bad_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "experts.safetensors"
    pack = pack_experts(*weights(), "int8")
    with pytest.raises(PackError, match="no such file"):
        PackedExperts.load(path)
    pack.save(path)
    data = path.read_bytes()
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(PackError, match="not a whole safetensors file"):
            PackedExperts.load(path)
    flipped = bytearray(data)
    flipped[len(data) - 10000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(PackError, match="checksum differs"):
        PackedExperts.load(path)
    assert PackedExperts.load(path, verify=False).scheme == "int8"
    for changes, message in (
        ({"layout_version": "0"}, "layout version 0"),
        ({"scheme": "int3"}, "unknown scheme 'int3'"),
        ({"hidden": "many"}, "lack whole numbers"),
        ({"hidden": "4096"}, "its metadata say"),
        ({"w2": pack.w2[:2].clone()}, "w2 is"),
        ({"scheme": "int4", "group": "0"}, "w13 is"),
    ):
        path.write_bytes(data)
        _altered(path, **changes)
        with pytest.raises(PackError, match=message):
            PackedExperts.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(PackError, match="not a file of packed experts"):
        PackedExperts.load(path)


def test_a_loaded_pack_outlives_its_file(tmp_path):
    """Weights are copied out of the file: pages of a file that is cut short would end the process that reads them."""
    path = tmp_path / "pack.safetensors"
    pack = pack_experts(*weights(), "int8")
    pack.save(path)
    loaded = PackedExperts.load(path)
    with path.open("r+b") as file:
        file.truncate(64)
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in pack.tensors().items())


@pytest.mark.parametrize("count", [0, 1, large_pages.PAGE // 4, 3 * large_pages.PAGE // 4 + 5])
def test_memory_in_large_pages_is_memory(count):
    tensor = large_pages.empty((count,), torch.int32)
    assert tensor.shape == (count,)
    assert tensor.dtype == torch.int32
    assert tensor.fill_(7).sum() == 7 * count


def test_unpack_is_what_the_text_says():
    """int8 by hand: one column of one group."""
    pack = pack_experts(*weights(), "int8")
    rows = unpack(pack.w2, pack.w2_scale, "int8")
    assert rows.shape == (3, 128, 64)
    assert torch.equal(rows[:, 100:], torch.zeros(3, 28, 64))
