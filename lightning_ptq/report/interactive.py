"""Plots as traces and layouts of plotly.js, for the page; the page's script adds the colours of its theme."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Iterable
from typing import Any

from lightning_ptq.report.plots import AFTER, BEFORE, THIRD, Axis, Bars, Heat, Lines, Panels, Plot, Series
from lightning_ptq.report.record import Histogram, LayerRecord
from lightning_ptq.report.table import shown
from lightning_ptq.runtime.memory import format_bytes

_MAX_LEGEND = 24  # series that a legend lists
_MODES = {"line": "lines", "line and points": "lines+markers", "points": "markers", "star": "markers"}
_MANY = 20  # bars from which their axis stands at the top, where it is in view
_TICKS = 5  # labels of an axis of sizes
_LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
_MISSING = {"text": "not recorded", "showarrow": False, "yref": "paper", "y": 0.5}


def plotly_script() -> str | None:
    """Return the source of plotly.js; None if plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        return None
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def to_plotly(plot: Plot) -> list[dict[str, Any]]:
    """Return charts of plotly.js: one, or one for each layer where a plot has panels.

    Each has ``title``, ``height`` in pixels, ``data`` and ``layout``. Numbers that are not finite are None.
    """
    if isinstance(plot, Panels):
        return [_panel(row) for row in plot.rows]
    chart = _bars(plot) if isinstance(plot, Bars) else _lines(plot) if isinstance(plot, Lines) else _heat(plot)
    return [{"title": plot.title, **chart}]


def _bars(plot: Bars) -> dict[str, Any]:
    # The y axis counts the names, because bars of equal names would fall on one place of an axis of texts.
    places = list(range(len(plot.names)))
    data = [
        {
            "type": "bar", "orientation": "h", "name": _text(row.name), "x": _finite(row.x), "y": places,
            "marker": {"color": row.colour}, **_hover(row.hover),
        }
        for row in plot.series
    ]  # fmt: skip
    values = {**_axis(plot.axis), "side": "top" if len(places) > _MANY else "bottom"}
    layout = {
        "barmode": "group", "bargap": 0.25, "xaxis": values,
        "yaxis": {"range": [len(places) - 0.5, -0.5], **_named(plot.names)}, "legend": _LEGEND,
    }  # fmt: skip
    return {"height": 110 + 26 * len(places), "data": data, "layout": layout}


def _lines(plot: Lines) -> dict[str, Any]:
    x = _axis(plot.x, [value for row in plot.series for value in row.x])
    layout = {
        "xaxis": x, "yaxis": _axis(plot.y), "showlegend": 1 < len(plot.series) <= _MAX_LEGEND, "legend": _LEGEND,
        "hovermode": "closest",
    }  # fmt: skip
    return {"height": 420, "data": [_trace(row) for row in plot.series], "layout": layout}


def _trace(row: Series) -> dict[str, Any]:
    star = row.style == "star"
    errors = {"array": _finite(row.error), "color": row.colour, "thickness": 1}
    return {
        "type": "scatter", "mode": _MODES[row.style], "name": _text(row.name), "x": _finite(row.x),
        "y": _finite(row.y), "line": {"color": row.colour, "width": 1.5},
        "marker": {"color": row.colour, "size": 14 if star else 8, "symbol": "star" if star else "circle"},
        **_hover(row.hover), **({"error_y": errors} if row.error else {}),
    }  # fmt: skip


def _heat(plot: Heat) -> dict[str, Any]:
    low, high = (math.log10(end) for end in plot.scale())
    values = [[None if math.isnan(shade) else math.log10(shade) for shade in row] for row in plot.shades()]
    hover = [
        [
            _text(f"{name}, {column}\n{plot.label}: {shown(value) or 'none'}")
            for column, value in zip(plot.columns, row, strict=True)
        ]
        for name, row in zip(plot.rows, plot.values, strict=True)
    ]
    powers = [low + (high - low) * step / (_TICKS - 1) for step in range(_TICKS)]
    bar = {
        "tickvals": powers, "ticktext": [f"{10**power:.2g}" for power in powers], "thickness": 12, "outlinewidth": 0,
        "title": {"text": _text(plot.label), "side": "right"},
    }  # fmt: skip
    data = [
        {
            "type": "heatmap", "z": values, "zmin": low, "zmax": high, "x": [_text(name) for name in plot.columns],
            "y": list(range(len(plot.rows))), "colorscale": "YlOrRd", "reversescale": True, "colorbar": bar,
            "hoverinfo": "text", "text": hover, "xgap": 1, "ygap": 1,
        }
    ]  # fmt: skip
    rows = {"range": [len(plot.rows) - 0.5, -0.5], **_named(plot.rows)}
    layout = {
        "xaxis": {"type": "category", "side": "top", "fixedrange": True, "showgrid": False},
        "yaxis": {**rows, "showgrid": False},
    }
    return {"height": 90 + 22 * len(plot.rows), "data": data, "layout": layout}


