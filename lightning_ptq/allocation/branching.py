"""An exact search around the integer program: drops what cannot fit, checks totals, and branches where they differ.

Solvers have tolerances relative to the largest coefficient of a row, so one entry far above the others hides them: a
cost of 1e6 beside costs of 1, or a rise of 1e9 beside rises of 1e-9. Here every limit is kept exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import mip

from lightning_ptq.allocation.costs import Table
from lightning_ptq.allocation.program import Group, Program

_FEW = 1000  # choices that are compared one by one
_SEEN = 1e-5  # part of the objective's range that solvers tell apart
_ROUNDING = 1e-13  # relative error of a sum of floats, with room to spare
_FINER = 8.0  # times the objective's range must shrink for the program to be solved again
_Totals = list[dict[str, float]]  # by group and candidate


@dataclass(frozen=True)
class Row:
    """A limit on the sum of a table: ``fixed + total <= most``.

    Args:
        table: Values by layer and candidate.
        most: The limit.
        fixed: What is added to the total.
        total: Function that returns the left side for a choice, by which the limit is finally judged.
    """

    table: Table
    most: float
    fixed: float
    total: Callable[[dict[str, str]], float]


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        choice: The best choice by layer; None if there is none.
        objective: Its objective.
        bound: Lower bound of the objective over all choices.
        proven: True if no choice is better, or there is none.
        status: Status of the solver when time ran out; empty otherwise.
        solver: Name of the solver; empty if none was needed.
    """

    choice: dict[str, str] | None = None
    objective: float = math.inf
    bound: float = math.inf
    proven: bool = True
    status: str = ""
    solver: str = ""


class Search:
    """Finds the choice of least objective within all limits.

    Args:
        groups: The groups, each with at least one candidate.
        objective: Table whose sum is minimized.
        rows: The limits.
        seconds: Time limit.
    """

    def __init__(self, groups: Sequence[Group], objective: Table, rows: Sequence[Row], seconds: float) -> None:
        self.groups, self.objective = groups, objective
        self.seconds, self.end = seconds, time.perf_counter() + seconds
        self.judged = [(self._totals(row.table), row) for row in rows]
        self.objectives = self._totals(objective)
        self.found = Outcome()

    def _totals(self, table: Table) -> _Totals:
        return [{c: group.total(table, c) for c in group.candidates} for group in self.groups]

    def run(self) -> Outcome:
        """Search until the best choice is proven, or the time is over."""
        stack = [[group.candidates for group in self.groups]]
        while stack:
            node = self._fitting(stack.pop())
            if node is None:
                continue
            if self.end <= time.perf_counter() and self.found.solver:  # at least one program is solved
                self._leave(self._least(self.objectives, node), "time limit")
                continue
            stack += self._solve(node)
        self.found.bound = min(self.found.bound, self.found.objective)
        return self.found

    def _fitting(self, node: list[list[str]]) -> list[list[str]] | None:
        """Return the candidates that can be part of a better choice within the limits; None if there is no choice."""
        limits = [(totals, row.most, row.fixed) for totals, row in self.judged]
        if self.found.choice is not None:
            limits.append((self.objectives, self.found.objective, 0.0))
            if self._least(self.objectives, node) >= self.found.objective:
                return None
        while True:
            before = sum(map(len, node))
            for totals, most, fixed in limits:
                least = [min(total[c] for c in candidates) for total, candidates in zip(totals, node, strict=True)]
                room = _room(most, fixed, least)
                node = [
                    [c for c in candidates if total[c] - low <= room]
                    for total, low, candidates in zip(totals, least, node, strict=True)
                ]
                if not all(node):
                    return None
            if sum(map(len, node)) == before:
                return node

    @staticmethod
    def _least(totals: _Totals, node: list[list[str]]) -> float:
        return math.fsum(min(total[c] for c in candidates) for total, candidates in zip(totals, node, strict=True))

    def _solve(self, node: list[list[str]]) -> list[list[list[str]]]:
        """Solve the program of a node and note what it gives; return the nodes that are still to be searched."""
        free = [index for index, candidates in enumerate(node) if len(candidates) > 1]
        chosen, bound, proven = [candidates[0] for candidates in node], -math.inf, True
        if free:
            program = Program([node[index] for index in free])
            for totals, row in self.judged:
                self._limit(program, totals, row, node, free)
            unit = program.minimize(_above(self.objectives, node, free))
            left = self.end - time.perf_counter() if self.found.solver else self.seconds
            status = program.solve(left)
            self.found.solver = program.solver
            if status in (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE):
                return self._note(node, chosen, bound, True) if _are_few(node) else []
            proven = status == mip.OptimizationStatus.OPTIMAL
            least = self._least(self.objectives, node)
            if not program.model.num_solutions:
                self._leave(least, status.name)
                return []
            bound = least + program.model.objective_bound * unit
            for index, candidate in zip(free, program.solution(), strict=True):
                chosen[index] = candidate
        return self._note(node, chosen, bound, proven)

    def _limit(self, program: Program, totals: _Totals, row: Row, node: list[list[str]], free: list[int]) -> None:
        """Add a limit to a program, as one on what the candidates cost above the least of their group."""
        least = [min(total[c] for c in candidates) for total, candidates in zip(totals, node, strict=True)]
        room = _room(row.most, row.fixed, least)
        values = _above(totals, node, free)
        if room > 0 and any(value for above in values for value in above.values()):
            program.limit(values, room)

    def _note(self, node: list[list[str]], chosen: list[str], bound: float, proven: bool) -> list[list[list[str]]]:
        """Keep a choice if it is within the limits and better; return the nodes that are still to be searched."""
        if proven and _are_few(node):  # compared one by one, without the solver's tolerances
            for every in product(*node):
                self._keep(every)
            return []
        if over := self._keep(chosen):  # by the solver's tolerance
            return _branches(over[0], node, chosen)
        if not proven:
            self._leave(bound, "FEASIBLE")
            return []
        # Where the objective's range was far above what the best choice needs, the solver did not see small entries.
        least = self._least(self.objectives, node)
        spread = max(_spread(total, cs) for total, cs in zip(self.objectives, node, strict=True))
        if 0 < (self.found.objective - least) * _FINER < spread:
            fitting = self._fitting(node)
            if fitting is None or sum(map(len, fitting)) < sum(map(len, node)):
                return [] if fitting is None else [fitting]
        return self._polished(node, chosen, spread)

    def _keep(self, chosen: Sequence[str]) -> list[_Totals]:
        """Keep a choice if it is within the limits and better; return the totals that are over a limit."""
        choice = self.choice(chosen)
        over = [totals for totals, row in self.judged if row.total(choice) > row.most]
        objective = sum(self.objective[layer][candidate] for layer, candidate in choice.items())
        if not over and objective < self.found.objective:
            self.found.choice, self.found.objective = choice, objective
        return over

    def _polished(self, node: list[list[str]], chosen: list[str], spread: float) -> list[list[list[str]]]:
        """Return a node without the groups that hide others in the objective: they keep what was chosen."""
        above = [t[c] - min(t[other] for other in cs) for t, c, cs in zip(self.objectives, chosen, node, strict=True)]
        if not any(0 < value < _SEEN * spread for value in above):
            return []
        large = [value > spread / _FINER**2 for value in above]
        return [[[c] if fixed else cs for c, cs, fixed in zip(chosen, node, large, strict=True)]] if any(large) else []

    def _leave(self, bound: float, status: str) -> None:
        """Give up a node whose choices all have an objective of at least ``bound``."""
        self.found.proven, self.found.status = False, status
        self.found.bound = min(self.found.bound, bound)

    def choice(self, chosen: Sequence[str]) -> dict[str, str]:
        """Return the candidate by layer, in the order of the objective's table."""
        by_layer = {layer: c for group, c in zip(self.groups, chosen, strict=True) for layer in group.layers}
        return {layer: by_layer[layer] for layer in self.objective}


