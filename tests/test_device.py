"""Device targets: code for them is machine code, packs say whom they serve, and emulated device code meets the reference.

``pytest --target NAME`` runs `test_parity_at_small_shapes` on the device NAME where it is present and emulated where it is not;
the default run does a sample of it on the emulation of one target.
"""

import ctypes
import json
import shutil

import pytest
import torch
import tvm_ffi
from compilers import needs_cxx

from tvm_gdn import build, cases, check, device, dispatch, env, images, kernel_cache, load, pack, parity, schedule, torch_ops
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import BuildError, PackError, TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED as PREFIX
from tvm_gdn.target import emulation_of, named, resolve, runnable, target_names

EMULATED = True
DECODE = "packed_decode_gated_delta_rule"
UPDATE = "fused_recurrent_gated_delta_rule_update"
GATING = "fused_gdn_gating"
CHUNK = "chunk_gated_delta_rule"
CONV = "causal_conv1d_fn"
NORM = "rms_norm_gated"
FUSED = "fused_conv_gated_delta_rule_update"
CONV_STEP = "causal_conv1d_update"
#: States and taps of a convolution in 16 bits.
HALF = {"state_dtype": "bfloat16", "weight_dtype": "bfloat16"}
ACCELERATORS = [name for name in target_names() if named(name).device != "cpu" and named(name).concrete]
SMALL = {
    "B": 2,
    "H": 1,
    "HV": 2,
    "K": 32,
    "V": 16,
    "S": 3,
    "with": ("initial_state_source", "initial_state_indices"),
    "padding": True,
}
#: Three value heads to a q/k head.
STEP = {"B": 2, "H": 1, "HV": 3, "K": 64, "V": 96, "S": 3, "SC": 4, "padding": True, "state_dtype": "float32"}
#: What is parametrized by `kernel` is compiled before the first test, so it must not be there in a run on the CPU itself.
ON_ACCELERATOR = env.target_name().startswith((PREFIX, *ACCELERATORS))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def small_cases():
    """On a device two storage variants of every short shape; in an emulation two cases of an operator, the others are slow."""
    target = resolve(env.target_name())
    for op, spec in OPS.items():
        try:
            schedule.find_space(spec.algorithm, target)
        except TargetError:
            continue  # no schedule yet: calls run on the torch reference
        usual = parity.sample(spec) if target.emulated else spec.cases
        shapes = {}
        for case in spec.cases:
            storage = {"dtype", "state_dtype", "state_v_first"}
            shapes.setdefault(json.dumps({k: v for k, v in case.items() if k not in storage}), []).append(case)
        chosen = [dict(case) for case in usual] if target.emulated else []
        for number, variants in enumerate(shapes.values()):
            chosen += [dict(variants[n % len(variants)]) for n in (number, number + 3)]
        for n, case in enumerate(chosen):
            if parity.tokens(case) <= 200 and case not in chosen[:n]:
                marks = () if case in usual else pytest.mark.slow
                yield pytest.param((op, case), id=f"{op} {cases.label(case)}", marks=marks)


if ON_ACCELERATOR:

    @pytest.mark.parametrize("kernel", small_cases())
    def test_parity_at_small_shapes(kernel):
        op, case = kernel
        try:
            result = parity.check_case(OPS[op], case, device=resolve(env.target_name()).device)
        except BuildError as error:
            if "TargetError: " not in str(error):
                raise
            pytest.skip(f"the schedule refuses this shape: {str(error).splitlines()[-1]}")
        assert result.passed, (result.errors, result.limits, result.failure)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setenv("TVM_GDN_TARGET", f"{PREFIX}cuda-sm80")
    dispatch.reset()
    yield resolve(f"{PREFIX}cuda-sm80")
    monkeypatch.undo()
    dispatch.reset()


def whole(case):
    """A case of a chunked rule with states in and out."""
    return {**case, "output_final_state": True, "with": ("initial_state", "cu_seqlens") if "lengths" in case else ()}


