"""The trade-off between a budget and the predicted degradation: many solutions from one sensitivity table."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation, allocate_bits, check_costs
from lightning_ptq.errors import AllocationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FrontierPoint:
    """The optimal allocation under one budget.

    Attributes:
        budget: The budget, as passed to :func:`frontier`.
        predicted: The measure that the sensitivities predict: the base value plus the rises.
        measured: The measure of the network at this allocation; None if it was not measured.
        allocation: The optimal allocation.
    """

    budget: float
    predicted: float
    measured: float | None
    allocation: BitAllocation


@dataclass(frozen=True)
class Frontier:
    """Optimal allocations over a sweep of budgets.

    Attributes:
        cost: Name of the cost whose budget is swept.
        measure: Name of the measure that is predicted.
        unit: Unit of the cost.
        points: The allocations by ascending budget.
        skipped: Budgets that no choice can meet, or that limit nothing.
    """

    cost: str
    measure: str
    unit: str = ""
    points: list[FrontierPoint] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per point: budget, costs, predicted and measured value, and each layer's candidate."""
        return [
            {
                "budget": point.budget, **point.allocation.costs, "predicted": point.predicted,
                "measured": point.measured, "proven": point.allocation.proven, **point.allocation.choice,
            }
            for point in self.points
        ]  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frontier to ``*.json`` (everything), ``*.csv`` (one row per point) or ``*.png`` (a plot).

        Raises:
            AllocationError: If the file name has another ending.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(asdict(self), indent=1))
        elif path.suffix == ".csv":
            rows = self.rows()
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".png":
            self._draw(path)
        else:
            raise AllocationError(f"cannot write a frontier to {path}. End the name in .json, .csv or .png.")

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure  # imported late: it is slow to import and may not be installed

        figure = Figure(figsize=(6, 4), layout="constrained")
        self.draw(figure.add_subplot())
        figure.savefig(path, dpi=150)

    def draw(self, axes: Axes) -> None:
        """Plot predicted and measured values over the cost into a matplotlib ``Axes``."""
        costs = [point.allocation.costs[self.cost] for point in self.points]
        axes.plot(costs, [point.predicted for point in self.points], "o-", label="predicted")
        measured = [(x, p.measured) for x, p in zip(costs, self.points, strict=True) if p.measured is not None]
        if measured:
            axes.plot(*zip(*measured, strict=True), "s--", label="measured")
        values = [p.predicted for p in self.points] + [value for _, value in measured]
        if min(values) > 0:
            axes.set_yscale("log")
        axes.set_xlabel(f"{self.cost}, {self.unit}" if self.unit else self.cost)
        axes.set_ylabel(self.measure)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def frontier(
    sensitivity: SensitivityTable,
    costs: Sequence[Cost] | Cost,
    budgets: Sequence[float],
    cost: str | None = None,
    *,
    measure: Callable[[Mapping[str, str]], float] | None = None,
    others: Mapping[str, float] | None = None,
    **options: Any,
) -> Frontier:
    """Solve the bit allocation for each budget of a sweep.

    Args:
        sensitivity: The sensitivity table of all points.
        costs: One or several costs.
        budgets: Budgets for the swept cost, for example ``[0.10, 0.11, 0.12]``.
        cost: Name of the swept cost; by default the first one.
        measure: Function that measures the network at a choice, for example with
            :func:`~lightning_ptq.allocation.sensitivity.measure_choice`. Without it, points have predictions only.
        others: Budgets for other costs by name, the same at every point; none by default.
        options: Further arguments of :func:`~lightning_ptq.allocation.solver.allocate_bits`.

    Raises:
        AllocationError: If no allocation is possible at any of the budgets.

    Example:
        >>> table = SensitivityTable("kl", {"a": "w8a8"}, 0.0, {"a": {"w8a8": 0.0, "w4a4": 0.1}})
        >>> size = Cost("size", {"a": {"w8a8": 8.0, "w4a4": 4.0}})
        >>> [point.predicted for point in frontier(table, size, [4, 8]).points]
        [0.1, 0.0]
    """
    costs = check_costs(costs)
    name = cost or costs[0].name
    points, skipped, reason = [], [], ""
    for budget in sorted(budgets):
        try:
            allocation = allocate_bits(sensitivity, costs, {**(others or {}), name: budget}, **options)
        except AllocationError as error:
            skipped.append(budget)
            reason = str(error)
            continue
        measured = measure(allocation.choice) if measure else None
        points.append(FrontierPoint(budget, sensitivity.predict(allocation.choice), measured, allocation))
    if not points:
        listed = sorted(budgets) if len(budgets) < 7 else f"from {min(budgets):.6g} to {max(budgets):.6g}"
        raise AllocationError(f"none of the budgets {listed} can be met: {reason}")
    unit = next(cost.unit for cost in costs if cost.name == name)
    return Frontier(name, sensitivity.measure, unit, points, skipped)


def sweep(
    sensitivity: SensitivityTable, costs: Sequence[Cost], name: str, points: int = 12, **options: Any
) -> Frontier:
    """Return the frontier at evenly spaced budgets from the least to the greatest cost of the candidates.

    Args:
        sensitivity: The sensitivity table of all points.
        costs: One or several costs.
        name: Name of the swept cost.
        points: Number of budgets.
        options: Further arguments of :func:`frontier`.

    Raises:
        AllocationError: If no choice meets the other budgets.
    """
    cost = next(cost for cost in costs if cost.name == name)
    rows = [[value for value in row.values() if value < math.inf] for row in cost.values.values()]
    if not all(rows):  # infinite costs forbid every candidate of a layer
        raise AllocationError(f"a layer has no candidate of a finite cost in {name}. Give one of them a finite cost.")
    low, high = (cost.fixed + sum(map(end, rows)) for end in (min, max))
    budgets = [low + (high - low) * step / (points - 1) for step in range(points)]
    # A budget of at most 1 would be read as a fraction of the float model's cost.
    return frontier(sensitivity, costs, [max(budget, 1 + 1e-9) for budget in budgets], name, **options)


def frontier_around(
    result: AllocationResult, costs: Sequence[Cost], budgets: Mapping[str, float], minimise: str, **options: Any
) -> Frontier:
    """Sweep the first budget of an allocation, with the other budgets as they were given.

    Args:
        result: The allocation; its first sensitivity table serves all points.
        costs: The costs of the allocation.
        budgets: Its budgets by cost name; may be empty.
        minimise: Name of the cost that is swept if there are no budgets.
        options: Further arguments of :func:`~lightning_ptq.allocation.solver.allocate_bits`.
    """
    name = next(iter(budgets), minimise)
    others = {cost: budget for cost, budget in budgets.items() if cost != name}
    # Each point takes about as long as the allocation did, so a slow one gets fewer points.
    points = 12 if result.allocation.seconds < 0.5 else 5
    try:
        return sweep(result.sensitivity, costs, name, points=points, others=others, **options)
    except AllocationError:  # ties, pins and the other budgets leave a single choice, and no budget to sweep
        cost, choice = next(cost for cost in costs if cost.name == name), result.allocation.choice
        total = cost.total(choice)
        only = replace(result.allocation, costs={name: total}, limits={name: total})
        point = FrontierPoint(total, result.sensitivity.predict(choice), None, only)
        return Frontier(name, result.sensitivity.measure, cost.unit, [point])
