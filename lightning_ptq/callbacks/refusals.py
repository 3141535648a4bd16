"""What stops a PTQ run before it starts: one list, which ``inspect`` reports and fit raises."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch.optim.swa_utils import AveragedModel

from lightning_ptq.callbacks.base import capture_of, check_order, check_trainer
from lightning_ptq.callbacks.trainer.lightning import callbacks_of, overrides
from lightning_ptq.callbacks.trainer.resuming import check_resume_dir
from lightning_ptq.callbacks.trainer.validation import Scores
from lightning_ptq.errors import CallbackError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_AVERAGING = re.compile(
    r"weight_?averag|^(model_?)?(ema|swa)(_?(callback|model|weights))?$|exponential_?moving_?average", re.IGNORECASE
)
"""Names of callbacks, of Lightning and of others, that keep a float copy of the weights."""

_TRAINING = {
    "LearningRateFinder": "needs optimizer steps, but a PTQ run takes none",
    "BatchSizeFinder": "needs optimizer steps, but a PTQ run takes none",
    "GradientAccumulationScheduler": "needs optimizer steps, but a PTQ run takes none",
    "BaseFinetuning": "gives layers to an optimizer, but a PTQ run has none",
    "ModelPruning": "prunes weights during training, but a PTQ run does not train",
}
"""Callbacks of Lightning that a PTQ run would end with an error of, by name, with the reason."""


def check_run(trainer: Trainer, module: LightningModule, scores: Scores | None = None) -> None:
    """Check that ``trainer.fit(module)``, which has started, can be a PTQ run.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        scores: What the validation of the float module has logged; None before it.

    Raises:
        CallbackError: If it cannot; the message says what to write instead.
    """
    for message in find_refusals(trainer, module, True, None if scores is None else scores.values):
        raise CallbackError(message)


def find_refusals(
    trainer: Trainer, module: LightningModule, fitting: bool = False, logged: Collection[str] | None = None
) -> Iterator[str]:
    """Yield everything for which fit refuses to start, with what to write instead.

    Args:
        trainer: The Trainer that would run; it stays unchanged.
        module: The LightningModule.
        fitting: True inside fit, when the validation loader is known.
        logged: Metrics that the validation of the float module has logged; None before it.
    """
    for check in (check_order, check_trainer, _check_progress):
        try:
            check(trainer)
        except CallbackError as error:
            yield str(error)
    if trainer.strategy.root_device.type == "mps":
        yield "PTQ sums in float64, which MPS does not support. Use accelerator='cpu'."
    for option, value in (("max_epochs", trainer.max_epochs), ("max_steps", trainer.max_steps), limit_of(trainer)):
        if value == 0:
            yield f"{option}=0: no calibration batch would be seen. Leave {option} out."
    for callback in callbacks_of(trainer):
        yield from _of_callback(trainer, module, callback, fitting, logged)


def limit_of(trainer: Trainer) -> tuple[str, int | float]:
    """Return the limit of training batches, and the name of the option that sets it."""
    # fast_dev_run and overfit_batches both set limit_train_batches, so the option that the user wrote is named.
    sources = ("fast_dev_run", "overfit_batches")
    name = next((source for source in sources if getattr(trainer, source)), "limit_train_batches")
    return name, trainer.limit_train_batches


def _check_progress(trainer: Trainer) -> None:
    capture = capture_of(trainer)
    if capture is not None and capture.resume:
        check_resume_dir(trainer, capture.resume_dir)


def _of_callback(
    trainer: Trainer, module: LightningModule, callback: Any, fitting: bool, logged: Collection[str] | None
) -> Iterator[str]:
    """Yield why a callback would undo the run, end it with an error, or take the place of all others in it."""
    name, bases = type(callback).__name__, [cls.__name__ for cls in type(callback).__mro__]
    if reason := next((_TRAINING[base] for base in bases if base in _TRAINING), ""):
        yield f"{name} {reason}. Leave {name} out."
    if any(map(_AVERAGING.search, bases)) or any(isinstance(v, AveragedModel) for v in vars(callback).values()):
        yield (
            f"{name} keeps a float copy of the weights, with which it would overwrite the tuned weights at the end of"
            f" fit. Leave {name} out of the PTQ run: load the averaged weights before, and fit without it."
        )
    if "EarlyStopping" in bases and callback.strict:
        may_validate = overrides(module, "validation_step") and trainer.limit_val_batches > 0
        validates = trainer.enable_validation if fitting else may_validate
        if not validates or (logged is not None and callback.monitor not in logged):
            names = "" if not logged else f", but {', '.join(sorted(logged))}"
            yield (
                f"{name} monitors {callback.monitor!r}, which no validation of this run logs{names}. Leave {name}"
                " out: a PTQ run ends by itself."
            )
