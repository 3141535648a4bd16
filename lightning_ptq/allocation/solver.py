"""Bit allocation: the integer program that chooses each layer's bit widths (Hubara et al., ICML 2021, sec. 4, eq. 4-6).

``min Σ ΔL[l,k]·x[l,k]`` subject to ``Σ_k x[l,k] = 1`` and ``Σ cost_j[l,k]·x[l,k] ≤ budget_j`` for every budget, or
``min Σ cost·x`` subject to ``Σ ΔL·x ≤ max_degradation``; ``x`` is binary. It is solved to proven optimality.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import mip

from lightning_ptq.allocation.costs import Cost, Table
from lightning_ptq.allocation.program import TOLERANCE, Group, Program
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.errors import AllocationError, UnprovenAllocationWarning, warn
from lightning_ptq.numerics.qconfig import check_patterns

_RISE = ""  # stands for the sensitivities where costs are named


@dataclass(frozen=True)
class BitAllocation:
    """The bit widths chosen for each layer.

    Attributes:
        choice: Candidate of each layer.
        rise: Predicted rise of the measure over the base: the sum of the chosen sensitivities.
        costs: Total of each cost, fixed part included.
        limits: Budgets of the solution, in the units of the costs.
        proven: True if the solver proved the solution optimal.
        bound: Lower bound of the objective (the rise, or the cost that was minimized) over all choices.
        gap: Relative distance of the objective from the bound.
        seconds: Time taken to solve.
        solver: Name of the solver.
    """

    choice: dict[str, str]
    rise: float
    costs: dict[str, float]
    limits: dict[str, float]
    proven: bool
    bound: float
    gap: float
    seconds: float
    solver: str

    def to_dict(self) -> dict[str, Any]:
        """Return the allocation as JSON-compatible types."""
        return asdict(self)


def allocate_bits(
    sensitivity: SensitivityTable | Table,
    costs: Sequence[Cost] | Cost,
    budgets: Mapping[str, float] | None = None,
    *,
    max_degradation: float | None = None,
    minimise: str | None = None,
    ties: Sequence[str] = (),
    pins: Mapping[str, str] | None = None,
    time_limit: float = 60.0,
) -> BitAllocation:
    """Choose the bit widths of least total sensitivity within budgets, or of least cost within a limit of degradation.

    Args:
        sensitivity: A sensitivity table, or any table of rises by layer and candidate.
        costs: One or several costs.
        budgets: Budgets by cost name, in the cost's unit or as a fraction (at most 1) of the float model's cost.
        max_degradation: Limit on the rise; with it, a cost is minimized instead of the rise.
        minimise: Name of that cost; by default the first one.
        ties: Layer-name patterns; the layers that one pattern matches get the same candidate.
        pins: Candidate by layer-name pattern.
        time_limit: Time limit in seconds; the best choice by then is returned, with its gap and a warning.

    Raises:
        AllocationError: If no choice meets the budgets; if tables, budgets, ties and pins do not fit together; or if
            the solver found no choice in time.
        QConfigError: If a pattern matches no layer.

    Warns:
        UnprovenAllocationWarning: If the time limit ended the search.

    Example:
        >>> rises = {"a": {"w8a8": 0.0, "w4a4": 0.1}, "b": {"w8a8": 0.0, "w4a4": 0.3}}
        >>> size = Cost("size", {"a": {"w8a8": 8.0, "w4a4": 4.0}, "b": {"w8a8": 8.0, "w4a4": 4.0}})
        >>> allocate_bits(rises, size, {"size": 12}).choice
        {'a': 'w4a4', 'b': 'w8a8'}
    """
    rises = sensitivity.rises if isinstance(sensitivity, SensitivityTable) else sensitivity
    costs = [costs] if isinstance(costs, Cost) else list(costs)
    by_name = {cost.name: cost for cost in costs}
    if unknown := set(budgets or {}) - set(by_name):
        raise AllocationError(f"there is a budget for {sorted(unknown)}, but only the costs {sorted(by_name)}.")
    limits = {name: by_name[name].limit(budget) for name, budget in (budgets or {}).items()}
    problem = _Problem(rises, costs, ties, pins or {})
    problem.check_reachable(limits)
    if max_degradation is None:
        if not limits:
            raise AllocationError("there is no budget. Give one, for example size=0.15, or max_degradation.")
        return problem.solve(_RISE, limits, None, time_limit)
    target = minimise or costs[0].name
    if target not in by_name:
        raise AllocationError(f"minimise={target!r} is not one of the costs {sorted(by_name)}.")
    problem.check_degradation(max_degradation)
    return problem.solve(target, limits, max_degradation, time_limit)


@dataclass
class _Problem:
    """Sensitivities, costs, ties and pins, to be solved under any limits."""

    rises: Table
    costs: list[Cost]
    ties: Sequence[str]
    pins: Mapping[str, str]
    groups: list[Group] = field(init=False)

    def __post_init__(self) -> None:
        self._check_tables()
        check_patterns(self.ties, self.rises, "ties")
        check_patterns(self.pins, self.rises, "pins")
        members: dict[str, list[str]] = {}
        for layer in self.rises:
            tie = next((f"tie {p}" for p in self.ties if fnmatchcase(layer, p)), f"layer {layer}")
            members.setdefault(tie, []).append(layer)
        self.groups = [Group(layers, self._shared(layers)) for layers in members.values()]

    def _check_tables(self) -> None:
        if not self.rises:
            raise AllocationError("the sensitivity table is empty. Measure a module that has quantized layers.")
        tables = [("sensitivity", self.rises), *((cost.name, cost.values) for cost in self.costs)]
        for name, table in tables:
            for layer, row in self.rises.items():
                for candidate in row:
                    value = table.get(layer, {}).get(candidate)
                    if value is None:
                        raise AllocationError(f"the {name} table has no entry for layer {layer!r} at {candidate}.")
                    if not math.isfinite(value) or (value < 0 and name != "sensitivity"):
                        raise AllocationError(
                            f"the {name} table has {value} for layer {layer!r} at {candidate}. Costs must be numbers of"
                            " 0 or more, sensitivities finite numbers."
                        )

    def _shared(self, layers: list[str]) -> list[str]:
        """Return the candidates that all of the layers have, and that the pins allow."""
        common = [c for c in self.rises[layers[0]] if all(c in self.rises[layer] for layer in layers)]
        pinned = {c for layer in layers for p, c in self.pins.items() if fnmatchcase(layer, p)}
        allowed = [c for c in common if all(c == pin for pin in pinned)]
        if not allowed:
            raise AllocationError(
                f"no candidate is left for {layers}: together they have {common}, pinned to {sorted(pinned)}. First and"
                " last layers may have fewer candidates than the others."
            )
        return allowed

    def _extreme(self, table: Table, pick: Any) -> float:
        return float(sum(pick(group.total(table, c) for c in group.candidates) for group in self.groups))

    def check_reachable(self, limits: Mapping[str, float]) -> None:
        """Raise if a budget cannot be met on its own, or is more than any choice costs."""
        reach = {c.name: [c.fixed + self._extreme(c.values, pick) for pick in (min, max)] for c in self.costs}
        for name, limit in limits.items():
            least, most = reach[name]
            if limit < least * (1 - TOLERANCE) or limit > most * (1 + TOLERANCE):
                where = "below the least cost" if limit < least else "above the greatest cost"
                ranges = "; ".join(self._range(n, *reach[n]) for n in limits)
                raise AllocationError(
                    f"the budget of {limit:.6g} for {name} is {where} of the candidates. Reachable: {ranges}."
                )

    def _range(self, name: str, least: float, most: float) -> str:
        cost = next(c for c in self.costs if c.name == name)
        share = f" ({least / cost.of_float:.4f} to {most / cost.of_float:.4f} of float)" if cost.of_float else ""
        fixed = f", including {cost.fixed:.6g} for what stays float" if cost.fixed > least / 2 else ""
        return f"{name} from {least:.6g} to {most:.6g} {cost.unit}".rstrip() + share + fixed

    def check_degradation(self, limit: float) -> None:
        """Raise if no choice has a rise within the limit."""
        least = self._extreme(self.rises, min)
        if not limit >= least - TOLERANCE * abs(least):
            raise AllocationError(
                f"max_degradation={limit!r} is below the least rise of the candidates, {least:.6g}. Write a greater"
                " value."
            )

    def solve(
        self, target: str, limits: Mapping[str, float], max_rise: float | None, time_limit: float
    ) -> BitAllocation:
        """Minimize the rise, or the cost called ``target``."""
        start = time.perf_counter()
        fixed = {_RISE: 0.0, **{cost.name: cost.fixed for cost in self.costs}}
        room = {name: limit - fixed[name] for name, limit in limits.items()}
        if max_rise is not None:
            room[_RISE] = max_rise
        tables = {_RISE: self.rises, **{cost.name: cost.values for cost in self.costs}}
        program = Program(self.groups)
        for name, limit in room.items():
            program.limit(tables[name], limit)
        unit = program.minimize(tables[target])
        status = program.model.optimize(max_seconds=max(time_limit, 1e-3))
        if status == mip.OptimizationStatus.INFEASIBLE:
            raise AllocationError(self._joint_message(limits, max_rise, time_limit))
        if not program.model.num_solutions:
            raise AllocationError(
                f"the solver found no choice within {time_limit} s ({status.name}). Write a greater time_limit."
            )
        solution = program.solution()
        choice = {layer: solution[layer] for layer in self.rises}
        objective = sum(tables[target][layer][c] for layer, c in choice.items())
        proven = status == mip.OptimizationStatus.OPTIMAL
        bound = objective if proven else program.model.objective_bound * unit
        gap = abs(objective - bound) / max(abs(objective), 1e-30)
        if not proven:
            warn(
                f"the time limit of {time_limit} s ended the search: the bit allocation is within {gap:.2%} of the"
                " bound, but not proven optimal.",
                UnprovenAllocationWarning,
                stacklevel=3,
            )
        return BitAllocation(
            choice, sum(self.rises[layer][c] for layer, c in choice.items()),
            {cost.name: cost.total(choice) for cost in self.costs}, dict(limits), proven, bound + fixed[target], gap,
            time.perf_counter() - start, program.solver,
        )  # fmt: skip

    def _joint_message(self, limits: Mapping[str, float], max_rise: float | None, time_limit: float) -> str:
        """Return the message for limits that exclude each other: for each, the least value under the others."""
        needs = []
        for name in limits:
            others = {other: limit for other, limit in limits.items() if other != name}
            try:
                least = self.solve(name, others, max_rise, time_limit).costs[name]
                needs.append(f"{name} {limits[name]:.6g} (at least {least:.6g} under the others)")
            except AllocationError:
                needs.append(f"{name} {limits[name]:.6g} (the others exclude each other)")
        rise = "" if max_rise is None else f" with a rise of at most {max_rise:.6g}"
        return f"no choice meets all budgets together{rise}: {', '.join(needs)}."
