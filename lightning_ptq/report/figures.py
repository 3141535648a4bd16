"""The record of a run as plots, the only part of the report that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_ptq.allocation.frontier import Frontier
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.report.record import Histogram, RunRecord
from lightning_ptq.report.tables import key_of
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.tuning.run import AdaQuantResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEFORE, _AFTER, _THIRD = "#b8b8b8", "#2166ac", "#d6604d"
_MAX_PANELS = 48  # layers whose histograms are drawn


def all_figures(record: RunRecord) -> dict[str, Figure]:
    """Return all plots of a record by key, without those of stages that did not run.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figures: dict[str, Figure] = {}
    for stage, result in record.tuning.items():
        figures[f"units_{key_of(stage)}"] = draw_units(stage, result)
        if any(row.curve for row in result.units):
            figures[f"curves_{key_of(stage)}"] = draw_curves(stage, result)
    if record.allocation is not None:
        figures["allocation"] = draw_allocation(record)
        figures["sensitivity"] = draw_sensitivity(record.allocation.sensitivity)
    if record.frontier is not None:
        figures["frontier"] = draw_frontier(record.frontier, record.allocation)
    if record.statistics:
        figures["statistics"] = draw_statistics(record)
    if any(row.weights for row in record.layers):
        figures["ranges"] = draw_ranges(record)
    return figures


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _bars(axes: Axes, names: list[str], series: dict[str, tuple[list[float], str]]) -> None:
    """Draw horizontal bars, those of one name next to each other, the first name at the top."""
    height = 0.8 / len(series)
    for index, (label, (values, colour)) in enumerate(series.items()):
        # The bars of a name are centred on its tick.
        positions = [i + (index - (len(series) - 1) / 2) * height for i in range(len(names))]
        axes.barh(positions, values, height, label=label, color=colour)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)


def draw_units(stage: str, result: AdaQuantResult) -> Figure:
    """Draw the errors of each unit before and after tuning; units that were rolled back are marked."""
    rows = result.units
    repeated = len({row.name for row in rows}) < len(rows)  # parallel tuning has a row per unit and candidate
    names = [
        row.name + (f" {row.bits}" if repeated else "") + (" (rolled back)" if row.steps and not row.accepted else "")
        for row in rows
    ]
    figure, axes = _new(8, 1.2 + 0.22 * len(rows))
    # The axis is logarithmic, and an error may be exactly 0.
    before, after = ([max(getattr(row, key), 1e-12) for row in rows] for key in ("error_before", "error_after"))
    _bars(axes, names, {"before": (before, _BEFORE), "after": (after, _AFTER)})
    axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the unit's output on held-out samples")
    axes.set_title(stage, fontsize=9)
    return figure


