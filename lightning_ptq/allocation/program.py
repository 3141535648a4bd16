"""Integer programs that pick one candidate for each group of layers, and the solvers they are handed to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mip
import torch

from lightning_ptq.allocation.costs import Table
from lightning_ptq.errors import AllocationError

log = logging.getLogger(__name__)
_announced: list[str] = []  # the solver that took the place of CBC in this process

_GAP = 1e-9  # optimality gap at which a solution counts as proven
_MARGIN = 1e-6  # about the tolerance of solvers, who may otherwise cut off a choice that meets a limit exactly


@dataclass(frozen=True)
class Group:
    """Layers that get the same candidate: tied ones, or a single layer."""

    layers: list[str]
    candidates: list[str]

    def total(self, table: Table, candidate: str) -> float:
        """Return the sum of a table over the layers at ``candidate``."""
        return sum(table[layer][candidate] for layer in self.layers)


class Program:
    """An integer program with a binary variable per group and candidate. Exactly one variable of each group is 1.

    Args:
        choices: The candidates of each group.
    """

    def __init__(self, choices: Sequence[Sequence[str]]) -> None:
        self.choices = choices
        self.model, self.solver = _new_model()
        self.rows = [[self.model.add_var(var_type=mip.BINARY) for _ in candidates] for candidates in choices]
        for row in self.rows:
            self.model += mip.xsum(row) == 1

    def _scaled(self, values: Sequence[Mapping[str, float]], scale: float) -> Any:
        """Return the sum of the values at the chosen candidates, in units of ``scale``."""
        terms = [
            value[candidate] / scale * variable
            for candidates, row, value in zip(self.choices, self.rows, values, strict=True)
            for candidate, variable in zip(candidates, row, strict=True)
            if value[candidate]
        ]
        return mip.xsum(terms)

    def limit(self, values: Sequence[Mapping[str, float]], most: float) -> None:
        """Require the sum of a value per group and candidate to be at most ``most``, or little more.

        Solvers have absolute tolerances, so the row is divided by ``most``. The caller checks the solution.
        """
        self.model += self._scaled(values, most) <= 1 + _MARGIN

    def minimize(self, values: Sequence[Mapping[str, float]]) -> float:
        """Make the sum of a value per group and candidate the objective; return the unit of the solver's objective."""
        largest = max((value[c] for cs, value in zip(self.choices, values, strict=True) for c in cs), default=0.0)
        self.model.objective = mip.minimize(self._scaled(values, largest or 1.0))
        return largest or 1.0

    def solve(self, seconds: float) -> mip.OptimizationStatus:
        """Solve the program within a time limit."""
        threads = torch.get_num_threads()
        try:
            return self.model.optimize(max_seconds=max(seconds, 1e-3))
        finally:
            torch.set_num_threads(threads)  # CBC sets OpenMP's number to 1, and torch computes with that number

    def solution(self) -> list[str]:
        """Return the candidate of each group."""
        chosen = []
        for candidates, row in zip(self.choices, self.rows, strict=True):
            # Solvers return binary variables up to their tolerance.
            values = [float(variable.x) for variable in row]
            chosen.append(candidates[values.index(max(values))])
        return chosen


def _new_model() -> tuple[mip.Model, str]:
    """Return an empty model of CBC, or of HiGHS if CBC cannot be loaded, and the name of the solver."""
    failures = []
    for solver in (mip.CBC, mip.HIGHS):
        try:
            with _unlogged(f"mip.{solver.lower()}") as logged:
                model = mip.Model(solver_name=solver)
        except Exception as error:  # python-mip passes on any error of its loader
            failures.append(f"{solver}: {' '.join(logged) or error}")
            continue
        if failures and not _announced:
            _announced.append(solver)
            log.warning("bit allocation uses the solver %s, because %s", solver, "; ".join(failures))
        model.verbose = 0
        model.max_mip_gap = model.max_mip_gap_abs = _GAP
        return model, str(solver)
    raise AllocationError(
        f"no solver loads ({'; '.join(failures)}). Install one for this platform: pip install 'mip[highs]'."
    )


@contextmanager
def _unlogged(name: str) -> Iterator[list[str]]:
    """Collect the messages of a logger inside the ``with`` block, in place of showing them."""
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        messages.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger(name)
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)
