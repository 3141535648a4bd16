"""What the callbacks share: their base class, their order, and the check of the Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.trainer.lightning import LightningCallback
from lightning_ptq.callbacks.trainer.loggers import log_sheets
from lightning_ptq.errors import CallbackError
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import Journal

ORDER = (
    ("CalibrationCapture", ("",)),
    ("AdaQuantLayerwise", ("parallel",)),
    ("BitAllocator", ("",)),
    ("AdaQuantLayerwise", ("sequential", "parallel")),
    ("StatsTuning", ("",)),
)
"""Roles of the callbacks, each with the modes it may have at its place."""

_NO_SETTING = ("calibration", "report", "result", "log", "log_dict")  # the Trainer adds the last two
_WAY_OUT = "Use strategy='ddp', or strategy='auto' on one device."
_TAKEN = ("SingleDeviceStrategy", "DDPStrategy")


class PTQCallback(LightningCallback):
    """Base class of the library's callbacks.

    Attributes:
        role: The callback's place in :data:`ORDER`; that of its library class for a class derived from it.
        calibration: For CalibrationCapture, what it calibrated.
    """

    role = ""
    calibration: Calibration | None = None

    @property
    def title(self) -> str:
        """What the callback does, for progress, report and logs."""
        return self.role


class StepCallback(PTQCallback, ABC):
    """A callback that works once on the calibrated module, when the calibration pass is over.

    Attributes:
        result: What :meth:`work` returned in the last run.
    """

    result: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the order of the callbacks."""
        if stage == "fit":
            check_order(trainer)
            self.result = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Do the work, once."""
        capture = capture_of(trainer)
        if capture is not None and capture.calibration is not None and self.result is None:
            with capture.report.stage(self.title):
                self.result = self.work(trainer, capture.calibration, capture.journal_for(self))
            known = {sheet.key for sheet in capture.report.sheets()}
            self.record(capture.report)
            log_sheets(trainer, [sheet for sheet in capture.report.sheets() if sheet.key not in known])

    @abstractmethod
    def work(self, trainer: Any, calibration: Calibration, journal: Journal | None = None) -> Any:
        """Change the calibrated module in place; what is returned becomes :attr:`result`.

        Args:
            trainer: Of the run.
            calibration: The calibrated module.
            journal: For finished pieces of the work.
        """

    @abstractmethod
    def record(self, report: PTQReport) -> None:
        """Put :attr:`result` into the report."""


def ptq_callbacks(trainer: Any) -> list[PTQCallback]:
    """The library's callbacks of a trainer, in list order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PTQCallback)]


def check_order(trainer: Any) -> None:
    """Check that the callbacks stand in the order of :data:`ORDER`, with one CalibrationCapture in front.

    Raises:
        CallbackError: Naming the right order.
    """
    found = [(callback.role, getattr(callback, "mode", "")) for callback in ptq_callbacks(trainer)]
    places = iter(ORDER)
    in_order = all(any(role == place and mode in modes for place, modes in places) for role, mode in found)
    if not in_order or not found or found[0][0] != "CalibrationCapture":
        shown = [f"{role}(mode={mode!r})" if mode else role for role, mode in found]
        raise CallbackError(
            f"the callbacks are in the order {shown}. Put one CalibrationCapture before all others; the whole order is"
            f" {[f'{role}(mode={modes[0]!r})' if modes[0] else role for role, modes in ORDER]}, of which any but the"
            " first may be left out."
        )


def told(callback: Any) -> dict[str, Any]:
    """What a callback was told, by attribute."""
    return {k: v for k, v in sorted(vars(callback).items()) if not k.startswith("_") and k not in _NO_SETTING}


def capture_of(trainer: Any) -> Any:
    """The trainer's CalibrationCapture, or None."""
    return next((c for c in ptq_callbacks(trainer) if c.role == "CalibrationCapture"), None)


def check_trainer(trainer: Any) -> None:
    """Check that PTQ works under the trainer's strategy and precision.

    Raises:
        CallbackError: Saying what to use instead.
    """
    strategy = type(trainer.strategy).__name__
    start_method = getattr(trainer.strategy, "_start_method", None)
    if start_method in ("spawn", "fork", "forkserver"):
        raise CallbackError(
            f"PTQ does not work under a strategy that runs fit in processes of its own ({start_method}, as in"
            f" notebooks): the quantized module would be lost with it. {_WAY_OUT} In a notebook, use one device."
        )
    if "XLA" in strategy or not {cls.__name__ for cls in type(trainer.strategy).__mro__} & set(_TAKEN):
        raise CallbackError(f"PTQ does not work under {strategy}, which shards or moves the module. {_WAY_OUT}")
    if str(trainer.precision).endswith("-true") and not str(trainer.precision).startswith("32"):
        raise CallbackError(
            f"PTQ needs the weights in float32, the Trainer has precision={trainer.precision!r}."
            " Use precision='32-true' or a mixed one such as 'bf16-mixed'."
        )
