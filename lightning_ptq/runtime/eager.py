"""Running modules without compilation, without checkpoints of autograd, and outside inference mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from lightning_ptq.runtime.patching import attributes


@contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, nothing compiled runs; after it, what is compiled in ``module`` is compiled anew.

    Compiled code may not notice that a layer changed its mode or its quantizers, so it would compute another function.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with eagerly(net):
        ...     net(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """
    try:
        with not_compiled():
            yield
    finally:
        if is_compiled(module):
            torch._dynamo.reset()


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled functions and modules eagerly inside the ``with`` block."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
    elif hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:  # torch 2.5
        with torch._dynamo.config.patch(disable=True):
            yield


@contextmanager
def not_checkpointed() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` keep the activations inside the ``with`` block.

    It would compute them again in the backward pass, where the parameters that tuning puts in their place are gone.
    """

    def once(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with attributes(torch.utils.checkpoint, {"CheckpointFunction": _Direct, **dict.fromkeys(_GENERATORS, once)}):
        yield


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` inside the ``with`` block; gradients are switched off, as they are in that mode.

    Tensors that were made in inference mode could neither be tuned nor be used in tuning.

    Example:
        >>> with torch.inference_mode(), no_inference_mode():
        ...     torch.zeros(1).is_inference(), torch.is_grad_enabled()
        (False, False)
    """
    if not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


@contextmanager
def plainly() -> Iterator[None]:
    """Run modules eagerly, with activations kept for the backward pass, and outside inference mode."""
    with no_inference_mode(), not_compiled(), not_checkpointed():
        yield


_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
"""Names of what computes activations again in the backward pass, in older and in newer torch."""


class _Direct:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def is_compiled(module: nn.Module) -> bool:
    """Return True if ``module``, a module below it, or a method or attribute of one was given to ``torch.compile``."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or any(map(_is_compiled_function, _values(child)))
        for child in module.modules()
    )


def _values(child: nn.Module) -> Iterator[Any]:
    yield from vars(child).values()
    for cls in type(child).__mro__[:-1]:
        if cls is not nn.Module:
            yield from vars(cls).values()


def _is_compiled_function(value: Any) -> bool:
    return "_torchdynamo_orig_callable" in getattr(value, "__dict__", ())
