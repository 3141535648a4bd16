"""Plots as matplotlib figures, for PNG files and loggers; the only part of the report that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_ptq.report.plots import AFTER, BEFORE, THIRD, Axis, Bars, Heat, Lines, Panels, Plot
from lightning_ptq.report.record import Histogram
from lightning_ptq.runtime.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_PANELS = 48  # layers whose histograms are drawn
_MAX_LEGEND = 24  # series that a legend lists
_MARKERS = {"line": "-", "line and points": "o-", "points": "o", "star": "*"}


def draw(plot: Plot) -> Figure:
    """Draw a plot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if isinstance(plot, Bars):
        return _bars(plot)
    if isinstance(plot, Lines):
        return _lines(plot)
    return _heat(plot) if isinstance(plot, Heat) else _panels(plot)


def _new(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    return figure, axes


def _bars(plot: Bars) -> Figure:
    names, series = plot.names, plot.series
    figure, axes = _new(8, 1.2 + 0.11 * len(series) * len(names), plot.title)
    height = 0.8 / len(series)
    for index, row in enumerate(series):
        # The bars of a name are centred on its tick.
        positions = [i + (index - (len(series) - 1) / 2) * height for i in range(len(names))]
        axes.barh(positions, row.x, height, label=row.name, color=row.colour)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    _set_axis(axes, "x", plot.axis)
    return figure


def _lines(plot: Lines) -> Figure:
    figure, axes = _new(8, 4.5, plot.title)
    for row in plot.series:
        size = 11 if row.style == "star" else 6
        above = 3 if row.style in ("points", "star") else 2
        axes.plot(
            row.x, row.y, _MARKERS[row.style], color=row.colour, linewidth=1, markersize=size, label=row.name,
            zorder=above,
        )  # fmt: skip
        if row.error:
            bars = [0.0 if error is None else error for error in row.error]
            axes.errorbar(row.x, row.y, bars, fmt="none", ecolor=row.colour, elinewidth=1, capsize=2)
    _set_axis(axes, "x", plot.x)
    _set_axis(axes, "y", plot.y)
    axes.grid(alpha=0.3)
    if len(plot.series) <= _MAX_LEGEND:
        axes.legend(fontsize=7, ncols=2 if len(plot.series) > 6 else 1)
    return figure


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    axes.set(**{f"{which}label": axis.title})
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
    if axis.bytes:
        axes.locator_params(axis="x", nbins=6)  # the labels are wide
        axes.xaxis.set_major_formatter(lambda size, _: format_bytes(size))


def _heat(plot: Heat) -> Figure:
    from matplotlib.colors import LogNorm

    figure, axes = _new(2.5 + 0.8 * len(plot.columns), 1.2 + 0.2 * len(plot.rows), "")
    drawn = axes.imshow(plot.shades(), aspect="auto", cmap="YlOrRd", norm=LogNorm(*plot.scale()))  # NaN stays blank
    axes.set_yticks(range(len(plot.rows)), plot.rows, fontsize=7)
    axes.set_xticks(range(len(plot.columns)), plot.columns, fontsize=7)
    figure.colorbar(drawn, ax=axes, label=plot.label)
    return figure


def _panels(plot: Panels) -> Figure:
    from matplotlib.figure import Figure

    rows = plot.rows[:_MAX_PANELS]
    height = 0.6 + 0.85 * len(rows)
    # Without a layout engine, which would take seconds with this many panels: the positions are computed here.
    figure = Figure(figsize=(9, height))
    panels = figure.subplots(len(rows), 2, squeeze=False)
    figure.subplots_adjust(0.2, 0.2 / height, 0.98, 1 - 0.3 / height, wspace=0.06, hspace=0.45)
    for (left, right), row in zip(panels, rows, strict=True):
        _histogram(left, row.weights, BEFORE)
        _histogram(right, row.inputs, AFTER, log=True)
        for end in (row.low, row.high):
            if end is not None and row.inputs is not None:
                right.axvline(end, color=THIRD, linewidth=1)
        left.set_ylabel(f"{row.name}\n{row.widths}", fontsize=6, rotation=0, ha="right", va="center")
    more = f" (first {_MAX_PANELS} of {len(plot.rows)} layers)" if len(rows) < len(plot.rows) else ""
    panels[0][0].set_title(f"float weights{more}", fontsize=8)
    panels[0][1].set_title("inputs, counts on a log scale; red: ends of the grid", fontsize=8)
    return figure


def _histogram(axes: Axes, histogram: Histogram | None, colour: str, log: bool = False) -> None:
    axes.set_yticks([])
    axes.tick_params(labelsize=5, length=2, pad=1)
    if histogram is None:
        axes.text(0.5, 0.5, "not recorded", fontsize=6, ha="center", va="center", transform=axes.transAxes)
        return
    heights: Sequence[float] = [math.log1p(count) for count in histogram.counts] if log else histogram.counts
    axes.stairs(heights, histogram.edges, fill=True, color=colour)
    axes.set_xticks([histogram.edges[0], 0.0, histogram.edges[-1]])
    axes.xaxis.set_major_formatter("{x:.3g}")
