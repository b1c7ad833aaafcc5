"""The emulation of devices on CPUs: warps of every size, random thread order, and what it must not let pass."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import needs_cxx

from tvm_gdn import build, images, load, pack, parity, torch_ops
from tvm_gdn.cases import draw
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import BuildError
from tvm_gdn.ops import OPS
from tvm_gdn.target import resolve

WARPS = {"cuda-sm80": 32, "rocm-gfx942": 64, "rocm-gfx1100": 32, "musa-mp22": 128, "musa-mp31": 32}
THREADS = 256
REVERSE = """
extern "C" __global__ void __launch_bounds__(256) reverse(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(256) reverse(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float tile[256];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[255 - threadIdx.x];
}
"""
SUMS = """
extern "C" __global__ void __launch_bounds__(256) sums(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(256) sums(float* __restrict__ x, float* __restrict__ y) {
  float sum = x[threadIdx.x];
  for (int bit = 1; bit < EMULATED_WARP; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit, EMULATED_WARP);
  y[threadIdx.x] = sum + __shfl_sync(0xffffffffu, x[threadIdx.x], 3, 32);
}
"""
DIVERGENT = REVERSE.replace("  __syncthreads();", "  if (threadIdx.x < 7) __syncthreads();")


# Two fragments of four registers: the second starts at 4.
FRAGMENTS = """
extern "C" __global__ void __launch_bounds__(256) fragments(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(256) fragments(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) unsigned short tile[32 * 24];
  alignas(64) unsigned registers[SIZE];
  for (int n = threadIdx.x; n < 32 * 24; n += 256) tile[n] = n;
  __syncthreads();
  tvm_gdn_load_a(registers, 0, tile, 24);
  tvm_gdn_load_a(registers, 4, tile + 16 * 24, 24);
  y[threadIdx.x] = registers[4] & 0xffff;
}
"""

# The copy engine brings 256 numbers; `DROPPED` is left out.
BULK = """
extern "C" __global__ void __launch_bounds__(256) bulk(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(256) bulk(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) unsigned long long arrival[1];
  __shared__ alignas(64) float tile[256];
  tile[threadIdx.x] = -1;
  __syncthreads();
  if (threadIdx.x == 0) {
    tvm_gdn_bulk_open(arrival);
    tvm_gdn_bulk_read(tile, x, 1024, arrival);
  }
  __syncthreads();
  tvm_gdn_bulk_wait(arrival);
  tile[threadIdx.x] += 1;
  tvm_gdn_bulk_publish();
  __syncthreads();
  if (threadIdx.x == 0) tvm_gdn_bulk_write(y, tile, 1024);
}
"""

# A matrix times its transpose; BELIEVED puts the sums down as if their places were known.
WMMA = """
extern "C" __global__ void __launch_bounds__(256) square(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(256) square(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) nv_bfloat16 tile[17 * 24];
  __shared__ alignas(64) float sums[16 * 20];
  for (int n = threadIdx.x; n < 256; n += 256) tile[n / 16 * 24 + n % 16] = nv_bfloat16(x[n] - 100);
  __syncthreads();
  if (threadIdx.x < 32) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, nv_bfloat16, nvcuda::wmma::row_major> left[1];
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, nv_bfloat16, nvcuda::wmma::col_major> right[1];
    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[1];
    nvcuda::wmma::fill_fragment(sum[0], 0.f);
    nvcuda::wmma::load_matrix_sync(left[0], tile, 24);
    nvcuda::wmma::load_matrix_sync(right[0], tile, 24);
    nvcuda::wmma::mma_sync(sum[0], left[0], right[0], sum[0]);
    nvcuda::wmma::store_matrix_sync(sums, sum[0], 20, nvcuda::wmma::mem_row_major);
    __syncwarp();
    for (int n = threadIdx.x; n < 256; n += 32) y[n] = sums[n / 16 * 20 + n % 16];
  }
}
"""
STORED = "nvcuda::wmma::store_matrix_sync(sums, sum[0], 20, nvcuda::wmma::mem_row_major);"
#: As a device of NVIDIA's has them.
BELIEVED = """for (int n = 0; n < 8; ++n)
      sums[(threadIdx.x / 4 + n / 2 % 2 * 8) * 20 + threadIdx.x % 4 * 2 + n % 2 + n / 4 * 8] = sum[0].x[n];"""


def compiled(folder, source, name, target):
    image = folder / f"{name}-{target}-{len(list(folder.iterdir()))}.emulation"
    images._emulate(source, [name], resolve(f"emulated:{target}"), image)
    return image


def launched(image, name, seed, monkeypatch):
    """Output of a kernel of two pointers, run as a driver would."""
    monkeypatch.setenv("TVM_GDN_EMULATION_SEED", str(seed))
    library, function = ctypes.CDLL(str(image)), ctypes.c_void_p()
    assert library.emuModuleGetFunction(ctypes.byref(function), None, name.encode()) == 0
    x, y = torch.arange(THREADS, dtype=torch.float32), torch.zeros(THREADS)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)]
    parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(pointer) for pointer in pointers))
    assert library.emuLaunchKernel(function, 1, 1, 1, THREADS, 1, 1, 0, None, parameters, None) == 0
    return x, y


@needs_cxx
@pytest.mark.parametrize("target", ["cuda-sm80", "rocm-gfx942", "musa-mp22"])
def test_warps_have_the_size_of_the_target(tmp_path, monkeypatch, target):
    warp = WARPS[target]
    image = compiled(tmp_path, SUMS, "sums", target)
    for seed in (0, 1, 2):
        x, y = launched(image, "sums", seed, monkeypatch)
        want = x.view(-1, warp).sum(1).repeat_interleave(warp) + x.view(-1, 32)[:, 3].repeat_interleave(32)
        assert torch.equal(y, want)


def test_warp_sizes_of_targets():
    for target, warp in WARPS.items():
        assert dict(resolve(f"emulated:{target}").codegen)["thread_warp_size"] == warp


@needs_cxx
def test_a_deleted_barrier_shows(tmp_path, monkeypatch):
    image = compiled(tmp_path, REVERSE, "reverse", "cuda-sm80")
    broken = compiled(tmp_path, REVERSE.replace("  __syncthreads();\n", ""), "reverse", "cuda-sm80")
    for seed in (1, 2, 3):
        x, y = launched(image, "reverse", seed, monkeypatch)
        assert torch.equal(y, x.flip(0))
        x, y = launched(broken, "reverse", seed, monkeypatch)
        assert not torch.equal(y.nan_to_num(-1), x.flip(0))


@needs_cxx
def test_a_barrier_that_not_all_threads_reach_ends_the_process(tmp_path):
    image = compiled(tmp_path, DIVERGENT, "reverse", "cuda-sm80")
    program = (
        "import pytest, sys; sys.path.insert(0, 'tests'); import test_emulation as t; "
        f"t.launched({str(image)!r}, 'reverse', 1, pytest.MonkeyPatch())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=build.builder_environment())
    assert done.returncode == -6
    assert "a barrier" in done.stderr and "in block (0, 0, 0)" in done.stderr


@pytest.mark.slow
def test_a_barrier_deleted_from_a_real_kernel_shows(tmp_path):
    """The chunked rule, as generated for a target: of three barriers taken out one at a time, at least one makes it wrong."""
    spec, target = OPS["chunk_gated_delta_rule"], resolve("emulated:musa-mp31")
    case = {"B": 1, "T": 37, "H": 1, "HV": 1, "K": 16, "V": 8, "dtype": "bfloat16", "output_final_state": True}
    geometry = geometry_of_case(spec, case)
    (built,) = build.run_builder([build.Request(spec, geometry)], target, tmp_path)
    assert not isinstance(built, BuildError), built
    source = built.image.with_suffix(".cc").read_text()
    barriers = [match.span() for match in re.finditer(r"__syncthreads\(\);", source)]
    assert len(barriers) > 8
    want = parity.expected(spec, draw(spec, case))
    launcher = build.build_launcher(tmp_path, target)

    def holds(text):
        image = tmp_path / f"{abs(hash(text))}.emulation"
        path = image.with_suffix(".cc")
        path.write_text(text)
        images.compile_emulated(path, target, image)
        kernel = pack.BuiltKernel(**{**built.__dict__, "image": image})
        folder = tmp_path / f"pack-{abs(hash(text))}"
        pack.write(folder, target, [], [kernel], launcher)
        made = pack.read(folder)
        function = torch_ops.call_function(spec, geometry, load.load_kernel(made, made.manifest.kernels[0]), "cpu")
        errors, limits = parity.compare(spec, parity.run(spec, draw(spec, case), function), want)
        return all(errors[name] <= limits[name] for name in limits)

    assert holds(source)
    taken = [barriers[len(barriers) * n // 4] for n in (1, 2, 3)]
    assert not all(holds(source[:start] + source[end:]) for start, end in taken)


@needs_cxx
@pytest.mark.parametrize("size", [8, 5])
def test_a_fragment_outside_of_its_registers_ends_the_process(tmp_path, size):
    """On devices what is written behind an array's end is dropped; alignment hides it here unless it is looked for."""
    source = images.with_functions(FRAGMENTS.replace("SIZE", str(size)))
    image = compiled(tmp_path, source, "fragments", "cuda-sm80")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]; import pytest, pathlib; from test_emulation import launched;"
        "x, y = launched(pathlib.Path(sys.argv[2]), 'fragments', 1, pytest.MonkeyPatch());"
        # Lane l has row l / 4 and columns l % 4 * 2 of the fragment's first block.
        "assert y[:32].tolist() == [(16 + n // 4) * 24 + n % 4 * 2 for n in range(32)]"
    )
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder, str(image)], capture_output=True, text=True, check=False)
    if size == 8:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "a fragment outside of its registers in block (0, 0, 0)" in done.stderr


