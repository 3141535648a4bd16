"""Search for the cheapest network whose metric drops by at most a given value, over the choices of one frontier.

A trial is expensive, as it tunes the network, and its drop is noisy. So the search interpolates between the drops that
it has measured, tries few points, and ends where the standard error says that more would choose by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import linear_regression
from typing import Any

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.frontier import Frontier, FrontierPoint, frontier
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.errors import AllocationError

POINTS = 96
"""Number of budgets on the frontier; their ratio is constant. A third of it for more than a thousand layers."""

UNTUNED_SHARE = 8.0
"""The first trial is where the network without tuning loses about this many times the accepted drop."""

WORTHWHILE = 0.9
"""A tuning is not worth it if the network that it would try is predicted to have more than this part of the cost."""

MARGIN, LAST_MARGIN = 0.9, 0.7
"""Share of the accepted drop that a trial aims at; the last one is safer, if none has been within."""

NEAR = 0.9
"""Trials whose costs have a greater ratio are not told apart further, if the standard error is greater than that of
their drops."""


@dataclass(frozen=True)
class Measurement:
    """What a trial measured: the value of the metric, its drop, and the standard error of the drop if it is known."""

    value: float
    drop: float
    error: float | None

    def within(self, max_drop: float) -> bool:
        """True if the drop is at most the accepted one, up to the rounding of a metric in single precision."""
        return self.drop <= max_drop + 2**-22 * abs(self.value)


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
    points: Sequence[BitAllocation], max_drop: float, minimise: str, tuned: Measure, untuned: Measure | None, tries: int
) -> list[Trial]:
    """Find the cheapest allocation whose measured drop is at most ``max_drop``.

    Args:
        points: Allocations by ascending cost, as of :func:`fine_frontier`.
        max_drop: Accepted drop, in the metric's unit.
        minimise: Name of the cost.
        tuned: Tunes and measures the network at an allocation.
        untuned: Measures it without tuning, which is cheap and shows where to start; None to start in the middle.
        tries: Greatest number of tuned networks. One more is tuned, at the widest candidates, if none of them is
            within.

    Returns:
        All trials in order; the chosen one is marked.

    Raises:
        AllocationError: If the network drops by more at the widest candidates too.
    """
    search = _Search(points, max_drop, minimise, costly=untuned is not None)
    index = search.start(untuned) if untuned is not None else (len(points) - 1) // 2
    for left in reversed(range(tries)):
        search.add(index, tuned(points[index]))
        found = search.next(left)
        if found is None:
            break
        index = found
    if search.chosen() is None and len(points) - 1 not in search.trials:
        search.add(len(points) - 1, tuned(points[-1]))
    chosen = search.chosen()
    if chosen is None:
        best = min(search.trials.values(), key=lambda trial: trial.drop)
        if not math.isfinite(best.value):
            raise AllocationError(
                f"the metric of every network that was tried is {best.value:g}, so no drop can be measured. Mend the"
                " metric or the validation data, or give wider candidates."
            )
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
    untuned: dict[int, float] = field(default_factory=dict)  # drops without tuning

    def start(self, untuned: Measure) -> int:
        """Return the cheapest point at which the network without tuning loses :data:`UNTUNED_SHARE` of the drop."""
        low, high = -1, len(self.points) - 1  # the drop at high is small enough, or nothing is known of it
        while high - low > 2:
            middle = (low + high) // 2
            self.untuned[middle] = drop = untuned(self.points[middle]).drop
            within = drop <= UNTUNED_SHARE * self.max_drop
            low, high = (low, middle) if within else (middle, high)
        return high

    def add(self, index: int, found: Measurement) -> None:
        """Add a trial."""
        point, within = self.points[index], found.within(self.max_drop)
        self.trials[index] = Trial(
            dict(point.costs), point.rise, found.value, found.drop, found.error, within, choice=dict(point.choice)
        )

    def chosen(self) -> int | None:
        """Return the cheapest point within; None if there is none."""
        return min((index for index, trial in self.trials.items() if trial.within), default=None)

    def next(self, left: int = 2) -> int | None:
        """Return the point to try next; None if another trial would not be worth it.

        Args:
            left: Number of trials that may follow, with this one.
        """
        inside = self.chosen()
        outside = max((i for i in self.trials if inside is None or i < inside), default=-1)
        high = len(self.points) if inside is None else inside
        if high - outside <= 1:
            return None
        if inside is not None and self._settled(outside, inside):
            return None
        low, top = outside + 1, high - 1
        return min(max(self._aimed(outside, inside, LAST_MARGIN if left == 1 else MARGIN), low), top)

    def _settled(self, outside: int, inside: int) -> bool:
        """True if another trial could save too little, or would choose by chance."""
        if outside < 0:  # then the cheapest choice, where drops are greatest, is the limit
            return self.costly and self._cost(0) / self._cost(inside) > WORTHWHILE**2
        pair = self.trials[outside], self.trials[inside]
        if self.costly:
            return self._cost(self._first(self._between(*pair))) / self._cost(inside) > WORTHWHILE
        near = pair[0].drop - pair[1].drop < max(trial.error or 0.0 for trial in pair)
        return self._cost(outside) / self._cost(inside) > (NEAR if near else 0.98)

    def _aimed(self, outside: int, inside: int | None, margin: float) -> int:
        """Return the point to try between two trials, or beyond the only ones that there are."""
        if inside is None:
            return self._wider(self.trials[outside], margin)
        if outside < 0:
            return self._narrower(self.trials[inside], inside)
        return self._first(self._between(self.trials[outside], self.trials[inside], 0.25))

    def _wider(self, trial: Trial, margin: float) -> int:
        """Return the point to try after a trial beyond the limit: drops are taken to follow a power of the rise."""
        # Half a standard error is taken off, as a trial is beyond the limit partly by chance.
        drop = max(trial.drop - (trial.error or 0.0) / 2, self.max_drop, 1e-30)
        return self._first(trial.rise * max(margin * self.max_drop / drop, 1 / 16) ** (1 / self._power()))

    def _narrower(self, trial: Trial, index: int) -> int:
        """Return the point to try after a trial within, halfway to the cheapest choice at least."""
        # A small drop is mostly noise, so it says little of how far to go.
        ratio = MARGIN * self.max_drop / max(trial.drop, self.max_drop / 8, 1e-30)
        middle = math.sqrt(self._cost(0) * self._cost(index))
        halfway = next(i for i in range(len(self.points)) if self._cost(i) >= middle)
        return min(self._first(trial.rise * min(ratio, 4.0)), halfway)

    def _power(self) -> float:
        """Return the power of the rise that drops without tuning follow, by least squares; from 0.5 to 1."""
        # A drop near 0 is noise.
        points = {i: (self.points[i].rise, max(drop, self.max_drop / 8)) for i, drop in self.untuned.items()}
        logs = [(math.log(rise), math.log(drop)) for rise, drop in points.values() if rise > 0 < drop < math.inf]
        if len({rise for rise, _ in logs}) < 2:
            return 1.0
        return min(max(linear_regression(*zip(*logs, strict=True)).slope, 0.5), 1.0)

    def _first(self, rise: float) -> int:
        """Return the cheapest point with a predicted rise of at most ``rise``."""
        return next((i for i, point in enumerate(self.points) if point.rise <= rise), len(self.points) - 1)

    def _cost(self, index: int) -> float:
        return self.points[index].costs[self.minimise]

    def _between(self, outside: Trial, inside: Trial, apart: float = 0.0) -> float:
        """Return the rise at which the drop, if linear in the logarithm of the rise, is the accepted one.

        It keeps a share of the way from both trials.
        """
        # The widest candidates have none.
        least = min((point.rise for point in self.points if point.rise > 0), default=1e-30)
        low, high = math.log(max(inside.rise, least)), math.log(max(outside.rise, 2 * least))
        span = outside.drop - inside.drop
        share = (self.max_drop - inside.drop) / span if span > 0 else 0.5
        return math.exp(low + (high - low) * min(max(share, apart), 1 - apart))
