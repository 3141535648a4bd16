"""Registry of quantized counterparts, and how float modules are turned into them in place and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain
from types import MemberDescriptorType
from typing import Any, ClassVar

from torch import nn

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.numerics.qconfig import Operations, includes

_REGISTRY: dict[type[nn.Module], type[Swapped]] = {}
"""Maps a float class to the class that replaces it and its subclasses."""

_BY_NAME: dict[str, type[Swapped]] = {}
"""Maps a pattern of class names to a counterpart, for classes of packages that need not be installed."""

_CONTENTS = ("_parameters", "_buffers", "_modules")


class Swapped(nn.Module):
    """A class that takes the place of a float class, on the float module itself.

    The module stays the same object, so everything that refers to it keeps its meaning: lists, bound methods, hooks.

    Attributes:
        prefix: Start of the names of classes that are made at run time for derived float classes.
        added_names: Names of instance attributes that the counterpart adds.
    """

    prefix: ClassVar[str] = "Swapped"
    added_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def swap(cls, module: nn.Module) -> Any:
        """Turn a float module into its counterpart, in place, and return it.

        Raises:
            TypeError: If Python cannot change the class of this module.
        """
        set_class(module, cls)
        swapped: Any = module
        swapped._init_swapped()
        return swapped

    @classmethod
    def from_float(cls, module: nn.Module) -> Any:
        """Return the counterpart of ``module``, sharing its parameters, buffers and attributes; it stays unchanged."""
        twin = object.__new__(type(module))
        for key, value in module.__dict__.items():
            twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
        _set_slots(twin, _slots(module))
        return cls.swap(twin)

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        """Return False for a module that only has the name of those that this is the counterpart of."""
        return True

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return why ``module`` cannot be swapped, or an empty text."""
        bases = type(module).__mro__
        for name in sorted(cls._added()):
            if name in vars(module) or any(name in vars(module)[content] for content in _CONTENTS):
                return f"its attribute {name!r} has the name of one that quantization adds"
            if any(name in vars(base) for base in bases if base not in (nn.Module, object)):
                return f"its class defines {name!r}, the name of an attribute that quantization adds"
        return ""

    @classmethod
    def _added(cls) -> set[str]:
        """Return the names that the library's classes among the bases add to a float module."""
        own = [vars(base).items() for base in cls.__mro__ if base.__module__.startswith("lightning_ptq.")]
        # Replaceable tensors have the names of the float module's own; the prefix is read from classes only.
        names = {name for items in own for name, value in items if not isinstance(value, ReplaceableTensor)}
        names.difference_update(("prefix", "added_names"))
        return {n for n in (*names, *cls.added_names) if not hasattr(nn.Module, n) and not n.startswith("__")}

    def _init_swapped(self) -> None:
        """Set up what the counterpart adds."""

    def _leave_swapped(self) -> None:
        """Take back what :meth:`_init_swapped` added to objects that outlive the counterpart, such as hooks."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of a derived float layer is made at run time, so a pickle names the float class instead.
        swapped, float_class = type(self), float_class_of(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        if rest and isinstance(rest[0], tuple) and float_class.__setstate__ is nn.Module.__setstate__:
            rest[0] = rest[0][0]  # without the slots, which nn.Module cannot restore
        make, *args = (float_class if value is swapped else value for value in (make, *args))
        return _revive, (float_class, make, tuple(args), _slots(self), *self._class_maker()), *rest

    @classmethod
    def _class_maker(cls) -> tuple[Callable[[type[nn.Module]], Any], ...]:
        """Return what makes the counterpart of a float class when a pickle is read, if it is not the registry."""
        return ()


def _revive(
    float_class: type[nn.Module],
    make: Any,
    args: tuple[Any, ...],
    slots: dict[str, Any],
    make_class: Callable[[type[nn.Module]], Any] | None = None,
) -> nn.Module:
    """Make the module of a pickle, which then gets its state."""
    counterpart = (make_class or swapped_class)(float_class)
    if counterpart is None:
        raise TypeError(
            f"{float_class.__name__} has no quantized counterpart. Register it again as before pickling, then load."
        )
    module: nn.Module = make(*args)
    _set_slots(module, slots)
    if not isinstance(module, Swapped):
        set_class(module, counterpart)
    return module


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make ``module`` an instance of ``cls``, past any ``__setattr__`` of its class."""
    object.__setattr__(module, "__class__", cls)


def float_class_of(module: nn.Module) -> Any:
    """Return the class of a float module, or the class that a swapped module had before."""
    bases = type(module).__mro__
    return next(base for base in bases if not issubclass(base, Swapped) and base is not QuantizedOp)


