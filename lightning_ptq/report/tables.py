"""The record of a run as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightning_ptq.allocation.frontier import Frontier
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.errors import PTQWarning
from lightning_ptq.export.onnx import OnnxExport
from lightning_ptq.report.reasons import untunable, why_not_kept, why_undone
from lightning_ptq.report.record import MetricChange, RunRecord
from lightning_ptq.report.table import ReportTable, shown
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.run import AdaQuantResult


def all_tables(record: RunRecord) -> list[ReportTable]:
    """Return all tables of a record, without those of stages that did not run."""
    return [table for table in _tables(record) if table.rows]


def _tables(record: RunRecord) -> Iterator[ReportTable]:
    yield metric_table(record.metrics)
    yield summary_table(record)
    yield stage_table(record)
    yield warning_table(record)
    yield trial_table(record)
    yield layer_table(record)
    for stage, result in record.tuning.items():
        yield unit_table(stage, result, record.warnings)
    if record.allocation is not None:
        yield allocation_table(record.allocation)
        yield round_table(record.allocation)
        yield sensitivity_table(record.allocation)
    if record.frontier is not None:
        yield frontier_table(record.frontier)
    yield statistics_table(record.statistics)
    if record.export is not None:
        yield export_table(record.export)
    yield settings_table(record.settings)


def key_of(stage: str) -> str:
    """Return the name of a stage as an identifier, for names of files and in logs.

    Example:
        >>> key_of("AdaQuant sequential")
        'adaquant_sequential'
    """
    return re.sub(r"\W+", "_", stage.lower())


_IN_WORDS = {
    "float_bytes": "float size, bytes",
    "packed_bytes": "packed size, bytes",
    "bits_per_weight": "bits per quantized weight",
    "bit_operations_share": "bit operations, share of float",
    "peak_memory_bytes": "peak memory, bytes",
    "onnx_bytes": "ONNX file, bytes",
}
"""Names of the summary as people read them, where they are more than the words of the key."""


def metric_table(metrics: list[MetricChange]) -> ReportTable:
    """Return the metrics of the user's validation before and after the run."""
    rows: list[tuple[Any, ...]] = [(row.name, row.before, row.after, row.after - row.before) for row in metrics]
    return ReportTable("metrics", "Metrics", ("metric", "float", "quantized", "change"), rows)


def trial_table(record: RunRecord) -> ReportTable:
    """Return what the search for an accepted drop of a metric has tried."""
    rows: list[tuple[Any, ...]] = []
    for number, trial in enumerate(record.trials, start=1):
        size = trial.costs.get("size")
        share = None if size is None or not record.float_bytes else size / record.float_bytes
        costs = (size, share, trial.costs.get("bops"))
        rows.append(
            (number, *costs, trial.rise, trial.value, trial.drop, trial.error, trial.within, trial.chosen or None)
        )
    columns = (
        "trial", "size, bytes", "share of float size", "bit operations", "predicted rise", "metric", "drop",
        "standard error", "within", "chosen",
    )  # fmt: skip
    note = (
        "The drop is how much worse the metric is than that of the float network. Within: the drop is within the"
        " accepted one. The rise is that of the sensitivity measure."
    )
    return ReportTable("trials", "Trials", columns, rows, note)


def summary_table(record: RunRecord) -> ReportTable:
    """Return the key figures of the run, with names in words."""
    rows: list[tuple[Any, ...]] = [
        (_IN_WORDS.get(name, name.replace("_", " ")), value) for name, value in record.summary().items()
    ]
    return ReportTable("summary", "Summary", ("quantity", "value"), rows, named_rows=True)


def stage_table(record: RunRecord) -> ReportTable:
    """Return the duration and peak memory of each stage."""
    rows: list[tuple[Any, ...]] = [
        (stage.name, stage.seconds, stage.seconds / max(record.seconds, 1e-9), stage.peak_memory, stage.peak_gpu_memory)
        for stage in record.stages
    ]
    columns = ["stage", "seconds", "share of the run", "peak memory so far, bytes", "peak GPU memory so far, bytes"]
    if all(row[-1] is None for row in rows):  # no GPU
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return ReportTable("stages", "Stages", tuple(columns), rows)


def warning_table(record: RunRecord) -> ReportTable:
    """Return every warning of the run with its remedy."""
    rows = [(type(note).__name__.removesuffix("Warning"), str(note), note.remedy) for note in record.warnings]
    return ReportTable("warnings", "Warnings", ("kind", "message", "remedy"), rows)


def layer_table(record: RunRecord) -> ReportTable:
    """Return the quantized layers in execution order."""
    rows: list[tuple[Any, ...]] = [
        (row.name, row.kind, row.widths, row.parameters, row.macs, row.bops, row.size, row.low, row.high)
        for row in record.layers
    ]
    columns = ("layer", "type", "bit widths", "weights", "MACs", "BOPs", "size, bytes", "input min", "input max")
    note = (
        "MACs are multiply-accumulates and BOPs bit operations, both for one sample. The size is that of the packed"
        " weights with their scales. Input min and max are the ends of the grid; values beyond them are clamped."
    )
    return ReportTable("layers", "Layers", columns, rows, note)


