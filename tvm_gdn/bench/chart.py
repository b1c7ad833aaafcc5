"""A picture of `tools/bench_peers.py`: experts as lines over tokens, one panel per scheme; other works as bars per shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour by the first word of a contender's name; several of one family differ by marker and hatch.
COLOURS = {"tvm_gdn": "#c1121f", "transformers": "#f4a261", "onnxruntime": "#457b9d", "kt-kernel": "#2a9d8f"}
_MARKERS, _HATCHES, _COLUMNS = "osD^v", ("", "//", "..", "xx"), 3


def write(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw rows of `side_by_side.measure`.

    Parameters
    ----------
    path : Path
        PNG file.
    rows : sequence of dict
        Of one run.
    title : str
        Machine and versions.

    Raises
    ------
    ImportError
        matplotlib is not installed (extra ``report``).
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["work"], row["group"]), []).append(row)
    height = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(5.4 * _COLUMNS, 4.2 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, _COLUMNS, squeeze=False).flatten()
    for axis, ((work, group), found) in zip(axes, panels.items(), strict=False):
        (_lines if "tokens" in found[0] else _bars)(axis, found)
        axis.set_title(" ".join(filter(None, (work, group))), fontsize=11)
        axis.set_ylabel("ms, median")
        axis.set_yscale("log")
        axis.grid(axis="y", which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"{title}; {rows[0]['threads']} threads. Whiskers: quartiles. Lower is faster.", fontsize=9)
    figure.savefig(path, dpi=110)


def _by_contender(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = (
            row["contender"]
            if len({other["threads"] for other in rows}) == 1
            else f"{row['contender']}, {row['threads']} threads"
        )
        found.setdefault(name, []).append(row)
    return found


def _whiskers(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[abs(row["ms"][edge] - row["ms"]["median"]) for row in rows] for edge in ("q1", "q3")]


def _styles(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Colour, and number within the family."""
    families = [name.split()[0].rstrip(",") for name in names]
    return {
        name: (COLOURS.get(family, "#777777"), families[:i].count(family))
        for i, (name, family) in enumerate(zip(names, families, strict=True))
    }


def _lines(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    found = _by_contender(rows)
    for name, (colour, number) in _styles(list(found)).items():
        part = found[name]
        axis.errorbar(
            [row["tokens"] for row in part], [row["ms"]["median"] for row in part], _whiskers(part), label=name, color=colour,
            marker=_MARKERS[number % len(_MARKERS)], linestyle=("-", "--", ":", "-.")[number % 4], markersize=5, capsize=2,
        )  # fmt: skip
    ticks = sorted({row["tokens"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens")


def _bars(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    found, labels = _by_contender(rows), list(dict.fromkeys(row["case"] for row in rows))
    width = 0.8 / len(found)
    for i, (name, (colour, number)) in enumerate(_styles(list(found)).items()):
        part = found[name]
        places = [labels.index(row["case"]) - 0.4 + (i + 0.5) * width for row in part]
        axis.bar(
            places, [row["ms"]["median"] for row in part], width, yerr=_whiskers(part), label=name, color=colour, capsize=2,
            hatch=_HATCHES[number % len(_HATCHES)], edgecolor="white", error_kw={"linewidth": 0.8},
        )  # fmt: skip
    axis.set_xticks(range(len(labels)), labels, fontsize=7, rotation=15)
