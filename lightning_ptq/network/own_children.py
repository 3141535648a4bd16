"""Containers whose forward calls functions: the call sites below them are none of their elements.

User code iterates over containers, and over the children of a module in its forward. Call sites, which are children
too, would then run like layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_ptq.network.call_sites import CallSite, WeightedSite
from lightning_ptq.network.parameters import ParameterOp
from lightning_ptq.network.routes import Route

ADDED = (CallSite, WeightedSite, ParameterOp, Route)
"""Classes of the children that are added to modules that call functions."""


def own_children(module: nn.Module) -> dict[str, Any]:
    """Return the children of a module by name, without those that were added for its calls."""
    return {name: child for name, child in module._modules.items() if not isinstance(child, ADDED)}


def _len(self: Any) -> int:
    return len(own_children(self))


def _values(self: Any) -> Iterator[nn.Module]:
    return iter(own_children(self).values())


def _names(self: Any) -> Iterator[str]:
    return iter(own_children(self))


def _item(self: Any, index: Any) -> Any:
    if isinstance(index, slice):
        return nn.Sequential(*list(own_children(self).values())[index])
    return list(own_children(self).values())[index]


_METHODS: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {
    nn.Sequential: {"__len__": _len, "__iter__": _values, "__getitem__": _item},
    nn.ModuleList: {"__len__": _len, "__iter__": _values},
    nn.ModuleDict: {
        "__len__": _len,
        "__iter__": _names,
        "__contains__": lambda self, key: key in own_children(self),
        "keys": lambda self: own_children(self).keys(),
        "items": lambda self: own_children(self).items(),
        "values": lambda self: own_children(self).values(),
    },
}


def container_methods(float_class: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Return the methods by which a container of this class has its own children alone as elements."""
    return next((methods for kind, methods in _METHODS.items() if issubclass(float_class, kind)), {})
