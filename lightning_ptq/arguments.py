"""Checks of arguments: each returns the value in Python's own type, or raises an error of the library."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from lightning_ptq.errors import PTQError, QConfigError, SurgeryError

GREATEST_SEED = 2**63 - 1


def is_number(value: Any) -> bool:
    """Return True for a real number of Python or NumPy; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(
    name: str,
    value: Any,
    least: int = 1,
    most: int | None = None,
    none: bool = False,
    error: type[PTQError] = QConfigError,
) -> int:
    """Return a whole number as an ``int``.

    Args:
        name: Name of the argument.
        value: Its value.
        least: Least value allowed.
        most: Greatest value allowed; None for no limit.
        none: True if the caller accepts None, which the message then says.
        error: Class of the error.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        found = int(value)
        if least <= found and (most is None or found <= most):
            return found
    example = _read(value)
    if not is_number(value) and not isinstance(value, bool):
        fits = example.is_integer() and least <= example and (most is None or example <= most)
        shown = int(example) if fits else max(least, 1)
        optional = " or None" if none else ""
        within = f" from {least} to {most}" if most is not None and most < GREATEST_SEED else ""
        raise error(f"{name} must be a whole number{within}{optional}, got {value!r}. Write for example {shown}.")
    domain = f"{least} or more" if most is None else f"a whole number from {least} to {most}"
    domain += ", or None" if none else ""
    raise error(f"{name} must be {domain}, got {value!r}. Write a whole number, such as {max(least, 1)}.")


def _read(value: Any) -> float:
    """Return the number that a text such as ``"1024"`` or ``"20%"`` stands for; NaN if there is none."""
    if not isinstance(value, str):
        return math.nan
    try:
        percent = value.strip().endswith("%")
        return float(value.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return math.nan


def example_for(value: Any, allowed: tuple[float, float], default: str) -> str:
    """Return the number that a text stands for, if it is allowed, as an example of what to write instead."""
    meant = _read(value)
    return f"{meant:g}" if allowed[0] <= meant < allowed[1] else default


def seed(value: Any) -> int:
    """Return a seed as an ``int``."""
    return whole("seed", value, 0, GREATEST_SEED)


def number(
    name: str,
    value: Any,
    domain: str,
    allowed: tuple[float, float] = (0.0, math.inf),
    example: str = "0.01",
    error: type[PTQError] = QConfigError,
) -> float:
    """Return a number; it keeps its value, and its type where that is Python's own.

    Args:
        name: Name of the argument.
        value: Its value.
        domain: What it must be, in words.
        allowed: Half-open interval of the values allowed; the right end is excluded.
        example: A value to write instead.
        error: Class of the error.
    """
    if is_number(value) and allowed[0] <= value < allowed[1]:
        return value if type(value) in (int, float) else float(value)
    raise error(f"{name} must {domain}, got {value!r}. Write for example {example_for(value, allowed, example)}.")


def check_is_module(value: Any) -> None:
    """Raise :class:`SurgeryError` unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise SurgeryError(f"module must be an nn.Module, got a {type(value).__name__}. Pass the model itself.")


def one_of(name: str, value: Any, options: Collection[Any], error: type[PTQError] = QConfigError) -> Any:
    """Return a value that is one of several; an unhashable one is none of them."""
    if any(value is option or (isinstance(value, str) and value == option) for option in options):
        return value
    listed = " or ".join(map(repr, options)) if len(options) == 2 else f"one of {list(options)}"
    raise error(f"{name} must be {listed}, got {value!r}.")


def flag(name: str, value: Any) -> bool:
    """Return a truth value, also NumPy's, as a ``bool``."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise QConfigError(f"{name} must be True or False, got {value!r}. Write for example {name}=True.")


def folder(name: str, value: Any) -> Any:
    """Return the name of a folder, or None."""
    if value is None or isinstance(value, (str, os.PathLike)):
        return value
    raise QConfigError(f"{name} must be the name of a folder, or None, got {value!r}.")


def texts(name: str, value: Any, example: str = "head", error: type[PTQError] = QConfigError) -> list[str]:
    """Return a list of texts, such as patterns or bit widths; a single text is refused."""
    if isinstance(value, str):
        raise error(f"{name} must be a list, got the text {value!r}. Write [{value!r}].")
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise error(f"{name} must be a list of texts, got {value!r}. Write for example [{example!r}].")
    found = list(value)
    if wrong := [item for item in found if not isinstance(item, str)]:
        raise error(f"{name} must hold texts only, got {wrong[0]!r} in it. Write for example [{example!r}].")
    return found


def text_table(name: str, value: Any, example: str, error: type[PTQError] = QConfigError) -> dict[str, str]:
    """Return a dictionary of texts by texts, such as bit widths by pattern."""
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise error(f"{name} must be a dictionary of texts, got {value!r}. Write for example {example}.")
    return dict(value)


def keywords(
    name: str,
    value: Any,
    function: Callable[..., Any],
    taken: Collection[str] = (),
    error: type[PTQError] = QConfigError,
) -> dict[str, Any]:
    """Return a dictionary of further arguments of a function; None is an empty one.

    Args:
        name: Name of the argument that holds them.
        value: Its value.
        function: The function or class that gets them.
        taken: Names of the arguments that the caller gives itself.
        error: Class of the error.
    """
    if value is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    options = [p.name for p in parameters if p.name not in taken and p.kind is not p.VAR_KEYWORD]
    further = any(p.kind is p.VAR_KEYWORD for p in parameters)  # the function checks these itself
    if not isinstance(value, Mapping):
        raise error(f"{name} must be a dictionary of arguments, got {value!r}. Its keys can be {options}.")
    if unknown := [key for key in value if key in taken or not (further or key in options)]:
        raise error(
            f"{name} has {', '.join(map(repr, unknown))}, which {function.__name__} does not take here. Its keys can be"
            f" {options}."
        )
    return dict(value)