@needs_cxx
def test_copies_of_the_engine_are_there_when_they_are_waited_for(tmp_path, monkeypatch):
    image = compiled(tmp_path, images.with_functions(BULK), "bulk", "cuda-sm90")
    hasty = compiled(tmp_path, images.with_functions(BULK.replace("  tvm_gdn_bulk_wait(arrival);\n", "")), "bulk", "cuda-sm90")
    for seed in (0, 1, 2):
        x, y = launched(image, "bulk", seed, monkeypatch)
        assert torch.equal(y, x + 1)
        x, y = launched(hasty, "bulk", seed, monkeypatch)
        assert not torch.equal(y, x + 1)


@needs_cxx
@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("    tvm_gdn_bulk_open(arrival);\n", "not open"),
        ("    tvm_gdn_bulk_read(tile, x, 1024, arrival);\n", "nobody asked for"),
        (", 1024, arrival", "not aligned"),
    ],
)
def test_misused_copies_end_the_process(tmp_path, dropped, message):
    source = BULK.replace(dropped, ", 1020, arrival" if dropped.startswith(",") else "")
    image = compiled(tmp_path, images.with_functions(source), "bulk", "cuda-sm90")
    program = (
        "import pytest, sys; sys.path.insert(0, 'tests'); import test_emulation as t; "
        f"t.launched({str(image)!r}, 'bulk', 1, pytest.MonkeyPatch())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=build.builder_environment())
    assert done.returncode == -6
    assert message in done.stderr


@needs_cxx
def test_fragments_of_wmma_have_no_places_that_could_be_known(tmp_path, monkeypatch):
    image = compiled(tmp_path, WMMA, "square", "musa-mp31")
    believing = compiled(tmp_path, WMMA.replace(STORED, BELIEVED), "square", "musa-mp31")
    # The left operand put down, as if it had the places of sums.
    copied = "for (int n = 0; n < 8; ++n) sum[0].x[n] = float(left[0].x[n]);\n    "
    mixing = compiled(tmp_path, WMMA.replace(STORED, copied + STORED), "square", "musa-mp31")
    for seed in (0, 1, 2):
        x, y = launched(image, "square", seed, monkeypatch)
        matrix = x.view(16, 16) - 100
        assert torch.equal(y.view(16, 16), matrix @ matrix.t())
        x, y = launched(believing, "square", seed, monkeypatch)
        assert not torch.equal(y.view(16, 16), matrix @ matrix.t())
        x, y = launched(mixing, "square", seed, monkeypatch)
        assert torch.equal(y.sort()[0], matrix.flatten().sort()[0]) and not torch.equal(y.view(16, 16), matrix)


@needs_cxx
def test_loads_and_stores_of_wmma_are_no_barriers(tmp_path, monkeypatch):
    """What a warp wrote for itself is not there before it has synchronized, nor what it has stored."""
    alone = WMMA.replace("n < 256; n += 256", "n < 256 && threadIdx.x < 32; n += 32").replace("__syncthreads", "__syncwarp")
    built = [
        compiled(tmp_path, source, "square", "musa-mp31")
        for source in (alone, alone.replace("  __syncwarp();\n", "", 1), WMMA.replace("    __syncwarp();\n", ""))
    ]
    for seed in (0, 1, 2):
        for image in built:
            x, y = launched(image, "square", seed, monkeypatch)
            matrix = x.view(16, 16) - 100
            assert torch.equal(y.view(16, 16), matrix @ matrix.t()) == (image == built[0])


@needs_cxx
@pytest.mark.parametrize(
    ("given", "wrong", "message"),
    [
        ("(left[0], tile, 24)", "(left[0], tile + 8, 24)", "not aligned"),
        ("(left[0], tile, 24)", "(left[0], tile, 20)", "not aligned"),
        ("(left[0], tile, 24)", "(left[0], tile + threadIdx.x % 2 * 16, 24)", "different addresses"),
        ("nvcuda::wmma::load_matrix_sync(right", "if (threadIdx.x) nvcuda::wmma::load_matrix_sync(right", ""),
    ],
)
def test_misused_fragments_of_wmma_end_the_process(tmp_path, given, wrong, message):
    image = compiled(tmp_path, WMMA.replace(given, wrong), "square", "musa-mp31")
    program = (
        "import pytest, sys; sys.path.insert(0, 'tests'); import test_emulation as t; "
        f"t.launched({str(image)!r}, 'square', 1, pytest.MonkeyPatch())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=build.builder_environment(), timeout=120)
    assert done.returncode == -6
    assert message in done.stderr
