"""Changes that undo themselves: attributes, hooks, frozen parameters, saved tensors, a module left unchanged."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ptq.runtime.frames import frames, outside

_MISSING = object()

Before = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Function of a module's name, the module, and the positional and keyword arguments of a forward."""

After = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Function of the same arguments and the output. A result other than None replaces the output."""


@contextmanager
def attributes(obj: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Give ``obj`` these instance attributes inside the ``with`` block; its class is untouched.

    They are written to the instance's dictionary, past any ``__setattr__``, so methods of modules can be replaced.

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
            if old is _MISSING:  # pop: other code may have removed it meanwhile
                obj.__dict__.pop(name, None)
            else:
                obj.__dict__[name] = old


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call ``before`` and ``after`` around every forward of the modules inside the ``with`` block.

    Scripted modules are left out, since they take no hooks.

    Args:
        modules: Modules by the names that the functions are given.
        before: Called before each forward.
        after: Called after each forward. A result other than None replaces the output.

    Example:
        >>> net, seen = nn.Sequential(nn.ReLU(), nn.Tanh()), []
        >>> with hooked(dict(net.named_children()), before=lambda name, *_: seen.append(name)):
        ...     _ = net(torch.zeros(1))
        >>> seen
        ['0', '1']
    """

    def enter(name: str) -> Any:
        return lambda module, args, kwargs: _apart(before, name, module, args, kwargs)

    def leave(name: str) -> Any:
        return lambda module, args, kwargs, output: _apart(after, name, module, args, kwargs, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if before is not None:
                stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(leave(name), with_kwargs=True).remove)
        yield


def _apart(function: Any, *arguments: Any) -> Any:
    """Call a function whose own calls of torch are no part of the forward that it watches."""
    if not frames.stack or frames.discovering:
        return function(*arguments)
    with outside:
        return function(*arguments)


@contextmanager
def frozen(module: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Only the parameters in ``trained`` require gradients inside the ``with`` block.

    Afterwards the ``grad`` of ``trained`` is None.
    """
    trained = list(trained)
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in trained:
            parameter.grad = None


class TensorSnapshot:
    """The values of named tensors at one time, and how to restore them.

    Args:
        tensors: Tensors by name; they are copied.

    Example:
        >>> weight = torch.ones(2)
        >>> snapshot = TensorSnapshot({"weight": weight})
        >>> _ = weight.mul_(3)
        >>> sorted(snapshot.changed({"weight": weight})), snapshot.restore(), weight
        (['weight'], None, tensor([1., 1.]))
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._saved = {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._saved

    def add(self, name: str, tensor: Tensor) -> None:
        """Save one more tensor, unless one of this name is saved already."""
        self._saved.setdefault(name, (tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Write the saved values into the tensors; tensors that still have them are not written to."""
        for tensor, value in self._saved.values():
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)

    def changed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of ``tensors`` whose values differ from the saved ones, or that were not saved."""
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name not in self._saved or not torch.equal(tensor, self._saved[name][1])
        }


@contextmanager
def left_unchanged(module: nn.Module) -> Iterator[None]:
    """After the ``with`` block, leave ``module`` and the random states as they were before it.

    Every module below ``module`` gets back its attributes, children, parameters, gradients and buffers, with their
    values. The module itself is used, since not every module can be copied; meanwhile its tensors are held twice.
    Changes inside objects other than tensors, lists, dictionaries and sets remain.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with left_unchanged(net):
        ...     _ = net(torch.randn(8, 2)), net.eval()
        >>> net.running_mean, net.training
        (tensor([0., 0.]), True)
    """
    with ExitStack() as stack:
        # fork_rng saves the state of the CPU, and of those CUDA devices that it is given.
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng([d.index for d in devices]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for child in module.modules():
            # Containers get their content back, and stay the same objects, as others may refer to them.
            for value in (vars(child), *vars(child).values()):
                if isinstance(value, (dict, list, set)):
                    stack.callback(_refill, value, copy.copy(value))
            for tensor in (*vars(child).values(), *child._parameters.values(), *child._buffers.values()):
                if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
                    stack.callback(TensorSnapshot({"": tensor}).restore)
                    grad = tensor.grad if tensor.is_leaf else None
                    stack.callback(_restore_gradient, tensor, grad, tensor.requires_grad)
        yield


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _restore_gradient(tensor: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
