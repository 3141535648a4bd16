"""The user's own validation inside a PTQ run, on the validation loader that was given to fit."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ptq.callbacks.trainer.lightning import isolate_rng
from lightning_ptq.callbacks.trainer.standins import MutedLogger
from lightning_ptq.errors import PTQError, add_note
from lightning_ptq.runtime.patching import attributes, left_unchanged
from lightning_ptq.runtime.ranks import Ranks

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_NOTE = (
    "A PTQ run validates the float module first, and the quantized one at the end, on the validation loader of fit. If"
    " it is not to, leave the loader out, or write Trainer(limit_val_batches=0)."
)
_VARIANTS = ("_step", "_epoch")  # Lightning adds these names to that of a value that is logged in both ways


@dataclass(frozen=True)
class Scores:
    """What a validation has logged.

    Attributes:
        values: Each metric over all batches, by name, with the names that Lightning adds, such as ``val_loss_epoch``.
        batches: The values that were logged batch by batch, on all ranks; NaN where a batch has no value of its own.
    """

    values: dict[str, float] = field(default_factory=dict)
    batches: dict[str, list[float]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names without those that Lightning adds to a value that is logged by step and by epoch."""
        return [name for name in self.values if not self._is_added(name)]

    def _is_added(self, name: str) -> bool:
        base, slash, loader = name.partition("/dataloader_idx_")
        stem = next((base.removesuffix(end) for end in _VARIANTS if base.endswith(end)), "")
        both = [f"{stem}{slash}{loader}", f"{stem}_epoch{slash}{loader}"]
        return bool(stem) and all(each in self.values for each in both) and _same(*(self.values[each] for each in both))


def validates(trainer: Trainer) -> bool:
    """True if fit was given validation data, and the module has a ``validation_step``."""
    return bool(trainer.enable_validation)


@contextmanager
def no_validation_of_fit(trainer: Trainer) -> Iterator[None]:
    """Prevent fit from validating on its own, at times at which the module is neither float nor quantized."""
    never = {"_should_check_val_fx": lambda *args, **kwargs: False}
    # Lightning checks the interval against the number of batches.
    neutral = {"num_sanity_val_steps": 0, "val_check_interval": 1.0}
    with attributes(trainer.fit_loop.epoch_loop, never), attributes(trainer, neutral):
        yield


def validate(
    trainer: Trainer, module: LightningModule, ranks: Ranks, check_stop: Callable[[], None] = lambda: None
) -> Scores:
    """Run Lightning's validation loop now, without loggers and callbacks but the progress bar; return what is logged.

    Afterwards the module and the random states are as before, so a run with validation data computes the same as one
    without. Every validation begins with the same random states, so that those of a run can be compared.

    Args:
        trainer: Trainer of the run, inside fit.
        module: The module, float or quantized.
        ranks: Processes of the run.
        check_stop: Called whenever the module logs; raises if the run is to stop.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    recorded: dict[str, list[float]] = defaultdict(list)
    log = module.log

    def recording(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        check_stop()
        recorded[name].append(_number(value))
        return log(name, value, *args, **kwargs)

    loggers, first, known = trainer.loggers, connector._first_loop_iter, connector._callback_metrics
    bar = trainer.progress_bar_callback
    with ExitStack() as stack:
        for context in (isolate_rng(), left_unchanged(module), attributes(module, {"log": recording})):
            stack.enter_context(context)
        # The bar's thread looks for it among the Trainer's callbacks.
        stack.enter_context(attributes(trainer, {"callbacks": [bar] if bar else []}))
        _seed()
        trainer.loggers = cast(Any, [MutedLogger(logger) for logger in loggers])
        trainer.validating = True
        connector._callback_metrics = {}  # else what an earlier validation logged would count for this one
        try:
            loop.run()
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        except Exception as error:
            if not isinstance(error, PTQError):
                add_note(error, _NOTE)
            raise
        finally:
            trainer.training = True
            trainer.loggers = loggers
            connector._first_loop_iter = first
            connector._callback_metrics = {**known, **connector._callback_metrics}
    return _over_ranks(Scores(found, dict(recorded)), ranks)


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def standard_error(found: Scores, expected: Scores, name: str) -> float | None:
    """Return the standard error of the difference of a metric, from the differences of batches.

    Args:
        found: Scores of one module.
        expected: Scores of another module on the same batches.
        name: Name of the metric.

    Returns:
        The standard error, in the metric's unit; None where it is not known, because the metric has no value for each
        batch, or there are fewer than two batches.
    """
    pairs = found.batches.get(name, []), expected.batches.get(name, [])
    if len(pairs[0]) != len(pairs[1]) or len(pairs[0]) < 2:
        return None
    differences = [a - b for a, b in zip(*pairs, strict=True)]
    count, mean = len(differences), math.fsum(differences) / len(differences)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    return error if math.isfinite(error) else None


def _number(value: Any) -> float:
    """Return a logged value as a number; of a metric, its value on the last batch."""
    if isinstance(value, Metric):
        value = value._forward_cache
    if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, (int, float)):
        return float(value)
    return math.nan


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


def _over_ranks(scores: Scores, ranks: Ranks) -> Scores:
    """Return the same scores on all ranks; what a module logs without ``sync_dist`` is averaged."""
    if ranks.world == 1:
        return scores
    gathered = ranks.gather(scores)
    common = [name for name in scores.values if all(name in each.values for each in gathered)]
    values = {name: math.fsum(each.values[name] for each in gathered) / ranks.world for name in common}
    batches = {name: [v for each in gathered for v in each.batches.get(name, [])] for name in scores.batches}
    return Scores(values, batches)