def _room(most: float, fixed: float, least: Sequence[float]) -> float:
    """Return what a limit leaves above the least of all groups, with what sums of floats may be off by."""
    parts = [most, -fixed, *(-value for value in least)]
    return math.fsum(parts) + _ROUNDING * math.fsum(map(abs, parts))


def _are_few(node: list[list[str]]) -> bool:
    return math.prod(map(len, node)) <= _FEW


def _spread(total: dict[str, float], candidates: list[str]) -> float:
    return max(total[c] for c in candidates) - min(total[c] for c in candidates)


def _above(totals: _Totals, node: list[list[str]], free: list[int]) -> _Totals:
    """Return for each free group what its candidates cost above the least of them."""
    least = {index: min(totals[index][c] for c in node[index]) for index in free}
    return [{c: totals[index][c] - least[index] for c in node[index]} for index in free]


def _branches(totals: _Totals, node: list[list[str]], chosen: list[str]) -> list[list[list[str]]]:
    """Divide a node at the group that costs most above the least of its candidates: with its candidate, and without.

    With it, what is left of the limit is known exactly, and the rest is solved at its own scale.
    """
    above = [
        totals[i][c] - min(totals[i][other] for other in candidates) if len(candidates) > 1 else -1.0
        for i, (c, candidates) in enumerate(zip(chosen, node, strict=True))
    ]
    worst = above.index(max(above))
    if above[worst] <= 0:  # every group is at its least: no choice of the node is within the limit
        return []
    without = [c for c in node[worst] if c != chosen[worst]]
    return [[*node[:worst], kept, *node[worst + 1 :]] for kept in (without, [chosen[worst]])]
