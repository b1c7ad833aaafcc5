"""AMD code objects: built without ROCm, they state what they use; torch's loader gets the bytes of the pack. Nothing runs on AMD."""

import ctypes
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from compilers import needs_cxx
from processes import environment

from tvm_gdn import build, code_object, dispatch, images, kernel_cache, pack, parity, torch_modules
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import BuildError, PackError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve

DECODE = "packed_decode_gated_delta_rule"
GATING = "fused_gdn_gating"
NORM = "rms_norm_gated"
ROUTE = "moe_route"
CHUNK = "chunk_gated_delta_rule"
MODEL = {"B": 1, "H": 16, "HV": 32, "K": 128, "V": 128, "S": 2, "dtype": "bfloat16", "state_dtype": "float32"}
MODEL["with"] = ("initial_state_source", "initial_state_indices")
needs_linker = pytest.mark.skipif(images.tools(named("rocm-gfx942")) is None, reason="no ld.lld: pip install ziglang")


@needs_linker
@pytest.mark.parametrize(
    ("target", "wave", "vector"),
    [
        ("rocm-gfx90a", 64, "global_load_dwordx4"),
        ("rocm-gfx942", 64, "global_load_dwordx4"),
        ("rocm-gfx1100", 32, "global_load_b128"),
    ],
)
def test_code_objects_are_for_their_architecture_and_spill_nothing(tmp_path, target, wave, vector):
    # Routing with a bias and groups: LLVM died of it while a thread had all scores of a token.
    cases = {DECODE: MODEL, GATING: OPS[GATING].cases[-1], NORM: OPS[NORM].cases[0], ROUTE: parity.sample(OPS[ROUTE])[1]}
    assert "num_expert_group" in cases[ROUTE] and "correction_bias" in cases[ROUTE]["with"]
    requests = [build.Request(OPS[op], geometry_of_case(OPS[op], case)) for op, case in cases.items()]
    built = build.run_builder(requests, resolve(target), tmp_path)
    assert not [kernel for kernel in built if isinstance(kernel, BuildError)]
    arch = named(target).arch
    for kernel in built:
        data = kernel.image.read_bytes()
        images.check(kernel.image, "hsaco")
        found = images.facts(kernel.image, "hsaco")
        assert found["arch"] == arch
        assert 0 < found["threads"] <= 256 and found["lds"] <= 65536 and found["registers"] <= 512
        (entry,) = code_object.metadata(data)["amdhsa.kernels"]
        assert entry[".wavefront_size"] == wave and entry[".name"] == kernel.table[0].split()[0]
        text = kernel.image.with_suffix(".s").read_text()
        assert f'.amdgcn_target "amdgcn-amd-amdhsa-hcc-{arch}' in text or f'"amdgcn-amd-amdhsa--{arch}' in text
        # On gfx90a registers may spill to the matrix unit's (24 do), which is no memory.
        assert found["scratch"] == 0 and not re.search(r"\bscratch_(load|store)", text)
        if kernel.spec.name == DECODE:
            assert vector in text  # the state moves in 16 bytes
            assert "ds_bpermute_b32" in text  # and is summed by shuffles
    manifest = tmp_path / "pack"
    pack.write(manifest, resolve(target), [], built, build.build_launcher(tmp_path, resolve(target)))
    read = pack.read_whole(manifest).manifest
    assert (read.image, read.arch, read.driver["loader"]) == ("hsaco", arch, "torch")


