"""Run a module on a calibration batch: in eval mode, in float32, and by default without gradients."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.errors import CalibrationError, PTQError, add_note
from lightning_ptq.runtime.eager import not_checkpointed

Forward = Callable[[nn.Module, Any], Any]

BATCH_INDEX: ContextVar[int] = ContextVar("BATCH_INDEX", default=0)
"""Index of the calibration batch that the forward runs on, for steps that read their ``batch_idx``."""


def default_forward(module: nn.Module, batch: Any) -> Any:
    """Call ``module`` with the inputs in ``batch``.

    Args:
        module: The module.
        batch: A tuple or list, whose first entry is passed; a mapping, whose entries are passed as keyword arguments;
            or something else, such as a tensor or a dataclass, which is passed as the only argument. So is a list of
            samples, such as images of different sizes or strings; see :class:`~lightning_ptq.calibration.batch.Batch`.

    Raises:
        CalibrationError: If the batch is an empty tuple or list.
    """
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence) and not Batch(batch).is_sample_list:
        if not batch:
            raise CalibrationError(
                f"a calibration batch is an empty {type(batch).__name__}, so there is no input to run the module on."
                " Return the inputs as its first entry from the loader."
            )
        with _noted(module, "the first entry of the batch"):
            return module(batch[0])
    # A mapping that moves its own entries, such as a TensorDict, is the argument of modules that are made for it.
    if isinstance(batch, (dict, UserDict)) or (isinstance(batch, Mapping) and not hasattr(batch, "to")):
        with _noted(module, "the entries of the batch by keyword"):
            return module(**batch)
    with _noted(module, "the whole batch"):
        return module(batch)


@contextmanager
def _noted(module: nn.Module, given: str) -> Iterator[None]:
    """Add to an exception how the module was called."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, PTQError):
            add_note(
                error,
                f"Calibration called {type(module).__name__} in eval mode with {given}. To call it in another way, pass"
                " a function of module and batch: forward=, or step= of CalibrationCapture and inspect.",
            )
        raise


def fresh_batch(batch: Any, device: torch.device) -> Any:
    """Return a copy of a batch on ``device``, so that a step may change its batch in place."""
    return Batch(Batch(batch).copy()).to(device)


def run_forward(module: nn.Module, forward: Forward, batch: Any, gradients: bool = False, index: int = 0) -> Any:
    """Return ``forward(module, batch)``, run in eval mode and float32; training flags are restored.

    Args:
        module: The module.
        forward: The calibration forward.
        batch: The batch.
        gradients: Whether autograd records the forward.
        index: Index of the batch.
    """
    device_type = next((parameter.device.type for parameter in module.parameters()), "cpu")
    # A backward pass that runs modules again would run them without the hooks, and in another state.
    direct = not_checkpointed() if gradients else nullcontext()
    with eval_mode(module), torch.set_grad_enabled(gradients), torch.autocast(device_type, enabled=False), direct:
        token = BATCH_INDEX.set(index)
        try:
            return forward(module, batch)
        except StopIteration:  # the training loop would take it for the end of the loader
            pass
        finally:
            BATCH_INDEX.reset(token)
    raise CalibrationError(
        "the calibration forward ran out of an iterator (StopIteration). Calibration runs it several times on each"
        " batch, so it must not draw from an iterator or a generator that ends. Put what it draws into the batch, or"
        " pass a function of module and batch: step= of CalibrationCapture."
    )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every module below ``module`` into eval mode inside the ``with`` block, and restore each flag after it.

    Torch's fused attention is off meanwhile. It would use float weights, and nested tensors between the layers.
    """
    before = [(child, child.training) for child in module.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for child, _ in before:
            child.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for child, flag in before:
            child.training = flag
