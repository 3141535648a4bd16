"""What Lightning shows and checks in a training, as a PTQ run has it: progress, summary, intervals, early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_ptq.callbacks.trainer.lightning import callbacks_of
from lightning_ptq.runtime.patching import attributes

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

_SILENT: dict[str, dict[str, Any]] = {
    "ModelSummary": {"_max_depth": 0},  # it would show swapped layers, and no operations for them
    "EarlyStopping": {"_run_early_stopping_check": lambda trainer: None},  # a run ends by itself
}
"""Attributes that Lightning's callbacks have during a run, by class."""


@contextmanager
def suited_to_ptq(trainer: Trainer, num_samples: int | None) -> Iterator[None]:
    """Inside the ``with`` block, Lightning shows what is true of a PTQ run, and does not warn of what is none.

    Only attributes of the Trainer and its callbacks change; no filter of warnings and no logger does.

    Args:
        trainer: Trainer of the run.
        num_samples: Samples after which the pass ends, on all ranks together; None for the whole loader.
    """
    with ExitStack() as stack:
        # Lightning would warn that the epoch is shorter than its interval; a run logs whenever it has something to log.
        interval = min(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]  # set by a connector of the Trainer
        stack.enter_context(attributes(trainer, {"log_every_n_steps": interval}))
        for callback in callbacks_of(trainer):
            for cls in type(callback).__mro__:
                stack.enter_context(attributes(callback, _SILENT.get(cls.__name__, {})))
        bar: Any = trainer.progress_bar_callback
        if bar is not None and num_samples is not None:
            begin = partial(_begin, bar.on_train_epoch_start, num_samples)
            stack.enter_context(attributes(bar, {"on_train_epoch_start": begin}))
        yield


def _begin(original: Callable[..., None], num_samples: int, trainer: Trainer, *args: Any) -> None:
    """Begin the epoch on the bar; its total is the number of batches that hold ``num_samples`` samples."""
    original(trainer, *args)
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    bar: Any = trainer.progress_bar_callback
    if not isinstance(size, int) or not getattr(bar, "is_enabled", False):
        return
    total = min(trainer.num_training_batches, -(-num_samples // (size * trainer.world_size)))  # rounded up
    rich, task = getattr(bar, "progress", None), getattr(bar, "train_progress_bar_id", None)
    if rich is not None and task is not None:
        rich.update(task, total=total)
    elif getattr(bar, "_train_progress_bar", None) is not None:
        bar.train_progress_bar.total = total
        bar.train_progress_bar.refresh()
