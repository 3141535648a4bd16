"""Base classes of the callbacks, their order in the Trainer, and the check of the Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.trainer.lightning import LightningCallback, callbacks_of
from lightning_ptq.callbacks.trainer.loggers import log_tables
from lightning_ptq.callbacks.trainer.progress import progress_task
from lightning_ptq.errors import CallbackError
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.progress import Progress

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_ptq.callbacks.capture import CalibrationCapture

ORDER = (
    ("CalibrationCapture", ("",)),
    ("AdaQuantLayerwise", ("parallel",)),
    ("BitAllocator", ("",)),
    ("AdaQuantLayerwise", ("sequential", "parallel")),
    ("StatsTuning", ("",)),
    ("ExportONNX", ("",)),
)
"""Roles of the callbacks in their order, each with the modes that it may have at that place."""

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy")
_REMEDY = "Use strategy='ddp', or strategy='auto' on one device."


class PTQCallback(LightningCallback):
    """Base class of the library's callbacks.

    Attributes:
        role: Name of the callback's place in :data:`ORDER`. A derived class keeps the role of its library class.
        calibration: The calibrated module, on CalibrationCapture only.
    """

    role = ""
    calibration: Calibration | None = None

    @property
    def title(self) -> str:
        """Name of the work, for the progress bar, the report and the logs."""
        return self.role

    @property
    def monitored(self) -> list[str]:
        """Metrics of the user's validation that the work is to keep; they come first in the report."""
        return []

    def check(self, trainer: Trainer, calibration: Calibration) -> None:
        """Check that the work can be done; called after the calibration pass, before the work of any callback.

        Args:
            trainer: Trainer of the run.
            calibration: The calibrated module.

        Raises:
            PTQError: If it cannot; the message says what to write instead.
        """


class StepCallback(PTQCallback, ABC):
    """A callback that works once on the calibrated module, after the calibration pass.

    Attributes:
        tunes: Whether the work only tunes the module, so that a search for bit widths may try and repeat it.
        result: What :meth:`work` returned in the last run; None before.
    """

    tunes = False

    def __init__(self) -> None:
        super().__init__()
        self.result: Any = None
        self._taken: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the order of the callbacks."""
        if stage == "fit":
            check_order(trainer)
            self.result = self._taken = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the work, in the first epoch only."""
        capture = capture_of(trainer)
        if capture is None or capture.calibration is None or capture.report is None or self.result is not None:
            return
        report = capture.report
        self.result, self._taken = self._taken, None
        if self.result is None:
            with report.stage(self.title):
                self.result = self.tried(trainer, capture.calibration, capture)
        capture.stage_is_over(trainer, pl_module, self)
        logged = {table.key for table in report.tables()}
        self.record(report)
        log_tables(trainer, [table for table in report.tables() if table.key not in logged])

    def take(self, result: Any) -> None:
        """Take the result of a trial whose state the module is in, instead of doing the work again."""
        self._taken = result

    def tried(self, trainer: Trainer, calibration: Calibration, capture: CalibrationCapture, trial: str = "") -> Any:
        """Do the work, in a trial of a search if it has a name, and return its result."""
        journal = capture.journal_for(self)
        try:
            return self.work(trainer, calibration, journal.inner(trial) if trial else journal)
        except StopIteration:  # the training loop would take it for the end of the loader, and the run for finished
            pass
        raise CallbackError(
            f"{self.title}: the module ran out of an iterator (StopIteration). A run executes its parts several times,"
            " so they must not draw from iterators or generators that end, nor return them."
        )

    @abstractmethod
    def work(self, trainer: Trainer, calibration: Calibration, journal: Journal = NO_JOURNAL) -> Any:
        """Change the calibrated module in place.

        Args:
            trainer: Trainer of the run.
            calibration: The calibrated module.
            journal: Journal of this callback, for finished entries of the work.

        Returns:
            The value of :attr:`result`.
        """

    @abstractmethod
    def record(self, report: PTQReport) -> None:
        """Put :attr:`result` into the report."""

    def _progress(self, trainer: Trainer) -> AbstractContextManager[Progress]:
        """Open a progress task of this title, which also ends the run when it is to stop."""
        capture = capture_of(trainer)
        check_stop = (lambda: None) if capture is None else partial(capture.check_stop, trainer)
        return progress_task(trainer, self.title, check_stop)


def ptq_callbacks(trainer: Trainer) -> list[PTQCallback]:
    """Return the library's callbacks of a Trainer, in list order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PTQCallback)]


def capture_of(trainer: Trainer) -> CalibrationCapture | None:
    """Return the CalibrationCapture of a Trainer, or None."""
    # By role: importing the class, which derives from PTQCallback, would close a circle of imports.
    capture = next((callback for callback in ptq_callbacks(trainer) if callback.role == "CalibrationCapture"), None)
    return cast("CalibrationCapture | None", capture)


def check_order(trainer: Trainer) -> None:
    """Check that the callbacks stand in the order of :data:`ORDER`, with one CalibrationCapture at the front.

    Raises:
        CallbackError: If they do not; the message names the right order.
    """
    roles = [(callback.role, getattr(callback, "mode", "")) for callback in ptq_callbacks(trainer)]
    # One iterator for all roles: each role consumes the places up to its own, so the next one is sought after it.
    places = iter(ORDER)
    in_order = all(any(role == place and mode in modes for place, modes in places) for role, mode in roles)
    if not in_order or not roles or roles[0][0] != "CalibrationCapture":
        present = [f"{role}(mode={mode!r})" if mode else role for role, mode in roles]
        raise CallbackError(
            f"the callbacks are in the order {present}. Put one CalibrationCapture before all others; the full order is"
            f" {[f'{role}(mode={modes[0]!r})' if modes[0] else role for role, modes in ORDER]}, where all but the first"
            " may be left out."
        )


def check_trainer(trainer: Trainer) -> None:
    """Check that PTQ works under the Trainer's strategy and precision.

    Raises:
        CallbackError: If it does not; the message says what to use instead.
    """
    strategy = type(trainer.strategy).__name__
    start_method = getattr(trainer.strategy, "_start_method", None)
    if start_method in ("spawn", "fork", "forkserver"):
        raise CallbackError(
            f"PTQ does not work under a strategy that runs fit in child processes (start method {start_method!r}, as in"
            f" notebooks): the quantized module would be lost when they end. {_REMEDY} In a notebook, use one device."
        )
    bases = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if "XLA" in strategy or not bases.intersection(_SUPPORTED):
        raise CallbackError(f"PTQ does not work under {strategy}, which shards or moves the module. {_REMEDY}")
    if str(trainer.precision).endswith("-true") and not str(trainer.precision).startswith("32"):
        raise CallbackError(
            f"PTQ needs float32 weights, but the Trainer has precision={trainer.precision!r}."
            " Use precision='32-true', or a mixed precision such as 'bf16-mixed'."
        )
