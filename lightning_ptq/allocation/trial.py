"""What a search for the cheapest network within an accepted drop of a metric has tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trial:
    """A choice of bit widths that was tuned and validated.

    Attributes:
        costs: Costs of the choice by name: ``"size"`` in bytes, ``"bops"`` in bit operations of one sample.
        rise: Rise of the sensitivity measure that the table predicts for the choice.
        value: Value of the metric.
        drop: How much worse the value is than that of the float network, in the metric's unit.
        error: Standard error of the drop, from paired differences of batches; None if it is unknown.
        within: Whether the drop is within the accepted one.
        chosen: Whether this is the result of the search.
        choice: Candidate of each layer.
    """

    costs: Mapping[str, float]
    rise: float
    value: float
    drop: float
    error: float | None
    within: bool
    chosen: bool = False
    choice: Mapping[str, str] = field(default_factory=dict)