VIEWED = """
import sys
from pathlib import Path
from tvm.script import tirx as T
from tvm_gdn import images
from tvm_gdn.errors import BuildError
from tvm_gdn.target import named

@T.prim_func(s_tir=True)
def kernel(x_: T.handle):
    T.func_attr({"global_symbol": "kernel"})
    n = T.int64()
    x = T.match_buffer(x_, (n,), "float32")
    for block in T.thread_binding(n // 64, thread="blockIdx.x"):
        for lane in T.thread_binding(64, thread="threadIdx.x"):
            memory = T.alloc_buffer((256,), "uint8", scope="shared.dyn")
            view = T.decl_buffer((64,), "float32", data=memory.data, scope="shared.dyn")
            view[lane] = x[block * 64 + lane]
            T.evaluate(T.tvm_storage_sync("shared"))
            x[block * 64 + lane] = view[63 - lane]

try:
    images.compile_function(kernel, named("rocm-gfx942"), Path(sys.argv[1]), "kernel")
except BuildError as error:
    print(error)
"""


@needs_linker
def test_shared_memory_taken_for_global_memory_is_refused(tmp_path):
    """What TVM makes of a view of shared memory: no wrong code object leaves the builder."""
    script = tmp_path / "viewed.py"
    script.write_text(VIEWED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, env=environment()
    )
    assert "put shared memory into global memory" in done.stdout, done.stderr


def barriers_with_stores_under_way(text):
    """Barriers of a block that a wave may pass before what it wrote to LDS is there: the instruction does not wait for it."""
    under_way, found = False, []
    for line in text.splitlines():
        if re.search(r"\bds_(write|store|add)", line):
            under_way = True
        elif re.search(r"s_waitcnt.*lgkmcnt\(0\)", line):
            under_way = False
        elif "s_barrier" in line:
            found.append(under_way)
    return found


def products(folder, target, op, case, instruction):
    """Instructions of the matrix unit in a kernel's text, and what the code object states; all of its LDS is taken for LDS."""
    (kernel,) = build.run_builder([build.Request(OPS[op], geometry_of_case(OPS[op], case))], resolve(target), folder)
    assert not isinstance(kernel, BuildError), kernel
    found, text = images.facts(kernel.image, "hsaco"), kernel.image.with_suffix(".s").read_text()
    assert found["threads"] <= 256 and not re.search(r"\bflat_\w", text)
    assert re.search(r"\bds_(read|load)", text) and re.search(r"\bds_(write|store)", text)
    barriers = barriers_with_stores_under_way(text)
    assert len(barriers) > 5 and not any(barriers)
    return len(re.findall(instruction, text)), found


@needs_linker
@pytest.mark.parametrize(
    ("target", "instruction", "scratch"),
    [
        pytest.param("rocm-gfx90a", r"v_mfma_f32_16x16x16_?bf16", 0, marks=pytest.mark.slow),
        ("rocm-gfx942", r"v_mfma_f32_16x16x16_?bf16", 0),
        # WMMA's threads hold whole rows of operands: 13 of 256 registers spill.
        ("rocm-gfx1100", "v_wmma_f32_16x16x16_bf16", 64),
    ],
)
def test_chunked_products_use_the_matrix_unit(tmp_path, target, instruction, scratch):
    """A small geometry; docs/gpu.md has the numbers of the model's."""
    case = {"B": 1, "T": 37, "H": 1, "HV": 1, "K": 32, "V": 16, "dtype": "bfloat16", "output_final_state": True}
    count, found = products(tmp_path, target, CHUNK, case, instruction)
    # All elements of each product are asked for; the instruction stands there once, not once for each.
    assert 8 <= count <= 100
    assert found["scratch"] <= scratch and found["spills"] <= scratch // 4


