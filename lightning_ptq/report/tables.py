"""The record of a run as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_ptq.allocation.frontier import Frontier
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import Sheet
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.run import AdaQuantResult


def all_sheets(record: RunRecord) -> list[Sheet]:
    """All tables of a record, those of stages that did not run left out."""
    return [sheet for sheet in _sheets(record) if sheet.rows]


def _sheets(record: RunRecord) -> Iterator[Sheet]:
    yield summary_sheet(record)
    yield stage_sheet(record)
    yield warning_sheet(record)
    yield layer_sheet(record)
    for stage, result in record.tuning.items():
        yield unit_sheet(stage, result)
    if record.allocation is not None:
        yield allocation_sheet(record.allocation)
        yield round_sheet(record.allocation)
        yield sensitivity_sheet(record.allocation)
    if record.frontier is not None:
        yield frontier_sheet(record.frontier)
    yield statistics_sheet(record.statistics)
    yield settings_sheet(record.settings)


def key_of(stage: str) -> str:
    """A stage's name as part of a file name.

    Example:
        >>> key_of("AdaQuant sequential")
        'adaquant_sequential'
    """
    return stage.lower().replace(" ", "_")


def summary_sheet(record: RunRecord) -> Sheet:
    """The run in a few figures."""
    return Sheet("summary", "Summary", ("what", "value"), list(record.summary().items()))


def stage_sheet(record: RunRecord) -> Sheet:
    """What took how long."""
    rows: list[tuple[Any, ...]] = [
        (stage.name, stage.seconds, stage.seconds / max(record.seconds, 1e-9), stage.peak_memory, stage.peak_gpu_memory)
        for stage in record.stages
    ]
    columns = ["stage", "seconds", "share", "peak memory so far, bytes", "on the GPU, bytes"]
    if all(row[-1] is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Sheet("stages", "Stages", tuple(columns), rows)


def warning_sheet(record: RunRecord) -> Sheet:
    """Every warning of the run, and what can be done about it."""
    rows = [(type(found).__name__.removesuffix("Warning"), str(found), found.remedy) for found in record.warnings]
    return Sheet("warnings", "Warnings", ("kind", "what", "what to do"), rows)


def layer_sheet(record: RunRecord) -> Sheet:
    """The quantized layers in execution order."""
    rows: list[tuple[Any, ...]] = [
        (row.name, row.kind, row.widths, row.parameters, row.macs, row.bops, row.size, row.low, row.high)
        for row in record.layers
    ]
    columns = (
        "layer", "type", "widths", "weights", "MACs", "BOPs", "bytes", "input from", "to",
    )  # fmt: skip
    return Sheet(
        "layers",
        "Layers",
        columns,
        rows,
        "MACs (multiply-accumulates) and BOPs (bit operations) for one sample; inputs beyond their grid are clamped.",
    )


def unit_sheet(stage: str, result: AdaQuantResult) -> Sheet:
    """What became of each unit."""
    rows: list[tuple[Any, ...]] = [
        (
            row.name, row.bits, row.error_before, row.error_after, row.error_after / max(row.error_before, 1e-30),
            row.accepted if row.steps else "not tuned", row.steps, row.seconds,
        )
        for row in result.units
    ]  # fmt: skip
    columns = ("unit", "widths", "before", "after", "ratio", "kept", "steps", "seconds")
    note = (
        "Squared error of the unit's output over the squared float output, on held-out samples. A unit of no steps was"
        " good as it was."
    )
    return Sheet(f"units_{key_of(stage)}", f"Units: {stage}", columns, rows, note)


def allocation_sheet(result: AllocationResult) -> Sheet:
    """Each layer's widths, its sensitivity with standard error, and how sure the choice is."""
    allocation, sensitivity = result.allocation, result.sensitivity
    rows: list[tuple[Any, ...]] = [
        (
            name, candidate, sensitivity.rises[name][candidate], sensitivity.errors.get(name, {}).get(candidate),
            result.stability.get(name),
        )
        for name, candidate in allocation.choice.items()
    ]  # fmt: skip
    costs = ", ".join(f"{name} {total:,.0f}" for name, total in allocation.costs.items())
    proof = "proven optimal" if allocation.proven else f"within {allocation.gap:.2%} of the bound"
    note = (
        f"{costs} ({allocation.solver}, {proof}). {sensitivity.measure}: predicted"
        f" {sensitivity.predict(allocation.choice):.4g}, measured {result.measured:.4g}, all at base"
        f" {sensitivity.base_value:.4g}."
    )
    columns = ("layer", "widths", "rise", "standard error", "kept in redraws")
    return Sheet("allocation", "Bit allocation", columns, rows, note)


def round_sheet(result: AllocationResult) -> Sheet:
    """Each solution of the integer programme, and what the network did at it."""
    rows: list[tuple[Any, ...]] = [
        (number, row.predicted, row.measured, row.changed, row.accepted)
        for number, row in enumerate(result.rounds, start=1)
    ]
    columns = ("solution", "predicted", "measured", "layers changed", "kept")
    return Sheet("rounds", "Solutions of the integer programme", columns, rows)


def sensitivity_sheet(result: AllocationResult) -> Sheet:
    """The rise of the measure when one layer alone goes from its base to a candidate."""
    table = result.sensitivity
    rows: list[tuple[Any, ...]] = [
        (name, table.base[name], *(row.get(candidate) for candidate in table.candidates))
        for name, row in table.rises.items()
    ]
    title = f"Sensitivities: rise of {table.measure}"
    return Sheet("sensitivity", title, ("layer", "base", *table.candidates), rows)


def frontier_sheet(frontier: Frontier) -> Sheet:
    """The best prediction at each budget."""
    rows: list[tuple[Any, ...]] = [
        (point.budget, point.allocation.costs[frontier.cost], point.predicted, point.allocation.proven)
        for point in frontier.points
    ]
    unit = f", {frontier.unit}" if frontier.unit else ""
    columns = (f"budget{unit}", f"{frontier.cost}{unit}", f"{frontier.measure} predicted", "proven")
    return Sheet("frontier", f"Frontier of {frontier.cost}", columns, rows)


def statistics_sheet(results: list[StatisticsResult]) -> Sheet:
    """The steps of statistics tuning."""
    rows: list[tuple[Any, ...]] = [
        (
            row.step, row.before, row.after, row.accepted, len(row.layers),
            "; ".join(f"{name}: {why}" for name, why in row.skipped.items()) or None,
        )
        for row in results
    ]  # fmt: skip
    note = "Divergence from the float network's outputs on held-out samples; what did not help was taken back."
    columns = ("step", "before", "after", "kept", "layers corrected", "left alone")
    return Sheet("statistics", "Statistics tuning", columns, rows, note)


def settings_sheet(settings: dict[str, Any]) -> Sheet:
    """What the run was told."""
    rows: list[tuple[Any, ...]] = []
    for name, value in settings.items():
        rows += [(name, key, str(found)) for key, found in _leaves("", value)]
    return Sheet("settings", "Settings", ("of", "setting", "value"), rows)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, found in value.items():
        yield from _leaves(f"{key}.{name}" if key else str(name), found)
