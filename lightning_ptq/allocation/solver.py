"""Bit allocation: the integer program that chooses each layer's bit widths (Hubara et al., ICML 2021, sec. 4, eq. 4-6).

``min Σ ΔL[l,k]·x[l,k]`` subject to ``Σ_k x[l,k] = 1`` and ``Σ cost_j[l,k]·x[l,k] ≤ budget_j`` for every budget, or
``min Σ cost·x`` subject to ``Σ ΔL·x ≤ max_degradation``; ``x`` is binary. It is solved to proven optimality.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_ptq.allocation.branching import Outcome, Row, Search
from lightning_ptq.allocation.costs import Cost, Table
from lightning_ptq.allocation.program import Group
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.arguments import is_number, text_table, texts
from lightning_ptq.calibration.candidates import Choice
from lightning_ptq.errors import AllocationError, UnprovenAllocationWarning, warn
from lightning_ptq.numerics.qconfig import check_patterns, matches

_RISE = ""  # stands for the sensitivities where costs are named
_TOLERANCE = 1e-9  # relative; budgets are often computed from sums in another order


@dataclass(frozen=True)
class BitAllocation:
    """The bit widths chosen for each layer.

    Attributes:
        choice: Candidate of each layer.
        rise: Predicted rise of the measure over the base: the sum of the chosen sensitivities.
        costs: Total of each cost, fixed part included.
        limits: Budgets of the solution, in the units of the costs.
        proven: True if the solution is optimal: no choice within the limits has a lower objective, by more than about
            1e-5 of the largest difference that is left between two candidates.
        bound: Lower bound of the objective (the rise, or the cost that was minimized) over all choices.
        gap: Relative distance of the objective from the bound.
        seconds: Time taken to solve.
        solver: Name of the solver; ``"none"`` if only one choice was left.
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
        costs: One or several costs. An infinite cost forbids a candidate.
        budgets: Budgets by cost name, in the cost's unit or as a fraction (at most 1) of the float model's cost;
            needed unless ``max_degradation`` is given.
        max_degradation: Limit on the rise; with it, a cost is minimized instead of the rise. None by default.
        minimise: Name of that cost; by default the first one.
        ties: Layer-name patterns; the layers that one pattern matches get the same candidate. None by default.
        pins: Candidate by layer-name pattern. None by default.
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
    costs = check_costs(costs)
    ties, pins = check_solving(ties, pins, time_limit)
    by_name = {cost.name: cost for cost in costs}
    if unknown := set(budgets or {}) - set(by_name):
        raise AllocationError(f"there is a budget for {sorted(unknown)}, but only the costs {sorted(by_name)}.")
    limits = {name: by_name[name].limit(budget) for name, budget in (budgets or {}).items()}
    problem = _Problem(rises, costs, ties, pins)
    limits = problem.within_reach(limits)
    if max_degradation is None:
        if not limits:
            raise AllocationError("there is no budget. Give one, for example size=0.15, or max_degradation.")
        return problem.solve(_RISE, limits, None, time_limit)
    target = minimise or costs[0].name
    if target not in by_name:
        raise AllocationError(f"minimise={target!r} is not one of the costs {sorted(by_name)}.")
    return problem.solve(target, limits, problem.degradation(max_degradation), time_limit)


def check_costs(costs: Any) -> list[Cost]:
    """Return one cost or several as a list; raise :class:`AllocationError` if there is none."""
    found = [costs] if isinstance(costs, Cost) else list(costs) if isinstance(costs, Sequence) else []
    if not found or not all(isinstance(cost, Cost) for cost in found):
        raise AllocationError(f"costs must be one Cost or several, got {costs!r}. Write for example size_cost(...).")
    return found