GATED = whole({"B": 1, "T": 37, "H": 1, "HV": 2, "K": 32, "V": 16, "dtype": "bfloat16"})
PER_CHANNEL = whole({"lengths": (21, 0, 1), "H": 1, "HV": 1, "K": 16, "V": 32, "S": 3, "dtype": "float16"})
#: The matrix units of AMD's two families take both rules; a run has one of each.
ELSEWHERE_SLOW = [("rocm-gfx1100", CHUNK, GATED), ("rocm-gfx942", "chunk_kda", PER_CHANNEL)]
ELSEWHERE = [
    ("cuda-sm80", GATING, {"M": 65, "HV": 33, "dtype": "bfloat16"}),
    ("cuda-sm80", DECODE, {**SMALL, "dtype": "bfloat16", "state_dtype": "float32"}),
    # Two chunks, both passes, several fragments per warp.
    ("cuda-sm80", CHUNK, {"B": 1, "T": 65, "H": 1, "HV": 2, "K": 32, "V": 48, "with": ("initial_state",), "dtype": "bfloat16"}),
    ("cuda-sm80", CONV, {"B": 2, "D": 70, "T": 65, "with": ("conv_states",), "dtype": "bfloat16", "weight_dtype": "bfloat16"}),
    # Strips of channels in vectors: blocks with and without a sequence's first tokens, of which one is not full; one token.
    ("cuda-sm80", CONV, {"B": 2, "D": 76, "T": 70, "with": ("conv_states",), "dtype": "bfloat16", **HALF}),
    (
        "cuda-sm80",
        CONV_STEP,
        {"B": 3, "D": 72, "T": 1, "S": 5, "with": ("conv_state_indices",), "padding": True, "dtype": "float16", **HALF},
    ),
    # Nine tiles of value columns for four warps; padding; channels that threads convolve for one another.
    ("cuda-sm80", FUSED, {**STEP, "with": ("conv_state_indices", "initial_state_indices", "conv_bias"), "dtype": "bfloat16"}),
    # Vectors, a last one that not every thread has, and elements behind it.
    ("cuda-sm80", NORM, {"M": 7, "G": 3, "D": 130, "with": ("z",), "dtype": "float16"}),
    ("rocm-gfx942", CHUNK, GATED),
    ("rocm-gfx1100", "chunk_kda", PER_CHANNEL),
    # What 64 KiB hold of a gate per channel in fp32: chunks of one block.
    ("musa-mp31", "chunk_kda", whole({"B": 1, "T": 37, "H": 1, "HV": 1, "K": 64, "V": 32, "dtype": "float32"})),
    # Columns that are no multiple of a fragment of wmma; chunks of 64 tokens, whose inverse is merged by products.
    (
        "musa-mp31",
        "chunk_kda",
        whole({"lengths": (21, 0, 1), "H": 1, "HV": 1, "K": 16, "V": 20, "S": 3, "dtype": "float16"}),
    ),
    ("musa-mp31", CHUNK, whole({"B": 1, "T": 70, "H": 1, "HV": 2, "K": 32, "V": 48, "dtype": "bfloat16"})),
]


@needs_cxx
@pytest.mark.parametrize(
    "elsewhere",
    [
        pytest.param(
            (f"{PREFIX}{target}", op, case),
            id=f"{target} {op} {cases.label(case)}",
            marks=pytest.mark.slow if listed is ELSEWHERE_SLOW else (),
        )
        for listed in (ELSEWHERE, ELSEWHERE_SLOW)
        for target, op, case in listed
    ],
)
def test_emulated_device_code_meets_the_reference(monkeypatch, elsewhere):
    target, op, case = elsewhere
    monkeypatch.setenv("TVM_GDN_TARGET", target)
    dispatch.reset()
    try:
        result = parity.check_case(OPS[op], case)
        assert result.passed, result
        assert target in result.served
        for name, value in parity.expected(OPS[op], cases.draw(OPS[op], case)).items():
            assert parity.rms_ratio(torch.zeros_like(value), value) > 0.5, name
    finally:
        monkeypatch.undo()
        dispatch.reset()