def unit_table(stage: str, result: AdaQuantResult, warnings: list[PTQWarning]) -> ReportTable:
    """Return the outcome of each unit in a stage of AdaQuant, with the reasons that warnings give."""
    refused = untunable(warnings)
    rows: list[tuple[Any, ...]] = [
        (
            row.name, row.bits, row.error_before, row.error_after, row.error_after / max(row.error_before, 1e-30),
            row.accepted if row.steps else "not tuned", row.steps, row.seconds, why_not_kept(row, refused),
        )
        for row in result.units
    ]  # fmt: skip
    columns = ("unit", "bit widths", "error before", "error after", "ratio", "kept", "steps", "seconds", "why not kept")
    note = (
        "The error is the squared error of the unit's output over the variance of the float output, on held-out"
        " samples. A unit that is not kept has its initial quantization."
    )
    return ReportTable(f"units_{key_of(stage)}", f"Units: {stage}", columns, rows, note)


def allocation_table(result: AllocationResult) -> ReportTable:
    """Return each layer's bit widths, its sensitivity with standard error, and the stability of the choice."""
    allocation, sensitivity = result.allocation, result.sensitivity
    rows: list[tuple[Any, ...]] = [
        (
            name, candidate, sensitivity.rises[name][candidate], sensitivity.errors.get(name, {}).get(candidate),
            result.stability.get(name),
        )
        for name, candidate in allocation.choice.items()
    ]  # fmt: skip
    # Costs do not carry their units here; "size" is the name that size_cost gives its bytes.
    costs = ", ".join(
        f"{name} {format_bytes(total) if name == 'size' else shown(total)}" for name, total in allocation.costs.items()
    )
    proof = "proven optimal" if allocation.proven else f"within {allocation.gap:.2%} of the bound"
    note = (
        f"Costs: {costs} ({allocation.solver}, {proof}). {sensitivity.measure}: predicted"
        f" {sensitivity.predict(allocation.choice):.4g}, measured {result.measured:.4g}; with all layers at their base"
        f" {sensitivity.base_value:.4g}."
    )
    if result.stability:
        note += (
            " Stability is the share of redraws of the sensitivities, within their standard errors, that lead to the"
            " same choice."
        )
    columns = ("layer", "bit widths", f"rise of {sensitivity.measure}", "standard error", "stability")
    return ReportTable("allocation", "Bit allocation", columns, rows, note)


def round_table(result: AllocationResult) -> ReportTable:
    """Return each solution of the integer program, predicted and measured."""
    rows: list[tuple[Any, ...]] = [
        (number, row.predicted, row.measured, row.changed, row.accepted)
        for number, row in enumerate(result.rounds, start=1)
    ]
    measure = result.sensitivity.measure
    columns = ("solution", f"predicted {measure}", f"measured {measure}", "layers changed", "kept")
    return ReportTable("rounds", "Solutions of the integer program", columns, rows)


def sensitivity_table(result: AllocationResult) -> ReportTable:
    """Return the rise of the measure when one layer alone goes from its base to a candidate."""
    sensitivity = result.sensitivity
    rows: list[tuple[Any, ...]] = [
        (name, sensitivity.base[name], *(rises.get(candidate) for candidate in sensitivity.candidates))
        for name, rises in sensitivity.rises.items()
    ]
    title = f"Sensitivities: rise of {sensitivity.measure}"
    return ReportTable("sensitivity", title, ("layer", "base", *sensitivity.candidates), rows)


def frontier_table(frontier: Frontier) -> ReportTable:
    """Return the best prediction at each budget."""
    cost = frontier.cost
    rows: list[tuple[Any, ...]] = [
        # The limit is the budget in the unit of the cost, also where a fraction was given.
        (point.allocation.limits[cost], point.allocation.costs[cost], point.predicted, point.allocation.proven)
        for point in frontier.points
    ]
    unit = f", {frontier.unit}" if frontier.unit else ""
    columns = (f"budget{unit}", f"{cost}{unit}", f"predicted {frontier.measure}", "proven optimal")
    return ReportTable("frontier", f"Frontier of {cost}", columns, rows)


def statistics_table(results: list[StatisticsResult]) -> ReportTable:
    """Return the steps of statistics tuning."""
    rows: list[tuple[Any, ...]] = [
        (
            row.step, row.before, row.after, row.accepted, why_undone(row), len(row.layers),
            "; ".join(f"{name}: {why}" for name, why in row.skipped.items()) or None,
        )
        for row in results
    ]  # fmt: skip
    note = "Divergence between the outputs of the quantized and the float network on held-out samples."
    columns = (
        "step",
        "divergence before",
        "divergence after",
        "kept",
        "why not kept",
        "layers corrected",
        "skipped layers",
    )
    return ReportTable("statistics", "Statistics tuning", columns, rows, note)


def export_table(export: OnnxExport) -> ReportTable:
    """Return how far the outputs of an exported file are from those of the module."""
    rows: list[tuple[Any, ...]] = [
        (row.name, row.snr, row.agreement) for row in (export.parity.outputs if export.parity else [])
    ]
    verified = f"compared on {export.parity.samples} samples in onnxruntime" if export.parity else "not verified"
    floats = f" Products in float: {', '.join(export.float_products)}." if export.float_products else ""
    note = (
        f"{export.path.name}: {format_bytes(export.bytes)}, opset {export.opset}, {verified};"
        f" {export.products - len(export.float_products)} of {export.products} products of integers.{floats}"
    )
    columns = ("output", "signal-to-noise ratio, dB", "equal predictions")
    return ReportTable("export", "Exported file", columns, rows or [("not verified", None, None)], note=note)


def settings_table(settings: dict[str, Any]) -> ReportTable:
    """Return the settings of the run, nested ones under dotted names."""
    rows: list[tuple[Any, ...]] = []
    for stage, options in settings.items():
        rows += [(stage, name, str(value)) for name, value in _leaves("", options)]
    return ReportTable("settings", "Settings", ("stage", "setting", "value"), rows)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{name}.{key}" if name else str(key), inner)
