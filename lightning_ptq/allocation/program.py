"""Integer programs that pick one candidate for each group of layers, and the solvers they are handed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mip

from lightning_ptq.allocation.costs import Table
from lightning_ptq.errors import AllocationError

TOLERANCE = 1e-9
"""Relative tolerance of limits, and the optimality gap at which a solution counts as proven."""


@dataclass(frozen=True)
class Group:
    """Layers that get the same candidate: tied ones, or a single layer."""

    layers: list[str]
    candidates: list[str]

    def total(self, table: Table, candidate: str) -> float:
        """Return the sum of a table over the layers at ``candidate``."""
        return sum(table[layer][candidate] for layer in self.layers)


class Program:
    """An integer program with a binary variable per group and candidate. Exactly one variable of each group is 1."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.model, self.solver = _new_model()
        self.rows = [[self.model.add_var(var_type=mip.BINARY) for _ in group.candidates] for group in groups]
        for row in self.rows:
            self.model += mip.xsum(row) == 1

    def _scaled(self, table: Table) -> tuple[Any, float]:
        """Return the sum of a table at the chosen candidates, divided by the largest entry, and that entry."""
        values = [group.total(table, candidate) for group in self.groups for candidate in group.candidates]
        variables = [variable for row in self.rows for variable in row]
        # Solvers have absolute tolerances, which would swallow tables of tiny entries.
        scale = max(map(abs, values), default=0.0) or 1.0
        return mip.xsum(v / scale * x for v, x in zip(values, variables, strict=True)), scale

    def limit(self, table: Table, most: float) -> None:
        """Require the sum of a table to be at most ``most``."""
        total, scale = self._scaled(table)
        self.model += total <= most / scale

    def minimize(self, table: Table) -> float:
        """Make the sum of a table the objective; return the unit in which the solver states it."""
        total, scale = self._scaled(table)
        self.model.objective = mip.minimize(total)
        return scale

    def solution(self) -> dict[str, str]:
        """Return the candidate of each layer."""
        chosen: dict[str, str] = {}
        for group, row in zip(self.groups, self.rows, strict=True):
            # Solvers return binary variables up to their tolerance.
            values = [float(variable.x) for variable in row]
            chosen.update(dict.fromkeys(group.layers, group.candidates[values.index(max(values))]))
        return chosen


def _new_model() -> tuple[mip.Model, str]:
    """Return an empty model of CBC, or of HiGHS if CBC cannot be loaded, and the name of the solver."""
    failures = []
    for solver in (mip.CBC, mip.HIGHS):
        try:
            model = mip.Model(solver_name=solver)
        except Exception as error:  # python-mip passes on any error of its loader
            failures.append(f"{solver}: {error}")
            continue
        model.verbose = 0
        model.max_mip_gap = model.max_mip_gap_abs = TOLERANCE
        return model, str(solver)
    raise AllocationError(
        f"no solver loads ({'; '.join(failures)}). Install one for this platform: pip install 'mip[highs]'."
    )