def with_knobs(target, folder, op, arguments, **knobs):
    """The operator's function with a kernel of explicit knobs."""
    spec = OPS[op]
    geometry = check.geometry_of(spec, arguments)
    (built,) = build.run_builder([build.Request(spec, geometry, knobs)], target, folder)
    assert not isinstance(built, BuildError), built
    pack.write(folder / "pack", target, [], [built], build.build_launcher(folder, target))
    found = pack.read(folder / "pack")
    kernel = load.load_kernel(found, found.manifest.kernels[0])
    return torch_ops.call_function(spec, geometry, kernel, "cpu")


@needs_cxx
@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        ({"dtype": "bfloat16", "state_dtype": "float32"}, {"column_lanes": 8, "columns": 4, "group": 2}),
        pytest.param(
            {"dtype": "float32", "state_dtype": "bfloat16"},
            {"column_lanes": 4, "columns": 8, "group": 2},
            marks=pytest.mark.slow,
        ),
        ({"dtype": "bfloat16", "state_dtype": "bfloat16", "state_v_first": True}, {"column_lanes": 8, "columns": 2, "group": 4}),
    ],
    ids=lambda value: str(value.get("state_dtype", "")),
)
def test_states_that_pass_through_shared_memory(emulated, tmp_path, case, knobs):
    arguments = cases.draw(OPS[DECODE], {**SMALL, "K": 64, "V": 64, **case})
    function = with_knobs(emulated, tmp_path, DECODE, arguments, **knobs, place="shared")
    want = parity.expected(OPS[DECODE], arguments)
    pool = arguments["initial_state_source"]
    for odd in (False, True):
        given = cases.clone(arguments)
        if odd:
            given["initial_state_source"] = torch.empty(pool.numel() + 1, dtype=pool.dtype)[1:].view(pool.shape).copy_(pool)
        errors, limits = parity.compare(OPS[DECODE], parity.run(OPS[DECODE], given, function), want)
        assert all(errors[name] <= limits[name] for name in limits), (odd, errors)
    assert all(parity.rms_ratio(torch.zeros_like(value), value) > 0.5 for value in want.values())


