"""Training disabled: ``trainer.fit`` runs a LightningModule's calibration forward and nothing of its training."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchmetrics import Metric

from lightning_ptq.calibration.forward import BATCH_INDEX, Forward, default_forward
from lightning_ptq.callbacks.trainer.lightning import overrides
from lightning_ptq.callbacks.trainer.standins import MutedLogger, Planned
from lightning_ptq.errors import CalibrationError, PTQError, add_note
from lightning_ptq.runtime.eager import eagerly
from lightning_ptq.runtime.patching import attributes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

_STEPS = {"training": "training_step", "predict": "predict_step"}

Step = Literal["training", "predict"] | Callable[[Any, Any], Any]
"""A calibration forward, as users give it: the name of a step, or a function of module and batch."""

_MANUAL = (
    "training_step runs its own optimization (it called {call}), which calibration must not do. Give CalibrationCapture"
    " another forward: step='predict', or step=function of module and batch."
)
_NOTE = (
    "Calibration ran {step} in eval mode and without gradients, so layers may return something else than in training,"
    " such as predictions in place of losses. If that is the reason, give CalibrationCapture (or inspect) another"
    " forward: step='predict', or step=function of module and batch."
)
_TRAINING_HOOKS = (
    "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_end",
    "on_before_zero_grad",
)  # fmt: skip


def calibration_forward(module: LightningModule, step: Step) -> Forward:
    """Return the calibration forward of a LightningModule.

    Args:
        module: The module; its methods are taken now, so later replacements have no effect.
        step: ``"training"``, ``"predict"``, or a function of module and batch.

    Raises:
        CalibrationError: If ``step`` is none of these, or the step takes an iterator instead of a batch.
    """
    step = check_step(step)
    name = step if isinstance(step, str) else getattr(step, "__name__", "the step")
    if callable(step):
        run = step
    elif step == "predict":
        run = _with_indices(module.predict_step) if overrides(module, "predict_step") else default_forward
    else:
        run = _with_indices(module.training_step)

    configure = module.configure_optimizers if overrides(module, "configure_optimizers") else None
    planned, note = Planned(configure, _refuse), _NOTE.format(step=_STEPS.get(name, name))

    def forward(root: nn.Module, batch: Any) -> Any:
        with _muted(root, planned):
            try:
                return run(root, batch)
            except Exception as error:
                if not isinstance(error, PTQError):
                    add_note(error, note)
                raise

    return forward


def check_step(step: Any) -> Step:
    """Return a step; raise :class:`CalibrationError` unless it is ``"training"``, ``"predict"`` or a function."""
    if callable(step) or (isinstance(step, str) and step in _STEPS):
        return cast(Step, step)
    raise CalibrationError(f"step must be 'training', 'predict' or a function of module and batch, got {step!r}.")


def _with_indices(method: Callable[..., Any]) -> Forward:
    """Return a step as a function of module and batch; it gets the index of the batch, and 0 for other indices."""
    parameters = inspect.signature(method).parameters
    if "dataloader_iter" in parameters:
        raise CalibrationError(
            f"{method.__name__} takes a dataloader_iter, but calibration runs batch by batch."
            " Pass step=function of module and batch to CalibrationCapture."
        )
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # The first parameter is the batch; the others are batch_idx and dataloader_idx, which may have any name.
    required = sum(p.default is p.empty for p in positional[1:])
    wrapper = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())  # Lightning passes it batch_idx
    if not required and (wrapper or "batch_idx" in [p.name for p in positional[1:2]]):
        required = 1
    return lambda module, batch: method(batch, *[BATCH_INDEX.get(), *[0] * required][:required])


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise CalibrationError(_MANUAL.format(call=name))

    return refused


@contextmanager
def _muted(module: nn.Module, planned: Planned) -> Iterator[None]:
    """Discard what the step logs, let it read its optimizers, and raise an error with a remedy if it uses them."""

    def silent(*args: Any, **kwargs: Any) -> None:
        return None

    replaced: dict[str, Any] = {
        "log": silent,
        "log_dict": silent,
        "optimizers": planned.optimizers,
        "lr_schedulers": planned.lr_schedulers,
        "manual_backward": _refuse("self.manual_backward()"),
    }
    trainer = vars(module).get("_trainer")
    handle = register_optimizer_step_pre_hook(_refuse("the step of an optimizer"))
    try:
        with ExitStack() as stack:
            stack.enter_context(attributes(module, replaced))
            if trainer is not None:  # the property is assigned past its setter, which would wrap the optimizers
                stack.callback(setattr, trainer, "loggers", trainer.loggers)
                trainer.loggers = [MutedLogger(logger) for logger in trainer.loggers]
                stack.enter_context(attributes(trainer.strategy, {"_optimizers": planned}))
            yield
    except RuntimeError as error:
        # Calibration runs without gradients, so a direct loss.backward() fails with this message of torch.
        if "does not require grad" in str(error):
            raise CalibrationError(_MANUAL.format(call="backward()")) from error
        raise
    finally:
        handle.remove()


@contextmanager
def training_disabled(
    module: LightningModule, on_batch: Callable[[Any], Any], done: Callable[[], bool]
) -> Iterator[None]:
    """Replace the module's ``training_step`` by ``on_batch`` inside the ``with`` block; no part of its training runs.

    Optimizers, schedulers, training hooks and gradient steps are disabled. Afterwards the metrics that the steps
    updated get their previous states back. Compiled code does not run, and is compiled anew afterwards.

    Args:
        module: A LightningModule.
        on_batch: Called with each batch. What it returns is passed on to ``on_train_batch_end`` of all callbacks.
        done: Returns True if no more batches are wanted.
    """
    original = module.training_step

    @functools.wraps(original)  # Lightning reads the signature
    def training_step(batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _as_outputs(on_batch(batch))

    def on_train_batch_start(batch: Any, batch_idx: int) -> int | None:
        return -1 if done() else None  # -1 skips the rest of the epoch

    replaced: dict[str, Any] = {
        "training_step": training_step,
        "configure_optimizers": lambda: [],  # None would be a warning
        "_automatic_optimization": False,
        "on_train_batch_start": on_train_batch_start,
    }
    replaced |= {name: lambda *args, **kwargs: None for name in _TRAINING_HOOKS}
    with ExitStack() as stack:
        stack.enter_context(eagerly(module))
        stack.callback(_restore_gradients, [(parameter, parameter.grad) for parameter in module.parameters()])
        for metric in (child for child in module.modules() if isinstance(child, Metric)):
            stack.callback(
                _restore_metric, metric, {name: copy.deepcopy(metric.__dict__[name]) for name in _states(metric)}
            )
        if "forward" not in vars(module):  # under DDP, Lightning leaves a forward of its own on the instance
            stack.callback(vars(module).pop, "forward", None)
        stack.enter_context(attributes(module, replaced))
        yield


def _as_outputs(output: Any) -> dict[str, Any]:
    """Return what a step returned as Lightning passes it on: a dictionary with a loss, which is NaN if there is none.

    Nothing is computed from it, as no optimization takes place.
    """
    outputs = dict(output) if isinstance(output, Mapping) else {}
    loss = outputs.get("loss", output)
    known = isinstance(loss, Tensor) and loss.numel() == 1
    return {**outputs, "loss": loss.detach() if known else torch.tensor(math.nan)}


def _states(metric: Metric) -> list[str]:
    return [*metric.metric_state, "_update_count", "_computed"]


def _restore_gradients(gradients: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


def _restore_metric(metric: Metric, states: dict[str, Any]) -> None:
    metric.__dict__.update(states)
