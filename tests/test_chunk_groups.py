"""The chunked rules with products of four warps together: their operands' layouts, the kernel emulated, and where there is one."""

import ctypes

import pytest
import torch
from compilers import needs_cxx
from test_device import with_knobs
from test_emulation import compiled
from tvm_gdn.schedules.gpu_chunk import ChunkHopper

from tvm_gdn import cases, images, parity
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED, resolve

OP = "chunk_gated_delta_rule"
CASE = {
    "B": 1, "T": 70, "H": 1, "HV": 1, "K": 128, "V": 32, "with": ("initial_state",), "output_final_state": True,
    "dtype": "bfloat16", "state_dtype": "float32", "use_qk_l2norm_in_kernel": True,
}  # fmt: skip
# 64 x 128 numbers, in halves of 64 columns, times 128 rows of twice 32; or the other way round, 64 of its columns times 64 rows.
PRODUCT = """
extern "C" __global__ void __launch_bounds__(128) product(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(128) product(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(1024) unsigned short left[2 * 64 * 64], right[128 * 64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int n = threadIdx.x; n < 8192; n += 128) {
    int row = n / 128 % 64, column = n % 128, piece = column % 64 / 8 ^ row % 8;
    left[column / 64 * 4096 + row * 64 + piece * 8 + column % 8] = tvm_gdn_bfloat16(x[n]);
    row = n / 64, column = n % 64, piece = column / 8 ^ row % 8;
    right[row * 64 + piece * 8 + column % 8] = tvm_gdn_bfloat16(x[8192 + n]);
  }
  __syncthreads();
  float sums[32];
  for (int n = 0; n < 32; ++n) sums[n] = n;
  if (TURNED) tvm_gdn_wgmma_two(sums, 0, sums, 16, left + 4096, right, 4, 8192, 1, 1);
  else tvm_gdn_wgmma_two(sums, 0, sums, 16, left, right, 8, 8192, 0, 1);
  tvm_gdn_wgmma_one(sums, 0, left, right, 4, 8192, 0);
  tvm_gdn_wgmma_arrived(sums, LEFT);
  for (int n = 0; n < 32; ++n) {
    const int row = warp * 16 + lane / 4 + n % 4 / 2 * 8, column = n / 16 * 32 + n % 16 / 4 * 8 + lane % 4 * 2 + n % 2;
    y[row * 64 + column] = sums[n];
  }
}
"""


# 64 x 128 numbers in registers, or 64 of their columns, times 64 rows of 128, 64 columns of 64 rows, or a triangle; and in shared
# memory, times 32 rows.
HELD = """
extern "C" __global__ void __launch_bounds__(128) product(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(128) product(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(1024) unsigned short left[2 * 64 * 64], right[2 * 64 * 64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int n = threadIdx.x; n < 8192; n += 128) {
    const int row = n / 128, column = n % 128, piece = column % 64 / 8 ^ row % 8;
    left[column / 64 * 4096 + row * 64 + piece * 8 + column % 8] = tvm_gdn_bfloat16(x[n]);
    right[column / 64 * 4096 + row * 64 + piece * 8 + column % 8] = tvm_gdn_bfloat16(x[8192 + n]);
  }
  __syncthreads();
  unsigned held[32];
  for (int n = 0; n < 32; ++n) {
    const int row = warp * 16 + lane / 4 + n % 2 * 8, column = n / 4 * 16 + lane % 4 * 2 + n % 4 / 2 * 8;
    held[n] = tvm_gdn_bfloat16(x[row * 128 + column]) | tvm_gdn_bfloat16(x[row * 128 + column + 1]) << 16;
  }
  float sums[32];
  for (int n = 0; n < 32; ++n) sums[n] = 1;
  if (KIND == 3) tvm_gdn_wgmma_shown(sums, 0, left, right, 8, 8192, 8192, 0);
  else tvm_gdn_wgmma_held(sums, 0, held, right, KIND ? 4 : 8, 8192, KIND, 0);
  tvm_gdn_wgmma_arrived(sums, 0);
  for (int n = 0; n < 32; ++n) {
    const int row = warp * 16 + lane / 4 + n % 4 / 2 * 8, column = n / 4 * 8 + lane % 4 * 2 + n % 2;
    y[row * 64 + column] = sums[n];
  }
}
"""


