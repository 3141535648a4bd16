"""Making a LightningModule run its calibration forward, and nothing of its training, inside ``trainer.fit``."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NoReturn

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchmetrics import Metric

from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.patching import attributes

Step = Literal["training", "predict"] | Callable[[Any, Any], Any]

_MANUAL = (
    "training_step runs its own optimization (it called {found}), which calibration must not. Tell CalibrationCapture"
    " what to run instead: step='predict', or step=function of module and batch."
)
_TRAINING_HOOKS = (
    "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_end",
    "on_before_zero_grad",
)  # fmt: skip


def calibration_forward(module: Any, step: Step) -> Forward:
    """The calibration forward of a LightningModule.

    Args:
        module: The module; its methods are taken as they are now.
        step: ``"training"``, ``"predict"``, or a function of module and batch.

    Raises:
        CalibrationError: If ``step`` is none of these, or the step takes an iterator in place of a batch.
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

    def forward(root: Any, batch: Any) -> Any:
        with _nothing_trained(root):
            return run(root, batch)

    return forward


def lightning_base(cls: type) -> Any:
    """The LightningModule class that ``cls`` derives from, of whichever package."""
    return next(base for base in cls.__mro__ if base.__name__ == "LightningModule")


def _with_indices(method: Callable[..., Any]) -> Forward:
    parameters = inspect.signature(method).parameters
    if "dataloader_iter" in parameters:
        raise CalibrationError(
            f"{method.__name__} takes a dataloader_iter, but calibration runs batch by batch."
            " Pass step=function of module and batch to CalibrationCapture."
        )
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    indices = [0 for p in positional[1:] if p.default is p.empty]  # batch_idx, dataloader_idx, whatever their names
    if not indices and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        indices = [0]  # *args, of a wrapper: Lightning passes batch_idx then
    return lambda module, batch: method(batch, *indices)


@contextmanager
def _nothing_trained(module: Any) -> Iterator[None]:
    """Logging is silent, and whoever reaches for an optimizer gets an error that says what to do."""

    def refuse(name: str) -> Callable[..., NoReturn]:
        def refused(*args: Any, **kwargs: Any) -> NoReturn:
            raise CalibrationError(_MANUAL.format(found=name))

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
        if "does not require grad" in str(error):
            raise CalibrationError(_MANUAL.format(found="backward()")) from error
        raise
    finally:
        handle.remove()


@contextmanager
def muted(module: Any, on_batch: Callable[[Any], None], done: Callable[[], bool]) -> Iterator[None]:
    """Inside the block the module's ``training_step`` is ``on_batch`` and no part of its training runs.

    Optimizers, schedulers, training hooks and gradient steps are out of the way; metrics that the steps update get
    their states back in the end.

    Args:
        module: A LightningModule.
        on_batch: Called with each batch.
        done: True if no more batches are wanted.
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
        if "forward" not in vars(module):  # under DDP Lightning leaves one of its own on the instance
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
