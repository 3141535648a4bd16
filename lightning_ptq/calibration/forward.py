"""Running a module on a calibration batch: eval mode, float32, no gradients; batches of any structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ptq.errors import CalibrationError

Forward = Callable[[nn.Module, Any], Any]


def default_forward(module: nn.Module, batch: Any) -> Any:
    """``module`` on the inputs of ``batch``: the batch itself, the first of a tuple, or a dict as keywords."""
    if isinstance(batch, (tuple, list)):
        return module(batch[0])
    if isinstance(batch, dict):
        return module(**batch)
    return module(batch)


def run_forward(module: nn.Module, forward: Forward, batch: Any, gradients: bool = False) -> Any:
    """``forward(module, batch)`` in eval mode and float32, by default without gradients; puts training flags back."""
    device_type = next((parameter.device.type for parameter in module.parameters()), "cpu")
    with eval_mode(module), torch.set_grad_enabled(gradients), torch.autocast(device_type, enabled=False):
        return forward(module, batch)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every module below ``module`` is in eval mode inside the ``with`` block; each gets its own flag back."""
    before = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in before:
            child.training = False
        yield
    finally:
        for child, flag in before:
            child.training = flag


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor that has dimensions.

    Raises:
        CalibrationError: If there is no such tensor.
    """
    for leaf in _tensors(batch):
        if leaf.dim():
            return leaf.shape[0]
    raise CalibrationError(
        f"a calibration batch of type {type(batch).__name__} holds no tensor to count samples by."
        " Return tensors (bare, or in tuples, lists or dicts) from the loader."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "values"):  # mappings that are no dict, such as a tokenizer's BatchEncoding
            yield from _tensors(list(leaf.values()))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with everything that has a ``to`` method on ``device``."""
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)
