"""Bit allocation by the user's own metric: each trial tunes the network by the later callbacks, and validates it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_ptq.allocation.search import apply_allocation
from lightning_ptq.allocation.solver import BitAllocation
from lightning_ptq.allocation.target import POINTS, Measurement, search_drop
from lightning_ptq.arguments import number, one_of, whole
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import TunedStates
from lightning_ptq.calibration.saved_state import SavedState
from lightning_ptq.callbacks.base import StepCallback, capture_of, ptq_callbacks
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import log_scalars
from lightning_ptq.callbacks.trainer.validation import Scores, standard_error, validate, validates
from lightning_ptq.errors import AllocationError
from lightning_ptq.runtime.memory import format_bytes

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_ptq.callbacks.capture import CalibrationCapture

Direction = Literal["max", "min"]

_LOWER_IS_BETTER = ("loss", "err", "mae", "mse", "nll", "perplexity", "ppl", "wer", "cer", "fid", "divergence")


@dataclass(frozen=True)
class AccuracyTarget:
    """A metric of the validation, and how much worse than the float module's it may become.

    Attributes:
        monitor: Name under which the module logs the metric in its validation.
        max_drop: Accepted drop, in the metric's unit.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is.
        tries: Greatest number of networks that are tuned.
    """

    monitor: str
    max_drop: float
    mode: Direction
    tries: int

    def check(self, trainer: Trainer) -> None:
        """Check that the float module's validation has logged the metric.

        Raises:
            AllocationError: If it has not.
        """
        capture = capture_of(trainer)
        scores = None if capture is None else capture.scores
        if not validates(trainer):
            raise AllocationError(
                f"BitAllocator(monitor={self.monitor!r}) needs validation data and a validation_step. Write"
                " trainer.fit(module, calibration_loader, val_loader), and do not limit validation to 0 batches."
            )
        if scores is not None and not scores.names():
            raise AllocationError(
                f"BitAllocator(monitor={self.monitor!r}): validation logs no metric. Log it in validation_step, and"
                " give fit a validation loader with samples."
            )
        if scores is not None and self.monitor not in scores.values:
            raise AllocationError(
                f"BitAllocator(monitor={self.monitor!r}): validation logs {sorted(scores.names())}. Name"
                " one of these, or log the metric in validation_step."
            )
        if scores is not None and not math.isfinite(scores.values[self.monitor]):
            raise AllocationError(
                f"BitAllocator(monitor={self.monitor!r}): the metric of the float module is"
                f" {scores.values[self.monitor]}, so no drop can be measured. Mend the metric or the validation data."
            )

    def drop(self, value: float, before: float) -> float:
        """Return how much worse a value is than that of the float module; infinite if the value is NaN."""
        if math.isnan(value):
            return math.inf
        return before - value if self.mode == "max" else value - before


def target_of(monitor: Any, max_drop: Any, mode: Any, tries: Any) -> AccuracyTarget | None:
    """Return the target that the arguments of BitAllocator describe; None without one.

    Raises:
        AllocationError: If they do not go together, or one is out of its domain.
    """
    tries = whole("tries", tries, error=AllocationError)
    if mode is not None:
        one_of("mode", mode, ("max", "min"), AllocationError)
    if (monitor is None) != (max_drop is None):
        raise AllocationError("monitor and max_drop go together: write for example monitor='val_acc', max_drop=0.01.")
    if monitor is None:
        return None
    if not isinstance(monitor, str) or not monitor:
        raise AllocationError(f"monitor must be the name of a metric, got {monitor!r}. Write for example 'val_acc'.")
    max_drop = number("max_drop", max_drop, "be a number, 0 or more", example="0.01", error=AllocationError)
    if mode is None and any(part in monitor.lower() for part in _LOWER_IS_BETTER):
        raise AllocationError(
            f"monitor={monitor!r} sounds as if lower is better. Write mode='min', or mode='max' if it is not."
        )
    return AccuracyTarget(monitor, float(max_drop), mode or "max", tries)


class AccuracySearch:
    """The search of a run: what a trial does, and the state of the module that it leaves for the later callbacks.

    Args:
        trainer: Trainer of the run.
        allocator: The BitAllocator; the callbacks after it tune each trial.
        calibration: The calibrated module.
        target: The metric and its accepted drop.
        states: Tuned states of a parallel tuning before.
        expected: States that stand for those of tuned layers where the search starts.
    """

    def __init__(
        self, trainer: Trainer, allocator: StepCallback, calibration: Calibration, target: AccuracyTarget,
        states: TunedStates, expected: TunedStates,
    ) -> None:  # fmt: skip
        self.trainer, self.calibration, self.target, self.states = trainer, calibration, target, states
        capture: Any = capture_of(trainer)  # there is one: check_order has seen it
        self.capture: CalibrationCapture = capture
        callbacks = ptq_callbacks(trainer)
        later = callbacks[callbacks.index(allocator) + 1 :]
        self.later = [each for each in later if isinstance(each, StepCallback) and each.tunes]
        self.expected = expected
        self._start = SavedState(calibration)
        self._kept: dict[str, tuple[SavedState, dict[StepCallback, Any], list[Any]]] = {}
        self._count = 0

    def run(self, points: list[BitAllocation], minimise: str) -> BitAllocation:
        """Search, and leave the module tuned as in the chosen trial.

        Returns:
            The allocation of the chosen trial; the report gets all trials.

        Raises:
            AllocationError: If no choice is within the accepted drop.
        """
        # Trials without tuning cost no more than a look at where to start, so all steps of a bisection are taken.
        tries, untuned = (self.target.tries, self._untuned) if self.later else (POINTS.bit_length() + 1, None)
        trials = search_drop(points, self.target.max_drop, minimise, self._tuned, untuned, tries)
        chosen = next(trial for trial in trials if trial.chosen)
        state, results, warnings = self._kept[str(chosen.choice)]
        state.restore()
        for callback, result in results.items():
            callback.take(result)
        if self.capture.report is not None:
            self.capture.report.warnings.extend(warnings)
            self.capture.report.trials = trials
        return next(point for point in points if point.choice == chosen.choice)

    def _untuned(self, allocation: BitAllocation) -> Measurement:
        """Measure the network with the weights that stand for tuned ones."""
        self._apply(allocation, self.expected)
        return self._measured(self._validate())

    def _tuned(self, allocation: BitAllocation) -> Measurement:
        """Tune the network as the later callbacks do, and measure it."""
        self._count += 1
        most = f" of at most {self.target.tries}" if self.later else ""
        size = format_bytes(round(allocation.costs["size"]))
        rank_zero_info(f"Bit allocation, trial {self._count}{most}: {size}.")
        self._apply(allocation, self.states)
        noted = [] if self.capture.report is None else self.capture.report.warnings
        before = len(noted)
        name = str(allocation.choice)
        results = {each: each.tried(self.trainer, self.calibration, self.capture, name) for each in self.later}
        found = self._measured(self._validate())
        if found.within(self.target.max_drop):
            self._kept[name] = SavedState(self.calibration), results, noted[before:]
        del noted[before:]  # those of the trial that is chosen come back
        self._tell(allocation, found)
        return found

    def _apply(self, allocation: BitAllocation, states: TunedStates) -> None:
        self._start.restore()
        apply_allocation(self.calibration, allocation, states)

    def _validate(self) -> Scores:
        module: Any = self.calibration.module
        self.capture.check_stop(self.trainer)
        return validate(self.trainer, module, self.calibration.ranks, partial(self.capture.check_stop, self.trainer))

    def _measured(self, scores: Scores) -> Measurement:
        name, before = self.target.monitor, self.capture.scores
        if before is None or name not in scores.values:
            raise AllocationError(
                f"the validation of the quantized module does not log {name!r}, as that of the float module did. Log it"
                " in every validation, and give fit a validation loader that can be iterated several times."
            )
        value = scores.values[name]
        return Measurement(value, self.target.drop(value, before.values[name]), standard_error(scores, before, name))

    def _tell(self, allocation: BitAllocation, found: Measurement) -> None:
        name, error = self.target.monitor, "" if found.error is None else f" ± {found.error:.2g}"
        rank_zero_info(
            f"Bit allocation, trial {self._count}: {name} {found.value:.4g},"
            f" {'worse' if found.drop > 0 else 'better'} by {abs(found.drop):.3g}{error}; {self.target.max_drop:g} is"
            " accepted."
        )
        values = {"size": allocation.costs["size"], "bops": allocation.costs["bops"], "drop": found.drop}
        log_scalars(
            self.trainer,
            {f"ptq/trial/{key}": value for key, value in {**values, "metric": found.value}.items()},
            self._count,
        )
