"""MUSA sources stay in the subset of CUDA C++ that mcc takes, say how to compile them, and compile with nvcc through a shim."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_gdn import build, check, pack, parity, schedule, subset
from tvm_gdn.cases import draw
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import BuildError
from tvm_gdn.ops import OPS
from tvm_gdn.report import data
from tvm_gdn.report.matrix import cells
from tvm_gdn.target import named, resolve

ROOT = Path(__file__).parent.parent
GATING, DECODE, CHUNK = "fused_gdn_gating", "packed_decode_gated_delta_rule", "chunk_gated_delta_rule"
EXPERTS, PACKED = "fused_experts", "fused_experts_packed"
MP31 = named("musa-mp31")
#: A line of a kernel, its replacement outside the subset, and what is said of it.
OUTSIDE = [
  ("  __syncthreads();", '  asm volatile("bar.sync 0;");', "inline assembly"),
  ("  __syncthreads();", "  __ldmatrix(a, b);", "PTX instructions"),
  ("  __syncthreads();", "  cp_async_wait();", "PTX instructions"),
  ("  __syncthreads();", "  __pipeline_commit();", "a builtin of NVIDIA's compiler"),
  ("  __syncthreads();", "  nvcuda::wmma::fill_fragment(c, 0.f);", "a CUDA namespace"),
  ("  __syncthreads();", "  cudaMemsetAsync(p, 0, n, s);", "a CUDA name"),
  ("  __syncthreads();", "  cuLaunchKernel(f);", "a CUDA name"),
  ("  __syncthreads();", "  nv_bfloat16 x;", "an NVIDIA type"),
  ("  __syncthreads();", "  __nv_bfloat16 x;", "an NVIDIA type"),
  ("  __syncthreads();", "  __shared__ alignas(64) float x[4];", "alignment goes before __shared__"),
  ("  __syncthreads();", "  unsigned mask = __activemask();", "a warp builtin that is not in the subset"),
  ("  __syncthreads();", "  x += __shfl_xor_sync(0xffffffff, x, 1);", "a shuffle without a width"),
  ("  __syncthreads();", "  x += __shfl_xor_sync(0xffffffff, x, 1, 64);", "a shuffle without a width"),
  ("#include <musa_runtime.h>", "#include <cuda_runtime.h>", "a CUDA header"),
  ("#include <musa_runtime.h>", "#include <cooperative_groups.h>", "a CUDA header"),
]  # fmt: skip
GOOD = """#include <musa_runtime.h>
#include <mma.h>
extern "C" __global__ void f(float* x) {  // no asm, no cuda
  alignas(64) __shared__ float y[32];
  y[threadIdx.x] = x[threadIdx.x] + __shfl_xor_sync(0xffffffffu, x[0], 1, 32);
  mtmusa::wmma::fragment<mtmusa::wmma::accumulator, 16, 16, 16, float> c;
  mtmusa::wmma::fill_fragment(c, 0.f);
  mtmusa::wmma::store_matrix_sync(y, c, 16, mtmusa::wmma::mem_row_major);
  __syncthreads();
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Sources of two short cases of four operators."""
    wanted = [(op, case) for op in (GATING, DECODE, CHUNK, EXPERTS) for case in parity.sample(OPS[op])]
    requests = [build.Request(OPS[op], geometry_of_case(OPS[op], case)) for op, case in wanted]
    return build.run_builder(requests, resolve("musa-mp31"), tmp_path_factory.mktemp("musa"))


def test_sources_stay_in_the_subset_and_say_how_to_compile_them(built, tmp_path):
    for kernel in built:
        assert not isinstance(kernel, BuildError), kernel
        text = kernel.image.with_suffix(".mu").read_text()
        assert not list(subset.violations(text, MP31))
        assert "// mcc --offload-arch=mp_31 -O3 -std=c++17 -shared -fPIC" in text
        assert f"{kernel.symbol}.mu -lmusart" in text
        assert f"__tvm_ffi_{kernel.symbol}(void* self_handle" in text  # the launcher's export
        assert "<<<" in text and "== TVM_GDN_DEVICE_TYPE" in text and "musaGetDevice" in text
        assert "gridDim.x ||" in text and "_dim = 1;" not in text  # nothing is launched where there is no work
        assert "cuda" not in text.lower()
        # The number of the device type stands in one place: a constant elsewhere would refuse every tensor.
        assert not re.search(r"v_int64 != |device_type\) == \d", text)
    # Packs say that they hold source, and nothing loads them.
    pack.write(tmp_path / "pack", MP31, [], built[:1], None)
    assert pack.read_any(tmp_path / "pack").manifest.image == "source"


def test_products_of_matrices_are_those_of_wmma(built):
    """All of the chunked rules, whose operands are bf16 numbers and sums of them; of experts those in 16 bits."""
    found = set()
    for kernel in built:
        text = kernel.image.with_suffix(".mu").read_text()
        kernels = text[text.index("__launch_bounds__") :]
        found.add((kernel.spec.name, kernel.geometry.dtype.get("x", ""), "mtmusa::wmma::mma_sync(" in kernels))
        assert ("#include <mma.h>" in text) == ("mtmusa::wmma::mma_sync(" in kernels)
        assert not re.search(r"tvm_gdn_mma\w*\(", kernels)
    wanted = {
        (GATING, "", False),
        (DECODE, "", False),
        (CHUNK, "", True),
        (EXPERTS, "float32", False),
        (EXPERTS, "bfloat16", True),
    }
    assert found == wanted


def test_what_wmma_multiplies():
    """Warps of 128 threads have the plain form, and so have dtypes that it has no products of."""

    def space(op, target):
        return schedule.find_space(OPS[op].algorithm, named(target))[0]

    for op in (CHUNK, EXPERTS):
        assert "wmma" not in space(op, "musa-mp22").knobs(geometry_of_case(OPS[op], parity.sample(OPS[op])[0]))
    for op in (EXPERTS, PACKED, "fused_experts_quantized"):
        for case in OPS[op].cases:
            scheme, data = case.get("scheme"), case["dtype"]
            fits = data != "float32" and scheme in {None, {"bfloat16": "bf16", "float16": "fp16"}[data]}
            geometry = check.geometry_of(OPS[op], draw(OPS[op], case))
            assert space(op, "musa-mp31").knobs(geometry)["wmma"] == ((True, False) if fits else (False,)), case
            assert space(op, "musa-mp31").default(geometry)["wmma"] == fits


@pytest.mark.parametrize(("line", "wrong", "reason"), OUTSIDE)
def test_what_is_outside_the_subset_is_named_with_its_line(line, wrong, reason):
    assert not list(subset.violations(GOOD, MP31))
    text = GOOD.replace(line, wrong)
    ((number, found, told),) = subset.violations(text, MP31)
    assert (number, found) == (text[: text.index(wrong)].count("\n") + 1, wrong)
    assert told.startswith(reason)


def test_a_source_outside_the_subset_is_refused():
    with pytest.raises(BuildError, match=r"f\.mu:\d+: outside the subset of musa-mp31: inline assembly: 'asm"):
        subset.translated(GOOD.replace("  __syncthreads();", '  asm volatile("bar.sync 0;");'), "", MP31, "f")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_wmma_through_the_shim(tmp_path):
    source = tmp_path / "f.mu"
    source.write_text(GOOD)
    shim = ROOT / "tvm_gdn" / "csrc" / "musa_shim"
    command = [
        "nvcc",
        "-x",
        "cu",
        "-w",
        "-std=c++17",
        "-ptx",
        "-arch=sm_80",
        f"-I{shim}",
        "-o",
        str(tmp_path / "f.ptx"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wmma.store" in (tmp_path / "f.ptx").read_text()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_the_sources_through_the_shim(tmp_path):
    """Runs nowhere here: `tools/run_musa_on_cuda.py` without --compile-only does, on a CUDA device."""
    file = tmp_path / "musa.json"
    tool = [sys.executable, str(ROOT / "tools" / "run_musa_on_cuda.py"), "--compile-only", "--op", GATING, "--json", str(file)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False, cwd=ROOT, env=build.builder_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 cases compiled" in done.stdout
    (run,) = data.load_runs(file)
    assert cells([run])[GATING, "musa-mp31"].status == "compiles"
    assert "not by mcc" in json.loads(file.read_text())["ops"][GATING]["image"]["text"]
