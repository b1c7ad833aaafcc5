"""Charts as SVG text for an HTML page: matplotlib draws, colours become CSS variables, so that dark mode works.

Text stays text (searchable, in the page's own font).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tvm_gdn.report.compare import percent
from tvm_gdn.report.data import KERNEL, OURS, BenchCase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Stand-ins that matplotlib draws with, and the CSS variables of the template that replace them.
_INK, _MUTED, _GRID, _BAD, _OURS, _FLOOR = (f"#0a0a{i:02x}" for i in range(6))
_PEERS = [f"#0a0a{i:02x}" for i in range(6, 12)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _BAD: "bad", _OURS: "ours", _FLOOR: "floor"} | {
    color: f"peer{i}" for i, color in enumerate(_PEERS)
}
_MARKERS = "sD^vPX"


@dataclass(frozen=True)
class Point:
    """One run of one case, for the history: `factor` is the change that counted against its predecessor."""

    date: datetime
    machine: str
    median: float
    q1: float
    q3: float
    factor: float | None
    regressed: bool


def latency(name: str, cases: Sequence[BenchCase], labels: Sequence[str]) -> str:
    """Times of every contender, one line per case, on a logarithmic axis.

    Parameters
    ----------
    name : str
        Of the chart, unique in the page.
    cases : sequence of BenchCase
        Of one operator.
    labels : sequence of str
        Text of each line.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with _figure((10.5, 1.0 + 0.34 * len(cases)), name) as figure:
        axes = figure.add_subplot()
        rows = range(len(cases))
        peers = list(dict.fromkeys(peer for case in cases for peer in case.peers))
        floors = list(dict.fromkeys(floor for case in cases for floor in case.floors))
        for row, case in zip(rows, cases, strict=True):
            medians = [times.median for times in case.us.values()]
            axes.plot([min(medians), max(medians)], [row, row], color=_GRID, linewidth=1, zorder=1)
        for i, floor in enumerate(floors):
            found = [(case.us[floor].median, row) for row, case in zip(rows, cases, strict=True) if floor in case.us]
            size = 15 - 5 * (i % 2)
            axes.plot(*zip(*found, strict=True), "|", color=_FLOOR, markersize=size, markeredgewidth=2, label=f"{floor} (floor)")
        for i, peer in enumerate(peers):
            found = [(case.us[peer].median, row) for row, case in zip(rows, cases, strict=True) if peer in case.us]
            style: dict[str, Any] = {"color": _PEERS[i % len(_PEERS)], "marker": _MARKERS[i % len(_MARKERS)]}
            axes.plot(*zip(*found, strict=True), linestyle="", markersize=6, label=peer, zorder=3, **style)
        kernel = [(case.us[KERNEL].median, row) for row, case in zip(rows, cases, strict=True) if KERNEL in case.us]
        if kernel:
            plain: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"}
            axes.plot(*zip(*kernel, strict=True), color=_OURS, label=f"{OURS}, bare kernel", zorder=3, **plain)
        ours = [case.us[OURS] for case in cases]
        spread = [[max(t.median - t.q1, 0) for t in ours], [max(t.q3 - t.median, 0) for t in ours]]
        axes.errorbar(
            [t.median for t in ours],
            list(rows),
            xerr=spread,
            fmt="o",
            color=_OURS,
            markersize=5,
            elinewidth=2,
            label=OURS,
            zorder=4,
        )
        axes.set_xscale("log")
        axes.set_yticks(list(rows), labels)
        axes.set_ylim(len(cases) - 0.4, -0.6)
        axes.set_xlabel("µs per call, median (bar: quartiles); further left is faster")
        axes.grid(visible=True, axis="x", which="major", color=_GRID, linewidth=0.6)
        _plain_numbers(axes.xaxis)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper right", ncols=len(names), frameon=False)
        return _svg(figure, name, f"Times of {name}: the numbers stand in the table below")


def history(name: str, panels: Mapping[str, Sequence[Point]]) -> str:
    """Our time in every run, one small panel per case; lines join runs on equal hardware, regressions are marked.

    Parameters
    ----------
    name : str
        Of the chart, unique in the page.
    panels : mapping
        Points by the text of their case, in the order of their dates.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    # Few panels keep the size that they have among many.
    with _figure((10.5 * columns / 4, 0.2 + 1.75 * lines), name) as figure:
        for i, (label, points) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(lines, columns, i)
            _panel(axes, points)
            axes.set_title(label, fontsize=8, loc="left", color=_INK)
        return _svg(figure, name, f"History of {name}: the numbers stand in the table below")


def _panel(axes: Any, points: Sequence[Point]) -> None:
    top = max(point.q3 for point in points)
    for machine in dict.fromkeys(point.machine for point in points):
        of_it = [(i, point) for i, point in enumerate(points) if point.machine == machine]
        places, there = [i for i, _ in of_it], [point for _, point in of_it]
        axes.fill_between(places, [p.q1 for p in there], [p.q3 for p in there], color=_OURS, alpha=0.2, linewidth=0)
        fill = _OURS if machine == points[-1].machine else "none"
        axes.plot(places, [p.median for p in there], "o-", color=_OURS, markerfacecolor=fill, markersize=4, linewidth=1.2)
    for i, point in enumerate(points):
        if point.regressed:
            axes.plot([i], [point.median], "^", color=_BAD, markersize=9, zorder=5)
            text = percent(point.factor) if point.factor is not None and point.factor > 1 else "wrong"
            axes.annotate(
                text, (i, point.median), (0, 7), textcoords="offset points", ha="center", va="bottom", fontsize=8, color=_BAD
            )
            top = max(top, point.median * 1.2)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_xticks(range(len(points)), [f"{p.date:%m-%d\n%H:%M}" if len(points) <= 6 else "" for p in points], fontsize=7)
    axes.set_ylabel("µs", fontsize=8)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)


@contextmanager
def _figure(size: tuple[float, float], name: str) -> Iterator[Figure]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _INK,
        "axes.edgecolor": _MUTED, "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.left": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        yield Figure(figsize=size, layout="constrained")


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of an HTML page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures share one page: matplotlib numbers the ids of each from 1.
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    width = f"{figure.get_figwidth() * 96:.0f}px"
    label = title.replace("&", "and").replace('"', "'").replace("<", "")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"|<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"',
        lambda m: f'<svg role="img" aria-label="{label}" style="width: {width}" {"".join(filter(None, m.groups()))}',
        text,
        count=1,
    )
