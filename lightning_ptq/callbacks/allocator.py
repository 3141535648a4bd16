"""BitAllocator: sensitivities and the integer program inside ``trainer.fit``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from lightning_ptq.allocation.costs import Cost, Table, bops_cost, check_table, size_cost, table_cost
from lightning_ptq.allocation.frontier import Frontier, frontier_around
from lightning_ptq.allocation.search import AllocationResult, apply_allocation, search_allocation
from lightning_ptq.allocation.sensitivity import check_measure, measure_choice, measure_sensitivity
from lightning_ptq.allocation.sensitivity_table import MEASURES, Measure
from lightning_ptq.allocation.solver import check_solving
from lightning_ptq.allocation.target import as_frontier, fine_frontier
from lightning_ptq.arguments import example_for, is_number, one_of, whole
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates, TunedStates
from lightning_ptq.calibration.outputs import ChooseOutput, check_choice
from lightning_ptq.callbacks.accuracy import AccuracySearch, AccuracyTarget, Direction, target_of
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import StepCallback, capture_of, ptq_callbacks
from lightning_ptq.callbacks.trainer.loggers import log_scalars
from lightning_ptq.errors import AllocationError
from lightning_ptq.numerics.qconfig import parse_candidates
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.tuning.solved_states import solved_states

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

DEFAULT_CANDIDATES = ("w8a8", "w4a8", "w4a4", "w2a4")
"""Bit widths to choose from if neither the user nor a parallel AdaQuantLayerwise names any."""

SMALL_CANDIDATES = ("w8a8", "w6a8", "w5a8", "w4a8", "w3a8", "w2a8")
"""The same where an accepted drop of a metric limits the size alone, to which bits of activations do not count."""

STORED_CANDIDATES = ("w8a8", "w4a8", "w2a8")
"""Those of the small ones that an ONNX file has types for; it stores others in the next wider type."""


class BitAllocator(StepCallback):
    """Chooses each layer's bit widths: least degradation within a budget, or least cost within a limit of degradation.

    The limit is a drop of your own metric (``monitor``, ``max_drop``) or a rise of a measure (``max_degradation``). For
    the metric, choices of the frontier are tuned by the callbacks after this one and validated by the module's own
    ``validation_step`` on the validation data of fit; the cheapest one within the drop is the result.

    Runs :func:`~lightning_ptq.allocation.search.search_allocation` after
    :class:`~lightning_ptq.callbacks.capture.CalibrationCapture`, or after a parallel
    :class:`~lightning_ptq.callbacks.adaquant.AdaQuantLayerwise`, whose candidates and tuned states it uses. Where a
    sequential one follows, sensitivities are those of layers in closed form
    (:func:`~lightning_ptq.tuning.solved_states.solved_states`), which are close to tuned ones.

    Args:
        size: Budget for the packed weights: a fraction (at most 1) of the float model's bytes, or bytes;
            None for no such budget.
        bops: Budget for the bit operations of one sample: a fraction of those of the float model, or their number;
            None for no such budget.
        table: Any other cost, for example latency: cost by layer and candidate, or a CSV file with the columns layer,
            w8a8, ...; None for no other cost.
        limit: Budget for the cost of the table; given exactly where a table is, unless a drop or rise is the limit.
        max_degradation: Accepted rise of the measure over its value at the widest candidates, instead of budgets;
            None where budgets are given.
        monitor: Name of a metric that ``validation_step`` logs; None for no limit by a metric.
        max_drop: How much worse than that of the float module the metric may be, in the metric's unit.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower one is; by default ``"max"``, but an error
            for names such as ``"val_loss"``.
        tries: Greatest number of networks that are tuned in search of ``max_drop``; one more if none of them is within.
        minimise: Cost to minimize under ``max_drop`` or ``max_degradation``: ``"size"``, ``"bops"`` or ``"table"``.
        candidates: Bit widths to choose from; by default those of the parallel AdaQuantLayerwise, or
            w8a8, w4a8, w4a4 and w2a4. Where ``max_drop`` alone limits the size, all of 2 to 6 and 8 bits with
            8-bit activations, or those that ONNX stores (w8a8, w4a8, w2a8) if CalibrationCapture has a ``target``.
        measure: ``"kl"``, ``"mse"``, ``"loss"`` or ``"fisher"``; see
            :func:`~lightning_ptq.allocation.sensitivity.measure_sensitivity`.
        output: Tensor of the network's output that ``"kl"`` and ``"mse"`` compare: a key, an index or a function;
            by default the only floating-point tensor, or the ``logits``.
        rounds: Number of sensitivity tables. Tables after the first are measured around the best choice so far, which
            changes only if the network measures better.
        ties: Layer-name patterns; all layers that match one pattern get the same widths. None by default.
        pins: Candidate by layer-name pattern. None by default.
        time_limit: Time limit of the solver, in seconds.

    Attributes:
        result: The :class:`~lightning_ptq.allocation.search.AllocationResult` of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.
        AllocationError: If there is neither a budget nor max_degradation; in fit, if no choice fits the budget.
        SensitivityError: In fit, before the work of any callback, if the network's output cannot be measured.

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
        monitor: str | None = None,
        max_drop: float | None = None,
        mode: Direction | None = None,
        tries: int = 3,
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
        self.target = target_of(monitor, max_drop, mode, tries)
        limited = max_degradation is not None or self.target is not None
        if max_degradation is not None and self.target is not None:
            raise AllocationError("max_degradation and max_drop are two limits of the same thing. Give one of them.")
        if (table is None) != (limit is None) and not limited:
            raise AllocationError("table and limit go together: give a cost table and the limit of its total cost.")
        self.budgets = {k: v for k, v in {"size": size, "bops": bops, "table": limit}.items() if v is not None}
        if not self.budgets and not limited:
            raise AllocationError(
                "BitAllocator needs a budget or an accepted drop. Write for example BitAllocator(size=0.15), or"
                " BitAllocator(monitor='val_acc', max_drop=0.01)."
            )
        for name, budget in {**self.budgets, "max_degradation": max_degradation}.items():
            if budget is not None and not (is_number(budget) and math.isfinite(budget)):
                example = example_for(budget, (0, math.inf), "0.15")
                raise AllocationError(f"{name} must be a finite number, got {budget!r}. Write for example {example}.")
        for name, budget in self.budgets.items():
            Cost(name, {}).limit(budget)
        one_of("measure", measure, MEASURES)
        if candidates is not None:
            parse_candidates(candidates)
        if table is not None:
            check_table(table)
        self.table = table
        self.max_degradation = max_degradation
        self.minimise = one_of("minimise", minimise, ("size", "bops", "table"), AllocationError)
        if self.minimise == "table" and table is None:
            raise AllocationError("minimise='table' needs a cost table: give table={'layer': {'w8a8': 0.2, ...}, ...}.")
        self.candidates = candidates
        self.measuring: dict[str, Any] = {"measure": measure, "output": check_choice(output)}
        self.rounds = whole("rounds", rounds, error=AllocationError)
        self.ties, self.pins = check_solving(ties, pins, time_limit)
        self.time_limit = time_limit
        self._frontier: Frontier | None = None

    def check(self, trainer: Trainer, calibration: Calibration) -> None:
        """Check that the network's output can be measured with all layers at their widest candidates."""
        check_measure(calibration, self._candidates(trainer), **self.measuring)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the validation of the float module, which was just before, has logged the metric."""
        if self.target is not None:
            self.target.check(trainer)

    def work(self, trainer: Trainer, calibration: Calibration, journal: Journal = NO_JOURNAL) -> AllocationResult:
        """Choose the widths, and give them to the layers."""
        states = self._states(trainer)
        candidates = self._candidates(trainer) or list(states)
        choose = self._within if self.target is None else partial(self._by_metric, self.target)
        result = choose(trainer, calibration, journal, candidates, states)
        scalars = {**result.allocation.costs, str(self.measuring["measure"]): result.measured}
        log_scalars(trainer, {f"ptq/allocated/{name}": value for name, value in scalars.items()})
        return result

    def _within(
        self, trainer: Trainer, calibration: Calibration, journal: Journal, candidates: list[str], states: TunedStates
    ) -> AllocationResult:
        """Choose the widths within budgets, or within a rise of the measure."""
        with self._progress(trainer) as progress:
            expected = self._expected(trainer, calibration, candidates, states, progress)
            result = search_allocation(
                calibration,
                candidates,
                self.costs(calibration, candidates),
                self.budgets,
                rounds=self.rounds,
                max_degradation=self.max_degradation,
                states=expected,
                measuring=self.measuring,
                solving={**self._solving, "minimise": self.minimise},
                progress=progress,
                journal=journal,
            )
        apply_allocation(calibration, result.allocation, states)
        if trainer.is_global_zero:  # the report, which shows it, is written on this rank only
            costs = self.costs(calibration, result.sensitivity.candidates)
            self._frontier = frontier_around(result, costs, self.budgets, self.minimise, **self._solving)
        return result

    def _by_metric(
        self, target: AccuracyTarget, trainer: Trainer, calibration: Calibration, journal: Journal,
        candidates: list[str], states: TunedStates,
    ) -> AllocationResult:  # fmt: skip
        """Choose the widths by the user's metric, and leave the module tuned at them."""
        capture = capture_of(trainer)
        if capture is not None and capture.frees_edges and not states:
            calibration.free_large_edges()
        with self._progress(trainer) as progress:
            expected = self._expected(trainer, calibration, candidates, states, progress)
            table = measure_sensitivity(
                calibration, candidates, states=expected, progress=progress, journal=journal, **self.measuring
            )
        costs = self.costs(calibration, table.candidates)
        others = {name: budget for name, budget in self.budgets.items() if name != self.minimise}
        solving = {"others": others, **self._solving}
        # Solvers with a time limit need not agree on all ranks.
        points = calibration.ranks.on_rank_zero(
            lambda: fine_frontier(table, costs, self.minimise, self.budgets.get(self.minimise), **solving)
        )
        allocation = AccuracySearch(trainer, self, calibration, target, states, expected).run(points, self.minimise)
        self._frontier = as_frontier(points, table, costs, self.minimise)
        same = {key: self.measuring[key] for key in ("measure", "output")}
        measured = measure_choice(calibration, allocation.choice, states=expected, **same)
        return AllocationResult(allocation, table, measured)

    def _expected(
        self, trainer: Trainer, calibration: Calibration, candidates: list[str], states: TunedStates, progress: Progress
    ) -> TunedStates:
        """Return the states that are measured: those of a tuning before, or solved ones if a tuning follows."""
        callbacks = ptq_callbacks(trainer)
        follows = any(isinstance(each, AdaQuantLayerwise) for each in callbacks[callbacks.index(self) + 1 :])
        return solved_states(calibration, candidates, progress) if follows and not states else states

    @property
    def monitored(self) -> list[str]:
        """The metric whose drop is limited, if one is."""
        return [] if self.target is None else [self.target.monitor]

    def record(self, report: PTQReport) -> None:
        """Put the allocation and the frontier into the report."""
        report.allocation, report.frontier = self.result, self._frontier

    def costs(self, calibration: Calibration, candidates: list[str]) -> list[Cost]:
        """Return the costs of a calibrated module: size, bit operations, and the user's table if there is one."""
        choices = Candidates(calibration, candidates)
        costs = [size_cost(calibration, choices), bops_cost(calibration, choices)]
        return costs if self.table is None else [*costs, table_cost("table", self.table, choices)]

    def _tunings(self, trainer: Trainer) -> list[AdaQuantLayerwise]:
        """Return the AdaQuantLayerwise callbacks before this one."""
        before = takewhile(lambda callback: callback is not self, ptq_callbacks(trainer))
        return [callback for callback in before if isinstance(callback, AdaQuantLayerwise)]

    def _candidates(self, trainer: Trainer) -> list[str]:
        """Return the candidates: those given, those of a tuning before this callback, or the defaults.

        An empty list stands for the calibrated widths, for which a tuning without candidates is done.
        """
        tunings = self._tunings(trainer)
        small, capture = self.target is not None and self.minimise == "size" and not self.budgets, capture_of(trainer)
        packed = SMALL_CANDIDATES if capture is None or capture.target is None else STORED_CANDIDATES
        default = list(packed if small else DEFAULT_CANDIDATES)
        return self.candidates or (tunings[-1].candidates or [] if tunings else default)

    def _states(self, trainer: Trainer) -> TunedStates:
        """Return the tuned states of the tuning before this callback."""
        results = [callback.result for callback in self._tunings(trainer) if callback.result is not None]
        return results[-1].states if results else {}

    @property
    def _solving(self) -> dict[str, Any]:
        """The arguments of :func:`~lightning_ptq.allocation.solver.allocate_bits` that all solutions share."""
        return {"ties": self.ties, "pins": self.pins, "time_limit": self.time_limit}
