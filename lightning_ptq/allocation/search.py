"""From the integer programme to a network: apply an allocation, measure it, and solve again around it.

Sensitivities do not add up at low bits, so the rise that the first programme predicts is off. A second table, measured
with all layers at the choice found, tells what changes of it would bring *there*; a choice that measures better
replaces it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.sensitivity import measure_choice, measure_sensitivity
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation, allocate_bits
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Choice, Choices, TunedStates
from lightning_ptq.errors import AllocationError
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.progress import Progress


@dataclass(frozen=True)
class Round:
    """One solution of the programme, and what the network does at it.

    Attributes:
        predicted: The measure as the table predicts it.
        measured: The measure of the network.
        changed: How many layers differ from the choice before.
        accepted: Whether it replaced the choice before.
    """

    predicted: float
    measured: float
    changed: int
    accepted: bool


@dataclass(frozen=True)
class AllocationResult:
    """What the search for an allocation found.

    Attributes:
        allocation: The choice.
        sensitivity: The table of the first round, over the widest candidates.
        measured: The measure of the network at the choice.
        rounds: All rounds, in order.
        stability: For each layer, the share of allocations that keep its choice when the sensitivities are redrawn
            within their standard errors; a low share says that more samples could change it. Empty if unknown.
    """

    allocation: BitAllocation
    sensitivity: SensitivityTable
    measured: float
    rounds: list[Round] = field(default_factory=list)
    stability: dict[str, float] = field(default_factory=dict)


def search_allocation(
    calibration: Calibration,
    candidates: Sequence[str],
    costs: Sequence[Cost] | Cost,
    budgets: Mapping[str, float] | None = None,
    *,
    rounds: int = 2,
    max_degradation: float | None = None,
    sensitivity: SensitivityTable | None = None,
    states: TunedStates | None = None,
    measuring: Mapping[str, Any] | None = None,
    solving: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total, text: None,
    journal: Journal | None = None,
) -> AllocationResult:
    """Measure sensitivities, allocate, measure again around the allocation, and keep the best that was measured.

    Args:
        calibration: A calibrated module; it stays as it is.
        candidates: Bit widths.
        costs: One or several costs.
        budgets: By cost name; see :func:`~lightning_ptq.allocation.solver.allocate_bits`.
        rounds: Tables to measure; 1 for the plain method of the paper.
        max_degradation: Instead of budgets: the rise, measured, that is accepted over the widest candidates.
        sensitivity: The first table, if it was measured already.
        states: Tuned states by candidate and layer.
        measuring: Further arguments of :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        solving: Further arguments of :func:`~lightning_ptq.allocation.solver.allocate_bits`.
        progress: As in :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        journal: Where finished entries of the tables are kept, and found again.

    Raises:
        AllocationError: If nothing fits the budgets.
        SensitivityError: If nothing can be measured.
    """
    if rounds < 1:
        raise AllocationError(f"rounds must be 1 or more, got {rounds}.")
    measuring = {"measure": "kl", **(measuring or {})}
    search = _Search(
        calibration, candidates, costs, budgets, states, measuring, solving or {}, max_degradation, progress, journal
    )
    first = sensitivity or search.table(None)
    search.start(first)
    for _ in range(rounds - 1):
        if not search.improve():
            break
    redraw = search.solve if max_degradation is None else lambda table: search.solve(table, max_degradation)
    stability = _stability(first, search.first.choice, redraw)
    return AllocationResult(search.best, first, search.value, search.rounds, stability)


@dataclass
class _Search:
    calibration: Calibration
    candidates: Sequence[str]
    costs: Sequence[Cost] | Cost
    budgets: Mapping[str, float] | None
    states: TunedStates | None
    measuring: Mapping[str, Any]
    solving: Mapping[str, Any]
    max_degradation: float | None
    progress: Progress
    journal: Journal | None
    rounds: list[Round] = field(default_factory=list)

    def table(self, base: Choice | None) -> SensitivityTable:
        return measure_sensitivity(
            self.calibration,
            self.candidates,
            base=base,
            states=self.states,
            progress=self.progress,
            journal=self.journal and self.journal.inner(f"around {base}"),
            **self.measuring,
        )

    def solve(self, table: SensitivityTable, max_rise: float | None = None) -> BitAllocation:
        """The solution of rank 0, on all ranks."""
        return self.calibration.ranks.first(
            lambda: allocate_bits(table, self.costs, self.budgets, max_degradation=max_rise, **self.solving)
        )

    def measure(self, choice: Choice) -> float:
        same = {key: self.measuring[key] for key in ("measure", "output") if key in self.measuring}
        return measure_choice(self.calibration, choice, states=self.states, **same)

    def start(self, table: SensitivityTable) -> None:
        """The plain method: one table, one solution."""
        self.tables = [table]
        self.best = self.first = self.solve(table, self.max_degradation)
        self.value = self.measure(self.best.choice)
        self.rounds.append(Round(table.predict(self.best.choice), self.value, len(self.best.choice), True))

    def improve(self) -> bool:
        """Measure around the best choice and solve again; False if that brought nothing better."""
        here = self.table(self.best.choice)
        self.tables.append(here)
        # Far from where it was measured a table is as wrong as the first one was, so the mean of all has its say too.
        return any(self._try(table) for table in (here, _mean(self.tables)))

    def _try(self, table: SensitivityTable) -> bool:
        room = None
        if self.max_degradation is not None:
            room = self.max_degradation - (self.value - self.tables[0].base_value)
            room += sum(table.rises[name][candidate] for name, candidate in self.best.choice.items())
        try:
            found = self.solve(table, room)
        except AllocationError:
            return False
        changed = sum(found.choice[name] != candidate for name, candidate in self.best.choice.items())
        if not changed:
            return False
        measured = self.measure(found.choice)
        accepted = self._better(found, measured)
        step = sum(table.rises[n][c] - table.rises[n][self.best.choice[n]] for n, c in found.choice.items())
        self.rounds.append(Round(self.value + step, measured, changed, accepted))
        if accepted:
            total = sum(self.tables[0].rises[name][candidate] for name, candidate in found.choice.items())
            self.best, self.value = replace(found, rise=total), measured
        return accepted

    def _better(self, found: BitAllocation, measured: float) -> bool:
        if self.max_degradation is None:
            return measured < self.value
        limit = self.tables[0].base_value + self.max_degradation
        if self.value > limit or measured > limit:
            return measured < self.value
        target = self.solving.get("minimise") or next(iter(found.costs))
        return found.costs[target] < self.best.costs[target]


def apply_allocation(
    calibration: Calibration, allocation: BitAllocation | Choice, states: TunedStates | None = None
) -> None:
    """Give every layer its chosen widths: its tuned state at them, or the weights rounded to the nearest.

    Args:
        calibration: A calibrated module; its layers are changed in place.
        allocation: What :func:`~lightning_ptq.allocation.solver.allocate_bits` returned, or layer names to candidates.
        states: Tuned states by candidate and layer (``AdaQuantResult.states`` of parallel mode).

    Raises:
        AllocationError: If the allocation names a layer that is not there, or the layer cannot have the candidate.
    """
    choice = allocation.choice if isinstance(allocation, BitAllocation) else allocation
    choices = Choices(calibration, sorted(set(choice.values())), states)
    for name, candidate in choice.items():
        if candidate not in choices.of.get(name, {}):
            raise AllocationError(
                f"layer {name!r} cannot become {candidate}: it can be {list(choices.of.get(name, {}))}."
                " First and last layer and overridden ones keep to the QConfig."
            )
    choices.put_all(choice)


def _mean(tables: Sequence[SensitivityTable]) -> SensitivityTable:
    """The mean of several tables, up to a constant for each layer, which changes no solution."""
    rises = {
        name: {c: sum(table.rises[name][c] for table in tables) / len(tables) for c in row}
        for name, row in tables[0].rises.items()
    }
    return replace(tables[0], rises=rises)


def _stability(
    table: SensitivityTable, choice: Choice, solve: Callable[[SensitivityTable], BitAllocation], draws: int = 16
) -> dict[str, float]:
    """The share of draws, sensitivities moved by normal noise of their standard errors, that keep a layer's choice."""
    if not table.errors or any(error != error for row in table.errors.values() for error in row.values()):
        return {}
    noise = random.Random(0)
    kept = dict.fromkeys(choice, 0.0)
    for _ in range(draws):
        rises = {
            name: {c: value + noise.gauss(0, table.errors[name][c]) for c, value in row.items()}
            for name, row in table.rises.items()
        }
        try:
            drawn = solve(replace(table, rises=rises)).choice
        except AllocationError:  # the draw lies outside the limit on the degradation
            continue
        for name, candidate in choice.items():
            kept[name] += (drawn[name] == candidate) / draws
    return kept