def check_solving(
    ties: Sequence[str] | None, pins: Mapping[str, str] | None, time_limit: float
) -> tuple[list[str], dict[str, str]]:
    """Return ties and pins as a list and a dictionary; raise where one of the three arguments is none."""
    if not (is_number(time_limit) and time_limit >= 0):
        raise AllocationError(f"time_limit must be a number of seconds, got {time_limit!r}. Write for example 60.")
    return texts("ties", ties or (), "layers.*.query"), text_table("pins", pins or {}, "{'head': 'w8a8'}")


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
            tie = next((f"tie {p}" for p in self.ties if matches(layer, p)), f"layer {layer}")
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
                    if not (is_number(value) and (math.isfinite(value) if name == "sensitivity" else value >= 0)):
                        raise AllocationError(
                            f"the {name} table has {value} for layer {layer!r} at {candidate}. Costs must be numbers of"
                            " 0 or more (infinity forbids a candidate), sensitivities finite numbers."
                        )
        for cost in self.costs:
            if not (is_number(cost.fixed) and math.isfinite(cost.fixed)):
                raise AllocationError(f"the fixed part of {cost.name} must be a finite number, got {cost.fixed!r}.")

    def _shared(self, layers: list[str]) -> list[str]:
        """Return the candidates that all of the layers have, and that the pins and the costs allow."""
        common = [c for c in self.rises[layers[0]] if all(c in self.rises[layer] for layer in layers)]
        pinned = {c for layer in layers for p, c in self.pins.items() if matches(layer, p)}
        allowed = [c for c in common if all(c == pin for pin in pinned)]
        if not allowed:
            raise AllocationError(
                f"no candidate is left for {layers}: together they have {common}, pinned to {sorted(pinned)}. First and"
                " last layers may have fewer candidates than the others."
            )
        possible = [
            c for c in allowed if all(cost.values[layer][c] < math.inf for cost in self.costs for layer in layers)
        ]
        if not possible:
            raise AllocationError(
                f"no candidate is left for {layers}: {allowed} have an infinite cost, which forbids them. Give one of"
                " them a finite cost, or add a candidate."
            )
        return possible

    def _extreme(self, table: Table, pick: Any) -> dict[str, str]:
        """Return the choice whose sum of a table is the least or the greatest, by ``pick``."""
        chosen: dict[str, str] = {}
        for group in self.groups:
            candidate = pick(group.candidates, key=lambda c, group=group: group.total(table, c))
            chosen.update(dict.fromkeys(group.layers, candidate))
        return {layer: chosen[layer] for layer in self.rises}

    def within_reach(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Return the limits; raise if one cannot be met on its own, or is more than any choice costs."""
        reach = {c.name: [c.total(self._extreme(c.values, pick)) for pick in (min, max)] for c in self.costs}
        for name, limit in limits.items():
            least, most = reach[name]
            if limit < least * (1 - _TOLERANCE) or limit > most * (1 + _TOLERANCE):
                where = "below the least cost" if limit < least else "above the greatest cost"
                ranges = "; ".join(self._range(n, *reach[n]) for n in limits)
                raise AllocationError(
                    f"the budget of {limit:.6g} for {name} is {where} of the candidates. Reachable: {ranges}."
                )
        return {name: max(limit, reach[name][0]) for name, limit in limits.items()}

    def _range(self, name: str, least: float, most: float) -> str:
        cost = next(c for c in self.costs if c.name == name)
        share = f" ({least / cost.of_float:.4f} to {most / cost.of_float:.4f} of float)" if cost.of_float else ""
        fixed = f", including {cost.fixed:.6g} for what stays float" if cost.fixed > least / 2 else ""
        return f"{name} from {least:.6g} to {most:.6g} {cost.unit}".rstrip() + share + fixed

    def degradation(self, limit: float) -> float:
        """Return a limit on the rise; raise if no choice is within it."""
        least = self._rise(self._extreme(self.rises, min))
        if not (is_number(limit) and limit >= least - _TOLERANCE * abs(least)):
            raise AllocationError(
                f"max_degradation={limit!r} is below the least rise of the candidates, {least:.6g}. Write a greater"
                " value."
            )
        return max(float(limit), least)

    def solve(
        self, target: str, limits: Mapping[str, float], max_rise: float | None, time_limit: float
    ) -> BitAllocation:
        """Minimize the rise, or the cost called ``target``."""
        start = time.perf_counter()
        costs = {cost.name: cost for cost in self.costs}
        rows = [Row(costs[name].values, limit, costs[name].fixed, costs[name].total) for name, limit in limits.items()]
        if max_rise is not None:
            rows.append(Row(self.rises, max_rise, 0.0, self._rise))
        found = Search(self.groups, self.rises if target == _RISE else costs[target].values, rows, time_limit).run()
        if found.choice is None:
            if found.proven:
                raise AllocationError(self._joint_message(limits, max_rise, time_limit))
            raise AllocationError(
                f"the solver found no choice within {time_limit} s ({found.status}). Write a greater time_limit."
            )
        gap = abs(found.objective - found.bound) / max(abs(found.objective), 1e-30)
        if not found.proven:
            warn(
                f"the time limit of {time_limit} s ended the search: the bit allocation is within {gap:.2%} of the"
                " bound, but not proven optimal.",
                UnprovenAllocationWarning,
                stacklevel=3,
            )
        self._verify(found, rows)
        fixed = 0.0 if target == _RISE else costs[target].fixed
        return BitAllocation(
            found.choice, self._rise(found.choice), {cost.name: cost.total(found.choice) for cost in self.costs},
            dict(limits), found.proven, found.bound + fixed, gap, time.perf_counter() - start, found.solver or "none",
        )  # fmt: skip

    def _rise(self, choice: Choice) -> float:
        return sum(self.rises[layer][candidate] for layer, candidate in choice.items())

    def _verify(self, found: Outcome, rows: Sequence[Row]) -> None:
        """Raise if a solution breaks a limit, a tie or a pin: a fault of the solver must not become a result."""
        choice = found.choice or {}
        broken = [f"a limit of {row.most:.6g}" for row in rows if not row.total(choice) <= row.most]
        for group in self.groups:
            if len(given := {choice.get(layer) for layer in group.layers}) != 1 or not given <= set(group.candidates):
                broken.append(f"the ties or pins of {group.layers}")
        if broken:
            raise AllocationError(
                f"the solution of {found.solver} breaks {', '.join(broken)}. Check that the tables hold plain numbers,"
                " and please report this."
            )

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