def product(folder, source, x):
    """What a kernel makes of numbers: 64 x 64."""
    library, function = (
        ctypes.CDLL(str(compiled(folder, images.with_functions(source), "product", "cuda-sm90"))),
        ctypes.c_void_p(),
    )
    assert library.emuModuleGetFunction(ctypes.byref(function), None, b"product") == 0
    y = torch.zeros(64, 64)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)]
    parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(pointer) for pointer in pointers))
    assert library.emuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, None, parameters, None) == 0
    return y


@needs_cxx
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_left_operands_come_from_registers(tmp_path, monkeypatch, kind):
    """Rows, columns, a triangle whose zeros are not read where they fill a quarter, and rows that are shown; sums go on from 1."""
    monkeypatch.setenv("TVM_GDN_EMULATION_SEED", "1")
    x = torch.randint(-8, 9, (2, 8192), generator=torch.Generator().manual_seed(0)).float()
    left, right = x[0].view(64, 128), x[1].view(64, 128)
    want = [left @ right.T, left[:, :64] @ right[:, :64], left[:, :64] @ right[:, :64].T, left @ right.T][kind]
    if kind == 2:
        # What is not read is no zero here.
        want[:, :32] -= left[:, 32:64] @ right[:32, 32:64].T
    y = product(tmp_path, HELD.replace("KIND", str(kind)), x)
    columns = 32 if kind == 3 else 64
    assert torch.equal(y[:, :columns], want[:, :columns] + 1)
    assert (y[:, columns:] == 1).all()


@needs_cxx
@pytest.mark.parametrize("turned", [0, 1])
def test_operands_lie_either_way_round(tmp_path, monkeypatch, turned):
    """Integers, so that the sums are exact; with one product not waited for, its sums are not there."""
    monkeypatch.setenv("TVM_GDN_EMULATION_SEED", "1")
    x = torch.randint(-8, 9, (2, 8192), generator=torch.Generator().manual_seed(0)).float()
    left, right = x[0].view(64, 128), x[1].view(128, 64)
    first = left[:, 64:].T @ right[:64] if turned else left @ right
    second = left[:, :64] @ right[:64, :32]
    for waited in (True, False):
        source = PRODUCT.replace("TURNED", str(turned)).replace("LEFT", "0" if waited else "1")
        y = product(tmp_path, source, x)
        want = first.clone()
        if waited:
            want[:, :32] += second
        assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({}, 3), ({"K": 192}, 1), ({"K": 64, "V": 96}, 1), ({"K": 96}, 0), ({"V": 16}, 0), ({"K": 256}, 0), ({"dtype": "float16"}, 0),
        ({"dtype": "float32"}, 0),
    ],
)  # fmt: skip
def test_where_warps_multiply_together(change, groups):
    assert ChunkHopper.default(geometry_of_case(OPS[OP], {**CASE, **change}))["groups"] == groups


def test_warps_of_groups_alone_are_refused():
    geometry = geometry_of_case(OPS[OP], CASE)
    knobs = {**ChunkHopper.default(geometry), "groups": 0, "warps": 12}
    with pytest.raises(TargetError, match="warps 12 without groups share out no tile; allowed: 4, 8"):
        ChunkHopper.tiles(geometry, **knobs)


@needs_cxx
@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({"T": 150, "H": 2, "HV": 4, "V": 64}, 2), ({"T": 65, "K": 64, "V": 96}, 3),
        *(pytest.param(*shape, marks=pytest.mark.slow)
          for shape in (({}, 2), ({"K": 64}, 1), ({"T": 300, "H": 2, "HV": 4, "V": 64}, 3))),
    ],
)  # fmt: skip
def test_groups_meet_the_reference(tmp_path, change, groups):
    """Two chunks and more, the last in part; then tensors at odd addresses, whose pieces are no 16 bytes."""
    case = {**CASE, **change}
    arguments = cases.draw(OPS[OP], case)
    want = parity.expected(OPS[OP], arguments)
    knobs = {**ChunkHopper.default(geometry_of_case(OPS[OP], case)), "groups": groups, "warps": 4 * groups}
    function = with_knobs(resolve(f"{EMULATED}cuda-sm90"), tmp_path, OP, arguments, **knobs)
    for odd in (False, True):
        for name in ("k", "v") if odd else ():
            value = arguments[name]
            arguments[name] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
        errors, limits = parity.compare(OPS[OP], parity.run(OPS[OP], cases.clone(arguments), function), want)
        assert all(errors[name] <= limits[name] for name in limits), errors
    assert all(parity.rms_ratio(torch.zeros_like(value), value) > 0.5 for value in want.values())