@needs_linker
@pytest.mark.parametrize(
    ("target", "scheme", "instruction"),
    [
        ("rocm-gfx942", "", r"v_mfma_f32_16x16x16_?bf16"),
        pytest.param("rocm-gfx90a", "", r"v_mfma_f32_16x16x16_?bf16", marks=pytest.mark.slow),
        pytest.param("rocm-gfx1100", "", "v_wmma_f32_16x16x16_bf16", marks=pytest.mark.slow),
        pytest.param("rocm-gfx942", "int8", "v_mfma_i32_16x16x32_?i8", marks=pytest.mark.slow),
        pytest.param("rocm-gfx90a", "int8", "v_mfma_i32_16x16x16_?i8", marks=pytest.mark.slow),
        pytest.param("rocm-gfx1100", "int8", "v_wmma_i32_16x16x16_iu8", marks=pytest.mark.slow),
    ],
)
def test_experts_use_the_matrix_unit(tmp_path, target, scheme, instruction):
    """Both products of both plans, and those of pairs that are not sorted; no registers spill."""
    case = {"T": 3, "k": 2, "E": 4, "D": 104, "I": 40, "dtype": "bfloat16"}
    if scheme:
        case |= {"scheme": scheme, "scale_dtype": "float32", "D": 300, "I": 200}
    count, found = products(tmp_path, target, "fused_experts_quantized" if scheme else "fused_experts", case, instruction)
    assert 50 <= count <= 600
    assert found["scratch"] == 0 and found["spills"] == 0


def test_what_is_no_code_object_is_refused():
    for data in (b"", b"\x7fELF\x02\x01" + b"\0" * 100, b"hello"):
        with pytest.raises(PackError, match="no AMDGPU metadata"):
            code_object.metadata(data)
    with pytest.raises(PackError, match="damaged"):
        code_object.metadata(b"\x7fELF\x02\x01" + b"\0" * 34 + b"\xff" * 24)


def test_a_missing_linker_is_named_with_the_package_that_brings_one(monkeypatch, tmp_path):
    monkeypatch.setattr(images.shutil, "which", lambda name: None)
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    assert images.tools(named("rocm-gfx942")) is None
    with pytest.raises(BuildError, match=r"ld\.lld or .*`pip install ziglang`"):
        images._link([b"object"], named("rocm-gfx942"), tmp_path / "x.hsaco")


class _Loader:
    """Stands in for torch's: the "image" is a library of the emulation, whose kernels it finds by name."""

    def __init__(self):
        self.images = []

    def __call__(self, image):
        self.images.append(image)
        return self

    def __getattr__(self, name):
        handle = ctypes.c_void_p()
        if self.library.emuModuleGetFunction(ctypes.byref(handle), None, name.encode()):
            raise AttributeError(name)
        return types.SimpleNamespace(func=handle)


@needs_cxx
def test_the_pack_goes_through_torchs_module_loader(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_GDN_TARGET", "emulated:rocm-gfx942")
    target = resolve("emulated:rocm-gfx942")
    spec, case = OPS[GATING], {"M": 65, "HV": 33, "dtype": "bfloat16"}
    kernel_cache.compile_pack(tmp_path / "pack", [build.Request(spec, geometry_of_case(spec, case))], target)
    path = tmp_path / "pack" / pack.MANIFEST
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "driver": {**data["driver"], "loader": "torch"}}))
    loader = _Loader()

    def refuses(image):
        raise RuntimeError("HIP error: hipErrorNoBinaryForGpu")

    monkeypatch.setattr(torch.cuda._utils, "_cuda_load_module", refuses)
    monkeypatch.setenv("TVM_GDN_PACK_PATH", str(tmp_path / "pack"))
    image = pack.read(tmp_path / "pack").file(pack.read(tmp_path / "pack").manifest.kernels[0].image)
    loader.library = ctypes.CDLL(str(image))
    dispatch.reset()
    try:
        with pytest.raises(RuntimeError, match=r"loading .*: the driver answered 999"):
            parity.check_case(spec, case)
        monkeypatch.setattr(torch.cuda._utils, "_cuda_load_module", loader)
        for _ in range(2):
            result = parity.check_case(spec, case)
            assert result.passed and "emulated:rocm-gfx942" in result.served, result
        assert loader.images == [image.read_bytes()]  # once, the pack's bytes
    finally:
        monkeypatch.undo()
        dispatch.reset()


def test_a_torch_without_rocm_says_so():
    if torch.version.hip is None:
        assert "is not built for ROCm" in torch_modules.available()
        assert torch_modules.library() is None
