"""The result of a run in one line: the metric first, then the size and the bit widths."""

from __future__ import annotations

import math
from collections import Counter

from lightning_ptq.report.record import MetricChange, RunRecord
from lightning_ptq.report.table import plural


def headline(record: RunRecord) -> str:
    """Return the result of a run in one line.

    Example:
        >>> record = RunRecord("net", metrics=[MetricChange("val_acc", 0.9885, 0.98751)])
        >>> record.float_bytes, record.packed_bytes = 6_700, 1_000
        >>> headline(record)
        'val_acc 0.9885 -> 0.9875, 6.7 times smaller'
    """
    size = f"{times_smaller(record):.1f} times smaller"
    metric = main_metric(record)
    if metric is not None:
        before, after = in_words(metric)
        return f"{metric.name} {before} -> {after}, {size}"
    return f"{size}, {_widths(record)}" if record.layers else size


def main_metric(record: RunRecord) -> MetricChange | None:
    """Return the metric that the run was to keep, or else the first that is not called a loss, or else the first."""
    if record.trials:
        return next(iter(record.metrics), None)
    return next((row for row in record.metrics if "loss" not in row.name), next(iter(record.metrics), None))


def in_words(metric: MetricChange) -> tuple[str, str]:
    """Return both values with four significant digits, or up to six where only these show the difference."""
    before, after = metric.before, metric.after
    if not (math.isfinite(before) and math.isfinite(after)) or before == after:
        return f"{before:.4g}", f"{after:.4g}"
    largest, difference = max(abs(before), abs(after)), abs(after - before)
    digits = 1 + math.floor(math.log10(largest)) - math.floor(math.log10(difference))
    digits = min(max(digits, 4), 6)
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    return f"{before:.{decimals}f}", f"{after:.{decimals}f}"


def times_smaller(record: RunRecord) -> float:
    """Return the float size over the packed size."""
    return record.float_bytes / max(1, record.packed_bytes)


def bits_per_weight(record: RunRecord) -> float:
    """Return the packed bits per quantized weight, with scales and zero points."""
    return sum(8 * row.size for row in record.layers) / max(1, sum(row.parameters for row in record.layers))


def bop_share(record: RunRecord) -> float:
    """Return the bit operations of the quantized layers as a share of those at 32 bits."""
    return sum(row.bops for row in record.layers) / max(1.0, record.float_bops)


def _widths(record: RunRecord) -> str:
    layers = plural(len(record.layers), "layer")
    ((widths, count),) = Counter(row.widths for row in record.layers).most_common(1)
    if count == len(record.layers):
        return f"{widths}, {layers} quantized"
    if 2 * count > len(record.layers):
        return f"{widths} in {count} of {layers}"
    return f"{bits_per_weight(record):.1f} bits per weight, {layers} quantized"
