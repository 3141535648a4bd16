"""Fingerprints of settings: equal in every process for values that act alike, and never by address."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_ptq.runtime.ranks import digest

_LEAVES = (bool, int, float, complex, str, bytes, Enum, type(None))
_WRAPPED = {staticmethod: "__func__", classmethod: "__func__", property: "fget", functools.cached_property: "func"}
_STDLIB = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib"))


def fingerprint(value: Any) -> str:
    """Return a checksum of a value.

    Functions count by their code with its constants, their defaults, closures and attributes, and the globals that the
    code names, which are followed in turn. Methods and callables also count by the object they belong to, and objects
    by class and attributes. Code of installed packages counts by name and version.

    Example:
        >>> half, third = [functools.partial(lambda x, by: x / by, by=by) for by in (2, 3)]
        >>> fingerprint([half]) == fingerprint([half]), fingerprint([half]) == fingerprint([third])
        (True, False)
    """
    return _Walk().of(value)


def module_fingerprint(module: nn.Module) -> str:
    """Return a checksum of a module's classes and plain attributes, without its tensors."""
    return _Walk().of(_Walk.parts_of_module(module))


class _Walk:
    """One walk over a value, with the checksums of the objects it has visited."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        self._open: list[int] = []
        self._kept: list[Any] = []  # so that no other object gets the identity of a visited one

    def of(self, value: Any) -> str:
        """Return the checksum of a value, or a short text for a plain one."""
        if isinstance(value, _LEAVES):
            return f"{type(value).__name__} {value!r}"
        if id(value) in self._open:
            return f"outer {len(self._open) - self._open.index(id(value))}"
        if id(value) not in self._known:
            self._open.append(id(value))
            self._kept.append(value)
            try:
                text = f"{type(value).__name__}({', '.join(map(self.of, self._parts(value)))})"
            except Exception as error:  # an object of other people's code that cannot be read
                text = f"{_name(type(value))} unreadable {type(error).__name__}"
            finally:
                self._open.pop()
            self._known[id(value)] = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
        return self._known[id(value)]

    def _parts(self, value: Any) -> Iterator[Any]:
        """Yield what makes up a value."""
        if isinstance(value, (dict, MappingProxyType)):
            for pair in value.items():
                yield from pair
        elif isinstance(value, (list, tuple, deque)):
            yield from value
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(self.of, value))
        elif isinstance(value, CodeType):
            yield from _parts_of_code(value)
        elif isinstance(value, FunctionType):
            yield from self._parts_of_function(value)
        elif isinstance(value, type):
            yield from _parts_of_class(value)
        elif isinstance(value, (ModuleType, BuiltinFunctionType, MethodType, functools.partial, *_WRAPPED)):
            yield from _parts_of_callable(value)
        elif isinstance(value, (Tensor, np.ndarray)):
            yield from _parts_of_array(value)
        elif isinstance(value, nn.Module):
            yield from self.parts_of_module(value)
            yield {**dict(value.named_parameters()), **dict(value.named_buffers())}
        else:
            yield from _parts_of_object(value)

    def _parts_of_function(self, function: FunctionType) -> Iterator[Any]:
        yield from (function.__code__, function.__defaults__, function.__kwdefaults__, vars(function))
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                yield "empty"
        if _is_installed(function.__module__):
            return
        names = sorted(_names(function.__code__))
        for name in names:
            found = function.__globals__.get(name)
            yield found
            if isinstance(found, ModuleType) and not _is_installed(found.__name__):
                yield {each: vars(found)[each] for each in names if each in vars(found)}

    @staticmethod
    def parts_of_module(module: nn.Module) -> list[Any]:
        """Return the names, classes and plain attributes of a module and of all modules in it."""
        usual = set(vars(nn.Module()))
        for base in type(module).__mro__:
            if base.__name__ == "LightningModule":
                usual |= set(vars(base())) - {"_hparams"}
        return [
            (name, type(child), {k: v for k, v in sorted(vars(child).items()) if k not in usual and _is_plain(v)})
            for name, child in module.named_modules()
        ]


def _parts_of_code(code: CodeType) -> Iterator[Any]:
    yield from (code.co_code, code.co_consts, code.co_names, code.co_flags)
    yield from (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_varnames)
    yield from (code.co_freevars, code.co_cellvars, getattr(code, "co_exceptiontable", b""))


def _names(code: CodeType) -> set[str]:
    """Return the names in a code object and in those inside it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _parts_of_class(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        yield _name(base)
        for name, value in () if _is_installed(base.__module__) else sorted(vars(base).items()):
            constant = not name.startswith("__") and _is_plain(value)
            if constant or isinstance(value, (FunctionType, *_WRAPPED)):
                yield from (name, value)


def _parts_of_callable(value: Any) -> Iterator[Any]:
    if isinstance(value, ModuleType):
        yield from (value.__name__, _version(value.__name__))
    elif isinstance(value, BuiltinFunctionType):
        owner = value.__self__
        yield from (value.__module__, value.__qualname__, None if isinstance(owner, ModuleType) else owner)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    else:
        yield next(getattr(value, inner) for kind, inner in _WRAPPED.items() if isinstance(value, kind))


def _parts_of_array(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield "lazy" if nn.parameter.is_lazy(value) else digest([value.detach().to_dense()])
    else:
        yield from (str(value.dtype), value.shape)
        yield value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()


def _parts_of_object(value: Any) -> Iterator[Any]:
    """Yield the class and the attributes; of an installed class only fields, or a text that holds no address."""
    yield type(value)
    if is_dataclass(value):
        yield {field.name: getattr(value, field.name, None) for field in fields(value)}
    elif not _is_installed(type(value).__module__) or isinstance(value, (SimpleNamespace, Namespace)):
        slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
        yield {name: getattr(value, name) for name in slots if hasattr(value, name)}
        yield dict(sorted(getattr(value, "__dict__", {}).items()))
    elif value is not os.environ and not re.search(r" at 0x[0-9a-f]+", repr(value)):
        yield repr(value)
    if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # functools.lru_cache, for example
        yield wrapped


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _is_plain(value: Any) -> bool:
    """True for values and functions, and for containers of nothing else."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_LEAVES, FunctionType, functools.partial))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__} {_version(cls.__module__)}"


def _is_installed(module: str | None) -> bool:
    """True for a module of the standard library, of an installed package, or of this library."""
    root = (module or "").partition(".")[0]
    if root == "__main__":
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if root in (__name__.partition(".")[0], *sys.stdlib_module_names) or file is None:
        return True
    return bool({"site-packages", "dist-packages"}.intersection(Path(file).parts)) or str(file).startswith(_STDLIB)


def _version(module: str | None) -> str:
    root = sys.modules.get((module or "").partition(".")[0])
    return str(getattr(root, "__version__", "")) if _is_installed(module) else ""