def _panel(row: LayerRecord) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for histogram, colour, axis in ((row.weights, BEFORE, ""), (row.inputs, AFTER, "2")):
        if histogram is None:
            notes.append({**_MISSING, "xref": f"x{axis} domain", "x": 0.5})
        data.append(_histogram(histogram, colour, axis))
    ends = [end for end in (row.low, row.high) if end is not None and row.inputs is not None]
    shapes = [
        {
            "type": "line",
            "x0": end,
            "x1": end,
            "y0": 0,
            "y1": 1,
            "xref": "x2",
            "yref": "paper",
            "line": {"color": THIRD},
        }
        for end in ends
    ]
    plain = {"showticklabels": False, "showgrid": False, "zeroline": False, "rangemode": "tozero", "fixedrange": True}
    layout = {
        "xaxis": {"domain": [0, 0.48], "nticks": 5, "title": {"text": "float weights"}},
        "xaxis2": {"domain": [0.52, 1], "nticks": 5, "title": {"text": "inputs, log counts"}, "anchor": "y2"},
        "yaxis": plain, "yaxis2": {**plain, "anchor": "x2"}, "showlegend": False, "shapes": shapes,
        "annotations": notes,
    }  # fmt: skip
    return {"title": f"{row.name}  {row.widths}", "height": 170, "data": data, "layout": layout}


def _histogram(histogram: Histogram | None, colour: str, axis: str) -> dict[str, Any]:
    edges, counts = (histogram.edges, histogram.counts) if histogram is not None else ([], [])
    bins = zip(edges, edges[1:], counts, strict=False)
    hover = [f"{shown(low)} to {shown(high)}: {count:,}" for low, high, count in bins]
    # A step belongs to its left edge, so the last height is repeated at the right end.
    heights = [*counts, *counts[-1:]]
    return {
        "type": "scatter", "mode": "lines", "fill": "tozeroy", "line": {"shape": "hv", "color": colour, "width": 1},
        "x": edges, "y": [math.log1p(height) for height in heights] if axis else heights,
        "xaxis": f"x{axis}", "yaxis": f"y{axis}", **_hover([*hover, *hover[-1:]]),
    }  # fmt: skip


def _axis(axis: Axis, values: Iterable[float] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": _text(axis.title)}, "type": "log" if axis.log else "linear"}
    if axis.log:
        found |= (
            {"exponentformat": "power", "dtick": 1} if axis.title != "training loss" else {"exponentformat": "power"}
        )
    if axis.bytes and (ends := [value for value in values if math.isfinite(value)]):
        low, high = min(ends), max(ends)
        ticks = [low + (high - low) * step / (_TICKS - 1) for step in range(_TICKS)] if high > low else [low]
        found |= {"tickvals": ticks, "ticktext": [format_bytes(tick) for tick in ticks]}
    return found


def _named(names: list[str]) -> dict[str, Any]:
    """Return the ticks of an axis that counts names; the page's script shortens them where there is no room."""
    return {"tickvals": list(range(len(names))), "ticktext": [_text(name) for name in names], "zeroline": False}


def _hover(texts: list[str]) -> dict[str, Any]:
    return {"hoverinfo": "text", "hovertext": [_text(text) for text in texts]} if texts else {}


def _text(text: str) -> str:
    """Return a text as plotly reads it: with tags for new lines, and other tags escaped."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _finite(values: Iterable[float | None]) -> list[float | None]:
    return [value if value is not None and math.isfinite(value) else None for value in values]
