"""Exported C: compiled without warnings by what is installed, run, and called by a program that is not ours."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from exports import CHUNK, CONV, PACKED_TREE, UPDATE, request

from tvm_gdn import dispatch, parity
from tvm_gdn.export import c_files
from tvm_gdn.export.artifact import ExportError, draw, fill
from tvm_gdn.ops import OPS

C_KERNELS = [
    ("fused_gdn_gating", "dtype=bfloat16"),
    ("moe_route", ""),
    ("chunk_kda", "K=16,V=32,dtype=bfloat16,with=initial_state+cu_seqlens"),
    ("rms_norm_gated", "D=33,dtype=bfloat16,norm_before_gate=0,activation=sigmoid"),
    ("fused_experts", "D=51,I=65,dtype=float32"),  # more weights than a self-test carries
]
C_MORE = [
    (CHUNK, "K=32,V=16,dtype=float32,state_v_first=1"),
    ("packed_decode_gated_delta_rule", "K=32,V=16,dtype=float32,state=bfloat16"),
    ("causal_conv1d_fn", f"W=4,L=3,dtype=float32,state=float32,with={'+'.join(CONV)}"),
    ("causal_conv1d_update", "W=4,L=5,dtype=bfloat16,state=bfloat16,activation=silu,with=conv_state_indices"),
    ("moe_sort", ""),
    ("expert_stats", ""),
    ("fused_experts_packed", "D=20,G=4,KD=1,ND=1,KI=2,dtype=float32,scheme=bf16"),
    ("fused_experts_quantized", "D=60,G=4,KD=1,ND=2,KI=1,S13=1,S2=1,dtype=float32,scheme=int8"),
    ("fused_experts_quantized", "D=60,G=8,KD=1,ND=2,KI=1,S13=4,S2=4,scheme=int4_kgroup,w13_scale=bfloat16,w2_scale=bfloat16"),
]
C_TREE = (UPDATE, f"K=16,V=16,{PACKED_TREE}")


@pytest.mark.parametrize(
    ("op", "dims"), [*C_KERNELS, *(pytest.param(*kernel, marks=pytest.mark.slow) for kernel in (*C_MORE, C_TREE))]
)
def test_c_compiles_without_warnings_and_its_self_test_passes(op, dims, tmp_path):
    wanted = request(op, dims)
    files = c_files.build(wanted)
    assert b"tvm/" not in files[f"{wanted.symbol}.c"]
    fill(tmp_path, files)
    *checks, cmake = c_files.verify(wanted, tmp_path)
    assert checks and all(check.passed for check in checks), checks
    assert cmake.passed is (None if shutil.which("cmake") is None else True) and cmake.by == "cmake", cmake
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    # The self-test itself must notice a wrong result.
    source = (tmp_path / f"{wanted.symbol}.c").read_text()
    # clang warns of functions that nobody calls, even of inline ones.
    assert all(source.count(f"{name}(") > 1 for name in re.findall(r"^static [\w ]+[ *](\w+)\(", source, flags=re.MULTILINE))
    spoiled = source.replace("return (int)kernel(args", "args[0].type_index = 7; return 0; (void)kernel; (void)(args")
    assert spoiled != source
    (tmp_path / f"{wanted.symbol}.c").write_text(spoiled)
    assert not any(check.passed for check in c_files.verify(wanted, tmp_path))


@pytest.mark.parametrize("op", ["fused_recurrent_gated_delta_rule", "fused_experts"])
def test_target_c_serves_calls_in_this_process(op, monkeypatch):
    """The kernels that are exported are those of a target like any other: parity runs on them."""
    monkeypatch.setenv("TVM_GDN_TARGET", "c")
    dispatch.reset()
    try:
        result = parity.check_case(OPS[op], OPS[op].cases[0])
    finally:
        monkeypatch.undo()
        dispatch.reset()
    assert result.passed and result.served == "compiled (c, generic)", result


def test_c_library_called_by_a_program_that_is_not_ours(tmp_path):
    """Built as a shared library and called through ctypes: other sizes than the self-test's, and a refused call."""
    wanted = request(CHUNK, "K=32,V=16,dtype=float32")
    fill(tmp_path, c_files.build(wanted))
    library = tmp_path / "lib.so"
    subprocess.run(
        ["cc", "-std=c99", "-O1", "-shared", "-fPIC", tmp_path / f"{wanted.symbol}.c", "-o", library, "-lm"], check=True
    )
    function, error = (getattr(ctypes.CDLL(str(library)), wanted.symbol + end) for end in ("", "_error"))
    error.restype = ctypes.c_char_p
    values, want = draw(wanted, seed=3, B=3, T=65, H=2, HV=4)
    tensors = [values[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
    o, final = torch.full((3, 65, 4, 16), float("nan")), torch.full((3, 4, 32, 16), float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]

    def call(heads, scale=32**-0.5):
        tail = [ctypes.c_void_p(o.data_ptr()), ctypes.c_void_p(final.data_ptr())]
        sizes = [ctypes.c_int64(n) for n in (3, 65, heads, 4, 3)]
        # Tensors and scalars in the operator's order, outputs, then B, T, H, HV, N.
        return function(*pointers[:5], ctypes.c_float(scale), pointers[5], ctypes.c_int(1), *tail, *sizes)

    assert f"int64_t {'HV'}" in (tmp_path / f"{wanted.symbol}.h").read_text()
    assert call(2) == 0, error()
    for name, got in (("o", o), ("final_state", final)):
        assert parity.rms_ratio(got, want[name]) < 1e-5
    assert call(3) == -1
    assert b"HV" in error() or b"head" in error()


def test_c_has_no_float16():
    with pytest.raises(ExportError, match=r"float16.*allowed: float32, bfloat16"):
        c_files.build(request(CHUNK, "K=32,V=16,dtype=float16"))