@needs_cxx
@pytest.mark.parametrize(
    ("op", "case", "few"),
    [
        (DECODE, {"state_dtype": "float32"}, 4),
        pytest.param(DECODE, {"state_dtype": "bfloat16", "state_v_first": True}, 0, marks=pytest.mark.slow),
        # Several tokens, and none; states of less than fp32 are not rounded between tokens: those calls have a plan of their own.
        pytest.param(UPDATE, {"state_dtype": "float32", "lengths": (2, 0, 1), "S": 4}, 0, marks=pytest.mark.slow),
        (UPDATE, {"state_dtype": "bfloat16", "T": 3}, 0),
    ],
    ids=lambda value: str(value.get("state_dtype", "")) if isinstance(value, dict) else str(value),
)
def test_states_that_the_copy_engine_moves(tmp_path, op, case, few):
    spec, target = OPS[op], resolve(f"{PREFIX}cuda-sm90")
    case = {**SMALL, "B": 3, "S": 4, "K": 64, "V": 64, "dtype": "bfloat16", "use_qk_l2norm_in_kernel": True, **case}
    if "lengths" in case:
        case["with"] = (*case["with"], "cu_seqlens")
    arguments = cases.draw(spec, case)
    geometry = check.geometry_of(spec, arguments)
    default = schedule.choose(spec, geometry, target).space.default(geometry)
    assert default["threads"] == case["K"]  # else all states are in registers
    knobs = {**default, "few": few}
    function = with_knobs(target, tmp_path, op, arguments, **knobs)
    calls = [arguments]
    if "T" in case:
        calls.append(cases.draw(spec, {**case, "T": 1}))
    elif few:
        calls.append(cases.draw(spec, {**case, "B": few // case["HV"]}))
    for given in calls:
        want, pool = parity.expected(spec, given), given["initial_state_source"]
        assert all(parity.rms_ratio(torch.zeros_like(value), value) > 0.5 for value in want.values())
        odd = torch.empty(pool.numel() + 1, dtype=pool.dtype)[1:].view(pool.shape)
        for place in (pool.clone(), odd.copy_(pool)):
            errors, limits = parity.compare(
                spec, parity.run(spec, {**cases.clone(given), "initial_state_source": place}, function), want
            )
            assert all(errors[name] <= limits[name] for name in limits), errors
            others = [n for n in range(len(pool)) if n not in given["initial_state_indices"]]
            assert others and torch.equal(place[others], pool[others])


@needs_cxx
def test_a_pool_at_an_odd_address_is_no_misaligned_access(emulated):
    arguments = cases.draw(OPS[DECODE], {**SMALL, "dtype": "float32"})
    want = parity.expected(OPS[DECODE], arguments)
    pool = arguments["initial_state_source"]
    arguments["initial_state_source"] = torch.empty(pool.numel() + 1)[1:].view(pool.shape).copy_(pool)
    got = parity.run(OPS[DECODE], arguments)
    errors, limits = parity.compare(OPS[DECODE], got, want)
    assert all(errors[name] <= limits[name] for name in limits)


@needs_cxx
def test_an_empty_batch_launches_nothing(emulated):
    arguments = cases.draw(OPS[GATING], {"M": 4, "HV": 3, "dtype": "float32"})
    empty = {**arguments, "a": arguments["a"][:0], "b": arguments["b"][:0]}
    assert parity.run(OPS[GATING], empty)["g"].shape == (0, 3)


@needs_nvcc
@pytest.mark.parametrize(("target", "number"), [("cuda-sm80", 80), ("cuda-sm90", 90)])
def test_cuda_packs_hold_machine_code_for_their_architecture(tmp_path, target, number):
    spec = resolve(target)
    requests = [
        build.Request(OPS[op], geometry_of_case(OPS[op], case)) for op, case in ((DECODE, SMALL), (GATING, OPS[GATING].cases[0]))
    ]
    kernel_cache.compile_pack(tmp_path / "pack", requests, spec)
    read = pack.read_whole(tmp_path / "pack")
    assert (read.manifest.image, read.manifest.arch, read.manifest.serves) == ("cubin", spec.arch, spec.serves)
    for entry in read.manifest.kernels:
        data = read.file(entry.image).read_bytes()
        assert data[:4] == b"\x7fELF"
        assert int.from_bytes(data[18:20], "little") == 190  # EM_CUDA
        assert b"__global__" not in data and b"#include" not in data
        assert data.count(entry.symbol.encode()) > 0
    libraries = b"".join(read.file(entry).read_bytes() for entry in read.manifest.kernels)
    assert b"__global__" not in libraries


def test_source_in_place_of_machine_code_is_refused(tmp_path):
    (tmp_path / "kernel.cubin").write_text('extern "C" __global__ void kernel() {}')
    with pytest.raises(PackError, match="no machine code"):
        images.check(tmp_path / "kernel.cubin", "cubin")
    shutil.copy(shutil.which("true"), tmp_path / "other.cubin")
    with pytest.raises(PackError, match="ELF file for machine"):
        images.check(tmp_path / "other.cubin", "cubin")


@needs_cxx
def test_pack_for_another_architecture_is_refused_with_what_differs(emulated, tmp_path, monkeypatch):
    geometry = geometry_of_case(OPS[GATING], OPS[GATING].cases[0])
    kernel_cache.compile_pack(tmp_path / "pack", [build.Request(OPS[GATING], geometry)], emulated)
    path = tmp_path / "pack" / pack.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda", "arch": "sm_80", "serves": ["8.0", "8.6"]}))
    found = pack.read(tmp_path / "pack")
    with pytest.raises(PackError, match="none is present"):
        monkeypatch.setattr(device, "architecture", lambda kind: None)
        pack.check_device(found)
    monkeypatch.setattr(device, "architecture", lambda kind: "9.0")
    with pytest.raises(
        PackError, match=r"sm_80 \(cuda devices of architecture 8\.0, 8\.6\), the device that is present has 9\.0"
    ):
        pack.check_device(found)
    monkeypatch.setattr(device, "architecture", lambda kind: "8.6")
    pack.check_device(found)


@needs_cxx
def test_a_driver_that_is_not_there_is_an_error(emulated, tmp_path):
    geometry = geometry_of_case(OPS[GATING], OPS[GATING].cases[0])
    kernel_cache.compile_pack(tmp_path / "pack", [build.Request(OPS[GATING], geometry)], emulated)
    path = tmp_path / "pack" / pack.MANIFEST
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "driver": {**data["driver"], "library": "libnothing.so.1"}}))
    found = pack.read(tmp_path / "pack")
    with pytest.raises(PackError, match=r"driver cannot be loaded: libnothing\.so\.1"):
        load.load_kernel(found, found.manifest.kernels[0])
    path.write_text(json.dumps({**data, "driver": {**data["driver"], "prefix": "other"}}))
    found = pack.read(tmp_path / "pack")
    with pytest.raises(PackError, match="no function otherInit"):
        load.load_kernel(found, found.manifest.kernels[0])