def draw_curves(stage: str, result: AdaQuantResult) -> Figure:
    """Draw the training loss of each unit over its steps."""
    figure, axes = _new(8, 4.5)
    rows = [row for row in result.units if row.curve]
    colours = _colours(len(rows))
    for index, row in enumerate(rows):
        steps, losses = zip(*row.curve, strict=True)
        axes.plot(steps, losses, color=colours(index), linewidth=1, label=f"{row.name} {row.bits}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(stage, fontsize=9)
    axes.grid(alpha=0.3)
    if len(rows) <= 24:
        axes.legend(fontsize=6, ncols=2)
    return figure


def _colours(count: int) -> Callable[[int], Any]:
    from matplotlib import colormaps

    return lambda index: colormaps["viridis"](index / max(1, count - 1))


def draw_allocation(record: RunRecord) -> Figure:
    """Draw the bit widths of each layer's weights and inputs."""
    figure, axes = _new(8, 1.2 + 0.22 * len(record.layers))
    qconfigs = [LayerQConfig.parse(row.widths) for row in record.layers]
    weights = [float(qconfig.weight.bits) for qconfig in qconfigs]
    inputs = [float(qconfig.activation.bits) if qconfig.activation else 0.0 for qconfig in qconfigs]
    names = [f"{row.name}  {row.widths}" for row in record.layers]
    _bars(axes, names, {"weights": (weights, _AFTER), "inputs": (inputs, _THIRD)})
    axes.set_xlabel("bits")
    axes.set_xticks(range(9))
    return figure


def draw_sensitivity(table: SensitivityTable) -> Figure:
    """Draw the sensitivities as colours, a row for each layer and a column for each candidate."""
    from matplotlib.colors import LogNorm

    candidates = table.candidates
    values = [[row.get(candidate, float("nan")) for candidate in candidates] for row in table.rises.values()]
    positive = [value for row in values for value in row if value > 0] or [1e-6, 1.0]
    # The colours are on a log scale, so rises of 0 or below, and tiny ones, get the lightest. NaN, a candidate that the
    # layer does not have, stays blank.
    floor = max(min(positive), max(positive) * 1e-6)
    figure, axes = _new(2.5 + 0.8 * len(candidates), 1.2 + 0.2 * len(values))
    shades = [[value if math.isnan(value) else max(value, floor) for value in row] for row in values]
    drawn = axes.imshow(shades, aspect="auto", cmap="YlOrRd", norm=LogNorm(floor, max(max(positive), floor * 1.01)))
    axes.set_yticks(range(len(values)), list(table.rises), fontsize=7)
    axes.set_xticks(range(len(candidates)), candidates, fontsize=7)
    figure.colorbar(drawn, ax=axes, label=f"rise of {table.measure}")
    return figure


def draw_frontier(frontier: Frontier, chosen: AllocationResult | None) -> Figure:
    """Draw the best predictions over the budgets, and the choice that was made."""
    figure, axes = _new(6.5, 4)
    if chosen is not None:
        cost = chosen.allocation.costs[frontier.cost]
        predicted = chosen.sensitivity.predict(chosen.allocation.choice)
        axes.plot([cost], [predicted], "o", color=_THIRD, label="chosen, predicted", zorder=3)
        axes.plot([cost], [chosen.measured], "*", color=_THIRD, markersize=11, label="chosen, measured", zorder=3)
    frontier.draw(axes)
    if frontier.unit == "bytes":
        axes.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
        axes.locator_params(axis="x", nbins=6)  # the labels are wide
        axes.set_xlabel(frontier.cost)
    return figure


def draw_statistics(record: RunRecord) -> Figure:
    """Draw the divergence from the float network before and after each step of statistics tuning."""
    figure, axes = _new(8, 1.2 + 0.5 * len(record.statistics))
    names = [row.step + ("" if row.accepted else " (rolled back)") for row in record.statistics]
    before, after = ([getattr(row, key) for row in record.statistics] for key in ("before", "after"))
    _bars(axes, names, {"before": (before, _BEFORE), "after": (after, _AFTER)})
    axes.set_xlabel("divergence from the float network's outputs on held-out samples")
    return figure


def draw_ranges(record: RunRecord) -> Figure:
    """Draw histograms of each layer's weights and inputs, with the ends of the input's grid."""
    from matplotlib.figure import Figure

    rows = record.layers[:_MAX_PANELS]
    height = 0.6 + 0.85 * len(rows)
    # Without a layout engine, which would take seconds with this many panels: the positions are computed here.
    figure = Figure(figsize=(9, height))
    panels = figure.subplots(len(rows), 2, squeeze=False)
    figure.subplots_adjust(0.2, 0.2 / height, 0.98, 1 - 0.3 / height, wspace=0.06, hspace=0.45)
    for (left, right), row in zip(panels, rows, strict=True):
        _histogram(left, row.weights, _BEFORE)
        _histogram(right, row.inputs, _AFTER, log=True)
        for end in (row.low, row.high):
            if end is not None and row.inputs is not None:
                right.axvline(end, color=_THIRD, linewidth=1)
        left.set_ylabel(f"{row.name}\n{row.widths}", fontsize=6, rotation=0, ha="right", va="center")
    more = f" (first {_MAX_PANELS} of {len(record.layers)} layers)" if len(rows) < len(record.layers) else ""
    panels[0][0].set_title(f"float weights{more}", fontsize=8)
    panels[0][1].set_title("inputs, counts on a log scale; red: ends of the grid", fontsize=8)
    return figure


def _histogram(axes: Axes, histogram: Histogram | None, colour: str, log: bool = False) -> None:
    axes.set_yticks([])
    axes.tick_params(labelsize=5, length=2, pad=1)
    if histogram is None:
        axes.text(0.5, 0.5, "not recorded", fontsize=6, ha="center", va="center", transform=axes.transAxes)
        return
    heights = [math.log1p(count) for count in histogram.counts] if log else histogram.counts
    axes.stairs(heights, histogram.edges, fill=True, color=colour)
    axes.set_xticks([histogram.edges[0], 0.0, histogram.edges[-1]])
    axes.xaxis.set_major_formatter("{x:.3g}")
