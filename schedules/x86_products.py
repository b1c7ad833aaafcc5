"""Dot-product instructions of x86 as vector operations of TensorIR: AVX512-BF16, AVX512-VNNI.

TVM has no type that LLVM's bf16 dot product takes (bf16 is legalized to uint16), so that one goes through a helper in LLVM IR;
kernels that use it open `T.attr(0, "pragma_import_llvm", IR)` around their loops.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

#: LLVM IR of the helpers; inlined away.
IR = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @tvm_gdn_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""


def dpbf16(acc: Any, a: Any, b: Any) -> Any:
    """acc[i] + a[2i] b[2i] + a[2i+1] b[2i+1]; a and b are bf16 pairs in int32x16, acc is float32x16."""
    return T.call_pure_extern("float32x16", "tvm_gdn_dpbf16", acc, a, b)


def dpbusd(acc: Any, unsigned: Any, signed: Any) -> Any:
    """acc[i] + sum of four products uint8 x int8, exact; operands are byte quads in int32x16, acc is int32x16."""
    return T.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpbusd.512",
        acc,
        T.reinterpret("uint8x64", unsigned),
        T.reinterpret("int8x64", signed),
    )
