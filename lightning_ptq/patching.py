"""Attributes of one object, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
