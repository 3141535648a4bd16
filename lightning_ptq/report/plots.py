"""The plots of a record as plain data, which the page draws with plotly and PNG files with matplotlib."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lightning_ptq.allocation.frontier import Frontier, FrontierPoint
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.report.reasons import untunable, why_not_kept, why_undone
from lightning_ptq.report.record import LayerRecord, RunRecord
from lightning_ptq.report.table import shown
from lightning_ptq.report.tables import key_of
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.tuning.run import AdaQuantResult

BEFORE, AFTER, THIRD = "#98a2ad", "#2f7ac0", "#d6604d"  # visible on white and on black
_LEAST = 1e-12  # an axis may be logarithmic, and an error exactly 0


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: Quantity and unit.
        log: True for a logarithmic scale.
        bytes: True for sizes, whose ticks get a unit such as MB.
    """

    title: str
    log: bool = False
    bytes: bool = False


@dataclass(frozen=True)
class Series:
    """Points or bars of one colour.

    Attributes:
        name: Name in the legend.
        colour: Colour, such as ``"#2f7ac0"``.
        x: Values along the x axis; the lengths of bars.
        y: Values along the y axis; unused for bars.
        hover: Text of each point, of one or several lines.
        style: How points are drawn.
        error: Standard error of each y, None where it is unknown; empty to draw none.
    """

    name: str
    colour: str
    x: list[float]
    y: list[float] = field(default_factory=list)
    hover: list[str] = field(default_factory=list)
    style: Literal["line", "line and points", "points", "star"] = "line"
    error: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, those of one name next to each other, the first name at the top."""

    title: str
    names: list[str]
    series: list[Series]
    axis: Axis


@dataclass(frozen=True)
class Lines:
    """Lines and points."""

    title: str
    series: list[Series]
    x: Axis
    y: Axis


@dataclass(frozen=True)
class Heat:
    """Values as colours on a log scale.

    Attributes:
        title: Title.
        rows: Names of the rows, the first at the top.
        columns: Names of the columns.
        values: A value by row and column; NaN where there is none.
        label: What the values are.
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    label: str

    def scale(self) -> tuple[float, float]:
        """Return the ends of the scale; values of 0 or below, and tiny ones, get the colour of the lower end."""
        positive = [value for row in self.values for value in row if value > 0] or [1e-6, 1.0]
        low = max(min(positive), max(positive) * 1e-6)
        return low, max(max(positive), low * 1.01)

    def shades(self) -> list[list[float]]:
        """Return the values, those below the scale raised to its lower end."""
        low, _ = self.scale()
        return [[value if math.isnan(value) else max(value, low) for value in row] for row in self.values]


@dataclass(frozen=True)
class Panels:
    """Histograms of each layer's weights and inputs, with the ends of the input's grid."""

    title: str
    rows: list[LayerRecord]


Plot = Bars | Lines | Heat | Panels


def all_plots(record: RunRecord) -> dict[str, Plot]:
    """Return the plots of a record by key, without those of stages that did not run."""
    return dict(_plots(record))


def _plots(record: RunRecord) -> Iterator[tuple[str, Plot]]:
    if record.trials:
        yield "trials", trials_plot(record.trials)
    for stage, result in record.tuning.items():
        yield f"units_{key_of(stage)}", units_plot(record, stage, result)
        if any(row.curve for row in result.units):
            yield f"curves_{key_of(stage)}", curves_plot(stage, result)
    if record.allocation is not None:
        yield "allocation", widths_plot(record)
        yield "sensitivity", sensitivity_plot(record.allocation.sensitivity)
    if record.frontier is not None:
        yield "frontier", frontier_plot(record.frontier, record.allocation)
    if record.statistics:
        yield "statistics", statistics_plot(record)
    if any(row.weights for row in record.layers):
        yield "ranges", Panels("Histograms of the float weights and the inputs", record.layers)


def units_plot(record: RunRecord, stage: str, result: AdaQuantResult) -> Bars:
    """Describe the errors of each unit before and after tuning; units that were rolled back are marked."""
    rows, refused = result.units, untunable(record.warnings)
    repeated = len({row.name for row in rows}) < len(rows)  # parallel tuning has a row per unit and candidate
    names = [
        row.name + (f" {row.bits}" if repeated else "") + (" (rolled back)" if row.steps and not row.accepted else "")
        for row in rows
    ]
    hover = [
        f"{row.name}, {row.bits}\nbefore {shown(row.error_before)}, after {shown(row.error_after)}\n"
        + (why_not_kept(row, refused) or f"kept after {row.steps} steps in {row.seconds:.1f} s")
        for row in rows
    ]
    before, after = ([max(getattr(row, key), _LEAST) for row in rows] for key in ("error_before", "error_after"))
    series = [Series("before", BEFORE, before, hover=hover), Series("after", AFTER, after, hover=hover)]
    return Bars(
        f"{stage}: errors before and after",
        names,
        series,
        Axis("relative squared error on held-out samples", log=True),
    )


def curves_plot(stage: str, result: AdaQuantResult) -> Lines:
    """Describe the training loss of each unit over its steps."""
    rows = [row for row in result.units if row.curve]
    series = []
    for index, row in enumerate(rows):
        name = f"{row.name} {row.bits}"
        steps, losses, hover = list[float](), list[float](), list[str]()
        for step, loss in row.curve:
            if steps and step <= steps[-1]:  # the curve of a second attempt, at lower rates, follows that of the first
                steps, losses, hover = [*steps, math.nan], [*losses, math.nan], [*hover, ""]
            steps, losses, hover = [*steps, step], [*losses, loss], [*hover, f"{name}\nstep {step}: {shown(loss)}"]
        series.append(Series(name, _colour(index, len(rows)), steps, losses, hover))
    return Lines(f"{stage}: training loss", series, Axis("step"), Axis("training loss", log=True))


