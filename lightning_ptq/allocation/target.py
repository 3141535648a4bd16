"""Search for the cheapest network whose metric drops by at most a given value, over the choices of one frontier.

A trial is expensive, as it tunes the network, and its drop is noisy. So the search interpolates between the drops that
it has measured, tries few points, and ends where the standard error says that more would choose by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.frontier import Frontier, FrontierPoint, frontier
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.errors import AllocationError

POINTS = 48
"""Number of budgets on the frontier; their ratio is constant. A third of it for more than a thousand layers."""

ROUNDED_SHARE = 8.0
"""The first trial is where the network without tuning loses about this many times the accepted drop."""

WORTHWHILE = 0.81
"""Halfway to the cheapest choice, a trial saves less than a tenth if that has more than this part of the cost."""

NEAR = 0.9
"""Trials whose costs have a greater ratio are not told apart further, if the standard error is greater than that of
their drops."""


@dataclass(frozen=True)
class Measurement:
    """What a trial measured: the value of the metric, its drop, and the standard error of the drop if it is known."""

    value: float
    drop: float
    error: float | None


Measure = Callable[[BitAllocation], Measurement]
"""Gives the network the widths of an allocation, and measures it."""


def fine_frontier(
    sensitivity: SensitivityTable, costs: Sequence[Cost], name: str, most: float | None = None, **solving: Any
) -> list[BitAllocation]:
    """Return the best allocations at budgets of constant ratio, by ascending cost, without repetitions.

    Args:
        sensitivity: The sensitivity table of all points.
        costs: All costs.
        name: Name of the cost whose budgets are swept.
        most: Greatest budget; by default the cost of the widest candidates.
        solving: Further arguments of :func:`~lightning_ptq.allocation.frontier.frontier`.

    Raises:
        AllocationError: If no choice fits.
    """
    cost = next(cost for cost in costs if cost.name == name)
    low, high = (
        cost.fixed + sum(pick(v for v in row.values() if math.isfinite(v)) for row in cost.values.values())
        for pick in (min, max)
    )
    high = min(high, high if most is None else cost.limit(most))
    count = POINTS if len(sensitivity.rises) <= 1000 else POINTS // 3
    steps = [i / (count - 1) for i in range(count)]
    budgets = [low * (high / low) ** step for step in steps] if low > 0 else [high * step for step in steps]
    # A budget of at most 1 would be a share of the float cost, where that is known; and none may be 0.
    least = 1.0 if cost.of_float is not None else 1e-9 * high
    budgets = [max(budget, least) * (1 + 1e-9) for budget in budgets]  # more than the exact cost, for sums that round
    found: list[BitAllocation] = []
    for point in frontier(sensitivity, costs, sorted(set(budgets)), name, **solving).points:
        if not found or point.allocation.costs[name] > found[-1].costs[name]:
            found.append(point.allocation)
    return found


def as_frontier(
    points: Sequence[BitAllocation], sensitivity: SensitivityTable, costs: Sequence[Cost], name: str
) -> Frontier:
    """Return the points of :func:`fine_frontier` with their predictions."""
    unit = next(cost.unit for cost in costs if cost.name == name)
    rows = [FrontierPoint(point.costs[name], sensitivity.predict(point.choice), None, point) for point in points]
    return Frontier(name, sensitivity.measure, unit, rows)


def search_drop(
    points: Sequence[BitAllocation], max_drop: float, minimise: str, tuned: Measure, rounded: Measure | None, tries: int
) -> list[Trial]:
    """Find the cheapest allocation whose measured drop is at most ``max_drop``.

    Args:
        points: Allocations by ascending cost, as of :func:`fine_frontier`.
        max_drop: Accepted drop, in the metric's unit.
        minimise: Name of the cost.
        tuned: Tunes and measures the network at an allocation.
        rounded: Measures it without tuning, which is cheap and shows where to start; None to start in the middle.
        tries: Greatest number of tuned networks. One more is tuned, at the widest candidates, if none of them is
            within.

    Returns:
        All trials in order; the chosen one is marked.

    Raises:
        AllocationError: If the network drops by more at the widest candidates too.
    """
    search = _Search(points, max_drop, minimise, costly=rounded is not None)
    index = search.start(rounded) if rounded is not None else (len(points) - 1) // 2
    for _ in range(tries):
        search.add(index, tuned(points[index]))
        found = search.next()
        if found is None:
            break
        index = found
    if search.chosen() is None and len(points) - 1 not in search.trials:
        search.add(len(points) - 1, tuned(points[-1]))
    chosen = search.chosen()
    if chosen is None:
        best = min(search.trials.values(), key=lambda trial: trial.drop)
        raise AllocationError(
            f"no choice of bit widths stays within max_drop={max_drop:g}: the best one drops by {best.drop:.4g}, to"
            f" {best.value:.4g}. Accept a greater drop, give wider candidates, or add AdaQuantLayerwise behind the"
            " BitAllocator if there is none."
        )
    return [replace(trial, chosen=index == chosen) for index, trial in search.trials.items()]


@dataclass
class _Search:
    """The trials so far, by index of the point, and where to go next."""

    points: Sequence[BitAllocation]
    max_drop: float
    minimise: str
    costly: bool = True
    trials: dict[int, Trial] = field(default_factory=dict)

    def start(self, rounded: Measure) -> int:
        """Return the cheapest point at which the network without tuning loses :data:`ROUNDED_SHARE` of the drop."""
        low, high = -1, len(self.points) - 1  # the drop at high is small enough, or nothing is known of it
        while high - low > 2:
            middle = (low + high) // 2
            within = rounded(self.points[middle]).drop <= ROUNDED_SHARE * self.max_drop
            low, high = (low, middle) if within else (middle, high)
        return high

    def add(self, index: int, found: Measurement) -> None:
        """Add a trial."""
        point, within = self.points[index], found.drop <= self.max_drop
        self.trials[index] = Trial(
            dict(point.costs), point.rise, found.value, found.drop, found.error, within, choice=dict(point.choice)
        )

    def chosen(self) -> int | None:
        """Return the cheapest point within; None if there is none."""
        return min((index for index, trial in self.trials.items() if trial.within), default=None)

    def next(self) -> int | None:
        """Return the point to try next; None if another trial would not be worth it."""
        inside = self.chosen()
        outside = max((i for i in self.trials if inside is None or i < inside), default=-1)
        high = len(self.points) if inside is None else inside
        if high - outside <= 1:
            return None
        if inside is not None and self._settled(outside, inside):
            return None
        low, top = outside + 1, high - 1
        return min(max(self._aimed(outside, inside), low), top)

    def _settled(self, outside: int, inside: int) -> bool:
        """True if another trial could save too little, or would choose by chance."""
        ratio = self._cost(max(outside, 0)) / self._cost(inside)
        if outside < 0:  # then the cheapest choice, where drops are greatest, is the limit
            return self.costly and ratio > WORTHWHILE
        errors = [self.trials[i].error or 0.0 for i in (outside, inside)]
        near = self.trials[outside].drop - self.trials[inside].drop < max(errors)
        return ratio > (NEAR if near else 0.98)

    def _aimed(self, outside: int, inside: int | None) -> int:
        """Return the point to try between two trials, or beyond the only ones that there are."""
        if inside is not None and outside >= 0:
            return self._first(self._between(self.trials[outside], self.trials[inside]))
        trial = self.trials[outside if inside is None else inside]
        # A drop near 0 says little of how far to go, so no step is longer than this.
        ratio = 0.9 * self.max_drop / max(trial.drop, self.max_drop / 8, 1e-30)
        if inside is None:
            return self._first(trial.rise * max(ratio, 0.25))
        # A small drop is mostly noise, so half of the way to the cheapest choice is gone at least.
        middle = math.sqrt(self._cost(0) * self._cost(inside))
        halfway = next(i for i in range(len(self.points)) if self._cost(i) >= middle)
        return min(self._first(trial.rise * min(ratio, 4.0)), halfway)

    def _first(self, rise: float) -> int:
        """Return the cheapest point with a predicted rise of at most ``rise``."""
        return next((i for i, point in enumerate(self.points) if point.rise <= rise), len(self.points) - 1)

    def _cost(self, index: int) -> float:
        return self.points[index].costs[self.minimise]

    def _between(self, outside: Trial, inside: Trial) -> float:
        """Return the rise at which the drop, if linear in the logarithm of the rise, is the accepted one."""
        low, high = math.log(max(inside.rise, 1e-30)), math.log(max(outside.rise, 2e-30))
        span = outside.drop - inside.drop
        share = (self.max_drop - inside.drop) / span if span > 0 else 0.5
        return math.exp(low + (high - low) * min(max(share, 0.25), 0.75))
