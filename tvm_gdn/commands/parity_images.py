"""What machine code that was built for a device and not run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm_gdn import images, kernel_cache, pack
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.ops import OPS
from tvm_gdn.target import TargetSpec


def of_operators(chosen: Mapping[str, list[dict[str, Any]]], target: TargetSpec) -> dict[str, dict[str, Any]]:
    """Look into the images of operators' cases that the cache has.

    Parameters
    ----------
    chosen : mapping
        Cases by operator.
    target : TargetSpec
        The device's target.

    Returns
    -------
    dict
        By operator of which something was built: ``format`` of the images, ``text`` for tables, and ``facts``, the most that any
        of its kernels states.
    """
    found = {}
    for op, cases in chosen.items():
        folders = {kernel_cache.folder_of(OPS[op], geometry_of_case(OPS[op], case), target) for case in cases}
        stated = [_facts(folder, target) for folder in folders if kernel_cache.is_whole(folder)]
        if stated:
            facts = {name: max(one[name] for one in stated) for name in stated[0]}
            told = "".join(f", {name} {value}" for name, value in facts.items())
            found[op] = {"format": target.image, "built": True, "text": f"{target.image} built, not run{told}", "facts": facts}
    return found


def _facts(folder: Any, target: TargetSpec) -> dict[str, Any]:
    whole = pack.read_whole(folder)
    image = whole.manifest.kernels[0].image
    return dict(images.facts(whole.file(image), target.image)) if image else {}
