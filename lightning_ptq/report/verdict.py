"""What a run's figures say, in one to four sentences, with code where there is a remedy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.report.headline import times_smaller
from lightning_ptq.report.reasons import remaining_error, untunable, was_refused
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import plural, shown
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.tuning.config import ReconstructionConfig, least_bits
from lightning_ptq.tuning.reconstruct import UnitResult

_MOST = 4  # statements
_NAMED = 3  # units that a statement names
_SMALL = 0.01  # relative error of a unit up to which nothing is advised
_SPREAD = 10.0  # ratio of errors after and before tuning from which the rates are taken to be too high
_UNSTABLE = 0.5  # stability below which the choice of a layer is called uncertain
_BUDGETS = {"size": "size", "bops": "bops", "table": "limit"}  # option of BitAllocator by cost


@dataclass(frozen=True)
class Statement:
    """A statement about a run.

    Attributes:
        text: What the figures say.
        remedy: What can be done about it; empty if there is nothing to do.
        code: The remedy as code; empty if there is none.
    """

    text: str
    remedy: str = ""
    code: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.text, self.remedy, self.code) if part)


def verdict(record: RunRecord) -> list[Statement]:
    """Return one to four statements that follow from the figures of a record, the most important first."""
    finders: tuple[Callable[[RunRecord], Iterator[Statement]], ...] = (
        _metric, _untuned, _largest_error, _not_improved, _refused, _below_tolerance, _budget, _uncertain, _export,
        _statistics,
    )  # fmt: skip
    found = [statement for find in finders for statement in find(record)]
    return found[:_MOST] or [Statement(f"The packed module is {times_smaller(record):.1f} times smaller.")]


def _metric(record: RunRecord) -> Iterator[Statement]:
    """Compare the drop of the chosen trial with its standard error."""
    chosen = next((trial for trial in record.trials if trial.chosen), None)
    if record.trials and not any(trial.within for trial in record.trials):
        least = min(trial.drop for trial in record.trials)
        tried = f"None of {plural(len(record.trials), 'trial')} is within the accepted drop; the least drop is"
        yield Statement(f"{tried} {shown(least)}.", "Accept a larger drop, or allow wider candidates.")
    elif chosen is not None and chosen.error is not None and math.isfinite(chosen.error):
        figures = f"{shown(chosen.drop)} with a standard error of {shown(chosen.error)}"
        if chosen.drop <= 2 * chosen.error:
            yield Statement(f"The drop of the metric is {figures}: it is within the noise of the validation set.")
        else:
            yield Statement(f"The drop of the metric is {figures}: it is larger than the noise.")


def _untuned(record: RunRecord) -> Iterator[Statement]:
    rounded = [row for row in record.layers if least_bits([LayerQConfig.parse(row.widths)]) < 8]
    if rounded and not record.tuning:
        text = f"{plural(len(rounded), 'layer')} below 8 bits had no AdaQuant: the weights are rounded to nearest."
        yield Statement(text, "Tune them:", "callbacks=[CalibrationCapture(...), AdaQuantLayerwise()]")


def final_units(record: RunRecord) -> tuple[str, list[UnitResult]]:
    """Return the last stage of AdaQuant and its units; none if it tuned several candidates of a unit."""
    if not record.tuning:
        return "", []
    stage, result = list(record.tuning.items())[-1]
    names = [row.name for row in result.units]
    return stage, result.units if len(set(names)) == len(names) else []


def _largest_error(record: RunRecord) -> Iterator[Statement]:
    """Name the unit below 8 bits whose error is furthest above that of the unit before it."""
    stage, rows = final_units(record)
    rows = [row for row in rows if math.isfinite(remaining_error(row))]
    tuned = any(row.steps for row in rows)
    if not tuned:
        return
    worst = max(rows, key=remaining_error)
    if remaining_error(worst) <= _SMALL:
        yield Statement(
            f"Every unit's output is close to that of the float network: the largest relative error is"
            f" {shown(remaining_error(worst))}, in {worst.name}."
        )
        return
    # Units of parallel tuning have float inputs, so that errors of units before them have no part in theirs.
    alone = _option(record, stage, "mode") == "parallel" or "parallel" in stage
    errors = [remaining_error(row) for row in rows]
    before = [0.0] * len(rows) if alone else [0.0, *errors[:-1]]
    narrow = [i for i, row in enumerate(rows) if least_bits(map(LayerQConfig.parse, row.bits.split("/"))) < 8]
    if not narrow:
        return
    at = max(narrow, key=lambda i: errors[i] - before[i])
    if errors[at] <= before[at]:
        return
    typical = f"the median of {plural(len(rows), 'unit')} is {shown(statistics.median(errors))}"
    rise = "" if alone or at == 0 else f" from {shown(before[at])} to {shown(errors[at])}"
    text = (
        f"The error of the units rises most in {rows[at].name},{rise}; {typical}."
        if rise
        else f"Most error is lost in {rows[at].name}, with a relative error of {shown(errors[at])}; {typical}."
    )
    yield _more_bits(record, rows[at], text)


def _more_bits(record: RunRecord, row: UnitResult, text: str) -> Statement:
    patterns = patterns_of(row.name, [layer.name for layer in record.layers])
    wide = "w8a8" if LayerQConfig.parse(row.bits.split("/")[0]).activation else "w8"
    widths = repr(dict.fromkeys(patterns, wide)) if patterns else ""
    if record.allocation is not None:
        return Statement(text, "Keep it at 8 bits:" if widths else "", f"pins={widths}" if widths else "")
    remedy = "Let BitAllocator choose the widths" + (", or give it 8 bits:" if widths else ".")
    return Statement(text, remedy, f"overrides={widths}" if widths else "BitAllocator(size=0.15)")


def patterns_of(unit: str, layers: list[str]) -> list[str]:
    """Return the name patterns that match the layers of a unit and no others; none if they are not known.

    Args:
        unit: Name of the unit: a layer, a block, or a slice of a chain, such as ``"features.0-2"``.
        layers: Names of all layers.

    Example:
        >>> patterns_of("blocks.1", ["stem", "blocks.1.conv", "blocks.10.conv"])
        ['blocks.1.*']
        >>> patterns_of("features.0-4", ["features.0", "features.3", "features.6"])
        ['features.0', 'features.3']
    """
    inside = [f"{unit}.*"] if any(name.startswith(f"{unit}.") for name in layers) else []
    if unit in layers or inside:
        return [unit] * (unit in layers) + inside
    parent, _, keys = unit.rpartition(".")
    first, dash, last = keys.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        return []
    above = f"{parent}." if parent else ""
    numbers = range(int(first), int(last) + 1)
    return [pattern for number in numbers for pattern in patterns_of(f"{above}{number}", layers)]


def _not_improved(record: RunRecord) -> Iterator[Statement]:
    stage, rows = final_units(record)
    tuned = [row for row in rows if row.steps]
    undone = [row for row in tuned if not row.accepted]
    if not undone:
        return
    figures = [f"{row.name} {shown(row.error_before)} -> {shown(row.error_after)}" for row in undone[:_NAMED]]
    more = f" and {len(undone) - _NAMED} more" if len(undone) > _NAMED else ""
    text = (
        f"{len(undone)} of {plural(len(tuned), 'unit')} {'were' if len(undone) > 1 else 'was'} not improved by tuning,"
        f" because the error on held-out samples did not fall, at a fifth of the rates either:"
        f" {', '.join(figures)}{more}."
    )
    if any(not row.error_after <= _SPREAD * row.error_before for row in undone):
        config = _option(record, stage, "config")
        rate = config.get("weight_lr") if isinstance(config, dict) else None
        rate = ReconstructionConfig().weight_lr if rate is None else float(rate)
        yield Statement(
            text, "The rates are too high for these units:", f"AdaQuantLayerwise(weight_lr={rate / 10:.2g})"
        )
    else:
        yield Statement(text, "Use more samples:", f"CalibrationCapture(num_samples={4 * record.samples})")


def _refused(record: RunRecord) -> Iterator[Statement]:
    _, rows = final_units(record)
    refused = [row.name for row in rows if was_refused(row)]
    if refused:
        reason = untunable(record.warnings).get(refused[0])
        why = f": {reason.rstrip('.')}" if reason else ""
        text = f"{len(refused)} of {plural(len(rows), 'unit')} cannot be tuned, such as {refused[0]}{why}."
        yield Statement(text, "The warnings list them with remedies.")


def _below_tolerance(record: RunRecord) -> Iterator[Statement]:
    _, rows = final_units(record)
    skipped = [row for row in rows if not row.steps and not was_refused(row)]
    if skipped and len(skipped) == len(rows):
        which = f"All {len(rows)} units are" if len(rows) > 1 else "The only unit is"
        largest = shown(max(row.error_before for row in rows))
        text = f"{which} below the tolerance from the start, with errors up to {largest}, and needed no tuning."
        yield Statement(text, "To tune them all the same:", "AdaQuantLayerwise(tolerance=0)")


def _budget(record: RunRecord) -> Iterator[Statement]:
    """Name the next budget of the frontier that lowers the prediction by a fifth, and what the solver has proven."""
    result, frontier = record.allocation, record.frontier
    if result is None:
        return
    if not result.allocation.proven:
        text = f"The bit allocation is not proven optimal: its gap is {result.allocation.gap:.2%}."
        yield Statement(text, "Give the solver more time:", "BitAllocator(time_limit=300)")
    if frontier is None or frontier.cost not in _BUDGETS:
        return
    cost, now = result.allocation.costs[frontier.cost], result.sensitivity.predict(result.allocation.choice)
    better = [p for p in frontier.points if p.allocation.costs[frontier.cost] > cost and p.predicted < 0.8 * now]
    if better:
        point = min(better, key=lambda point: point.allocation.costs[frontier.cost])
        larger = point.allocation.costs[frontier.cost]
        size, present = ((format_bytes if frontier.unit == "bytes" else shown)(value) for value in (larger, cost))
        text = (
            f"With a {frontier.cost} of {size} instead of {present}, the predicted {frontier.measure} falls from"
            f" {shown(now)} to {shown(point.predicted)}."
        )
        code = f"BitAllocator({_BUDGETS[frontier.cost]}={math.ceil(larger)})"
        yield Statement(text, "If the accuracy does not suffice:", code)


def _uncertain(record: RunRecord) -> Iterator[Statement]:
    stability = record.allocation.stability if record.allocation is not None else {}
    low = [name for name, share in stability.items() if share < _UNSTABLE]
    if low:
        named = ", ".join(low[:_NAMED]) + (f" and {len(low) - _NAMED} more" if len(low) > _NAMED else "")
        text = (
            f"The bit widths of {len(low)} of {plural(len(stability), 'layer')} are uncertain: less than half of the"
            f" redraws of the sensitivities give the same choice ({named})."
        )
        yield Statement(text, "Use more samples:", f"CalibrationCapture(num_samples={4 * record.samples})")


def _export(record: RunRecord) -> Iterator[Statement]:
    parity = record.export.parity if record.export is not None else None
    shares = [row.agreement for row in parity.outputs if row.agreement is not None] if parity else []
    if parity and shares:
        text = f"{min(shares):.1%} of the predictions of the exported file equal those of the module"
        yield Statement(f"{text}, on {plural(parity.samples, 'sample')}.")


def _statistics(record: RunRecord) -> Iterator[Statement]:
    kept = [row for row in record.statistics if row.accepted]
    undone = [row.step for row in record.statistics if not row.accepted and math.isfinite(row.before)]
    if kept:
        first, last = shown(kept[0].before), shown(kept[-1].after)
        yield Statement(f"Statistics tuning lowered the divergence on held-out samples from {first} to {last}.")
    elif undone:
        text = f"Statistics tuning brought no significant gain, so that it was undone: {', '.join(undone)}."
        yield Statement(text)


def _option(record: RunRecord, stage: str, name: str) -> Any:
    options = record.settings.get(stage)
    return options.get(name) if isinstance(options, dict) else None
