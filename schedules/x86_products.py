"""Dot-product instructions of x86 as vector operations of TensorIR: AVX512-BF16, AVX512-VNNI.

TVM has no type that LLVM's bf16 dot product takes (bf16 is legalized to uint16), so that one goes through a helper in LLVM IR;
kernels that use it open `T.attr(0, "pragma_import_llvm", IR)` around their loops.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm_gdn.schedules.cpu import local_array

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


class Amx:
    """AMX instructions. Tile numbers are constants; all eight tiles have 16 rows of 64 bytes."""

    @staticmethod
    def _op(name: str, *args: Any) -> Any:
        return T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))

    def configure(self) -> None:
        """Set the shape of the tiles, for this thread."""
        config = local_array(64, dtype="uint8")
        values = {0: 1, **{16 + 2 * tile: 64 for tile in range(8)}, **{48 + tile: 16 for tile in range(8)}}
        for at in range(64):
            T.buffer_store(config, T.uint8(values.get(at, 0)), [at])
        self._op("ldtilecfg", T.address_of(config[0]))

    def release(self) -> None:
        """Give the tiles up, so that the operating system need not save them."""
        self._op("tilerelease")

    def zero(self, tile: int) -> None:
        """Tile of zeros."""
        self._op("tilezero", T.uint8(tile))

    def load(self, tile: int, element: Any, stride: int) -> None:
        """16 rows of 64 bytes, `stride` bytes apart, from a buffer element on."""
        self._op("tileloadd64", T.uint8(tile), T.address_of(element), T.int64(stride))

    def store(self, tile: int, element: Any, stride: int) -> None:
        """The reverse of `load`."""
        self._op("tilestored64", T.uint8(tile), T.address_of(element), T.int64(stride))

    def multiply(self, kind: str, acc: int, a: int, b: int) -> None:
        """Add a b to acc, with a [16, k], b [k, 16] in VNNI order; kind ``bf16ps``, or ``bssd``, ``bsud``, ``busd`` for bytes."""
        self._op(f"tdp{kind}", T.uint8(acc), T.uint8(a), T.uint8(b))
