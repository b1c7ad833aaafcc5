"""Device code that TVM's LLVM generators make: what C source calls by name or finds in a header, in terms that they know.

The schedules of GPUs are the same for every vendor. Where machine code is generated without a C compiler there are no C functions
(`csrc/device_functions.h`) and not every shuffle, so both are lowered to what the generator has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm_gdn.errors import BuildError


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
    for name in ("tirx.call_extern", "tirx.call_pure_extern"):
        tvm.tirx.register_intrin_lowering(name, target=kind, f=_called, level=99)


def _shuffle_xor(call: Any) -> Any:
    """A shuffle from a lane that is computed: the one that every generator has."""
    import tvm

    mask, value, bits, width, warp = call.args
    lane = tvm.tirx.bitwise_and(_lane(), width - 1)
    return tvm.tirx.op.tvm_warp_shuffle(mask, value, tvm.tirx.bitwise_xor(lane, bits), width, warp)


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
    if not name.startswith("llvm."):
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


def _mfma(call: Any) -> Any:
    """One element of the matrix unit's product of 16 x 16 x 16; equal products become one instruction."""
    import tvm

    _, *numbers, element = call.args

    def vector(parts: list[Any]) -> Any:
        return tvm.tirx.Shuffle(parts, list(range(len(parts))))

    # Pairs of bf16 in a word each, which the intrinsic takes for 16-bit integers.
    a, b = (tvm.tirx.reinterpret("int16x4", vector(numbers[n : n + 2])) for n in (0, 2))
    none = tvm.tirx.const(0, "int32")
    name = "llvm.amdgcn.mfma.f32.16x16x16bf16.1k"
    made = tvm.tirx.op.call_llvm_pure_intrin("float32x4", name, a, b, vector(numbers[4:]), none, none, none)
    return tvm.tirx.Shuffle([made], [element])


#: C functions by name, as expressions.
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"tvm_gdn_aligned": _aligned, "tvm_gdn_bits": _bits, "tvm_gdn_mfma": _mfma}
