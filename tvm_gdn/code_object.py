"""What an AMD code object (HSACO) states about itself: architecture, registers, spills, scratch, local memory, threads.

Read from the ELF file's own note (AMDGPU metadata, MessagePack), so that a pack can be looked into wherever it lies, without a
tool of any vendor. Layout: "User Guide for AMDGPU Backend" of LLVM, "Code Object V3 and Above Metadata".
"""

from __future__ import annotations

import struct
from typing import Any

from tvm_gdn.errors import PackError

_SHT_NOTE, _NT_AMDGPU_METADATA = 7, 32
#: MessagePack's fixed sizes by first byte: format of the number that follows.
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = {
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"), 0xC4: ("data", ">B"), 0xC5: ("data", ">H"),
    0xC6: ("data", ">I"), 0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


def metadata(data: bytes) -> dict[str, Any]:
    """Metadata of a code object.

    Parameters
    ----------
    data : bytes
        The file.

    Returns
    -------
    dict
        ``amdhsa.target`` (such as ``"amdgcn-amd-amdhsa--gfx942"``), and per kernel in ``amdhsa.kernels`` its ``.name``,
        ``.vgpr_count``, ``.vgpr_spill_count``, ``.private_segment_fixed_size`` (bytes of scratch per thread),
        ``.group_segment_fixed_size`` (bytes of local memory), ``.max_flat_workgroup_size`` (threads) and more.

    Raises
    ------
    PackError
        It is no such file.
    """
    try:
        for name, kind, body in _notes(data):
            if name == b"AMDGPU" and kind == _NT_AMDGPU_METADATA:
                found, _ = _value(body, 0)
                if isinstance(found, dict):
                    return found
    except (struct.error, ArithmeticError, LookupError, ValueError) as error:
        raise PackError(f"the code object is damaged: {error}") from error
    raise PackError("the code object has no AMDGPU metadata")


def summary(data: bytes) -> dict[str, int | str]:
    """The worst of a code object's kernels: what decides whether it runs well.

    Returns
    -------
    dict
        ``arch``; ``threads`` and ``registers`` at most; ``spills``, ``scratch`` and ``lds`` (bytes) at most.
    """
    found = metadata(data)
    kernels = found.get("amdhsa.kernels", [])

    def most(*names: str) -> int:
        return max((sum(int(kernel.get(name, 0)) for name in names) for kernel in kernels), default=0)

    return {
        "arch": str(found.get("amdhsa.target", "")).rpartition("-")[2],
        "threads": most(".max_flat_workgroup_size"),
        "registers": most(".vgpr_count"),
        "spills": most(".vgpr_spill_count", ".sgpr_spill_count"),
        "scratch": most(".private_segment_fixed_size"),
        "lds": most(".group_segment_fixed_size"),
    }


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """Notes of a 64-bit little-endian ELF file: name, type, content."""
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    found = []
    for n in range(count):
        (kind,) = struct.unpack_from("<I", data, start + n * size + 4)
        offset, length = struct.unpack_from("<QQ", data, start + n * size + 0x18)
        at, end = offset, offset + length
        while kind == _SHT_NOTE and at + 12 <= end:
            name_size, body_size, note = struct.unpack_from("<III", data, at)
            body = at + 12 + (name_size + 3) // 4 * 4
            found.append((data[at + 12 : at + 12 + name_size].rstrip(b"\0"), note, data[body : body + body_size]))
            at = body + (body_size + 3) // 4 * 4
    return found


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """One MessagePack value, and where the next begins."""
    first = data[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return (first if first < 0x80 else first - 256), at
    if first in {0xC0, 0xC2, 0xC3}:
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in _NUMBERS:
        (number,) = struct.unpack_from(_NUMBERS[first], data, at)
        return number, at + struct.calcsize(_NUMBERS[first])
    if first in _LENGTHS:
        kind, form = _LENGTHS[first]
        (count,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
    else:
        kind, count = next((k, first - low) for k, low in (("text", 0xA0), ("list", 0x90), ("map", 0x80)) if first >= low)
    if kind in {"text", "data"}:
        raw = data[at : at + count]
        return (raw.decode() if kind == "text" else raw), at + count
    items = []
    for _ in range(count * (2 if kind == "map" else 1)):
        item, at = _value(data, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at
