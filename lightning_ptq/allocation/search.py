"""Search for an allocation: solve the integer program, measure the network, and solve again around the best choice.

Sensitivities do not add up at low bit widths, so the rise that the first program predicts is inaccurate. A second
table, measured with all layers at the first choice, gives the effect of changing that choice. The solution of a second
program replaces the first choice if the network measures better at it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.sensitivity import measure_choice, measure_sensitivity
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation, allocate_bits
from lightning_ptq.arguments import keywords, text_table, whole
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates, Choice, TunedStates
from lightning_ptq.calibration.checks import check_calibration
from lightning_ptq.errors import AllocationError
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.progress import Progress, no_progress


@dataclass(frozen=True)
class Round:
    """One solution of the integer program, and the network measured at it.

    Attributes:
        predicted: The measure that the table predicts.
        measured: The measure of the network.
        changed: Number of layers whose choice differs from the best choice before.
        accepted: True if the solution replaced the best choice before.
    """

    predicted: float
    measured: float
    changed: int
    accepted: bool


@dataclass(frozen=True)
class AllocationResult:
    """The outcome of :func:`search_allocation`.

    Attributes:
        allocation: The best allocation.
        sensitivity: The table of the first round, with the widest candidates as the base.
        measured: The measure of the network at the allocation.
        rounds: All rounds, in order.
        stability: For each layer, the share of allocations that keep its choice when the sensitivities of the first
            round are redrawn within their standard errors. Where it is low, more samples could change the choice. Empty
            if the standard errors are unknown.
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
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
) -> AllocationResult:
    """Measure sensitivities, allocate, measure again around the allocation, and keep the best measured allocation.

    Args:
        calibration: A calibrated module; it is left unchanged.
        candidates: Bit widths, such as ``["w8a8", "w4a4"]``.
        costs: One or several costs.
        budgets: Budgets by cost name; see :func:`~lightning_ptq.allocation.solver.allocate_bits`.
        rounds: Number of tables to measure; 1 for the plain method of the paper.
        max_degradation: Instead of budgets, the accepted rise of the measure over its value at the widest candidates.
        sensitivity: The first table, if it has been measured before; by default it is measured.
        states: Tuned states by candidate and layer; layers without one are rounded to nearest.
        measuring: Further arguments of :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        solving: Further arguments of :func:`~lightning_ptq.allocation.solver.allocate_bits`.
        progress: As in :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        journal: Where finished entries of the tables are saved, for a resumed run; by default nowhere.

    Raises:
        AllocationError: If no choice meets the budgets, or ``rounds`` is less than 1.
        SensitivityError: If the measure is not finite, or the network's output is not a tensor.
    """
    check_calibration(calibration, batches=True)
    rounds = whole("rounds", rounds, error=AllocationError)
    taken = ["calibration", "candidates", "base", "states", "progress", "journal"]
    measuring = {"measure": "kl", **keywords("measuring", measuring, measure_sensitivity, taken, AllocationError)}
    taken = ["sensitivity", "costs", "budgets", "max_degradation"]
    solving = keywords("solving", solving, allocate_bits, taken, AllocationError)
    search = _Search(
        calibration, candidates, costs, budgets, states, measuring, solving, max_degradation, progress, journal
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
    """The state of a search: the tables so far, the best allocation so far, and its measured value."""

    calibration: Calibration
    candidates: Sequence[str]
    costs: Sequence[Cost] | Cost
    budgets: Mapping[str, float] | None
    states: TunedStates | None
    measuring: Mapping[str, Any]
    solving: Mapping[str, Any]
    max_degradation: float | None
    progress: Progress
    journal: Journal
    rounds: list[Round] = field(default_factory=list)

    def table(self, base: Choice | None) -> SensitivityTable:
        """Measure a table around ``base``."""
        return measure_sensitivity(
            self.calibration,
            self.candidates,
            base=base,
            states=self.states,
            progress=self.progress,
            journal=self.journal.inner(f"around {base}"),
            **self.measuring,
        )

    def solve(self, table: SensitivityTable, max_rise: float | None = None) -> BitAllocation:
        """Return the solution of rank 0 on all ranks: solvers with a time limit need not agree."""
        return self.calibration.ranks.on_rank_zero(
            lambda: allocate_bits(table, self.costs, self.budgets, max_degradation=max_rise, **self.solving)
        )

    def measure(self, choice: Choice) -> float:
        """Measure the network at a choice."""
        same = {key: self.measuring[key] for key in ("measure", "output") if key in self.measuring}
        return measure_choice(self.calibration, choice, states=self.states, **same)

    def start(self, table: SensitivityTable) -> None:
        """Do the first round, the plain method of the paper."""
        self.tables = [table]
        self.best = self.first = self.solve(table, self.max_degradation)
        self.value = self.measure(self.best.choice)
        self.rounds.append(Round(table.predict(self.best.choice), self.value, len(self.best.choice), True))

    def improve(self) -> bool:
        """Measure around the best choice and solve again; return False if nothing better was found."""
        here = self.table(self.best.choice)
        self.tables.append(here)
        # A table is only accurate near its base, so the solution of the mean table is tried too.
        return any(self._try(table) for table in (here, _mean(self.tables)))

    def _try(self, table: SensitivityTable) -> bool:
        """Solve with a table, and return True if the network measures better at the solution."""
        room = None
        if self.max_degradation is not None:
            # What is left of the limit at the best choice, as a limit on the sum of this table's rises: at the best
            # choice that sum is 0 for a table measured there, but not for a mean of tables.
            room = self.max_degradation - (self.value - self.tables[0].base_value)
            room += sum(table.rises[name][candidate] for name, candidate in self.best.choice.items())
        try:
            solution = self.solve(table, room)
        except AllocationError:
            return False
        changed = sum(solution.choice[name] != candidate for name, candidate in self.best.choice.items())
        if not changed:
            return False
        measured = self.measure(solution.choice)
        accepted = self._better(solution, measured)
        step = sum(table.rises[n][c] - table.rises[n][self.best.choice[n]] for n, c in solution.choice.items())
        self.rounds.append(Round(self.value + step, measured, changed, accepted))
        if accepted:
            # The result goes with the first table, so its rise is the one over the base of that table.
            total = sum(self.tables[0].rises[name][candidate] for name, candidate in solution.choice.items())
            self.best, self.value = replace(solution, rise=total), measured
        return accepted

    def _better(self, solution: BitAllocation, measured: float) -> bool:
        """Return True if a solution is better than the best one: less cost within the limit, else a lower measure."""
        if self.max_degradation is None:
            return measured < self.value
        limit = self.tables[0].base_value + self.max_degradation
        if self.value > limit or measured > limit:
            return measured < self.value
        target = self.solving.get("minimise") or next(iter(solution.costs))
        return solution.costs[target] < self.best.costs[target]


def apply_allocation(
    calibration: Calibration, allocation: BitAllocation | Choice, states: TunedStates | None = None
) -> None:
    """Give every layer its chosen bit widths: the tuned state if there is one, else weights rounded to nearest.

    Args:
        calibration: A calibrated module; its layers are changed in place.
        allocation: What :func:`~lightning_ptq.allocation.solver.allocate_bits` returned, or candidates by layer name.
        states: Tuned states by candidate and layer (``AdaQuantResult.states`` of parallel mode); by default
            layers are rounded to nearest.

    Raises:
        AllocationError: If the allocation names a layer that does not exist, or that cannot have the candidate.
    """
    given = allocation.choice if isinstance(allocation, BitAllocation) else allocation
    choice = text_table("allocation", given, "{'head': 'w8a8'}", AllocationError)
    if not choice:
        return
    choices = Candidates(calibration, sorted(set(choice.values())), states)
    for name, candidate in choice.items():
        if candidate not in choices.by_layer.get(name, {}):
            raise AllocationError(
                f"layer {name!r} cannot become {candidate}, it can be {list(choices.by_layer.get(name, {}))}."
                " First and last layers and overridden ones have the bit widths of the QConfig."
            )
    choices.put_all(choice)
    calibration.round_biases()


def _mean(tables: Sequence[SensitivityTable]) -> SensitivityTable:
    """Return the mean of several tables.

    Their bases differ, so each row is off by a constant, which changes no solution.
    """
    rises = {
        name: {c: sum(table.rises[name][c] for table in tables) / len(tables) for c in row}
        for name, row in tables[0].rises.items()
    }
    return replace(tables[0], rises=rises)


def _stability(
    table: SensitivityTable, choice: Choice, solve: Callable[[SensitivityTable], BitAllocation], draws: int = 16
) -> dict[str, float]:
    """Return for each layer the share of draws that keep its choice.

    A draw adds normal noise to the sensitivities, with their standard errors as standard deviations.
    """
    if not table.errors or any(math.isnan(error) for row in table.errors.values() for error in row.values()):
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
        except AllocationError:  # no choice of this draw is within the limit on the degradation
            continue
        for name, candidate in choice.items():
            kept[name] += (drawn[name] == candidate) / draws
    return kept
