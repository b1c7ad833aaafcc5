"""How commands write results: tables and JSON on stdout, never logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm_gdn.errors import ArgumentError


def emit(text: str = "") -> None:
    """Write a result to stdout."""
    sys.stdout.write(f"{text}\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns of plain text.

    Parameters
    ----------
    header : sequence of str
        Column titles.
    rows : sequence of sequence of str
        One text per column.
    right : sequence of int
        Columns that are aligned to the right.

    Returns
    -------
    str
        Lines without a newline at the end.
    """
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def split_common(labels: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all labels have, and each label without them.

    Parameters
    ----------
    labels : sequence of str
        Labels of cases, words separated by blanks.

    Returns
    -------
    common : str
        Empty where there is only one label.
    rest : list of str
        ``-`` where nothing is left.
    """
    words = [label.split() for label in labels]
    common = [word for word in words[0] if len(words) > 1 and all(word in other for other in words)]
    return " ".join(common), [" ".join(word for word in text if word not in common) or "-" for text in words]


def as_json(data: Any) -> str:
    """JSON text of a report."""
    return json.dumps(data, indent=1)


def checked_destination(destination: str | None) -> str | None:
    """The argument of ``--json FILE``, refused before the work instead of after it.

    Raises
    ------
    ArgumentError
        The folder does not exist.
    """
    if destination not in {None, "-"} and not Path(destination).resolve().parent.is_dir():
        raise ArgumentError(f"--json {destination}: the folder {Path(destination).resolve().parent} does not exist")
    return destination


def deliver(data: Any, text: str, destination: str | None) -> None:
    """Write a report: the text to stdout, and JSON to a file; ``-`` puts the JSON on stdout in place of the text."""
    if destination == "-":
        emit(as_json(data))
        return
    emit(text)
    if destination is not None:
        Path(destination).write_text(as_json(data) + "\n", encoding="utf-8")


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 kernel``, ``2 kernels``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
