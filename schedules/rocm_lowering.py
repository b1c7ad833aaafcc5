"""Device code that TVM's LLVM generators make: what C source calls by name or finds in a header, in terms that they know.

The schedules of GPUs are the same for every vendor. Where machine code is generated without a C compiler there are no C functions
(`csrc/device_functions.h`) and not every shuffle, so both are lowered to what the generator has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm_gdn.errors import BuildError

#: Functions in LLVM's language that are linked with the kernels, and inlined: a barrier of the block behind which what threads
#: wrote before it is there. TVM's is the instruction alone: LLVM then neither waits for stores to local memory nor keeps
#: accesses on their side of it.
LIBRARY = """
declare void @llvm.amdgcn.s.barrier()
define linkonce_odr i32 @tvm_gdn_barrier() alwaysinline convergent nounwind {
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  ret i32 0
}
"""


@functools.cache
def register(kind: str) -> None:
    """Teach TVM, in this process, how a code generator says what its schedules use.

    Parameters
    ----------
    kind : str
        Kind of the TVM target.
    """
    import tvm

    tvm.tirx.register_intrin_lowering("tirx.tvm_warp_shuffle_xor", target=kind, f=_shuffle_xor, level=99)
    tvm.tirx.register_intrin_lowering("tirx.tvm_storage_sync", target=kind, f=_sync, level=99)
    for name in ("tirx.call_extern", "tirx.call_pure_extern"):
        tvm.tirx.register_intrin_lowering(name, target=kind, f=_called, level=99)


def _shuffle_xor(call: Any) -> Any:
    """A shuffle from a lane that is computed: the one that every generator has."""
    import tvm

    mask, value, bits, width, warp = call.args
    lane = tvm.tirx.bitwise_and(_lane(), width - 1)
    return tvm.tirx.op.tvm_warp_shuffle(mask, value, tvm.tirx.bitwise_xor(lane, bits), width, warp)


def _sync(call: Any) -> Any:
    import tvm

    if call.args[0].value == "warp":
        raise BuildError("a barrier of a wave has no lowering on this target")
    return tvm.tirx.call_extern("int32", "tvm_gdn_barrier")


def _lane() -> Any:
    """Number of a thread in its wave."""
    import tvm

    def count(half: str, before: Any) -> Any:
        return tvm.tirx.call_pure_extern("int32", f"llvm.amdgcn.mbcnt.{half}", tvm.tirx.const(-1, "int32"), before)

    return count("hi", count("lo", tvm.tirx.const(0, "int32")))


def _called(call: Any) -> Any:
    name = call.args[0].value
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](call)
    if not name.startswith("llvm.") and f"@{name}(" not in LIBRARY:
        raise BuildError(f"{name} is a C function, and this target's code generator takes none")
    return call


def _aligned(call: Any) -> Any:
    import tvm

    _, address, size = call.args
    bits = tvm.tirx.reinterpret("uint64", address)
    return tvm.tirx.EQ(tvm.tirx.bitwise_and(bits, tvm.tirx.Cast("uint64", size - 1)), tvm.tirx.const(0, "uint64"))


def _bits(call: Any) -> Any:
    import tvm

    return tvm.tirx.reinterpret("uint32", call.args[1])


def _next(call: Any) -> Any:
    """The number at an address, which becomes one more."""
    import tvm

    return tvm.tirx.call_intrin("int32", "tirx.atomic_add", call.args[1], tvm.tirx.const(1, "int32"))


def _vector(parts: list[Any]) -> Any:
    import tvm

    return tvm.tirx.Shuffle(parts, list(range(len(parts)))) if len(parts) > 1 else parts[0]


def _product(words: int, operand: str, emit: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
    """One number of a matrix unit's product; equal products become one instruction.

    Of the call's numbers `words` are the left operand's and as many the right one's, which the intrinsic that `emit` calls takes
    as `operand`; the others are the sums.
    """

    def lowered(call: Any) -> Any:
        import tvm

        _, *numbers, element = call.args
        left, right = (tvm.tirx.reinterpret(operand, _vector(numbers[n : n + words])) for n in (0, words))
        return tvm.tirx.Shuffle([emit(left, right, _vector(numbers[2 * words :]))], [element])

    return lowered


def _mfma(name: str, dtype: str = "float32x4") -> Callable[[Any, Any, Any], Any]:
    def emit(left: Any, right: Any, sums: Any) -> Any:
        import tvm

        none = tvm.tirx.const(0, "int32")
        return tvm.tirx.op.call_llvm_pure_intrin(dtype, f"llvm.amdgcn.mfma.{name}", left, right, sums, none, none, none)

    return emit


def _mfma_halves(left: Any, right: Any, sums: Any) -> Any:
    """Products of bytes on units that take four of a row at once: two words each."""
    import tvm

    emit = _mfma("i32.16x16x16i8", "int32x4")
    for word in range(2):
        sums = emit(tvm.tirx.Shuffle([left], [word]), tvm.tirx.Shuffle([right], [word]), sums)
    return sums


def _wmma(kind: str) -> Callable[[Any, Any, Any], Any]:
    def emit(left: Any, right: Any, sums: Any) -> Any:
        import tvm

        return tvm.tirx.op.call_llvm_pure_intrin("float32x8", f"llvm.amdgcn.wmma.f32.16x16x16.{kind}", left, right, sums)

    return emit


def _wmma_halves(left: Any, right: Any, sums: Any) -> Any:
    """Products of bytes, 16 of a row at once: four words each, both signed."""
    import tvm

    yes, no = tvm.tirx.const(1, "bool"), tvm.tirx.const(0, "bool")
    for half in range(2):
        a, b = (tvm.tirx.Shuffle([operand], [half * 4 + n for n in range(4)]) for operand in (left, right))
        name = "llvm.amdgcn.wmma.i32.16x16x16.iu8"
        sums = tvm.tirx.op.call_llvm_pure_intrin("int32x8", name, yes, a, yes, b, sums, no)
    return sums


#: C functions by name, as expressions.
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "tvm_gdn_aligned": _aligned,
    "tvm_gdn_bits": _bits,
    "tvm_gdn_next": _next,
    # Pairs of bf16 in a word each, which the intrinsics take for 16-bit integers.
    "tvm_gdn_mfma": _product(2, "int16x4", _mfma("f32.16x16x16bf16.1k")),
    "tvm_gdn_mfma_half": _product(2, "float16x4", _mfma("f32.16x16x16f16")),
    "tvm_gdn_mfma_bytes": _product(2, "int64", _mfma("i32.16x16x32.i8", "int32x4")),
    "tvm_gdn_mfma_bytes_short": _product(2, "int32x2", _mfma_halves),
    "tvm_gdn_wmma": _product(8, "int16x16", _wmma("bf16")),
    "tvm_gdn_wmma_half": _product(8, "float16x16", _wmma("f16")),
    "tvm_gdn_wmma_bytes": _product(8, "int32x8", _wmma_halves),
}
