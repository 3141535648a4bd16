"""Attributes of one object, replaced for a while; a module, used and left exactly as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MISSING = object()


@contextmanager
def attributes(obj: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """``obj`` has these attributes of its own inside the ``with`` block; its class is untouched.

    They are written to the instance's dictionary, past any ``__setattr__``, so methods can be replaced on modules.

    Example:
        >>> class Greeter:
        ...     def greet(self): return "hello"
        >>> greeter = Greeter()
        >>> with attributes(greeter, {"greet": lambda: "bye"}):
        ...     greeter.greet()
        'bye'
        >>> greeter.greet()
        'hello'
    """
    before = {name: obj.__dict__.get(name, _MISSING) for name in values}
    obj.__dict__.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is _MISSING:
                obj.__dict__.pop(name, None)
            else:
                obj.__dict__[name] = old


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Behind the ``with`` block every module below ``module`` has the attributes, children, parameters, gradients and
    buffers that it had before, with the same values; the random states are as they were, too.

    The module itself is worked on, for not every one can be copied. Its tensors are kept twice meanwhile. Of objects
    that modules hold, other than tensors, lists, dictionaries and sets, changes inside stay.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with left_as_it_was(net):
        ...     _ = net(torch.randn(8, 2)), net.eval()
        >>> net.running_mean, net.training
        (tensor([0., 0.]), True)
    """
    with ExitStack() as stack:
        # fork_rng keeps the state of the CPU, and of the CUDA devices that it is told
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng([d.index for d in devices]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for child in module.modules():
            for value in (vars(child), *vars(child).values()):
                if isinstance(value, (dict, list, set)):
                    stack.callback(_refill, value, copy.copy(value))
            for tensor in (*vars(child).values(), *child._parameters.values(), *child._buffers.values()):
                if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
                    grad = tensor.grad if tensor.is_leaf else None
                    stack.callback(_restore, tensor, tensor.detach().clone(), grad, tensor.requires_grad)
        yield


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _restore(tensor: Tensor, value: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    if not torch.equal(tensor, value):
        tensor.detach().copy_(value)
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