def _colour(index: int, count: int) -> str:
    """Return a colour between blue and red, of a lightness that is visible on white and on black."""
    hue = 0.62 * (1 - index / max(1, count - 1))
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.48, 0.6))


def widths_plot(record: RunRecord) -> Bars:
    """Describe the bit widths of each layer's weights and inputs."""
    qconfigs = [LayerQConfig.parse(row.widths) for row in record.layers]
    weights = [float(qconfig.weight.bits) for qconfig in qconfigs]
    inputs = [float(qconfig.activation.bits) if qconfig.activation else 0.0 for qconfig in qconfigs]
    names = [f"{row.name}  {row.widths}" for row in record.layers]
    hover = [
        f"{row.name}, {row.widths}\n{shown(row.parameters)} weights, {shown(row.macs)} MACs" for row in record.layers
    ]
    series = [Series("weights", AFTER, weights, hover=hover), Series("inputs", THIRD, inputs, hover=hover)]
    return Bars("Bit widths", names, series, Axis("bits"))


def sensitivity_plot(table: SensitivityTable) -> Heat:
    """Describe the sensitivities, a row for each layer and a column for each candidate."""
    values = [[row.get(candidate, math.nan) for candidate in table.candidates] for row in table.rises.values()]
    label = f"rise of {table.measure}"
    return Heat(f"Sensitivity: {label}", list(table.rises), table.candidates, values, label)


def frontier_plot(frontier: Frontier, chosen: AllocationResult | None) -> Lines:
    """Describe the best predictions over the budgets, and the choice that was made."""
    series, sizes = [], frontier.unit == "bytes"

    def text(point: FrontierPoint) -> str:
        cost, limit = point.allocation.costs[frontier.cost], point.allocation.limits[frontier.cost]
        proof = "proven optimal" if point.allocation.proven else "not proven optimal"
        amounts = f"{frontier.cost} {_amount(cost, sizes)} of {_amount(limit, sizes)}"
        return f"{amounts}\npredicted {shown(point.predicted)}\n{proof}"

    if chosen is not None:
        cost = chosen.allocation.costs[frontier.cost]
        predicted = chosen.sensitivity.predict(chosen.allocation.choice)
        at = f"chosen, {frontier.cost} {_amount(cost, sizes)}\n"
        values = {"predicted": (predicted, "points"), "measured": (chosen.measured, "star")}
        for name, (value, style) in values.items():
            hover = [f"{at}{name} {shown(value)}"]
            series.append(Series(f"chosen, {name}", THIRD, [cost], [value], hover, style))  # type: ignore[arg-type]
    costs = [point.allocation.costs[frontier.cost] for point in frontier.points]
    predictions = [point.predicted for point in frontier.points]
    series.append(Series("predicted", AFTER, costs, predictions, list(map(text, frontier.points)), "line and points"))
    measured = [(x, p.measured, text(p)) for x, p in zip(costs, frontier.points, strict=True) if p.measured is not None]
    if measured:
        xs, ys, texts = map(list, zip(*measured, strict=True))
        series.append(Series("measured", BEFORE, xs, ys, texts, "line and points"))
    positive = min(value for row in series for value in row.y) > 0
    title = f"{frontier.cost}, {frontier.unit}" if frontier.unit and not sizes else frontier.cost
    return Lines(f"Frontier of {frontier.cost}", series, Axis(title, bytes=sizes), Axis(frontier.measure, log=positive))


def _amount(value: float, sizes: bool) -> str:
    return format_bytes(value) if sizes else shown(value)


def trials_plot(trials: list[Trial]) -> Lines:
    """Describe the drop of the metric over the size of each trial."""
    groups = {
        "within the accepted drop": (AFTER, [t for t in trials if t.within and not t.chosen]),
        "beyond it": (BEFORE, [t for t in trials if not t.within and not t.chosen]),
        "chosen": (THIRD, [t for t in trials if t.chosen]),
    }
    sizes = all("size" in trial.costs for trial in trials)
    cost = "size" if sizes else next(iter(trials[0].costs))
    series = [
        Series(
            name, colour, [t.costs[cost] for t in group], [t.drop for t in group],
            [_trial_text(trials.index(t) + 1, t) for t in group], "star" if name == "chosen" else "points",
            [t.error for t in group],
        )
        for name, (colour, group) in groups.items()
        if group
    ]  # fmt: skip
    return Lines("Trials", series, Axis(cost, bytes=sizes), Axis("drop of the metric, with its standard error"))


def _trial_text(number: int, trial: Trial) -> str:
    error = "" if trial.error is None else f" ± {shown(trial.error)}"
    costs = ", ".join(f"{name} {_amount(value, name == 'size')}" for name, value in trial.costs.items())
    state = "chosen" if trial.chosen else "within the accepted drop" if trial.within else "beyond the accepted drop"
    lines = f"trial {number}: {state}\n{costs}\nmetric {shown(trial.value)}, drop {shown(trial.drop)}{error}"
    return f"{lines}\npredicted rise {shown(trial.rise)}"


def statistics_plot(record: RunRecord) -> Bars:
    """Describe the divergence from the float network before and after each step of statistics tuning."""
    rows = record.statistics
    names = [row.step + ("" if row.accepted else " (rolled back)") for row in rows]
    hover = [
        f"{row.step}\nbefore {shown(row.before)}, after {shown(row.after)}\n{why_undone(row) or 'kept'}" for row in rows
    ]
    series = [
        Series("before", BEFORE, [row.before for row in rows], hover=hover),
        Series("after", AFTER, [row.after for row in rows], hover=hover),
    ]
    return Bars("Statistics tuning", names, series, Axis("divergence on held-out samples"))
