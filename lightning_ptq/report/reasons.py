"""Why a unit or a step of statistics tuning was not kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_ptq.errors import PTQWarning, UntunableUnitWarning
from lightning_ptq.report.table import shown
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.reconstruct import UnitResult


def untunable(warnings: Iterable[PTQWarning]) -> dict[str, str]:
    """Return why units cannot be tuned, by name."""
    reasons: dict[str, str] = {}
    for note in warnings:
        if isinstance(note, UntunableUnitWarning):
            reasons |= note.details
    return reasons


def was_refused(row: UnitResult) -> bool:
    """Return True for a unit that could not be tuned; its errors are unknown."""
    return not row.steps and math.isnan(row.error_before)


def remaining_error(row: UnitResult) -> float:
    """Return the error of the state that the unit keeps."""
    return row.error_after if row.accepted else row.error_before


def why_not_kept(row: UnitResult, refused: dict[str, str]) -> str:
    """Return why a unit keeps its initial quantization; empty if the tuned state was kept.

    Args:
        row: The outcome of the unit.
        refused: What :func:`untunable` returned.
    """
    if row.accepted:
        return ""
    if was_refused(row):
        return f"it cannot be tuned: {refused[row.name]}" if row.name in refused else "it cannot be tuned"
    if not row.steps:
        return "not needed: the initial error is below the tolerance"
    if not math.isfinite(row.error_after):
        return "the error after tuning is not finite, at a fifth of the rates too"
    ratio = row.error_after / max(row.error_before, 1e-30)
    return f"tuning, at a fifth of the rates too, left {shown(ratio)} times the initial error on held-out samples"


def why_undone(row: StatisticsResult) -> str:
    """Return why a step of statistics tuning was undone or left out; empty if it was kept."""
    if row.accepted:
        return ""
    if math.isnan(row.before):
        return "left out: " + ("; ".join(row.skipped.values()) or "the divergence cannot be measured")
    if not math.isfinite(row.after):
        return "undone: the divergence after it is not finite"
    if row.after >= row.before:
        return "undone: the divergence on held-out samples did not fall"
    return "undone: the divergence fell by no more than twice its standard error over the samples"
