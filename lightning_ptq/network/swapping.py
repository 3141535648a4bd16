"""Registry of quantized counterparts, and how instances are made from float modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_ptq.network.op import QuantizedOp

_REGISTRY: dict[type[nn.Module], type[Swapped]] = {}
"""Maps a float class to the class that replaces it and its subclasses."""


class Swapped(nn.Module):
    """A class that takes the place of a float class, on a copy that shares its parameters and attributes.

    Attributes:
        prefix: Start of the names of classes that are made at run time for derived float classes.
    """

    prefix: ClassVar[str] = "Swapped"

    @classmethod
    def from_float(cls, module: nn.Module) -> Any:
        """Return the counterpart of ``module``, sharing its parameters, buffers and attributes; it stays unchanged."""
        swapped = cls.__new__(cls)
        for key, value in module.__dict__.items():
            swapped.__dict__[key] = value.copy() if isinstance(value, dict) else value
        swapped._init_swapped()
        return swapped

    def _init_swapped(self) -> None:
        """Set up what the counterpart adds."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of a derived float layer is made at run time, so a pickle names the float class instead.
        bases = type(self).__mro__
        float_class = next(base for base in bases if not issubclass(base, Swapped) and base is not QuantizedOp)
        return _rebuild, (float_class,), self.__dict__


def _rebuild(float_class: type[nn.Module]) -> nn.Module:
    counterpart = swapped_class(float_class)
    if counterpart is None:
        raise TypeError(
            f"{float_class.__name__} has no quantized counterpart. Register it again as before pickling, then load."
        )
    return cast(nn.Module, counterpart.__new__(counterpart))


def register_swap(float_class: type[nn.Module], counterpart: type[Swapped]) -> None:
    """Have ``counterpart`` take the place of ``float_class`` and of classes derived from it."""
    _REGISTRY[float_class] = counterpart


def registered_types(counterpart: type[Swapped] = Swapped) -> tuple[type[nn.Module], ...]:
    """Return the float classes whose counterparts derive from ``counterpart``."""
    return tuple(float_class for float_class, swapped in _REGISTRY.items() if issubclass(swapped, counterpart))


def swapped_class(float_class: type[nn.Module]) -> Any:
    """Return the counterpart of a float class: a registered one, one made for a derived class, or None."""
    if issubclass(float_class, Swapped):
        return None
    # The nearest registered base class decides, so that a derived class may be registered with a kind of its own.
    base = next((_REGISTRY[parent] for parent in float_class.__mro__ if parent in _REGISTRY), None)
    if base is None or issubclass(base, float_class):
        return base
    return type(f"{base.prefix}{float_class.__name__}", (base, float_class), {})


class _Replacements(threading.local):
    """Tensors that take the place of attributes, by module and name, in the current thread."""

    def __init__(self) -> None:
        self.by_module: dict[int, Mapping[str, Tensor | None]] = {}


_replacements = _Replacements()


class ReplaceableTensor:
    """A parameter that :func:`tensors_replaced` can replace for one thread, without a write to the module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        # By id and not by a weak reference: the entry lives only while the module's forward runs.
        replaced = _replacements.by_module.get(id(module))
        if replaced is not None and self.name in replaced:
            return replaced[self.name]
        for values in (vars(module), vars(module).get("_parameters", {}), vars(module).get("_buffers", {})):
            if self.name in values:
                return values[self.name]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")

    def __set__(self, module: Any, value: Any) -> None:
        # nn.Module.__setattr__ registers parameters itself; replicas of DataParallel get plain tensors.
        vars(module)[self.name] = value


@contextmanager
def tensors_replaced(module: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Inside the ``with`` block, this thread sees ``values`` in place of the module's parameters of these names."""
    by_module = _replacements.by_module
    before = by_module.get(id(module))
    by_module[id(module)] = values
    try:
        yield
    finally:
        if before is None:
            del by_module[id(module)]
        else:  # the module was called by its own forward
            by_module[id(module)] = before
