"""What a parity run by emulation adds: whether the machine code itself can be built here, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm_gdn import images, kernel_cache, pack
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED, TargetSpec, named


def build(chosen: Mapping[str, list[dict[str, Any]]], target: TargetSpec) -> dict[str, dict[str, Any]]:
    """Build the device's own code of each operator's first case, and look into it.

    Parameters
    ----------
    chosen : mapping
        Cases by operator.
    target : TargetSpec
        An emulated target.

    Returns
    -------
    dict
        By operator: ``format`` of the code, ``built`` (bool), ``text`` for tables, and what its metadata states.
    """
    real = named(target.name.removeprefix(EMULATED))
    if images.tools(real) is None and real.image != "source":
        text = f"no {real.image}: {images.wanted_tool(real)} is not installed"
        return {op: {"format": real.image, "built": False, "text": text} for op in chosen}
    wanted = {op: (OPS[op], geometry_of_case(OPS[op], cases[0])) for op, cases in chosen.items() if cases}
    failures = kernel_cache.prebuild(wanted.values(), real)
    found = {}
    for op, (spec, geometry) in wanted.items():
        folder = kernel_cache.folder_of(spec, geometry, real)
        if not kernel_cache.is_whole(folder):
            reason = next((line for line in failures if line.startswith(f"{op} [")), "not built")
            found[op] = {"format": real.image, "built": False, "text": f"no {real.image}: {reason.splitlines()[-1]}"}
            continue
        whole = pack.read_whole(folder)
        image = whole.manifest.kernels[0].image
        facts = images.facts(whole.file(image), real.image) if image else {}
        told = "".join(f", {name} {value}" for name, value in facts.items())
        text = f"{real.image} built and inspected, not run{told}"
        found[op] = {"format": real.image, "built": True, "text": text, **({"facts": facts} if facts else {})}
    return found
