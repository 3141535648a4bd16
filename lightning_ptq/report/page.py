"""The HTML page of a report, which contains all it needs and loads nothing from the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lightning_ptq.report.headline import bits_per_weight, bop_share, headline, in_words, main_metric, times_smaller
from lightning_ptq.report.interactive import plotly_script, to_plotly
from lightning_ptq.report.plots import all_plots
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import ReportTable, is_number, plural, shown
from lightning_ptq.report.tables import all_tables
from lightning_ptq.report.verdict import verdict
from lightning_ptq.runtime.memory import format_bytes

INSTALL = "pip install 'lightning-ptq[plots]'"
"""Command that installs what draws the plots."""

_BESIDE = 6  # most columns of a table that has its plots beside it
_PLOT_OF = {"layers": "ranges"}  # by table, where it has another key


def html_page(record: RunRecord, pictures: Mapping[str, bytes]) -> str:
    """Return the page.

    Plots are interactive if plotly is installed. Otherwise they are pictures, and the page says what to install.

    Args:
        record: The record of a run.
        pictures: Plots as PNG files, by key, which stand in for interactive ones.
    """
    environment = Environment(
        loader=PackageLoader("lightning_ptq", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        shown=shown, is_number=is_number, format_bytes=format_bytes, plural=plural, install=INSTALL
    )
    script = plotly_script()
    charts = {key: [_Chart.of(chart) for chart in to_plotly(plot)] for key, plot in all_plots(record).items()}
    return environment.get_template("page.html").render(
        report=record,
        headline=headline(record),
        verdict=verdict(record),
        cards=_cards(record),
        tables=all_tables(record),
        plots_of=_plots_of,
        is_broad=_is_broad,
        plotly=None if script is None else Markup(script),
        charts=charts,
        pictures={key: base64.b64encode(picture).decode() for key, picture in pictures.items()},
    )


@dataclass(frozen=True)
class _Chart:
    """A chart of plotly.js, with its data and layout as JSON that can stand inside a script element."""

    title: str
    height: int
    json: Markup

    @classmethod
    def of(cls, chart: Mapping[str, Any]) -> _Chart:
        drawn = {"data": chart["data"], "layout": chart["layout"]}
        text = json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return cls(chart["title"], chart["height"], Markup(text))


def _plots_of(table: str) -> list[str]:
    """Return the keys of the plots that stand beside a table."""
    if table.startswith("units_"):
        return [table, table.replace("units_", "curves_")]
    return [_PLOT_OF.get(table, table)]


def _is_broad(table: ReportTable) -> bool:
    """Return True for a table that needs the width of the page, so that its plots stand below it."""
    return len(table.columns) > _BESIDE


def _cards(record: RunRecord) -> list[tuple[str, str]]:
    """Return the figures at the top of the page, each with what it says."""
    metric = main_metric(record)
    before, after = in_words(metric) if metric is not None else ("", "")
    units = [row for result in record.tuning.values() for row in result.units if row.steps]
    sizes = f"{format_bytes(record.packed_bytes)} instead of {format_bytes(record.float_bytes)}"
    return [
        *([(after, f"{metric.name}, {before} in float")] if metric is not None else []),
        (f"{times_smaller(record):.1f} x", f"smaller: {sizes}"),
        (f"{bits_per_weight(record):.3g}", "bits per quantized weight"),
        (f"1/{1 / max(bop_share(record), 1e-9):.3g}", "of the float bit operations"),
        *([(f"{sum(row.accepted for row in units)} of {len(units)}", "tuned units kept")] if units else []),
        (_duration(record.seconds), "total time"),
        (str(len(record.warnings)), "warning" if len(record.warnings) == 1 else "warnings"),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