def test_a_family_means_the_device_that_is_present(monkeypatch):
    monkeypatch.setattr(device, "architecture", lambda kind: None)
    resolve.cache_clear()
    try:
        assert not resolve("cuda").concrete
        with pytest.raises(TargetError, match="needs what this machine lacks: a cuda device"):
            runnable(resolve("cuda"))
        for present, expected in (("8.6", "cuda-sm80"), ("9.0", "cuda-sm90")):
            monkeypatch.setattr(device, "architecture", lambda kind, present=present: present)
            resolve.cache_clear()
            assert resolve("cuda") == named(expected) == resolve("auto", "cuda")
            assert runnable(resolve("cuda")).missing() == []
        monkeypatch.setattr(device, "architecture", lambda kind: "12.0")
        resolve.cache_clear()
        derived = resolve("cuda")
        assert (derived.arch, derived.serves, derived.lineage[1:]) == ("sm_120", ("12.0",), ("cuda",))
        assert dict(derived.codegen)["arch"] == "sm_120"
        assert resolve(derived.text) == derived
    finally:
        resolve.cache_clear()


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_states_what_it_needs(name):
    target = named(name)
    assert target.serves and target.arch and target.rank
    assert {"library", "prefix", "launch", "error"} == set(dict(target.driver)) - {"loader"}
    assert emulation_of(target).device == "cpu"
    assert resolve(emulation_of(target).text) == emulation_of(target)
    assert emulation_of(target).digest() != target.digest()


def test_explicit_targets_speak_for_their_own_device(monkeypatch):
    spec = OPS[GATING]
    geometry = check.geometry_of(spec, cases.draw(spec, {"M": 3, "HV": 4, "dtype": "float32"}))
    monkeypatch.setenv("TVM_GDN_TARGET", "cuda-sm80")
    dispatch.reset()
    assert str(dispatch.lookup(spec, geometry, "cpu")).startswith("compiled (x86")
    if device.architecture("cuda") is None:
        with pytest.raises(TargetError, match="a cuda device"):
            dispatch.lookup(spec, geometry, "cuda")
    dispatch.reset()


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="nvcc is not on PATH"):
        images._compile_source("", [], named("cuda-sm80"), tmp_path / "kernel.cubin")


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no C interface for DLPack")
def test_scratch_memory_comes_from_torch_in_c(tmp_path):
    """The launcher's own allocations: apart, writable, free to be used again when they were given back, refused past 64."""
    launcher = ctypes.PyDLL(str(build.build_launcher(tmp_path, named("cuda-sm90"))))
    allocate, give_back = launcher.tvm_gdn_device_allocate, launcher.tvm_gdn_device_give_back
    allocate.restype, allocate.argtypes = (
        ctypes.c_void_p,
        (ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
    )
    give_back.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    cpu, size = 1, 1 << 16

    def call(_tensor):
        addresses = [allocate(cpu, 0, size, 0, 0) for _ in range(64)]
        assert None not in addresses
        assert not allocate(cpu, 0, size, 0, 0)
        for number, address in enumerate(addresses):
            ctypes.memset(address, number, size)
        assert all(ctypes.string_at(address, size) == bytes([number]) * size for number, address in enumerate(addresses))
        for address in addresses:
            assert give_back(cpu, 0, address) == 0
        again = allocate(cpu, 0, 0, 0, 0)
        assert again
        return give_back(cpu, 0, again)

    assert tvm_ffi.convert(call)(torch.zeros(3)) == 0
