"""Training disabled: ``trainer.fit`` runs a LightningModule's calibration forward and nothing of its training."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchmetrics import Metric

from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.patching import attributes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

Step = Literal["training", "predict"] | Callable[[Any, Any], Any]
"""A calibration forward, as users give it: the name of a step, or a function of module and batch."""

_MANUAL = (
    "training_step runs its own optimization (it called {call}), which calibration must not do. Give CalibrationCapture"
    " another forward: step='predict', or step=function of module and batch."
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
    if callable(step):
        run = step
    elif step == "predict":
        overridden = type(module).predict_step is not lightning_base(type(module)).predict_step
        run = _with_indices(module.predict_step) if overridden else default_forward
    elif step == "training":
        run = _with_indices(module.training_step)
    else:
        raise CalibrationError(f"step must be 'training', 'predict' or a function of module and batch, got {step!r}.")

    def forward(root: nn.Module, batch: Any) -> Any:
        with _optimization_refused(root):
            return run(root, batch)

    return forward


def lightning_base(cls: type) -> Any:
    """Return the LightningModule class that ``cls`` derives from, from either package."""
    return next(base for base in cls.__mro__ if base.__name__ == "LightningModule")


def _with_indices(method: Callable[..., Any]) -> Forward:
    """Return a step as a function of module and batch, with 0 for each index that the step requires."""
    parameters = inspect.signature(method).parameters
    if "dataloader_iter" in parameters:
        raise CalibrationError(
            f"{method.__name__} takes a dataloader_iter, but calibration runs batch by batch."
            " Pass step=function of module and batch to CalibrationCapture."
        )
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # The first parameter is the batch; the others are batch_idx and dataloader_idx, which may have any name.
    indices = [0 for p in positional[1:] if p.default is p.empty]
    if not indices and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        indices = [0]  # a wrapper with *args: Lightning passes it batch_idx
    return lambda module, batch: method(batch, *indices)


@contextmanager
def _optimization_refused(module: nn.Module) -> Iterator[None]:
    """Discard what the step logs, and raise an error with a remedy if it uses an optimizer."""

    def refuse(name: str) -> Callable[..., NoReturn]:
        def refused(*args: Any, **kwargs: Any) -> NoReturn:
            raise CalibrationError(_MANUAL.format(call=name))

        return refused

    def silent(*args: Any, **kwargs: Any) -> None:
        return None

    replaced: dict[str, Any] = {"log": silent, "log_dict": silent}
    replaced |= {name: refuse(f"self.{name}()") for name in ("optimizers", "lr_schedulers", "manual_backward")}
    handle = register_optimizer_step_pre_hook(refuse("the step of an optimizer"))
    try:
        with attributes(module, replaced):
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
    module: LightningModule, on_batch: Callable[[Any], None], done: Callable[[], bool]
) -> Iterator[None]:
    """Replace the module's ``training_step`` by ``on_batch`` inside the ``with`` block; no part of its training runs.

    Optimizers, schedulers, training hooks and gradient steps are disabled. Afterwards the metrics that the steps
    updated get their previous states back.

    Args:
        module: A LightningModule.
        on_batch: Called with each batch.
        done: Returns True if no more batches are wanted.
    """
    original = module.training_step

    @functools.wraps(original)  # Lightning reads the signature
    def training_step(batch: Any, *args: Any, **kwargs: Any) -> None:
        on_batch(batch)

    def on_train_batch_start(batch: Any, batch_idx: int) -> int | None:
        return -1 if done() else None  # -1 skips the rest of the epoch

    replaced: dict[str, Any] = {
        "training_step": training_step,
        "configure_optimizers": lambda: None,
        "_automatic_optimization": False,
        "on_train_batch_start": on_train_batch_start,
    }
    replaced |= {name: lambda *args, **kwargs: None for name in _TRAINING_HOOKS}
    with ExitStack() as stack:
        stack.callback(_restore_gradients, [(parameter, parameter.grad) for parameter in module.parameters()])
        for metric in (child for child in module.modules() if isinstance(child, Metric)):
            stack.callback(
                _restore_metric, metric, {name: copy.deepcopy(metric.__dict__[name]) for name in _states(metric)}
            )
        if "forward" not in vars(module):  # under DDP, Lightning leaves a forward of its own on the instance
            stack.callback(vars(module).pop, "forward", None)
        stack.enter_context(attributes(module, replaced))
        yield


def _states(metric: Metric) -> list[str]:
    return [*metric.metric_state, "_update_count", "_computed"]


def _restore_gradients(gradients: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


def _restore_metric(metric: Metric, states: dict[str, Any]) -> None:
    metric.__dict__.update(states)