def _slots(module: nn.Module) -> dict[str, Any]:
    """Return what a module keeps in ``__slots__``."""
    members = [item for base in type(module).__mro__ for item in vars(base).items()]
    names = [name for name, member in members if isinstance(member, MemberDescriptorType)]
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _set_slots(module: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(module, name, value)


class FloatState:
    """What a float module was before it was swapped, and how to make it that again.

    Args:
        module: The float module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._class = type(module)
        self._attributes = dict(vars(module))
        self._contents = {name: dict(vars(module)[name]) for name in _CONTENTS}

    def restore(self) -> None:
        """Restore class, attributes, parameters and children.

        Hooks and train mode stay as they are now, so that the user's handles keep working. Buffers keep their present
        values.
        """
        module: Any = self.module
        if isinstance(module, Swapped):
            module._leave_swapped()
        set_class(module, self._class)
        for name, old in self._contents.items():
            present = dict(vars(module)[name])
            if name == "_buffers":
                old = {key: present.get(key, value) for key, value in old.items()}
            elif name == "_parameters":
                _move_alike(old, present)
            self._attributes[name].clear()
            self._attributes[name].update(old)
        self._attributes["training"] = module.training
        vars(module).clear()
        vars(module).update(self._attributes)


def _move_alike(parameters: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Give parameters the device and the dtype that those in their place have been moved to."""
    for name, parameter in parameters.items():
        other = present.get(name)
        if parameter is not None and other is not None and other is not parameter:
            parameter.data = parameter.data.to(other)


def register_swap(float_class: type[nn.Module], counterpart: type[Swapped]) -> None:
    """Have ``counterpart`` take the place of ``float_class`` and of classes derived from it."""
    _REGISTRY[float_class] = counterpart


def register_swap_by_name(pattern: str, counterpart: type[Swapped]) -> None:
    """Have ``counterpart`` take the place of module classes whose name matches ``pattern``, and of derived classes."""
    _BY_NAME[pattern] = counterpart


def registered_types(counterpart: type[Swapped] = Swapped) -> tuple[type[nn.Module], ...]:
    """Return the float classes whose counterparts derive from ``counterpart``."""
    return tuple(float_class for float_class, swapped in _REGISTRY.items() if issubclass(swapped, counterpart))


def registered_counterpart(float_class: type[nn.Module]) -> type[Swapped] | None:
    """Return the counterpart that is registered for a float class or the nearest of its bases."""
    if issubclass(float_class, Swapped):
        return None
    # The nearest registered base class decides, so that a derived class may be registered with a kind of its own.
    bases = [parent for parent in float_class.__mro__ if issubclass(parent, nn.Module)]
    known = (_REGISTRY[parent] for parent in bases if parent in _REGISTRY)
    named = (kind for parent in bases for pattern, kind in _BY_NAME.items() if fnmatchcase(parent.__name__, pattern))
    return next(chain(known, named), None)


def counterpart_of(module: nn.Module, operations: Operations = "all") -> type[Swapped] | None:
    """Return the registered counterpart of a float module, if ``operations`` includes it."""
    kind = registered_counterpart(type(module))
    if kind is None or not kind.applies_to(module):
        return None
    is_wanted = not issubclass(kind, QuantizedOp) or includes(operations, kind.quantized_from)
    return kind if is_wanted else None


def swapped_class(float_class: type[nn.Module]) -> Any:
    """Return the counterpart of a float class: a registered one, one made for a derived class, or None."""
    base = registered_counterpart(float_class)
    if base is None or issubclass(base, float_class):
        return base
    bases = (base, float_class)
    for known in type.__subclasses__(float_class):
        if known.__bases__ == bases and known.__name__ == f"{base.prefix}{float_class.__name__}":
            return known
    try:
        return type(f"{base.prefix}{float_class.__name__}", bases, {})
    except Exception:  # a metaclass or an __init_subclass__ may raise anything
        return None


class _Replacements(threading.local):
    """Tensors that take the place of attributes, by module and name, in the current thread."""

    def __init__(self) -> None:
        self.by_module: dict[int, Mapping[str, Any]] = {}


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
        own = module.__dict__
        if own.get("mode") == "float" and self.name in (own.get("reference") or {}):  # read by code outside the module
            return own["reference"][self.name]
        for values in (own, own.get("_parameters", {}), own.get("_buffers", {})):
            if self.name in values:
                return values[self.name]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")

    def __set__(self, module: Any, value: Any) -> None:
        # nn.Module.__setattr__ registers parameters itself; replicas of DataParallel get plain tensors.
        vars(module)[self.name] = value


@contextmanager
def tensors_replaced(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
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
