"""BitAllocator: sensitivities and the integer programme inside ``trainer.fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_ptq.allocation.costs import Cost, Table, bops_cost, size_cost, table_cost
from lightning_ptq.allocation.frontier import Frontier, sweep
from lightning_ptq.allocation.search import AllocationResult, apply_allocation, search_allocation
from lightning_ptq.allocation.sensitivity import MEASURES, Measure
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Choices, TunedStates
from lightning_ptq.calibration.outputs import ChooseOutput
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import StepCallback, ptq_callbacks
from lightning_ptq.callbacks.trainer.loggers import log_scalars
from lightning_ptq.callbacks.trainer.progress import progress_task
from lightning_ptq.errors import AllocationError, QConfigError
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import Journal

DEFAULT_CANDIDATES = ("w8a8", "w4a8", "w4a4", "w2a4")


class BitAllocator(StepCallback):
    """Chooses each layer's bit widths: the least degradation within a budget, or the least cost within a degradation.

    A shell around :func:`~lightning_ptq.allocation.search.search_allocation`; comes behind :class:`CalibrationCapture`, or
    behind a parallel :class:`AdaQuantLayerwise`, whose candidates and tuned states it then takes. A sequential
    :class:`AdaQuantLayerwise` may follow.

    Args:
        size: Budget for the packed weights: a fraction (at most 1) of the float model's bytes, or bytes.
        bops: Budget for the bit operations of one sample: a fraction of the float model's, or their number.
        table: Any other cost, for example latency: layer to candidate to cost, or a CSV file with the columns layer,
            w8a8, ...
        limit: Budget for the table's cost.
        max_degradation: In place of budgets: the rise of the measure over the widest candidates that is accepted.
        minimise: The cost to minimise under ``max_degradation``: ``"size"``, ``"bops"`` or ``"table"``.
        candidates: Bit widths to choose from; by default those of the parallel AdaQuantLayerwise, or
            w8a8, w4a8, w4a4 and w2a4.
        measure: ``"kl"``, ``"mse"``, ``"loss"`` or ``"fisher"``; see
            :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        output: Which tensor of the network's output ``"kl"`` and ``"mse"`` compare: a key, an index or a function.
        rounds: Sensitivity tables to measure; those behind the first are measured around the best choice so far, which
            changes only if the network measures better.
        ties: Layer-name patterns; all layers that one matches get the same widths.
        pins: Candidate by layer-name pattern.
        time_limit: Seconds for the solver.

    Attributes:
        result: The :class:`~lightning_ptq.allocation.search.AllocationResult` of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.
        AllocationError: If there is neither a budget nor max_degradation; in fit, if nothing fits the budget.

    Example::

        callbacks = [CalibrationCapture("w4a4"), BitAllocator(size=0.15), AdaQuantLayerwise()]
    """

    role = "BitAllocator"
    title = "Bit allocation"
    result: AllocationResult | None

    def __init__(
        self,
        size: float | None = None,
        bops: float | None = None,
        table: Table | str | None = None,
        limit: float | None = None,
        max_degradation: float | None = None,
        minimise: Literal["size", "bops", "table"] = "size",
        candidates: list[str] | None = None,
        measure: Measure = "fisher",
        output: ChooseOutput | None = None,
        rounds: int = 2,
        ties: list[str] | None = None,
        pins: Mapping[str, str] | None = None,
        time_limit: float = 60.0,
    ) -> None:
        super().__init__()
        if (table is None) != (limit is None) and max_degradation is None:
            raise AllocationError("table and limit go together: give a cost table and the most it may add up to.")
        self.budgets = {k: v for k, v in {"size": size, "bops": bops, "table": limit}.items() if v is not None}
        if not self.budgets and max_degradation is None:
            raise AllocationError("BitAllocator needs a budget. Write for example BitAllocator(size=0.15).")
        if measure not in MEASURES:
            raise QConfigError(f"measure must be one of {list(MEASURES)}, got {measure!r}.")
        for candidate in candidates or ():
            LayerQConfig.parse(candidate)
        self.table = table
        self.max_degradation = max_degradation
        self.minimise = minimise
        self.candidates = candidates
        self.measuring = {"measure": measure, "output": output}
        self.rounds = rounds
        self.ties = ties or []
        self.pins = pins or {}
        self.time_limit = time_limit
        self._frontier: Frontier | None = None

    def work(self, trainer: Any, calibration: Calibration, journal: Journal | None = None) -> AllocationResult:
        """Allocate, and give the layers their widths."""
        candidates, states = self._tuned(trainer)
        with progress_task(trainer, self.title) as progress:
            result = search_allocation(
                calibration,
                candidates,
                self.costs(calibration, candidates),
                self.budgets,
                rounds=self.rounds,
                max_degradation=self.max_degradation,
                states=states,
                measuring=self.measuring,
                solving={
                    "ties": self.ties,
                    "pins": self.pins,
                    "time_limit": self.time_limit,
                    "minimise": self.minimise,
                },
                progress=progress,
                journal=journal,
            )
        apply_allocation(calibration, result.allocation, states)
        self._frontier = self._sweep(calibration, result) if trainer.is_global_zero else None
        costs = {f"ptq/allocated/{name}": total for name, total in result.allocation.costs.items()}
        log_scalars(trainer, {**costs, f"ptq/allocated/{self.measuring['measure']}": result.measured})
        return result

    def record(self, report: PTQReport) -> None:
        """Put the allocation and the frontier into the report."""
        report.allocation, report.frontier = self.result, self._frontier

    def _sweep(self, calibration: Calibration, result: AllocationResult) -> Frontier:
        """Best predictions over the budgets of the first cost, fewer of them where the solver takes long."""
        name = next(iter(self.budgets), self.minimise)
        others = {key: budget for key, budget in self.budgets.items() if key != name}
        return sweep(
            result.sensitivity,
            self.costs(calibration, result.sensitivity.candidates),
            name,
            points=12 if result.allocation.seconds < 0.5 else 5,
            others=others,
            ties=self.ties,
            pins=self.pins,
            time_limit=self.time_limit,
        )

    def costs(self, calibration: Calibration, candidates: list[str]) -> list[Cost]:
        """Size, bit operations and the user's table for a calibrated module."""
        choices = Choices(calibration, candidates)
        costs = [size_cost(calibration, choices), bops_cost(calibration, choices)]
        return costs if self.table is None else [*costs, table_cost("table", self.table, choices)]

    def _tuned(self, trainer: Any) -> tuple[list[str], TunedStates]:
        """Candidates and tuned states: those of a parallel AdaQuantLayerwise before this callback, or the default."""
        states: TunedStates = {}
        for callback in ptq_callbacks(trainer):
            if callback is self:
                break
            if isinstance(callback, AdaQuantLayerwise) and callback.result is not None:
                states = callback.result.states
        return self.candidates or list(states) or list(DEFAULT_CANDIDATES), states
