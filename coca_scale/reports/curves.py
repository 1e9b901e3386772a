"""Line charts as SVG, drawn by matplotlib, to stand inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

MOST_POINTS = 800
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One run's values: its name, colour, and (step, value) in order."""

    name: str
    colour: str
    points: Points


def chart(curves: Sequence[Curve], description: str) -> str:
    """An `<svg>` of all curves; points that fall together are averaged.

    Args:
        curves: those without points are left out.
        description: for people who cannot see it.
    """
    figure = Figure(figsize=(5.2, 2.6))
    axes = figure.subplots()
    for curve in curves:
        if not curve.points:
            continue
        x, y = zip(*thinned(curve.points, MOST_POINTS), strict=True)
        marker = "o" if len(x) < 12 else ""
        axes.plot(x, y, color=curve.colour, linewidth=1.4, marker=marker, markersize=3.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#555555")
    figure.tight_layout(pad=0.4)
    buffer = io.StringIO()
    # text as text, and the same file for the same values
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "coca-scale"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
