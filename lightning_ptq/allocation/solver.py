"""Bit allocation: the integer programme that picks each layer's widths (Hubara et al., ICML 2021, sec. 4, eq. 4-6).

``min Σ ΔL[l,k]·x[l,k]`` subject to ``Σ_k x[l,k] = 1`` and ``Σ cost_j[l,k]·x[l,k] ≤ budget_j`` for every budget, or
``min Σ cost·x`` subject to ``Σ ΔL·x ≤ max_degradation``; ``x`` binary. Solved to proven optimality.
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
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.errors import AllocationError, UnprovenAllocationWarning, warn
from lightning_ptq.numerics.qconfig import check_patterns

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class BitAllocation:
    """Each layer's widths.

    Attributes:
        choice: Layer to candidate.
        rise: The predicted rise of the measure over the base: the sum of the chosen sensitivities.
        costs: Total of each cost, fixed part included.
        limits: The budgets it was solved under, in the costs' units.
        proven: True if the solver proved it optimal.
        bound: No choice has a lower objective than this (the rise, or the cost that was minimised).
        gap: Relative distance of the objective from the bound.
        seconds: Time of the solver.
        solver: Which one.
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
        """Plain, JSON-able types."""
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
    """Choose the widths of least total sensitivity under budgets, or of least cost under a limit on the degradation.

    Args:
        sensitivity: What :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity` returned, or any table of rises.
        costs: One or several costs.
        budgets: By cost name: in the cost's unit, or a fraction (at most 1) of the float model's.
        max_degradation: Instead of the least rise, look for the least cost at which the rise stays within this.
        minimise: The cost that is then minimised; the first one by default.
        ties: Layer-name patterns; the layers that one pattern matches get one choice.
        pins: Candidate by layer-name pattern.
        time_limit: Seconds; the best choice found until then is returned, with its gap and a warning.

    Raises:
        AllocationError: If nothing fits the budgets, saying the least reachable; if tables, budgets, ties and pins do
            not fit together; or if the solver found nothing in time.
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
        return problem.solve("", limits, None, time_limit)
    target = minimise or costs[0].name
    if target not in by_name:
        raise AllocationError(f"minimise={target!r} is none of the costs {sorted(by_name)}.")
    problem.check_degradation(max_degradation)
    return problem.solve(target, limits, max_degradation, time_limit)


@dataclass
class _Problem:
    """Groups of tied layers, each with the candidates that all its layers have."""

    rises: Table
    costs: list[Cost]
    ties: Sequence[str]
    pins: Mapping[str, str]
    groups: list[tuple[list[str], list[str]]] = field(init=False)

    def __post_init__(self) -> None:
        self._check_tables()
        check_patterns(self.ties, self.rises, "ties")
        check_patterns(self.pins, self.rises, "pins")
        members: dict[str, list[str]] = {}
        for layer in self.rises:
            tie = next((f"tie {p}" for p in self.ties if fnmatchcase(layer, p)), f"layer {layer}")
            members.setdefault(tie, []).append(layer)
        self.groups = [(layers, self._shared(layers)) for layers in members.values()]

    def _check_tables(self) -> None:
        if not self.rises:
            raise AllocationError("the sensitivity table is empty.")
        tables = [("sensitivity", self.rises), *((cost.name, cost.values) for cost in self.costs)]
        for name, table in tables:
            for layer, own in self.rises.items():
                for candidate in own:
                    value = table.get(layer, {}).get(candidate)
                    if value is None:
                        raise AllocationError(f"the {name} table has no entry for layer {layer!r} at {candidate}.")
                    if not math.isfinite(value) or (value < 0 and name != "sensitivity"):
                        raise AllocationError(
                            f"the {name} table has {value} for layer {layer!r} at {candidate}; costs are numbers of 0"
                            " or more, sensitivities finite numbers."
                        )

    def _shared(self, layers: list[str]) -> list[str]:
        found = [c for c in self.rises[layers[0]] if all(c in self.rises[layer] for layer in layers)]
        pinned = {(p, c) for layer in layers for p, c in self.pins.items() if fnmatchcase(layer, p)}
        left = [c for c in found if all(c == candidate for _, candidate in pinned)]
        if not left:
            raise AllocationError(
                f"no candidate is left for {layers}: together they have {found}, pinned to"
                f" {sorted(c for _, c in pinned)}. First and last layer may have fewer candidates than the others."
            )
        return left

    def value(self, table: Table, group: tuple[list[str], list[str]], candidate: str) -> float:
        """A table's sum over a group's layers."""
        return sum(table[layer][candidate] for layer in group[0])

    def _extreme(self, table: Table, pick: Any) -> float:
        return float(sum(pick(self.value(table, group, c) for c in group[1]) for group in self.groups))

    def check_reachable(self, limits: Mapping[str, float]) -> None:
        """Raise if a budget alone cannot be met, or limits nothing."""
        reach = {c.name: [c.fixed + self._extreme(c.values, pick) for pick in (min, max)] for c in self.costs}
        for name, limit in limits.items():
            least, most = reach[name]
            if limit < least * (1 - _TOLERANCE) or limit > most * (1 + _TOLERANCE):
                where = "below the least" if limit < least else "above the most"
                listed = "; ".join(self._shown(n, *reach[n]) for n in limits)
                raise AllocationError(f"the budget of {limit:.6g} for {name} is {where} that is reachable. {listed}.")

    def _shown(self, name: str, least: float, most: float) -> str:
        cost = next(c for c in self.costs if c.name == name)
        share = f" ({least / cost.of_float:.4f} to {most / cost.of_float:.4f} of float)" if cost.of_float else ""
        fixed = f", of which {cost.fixed:.6g} for what stays float" if cost.fixed > least / 2 else ""
        return f"{name}: from {least:.6g} to {most:.6g} {cost.unit}{share}{fixed}"

    def check_degradation(self, limit: float) -> None:
        """Raise if no choice has a rise within the limit."""
        least = self._extreme(self.rises, min)
        if not limit >= least - _TOLERANCE * abs(least):
            raise AllocationError(f"max_degradation={limit!r} is below the least reachable rise, {least:.6g}.")

    def solve(
        self, target: str, limits: Mapping[str, float], max_rise: float | None, time_limit: float
    ) -> BitAllocation:
        """Minimise the rise, or the cost called ``target``."""
        start = time.perf_counter()
        tables = {"": self.rises, **{cost.name: cost.values for cost in self.costs}}
        fixed = {"": 0.0, **{cost.name: cost.fixed for cost in self.costs}}
        room = {name: limit - fixed[name] for name, limit in limits.items()}
        if max_rise is not None:
            room[""] = max_rise
        model, solver = _new_model()
        chosen = [[model.add_var(var_type=mip.BINARY) for _ in candidates] for _, candidates in self.groups]
        for row in chosen:
            model += mip.xsum(row) == 1
        flat = [variable for row in chosen for variable in row]
        columns = {
            name: [self.value(table, group, c) for group in self.groups for c in group[1]]
            for name, table in tables.items()
        }
        for name, limit in room.items():
            scale = max(map(abs, columns[name]), default=0.0) or 1.0
            model += mip.xsum(v / scale * x for v, x in zip(columns[name], flat, strict=True)) <= limit / scale
        unit = max(map(abs, columns[target])) or 1.0
        model.objective = mip.minimize(mip.xsum(v / unit * x for v, x in zip(columns[target], flat, strict=True)))
        status = model.optimize(max_seconds=max(time_limit, 1e-3))
        if status == mip.OptimizationStatus.INFEASIBLE:
            raise AllocationError(self._joint_message(limits, max_rise, time_limit))
        if not model.num_solutions:
            raise AllocationError(f"the solver found no choice within {time_limit} s ({status.name}). Give it more.")
        shares = [[float(x.x) for x in row] for row in chosen]
        picks = [row.index(max(row)) for row in shares]
        by_group = zip(self.groups, picks, strict=True)
        named = {layer: candidates[k] for (layers, candidates), k in by_group for layer in layers}
        choice = {layer: named[layer] for layer in self.rises}
        objective = sum(tables[target][layer][c] for layer, c in choice.items())
        proven = status == mip.OptimizationStatus.OPTIMAL
        bound = objective if proven else model.objective_bound * unit
        gap = abs(objective - bound) / max(abs(objective), 1e-30)
        if not proven:
            warn(
                f"the time limit of {time_limit} s ended the search: the bit allocation found is within {gap:.2%} of"
                " the bound, not proven optimal.",
                UnprovenAllocationWarning,
                stacklevel=3,
            )
        return BitAllocation(
            choice, sum(self.rises[layer][c] for layer, c in choice.items()),
            {cost.name: cost.total(choice) for cost in self.costs}, dict(limits), proven, bound + fixed[target], gap,
            time.perf_counter() - start, solver,
        )  # fmt: skip

    def _joint_message(self, limits: Mapping[str, float], max_rise: float | None, time_limit: float) -> str:
        """Each limit can be met alone but not all together: say how far each would have to go."""
        told = []
        for name in limits:
            others = {other: limit for other, limit in limits.items() if other != name}
            try:
                least = self.solve(name, others, max_rise, time_limit).costs[name]
                told.append(f"{name} {limits[name]:.6g} (at least {least:.6g} under the others)")
            except AllocationError:
                told.append(f"{name} {limits[name]:.6g} (the others exclude each other)")
        rise = "" if max_rise is None else f" with a rise of at most {max_rise:.6g}"
        return f"no choice meets all budgets together{rise}: {', '.join(told)}."


def _new_model() -> tuple[mip.Model, str]:
    """An empty model of CBC, or of HiGHS where CBC does not load."""
    failures = []
    for solver in (mip.CBC, mip.HIGHS):
        try:
            model = mip.Model(solver_name=solver)
        except Exception as error:  # python-mip raises whatever its loader meets
            failures.append(f"{solver}: {error}")
            continue
        model.verbose = 0
        model.max_mip_gap = model.max_mip_gap_abs = _TOLERANCE
        return model, str(solver)
    raise AllocationError(
        f"no solver loads ({'; '.join(failures)}). Install one for this platform: pip install 'mip[highs]'."
    )
