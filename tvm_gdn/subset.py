"""Source in a vendor's subset of CUDA C++: generated CUDA source with a launcher, renamed, and checked line by line.

What differs is data of the target's file (`[compiler]`): ``rewrite``, pairs of a regular expression and its replacement, applied
in order; ``forbidden``, pairs of a regular expression and the reason why no line may match it; ``command``, which is written into
the file's head. The file exports the operator's functions through tvm_ffi, with the argument checks of every other kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tvm_gdn.errors import BuildError
from tvm_gdn.target import TargetSpec


def translated(device: str, host: str, target: TargetSpec, symbol: str) -> str:
    """One translation unit for the vendor's compiler.

    Parameters
    ----------
    device, host : str
        Generated CUDA source of the kernels, and of the functions that launch them; none: "".
    target : TargetSpec
        The target.
    symbol : str
        Name of the file and of the function that it exports.

    Returns
    -------
    str

    Raises
    ------
    BuildError
        A line is outside the subset; the message names it.
    """
    text = f"{device}\n\n{host}"
    for pattern, replacement in _pairs(target, "rewrite"):
        text = re.sub(pattern, replacement, text)
    suffix = dict(target.compiler)["suffix"]
    command = compile_command(target, f"{symbol}{suffix}", f"{symbol}.so", "$(python -m tvm_ffi.config --includedir)")
    head = f"// {symbol}: written by tvm_gdn for {target.name} ({target.description}).\n// {' '.join(command)}\n"
    if host:
        head += f'// Then, in Python: tvm_ffi.load_module("{symbol}.so")["{symbol}"](arguments in the order of the operator).\n'
    text = head + text
    found = list(violations(text, target))
    if found:
        number, line, reason = found[0]
        raise BuildError(
            f"{symbol}{suffix}:{number}: outside the subset of {target.name}: {reason}: {line.strip()[:160]!r}"
            f"{f' (and {len(found) - 1} more lines)' if len(found) > 1 else ''}"
        )
    return text


def violations(text: str, target: TargetSpec) -> Iterator[tuple[int, str, str]]:
    """Lines that the vendor's compiler does not take: number, text, reason. What stands behind ``//`` is no code."""
    rules = [(re.compile(pattern), reason) for pattern, reason in _pairs(target, "forbidden")]
    for number, line in enumerate(text.splitlines(), 1):
        reason = next((reason for pattern, reason in rules if pattern.search(line.partition("//")[0])), None)
        if reason is not None:
            yield number, line, reason


def compile_command(target: TargetSpec, source: str, image: str, include: str) -> list[str]:
    """The vendor's command line for a source file."""
    number = "".join(re.findall(r"\d+[a-z]?$", target.arch))
    return [
        part.format(arch=target.arch, number=number, source=source, image=image, include=include)
        for part in dict(target.compiler)["command"]
    ]


def has_subset(target: TargetSpec) -> bool:
    """Whether a target's compiler takes a subset that source must stay in."""
    return "forbidden" in dict(target.compiler)


def _pairs(target: TargetSpec, name: str) -> list[tuple[Any, Any]]:
    texts = dict(target.compiler).get(name, ())
    return list(zip(texts[::2], texts[1::2], strict=True))
