"""Dot-product instructions of x86 as vector operations of TensorIR: AVX512-BF16, AVX512-VNNI, and what AVX2 has of the kind.

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


#: For AVX2, on 16 words at once: ``dot_pairs`` adds four products uint8 x int8 to each of 16 sums, as two of 16-bit pairs;
#: ``dot_bytes`` adds them to 16-bit pairs (their sum must fit); ``add_pairs`` adds both numbers of such pairs.
BYTES = """
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
define <8 x i32> @tvm_gdn_dot_pairs_8(<8 x i32> %c, <8 x i32> %u, <8 x i32> %s) alwaysinline {
  %a = bitcast <8 x i32> %u to <16 x i16>
  %b = bitcast <8 x i32> %s to <16 x i16>
  %a0 = and <16 x i16> %a, splat (i16 255)
  %a1 = lshr <16 x i16> %a, splat (i16 8)
  %bl = shl <16 x i16> %b, splat (i16 8)
  %b0 = ashr <16 x i16> %bl, splat (i16 8)
  %b1 = ashr <16 x i16> %b, splat (i16 8)
  %x = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a0, <16 x i16> %b0)
  %y = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a1, <16 x i16> %b1)
  %d = add <8 x i32> %c, %x
  %r = add <8 x i32> %d, %y
  ret <8 x i32> %r
}
define <8 x i32> @tvm_gdn_dot_bytes_8(<8 x i32> %c, <8 x i32> %u, <8 x i32> %s) alwaysinline {
  %a = bitcast <8 x i32> %u to <32 x i8>
  %b = bitcast <8 x i32> %s to <32 x i8>
  %x = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %a, <32 x i8> %b)
  %p = bitcast <8 x i32> %c to <16 x i16>
  %d = add <16 x i16> %p, %x
  %r = bitcast <16 x i16> %d to <8 x i32>
  ret <8 x i32> %r
}
define <8 x i32> @tvm_gdn_add_pairs_8(<8 x i32> %c, <8 x i32> %p, <8 x i32> %unused) alwaysinline {
  %a = bitcast <8 x i32> %p to <16 x i16>
  %x = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a, <16 x i16> splat (i16 1))
  %r = add <8 x i32> %c, %x
  ret <8 x i32> %r
}
"""
_HALVES = """
define <16 x i32> @tvm_gdn_NAME(<16 x i32> %c, <16 x i32> %u, <16 x i32> %s) alwaysinline {
  %c0 = shufflevector <16 x i32> %c, <16 x i32> poison, <8 x i32> <LOW>
  %c1 = shufflevector <16 x i32> %c, <16 x i32> poison, <8 x i32> <HIGH>
  %u0 = shufflevector <16 x i32> %u, <16 x i32> poison, <8 x i32> <LOW>
  %u1 = shufflevector <16 x i32> %u, <16 x i32> poison, <8 x i32> <HIGH>
  %s0 = shufflevector <16 x i32> %s, <16 x i32> poison, <8 x i32> <LOW>
  %s1 = shufflevector <16 x i32> %s, <16 x i32> poison, <8 x i32> <HIGH>
  %x = call <8 x i32> @tvm_gdn_NAME_8(<8 x i32> %c0, <8 x i32> %u0, <8 x i32> %s0)
  %y = call <8 x i32> @tvm_gdn_NAME_8(<8 x i32> %c1, <8 x i32> %u1, <8 x i32> %s1)
  %r = shufflevector <8 x i32> %x, <8 x i32> %y, <16 x i32> <LOW, HIGH>
  ret <16 x i32> %r
}
"""
for _word, _lanes in (("LOW", range(8)), ("HIGH", range(8, 16))):
    _HALVES = _HALVES.replace(_word, ", ".join(f"i32 {lane}" for lane in _lanes))
BYTES += "".join(_HALVES.replace("NAME", name) for name in ("dot_pairs", "dot_bytes", "add_pairs"))


def helper(name: str, *vectors: Any) -> Any:
    """Call one of `BYTES`."""
    return T.call_pure_extern("int32x16", f"tvm_gdn_{name}", *vectors)


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
