"""Containers in a batch: lists, tuples, mappings and dataclasses. Everything else is a leaf."""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral
from operator import setitem
from typing import Any

import numpy as np
from torch.nn.utils.rnn import PackedSequence

from lightning_ptq.runtime.structure import is_dense

TEXT = (str, bytes)
SEQUENCES = (list, tuple, deque)


def map_leaves(data: Any, fn: Callable[[Any], Any], whole: Collection[int] = ()) -> Any:
    """Return new containers with ``fn(leaf)`` in place of each leaf; containers with an id in ``whole`` are leaves."""
    entries = None if id(data) in whole else children(data)
    if entries is None:
        return fn(data)
    return _rebuild(data, {key: map_leaves(child, fn, whole) for key, child in entries.items()})


def leaves(data: Any, whole: Collection[int] = ()) -> Iterator[Any]:
    """Yield all leaves in order; containers with an id in ``whole`` are leaves."""
    entries = None if id(data) in whole else children(data)
    if entries is None:
        yield data
    for child in (entries or {}).values():
        yield from leaves(child, whole)


def children(data: Any) -> dict[Any, Any] | None:
    """Return the entries of a container by key, index or field name; None for a leaf."""
    movable = hasattr(data, "to") and not isinstance(data, (dict, UserDict, *SEQUENCES))
    if isinstance(data, PackedSequence) or (movable and (isinstance(data, Mapping) or own_count(data) is not None)):
        return None  # the entries of a TensorDict, for example, depend on its own device and batch size
    if isinstance(data, Mapping):
        return dict(data.items())
    if isinstance(data, SEQUENCES):
        return dict(enumerate(data))
    if is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in fields(data) if hasattr(data, f.name)}
    return None


def _rebuild(data: Any, entries: dict[Any, Any]) -> Any:
    """Return a container like ``data`` with other entries."""
    if isinstance(data, tuple):
        values = tuple(entries.values())
        return data._make(values) if hasattr(data, "_make") else type(data)(values)
    if isinstance(data, Mapping) and not isinstance(data, MutableMapping):
        return type(data)(entries)  # type: ignore[call-arg]  # Mapping itself takes no arguments, but classes of it do
    new = copy.copy(data)
    if isinstance(new, (list, deque)):
        new.clear()
        new.extend(entries.values())
        return new
    put = setitem if isinstance(new, MutableMapping) else object.__setattr__  # the latter sets frozen fields too
    for key, value in entries.items():
        put(new, key, value)
    return new


def parts(data: Any) -> Iterator[Any]:
    """Yield what may be a column; lists are not searched, except for the outermost one."""
    for child in (children(data) or {}).values():
        yield from parts(child) if is_record(child) else (child,)


def own_count(data: Any) -> int | None:
    """Return the number of samples that an object itself states, if any."""
    for value in (getattr(data, "batch_size", None), getattr(data, "num_graphs", None)):
        first = next(iter(value), None) if isinstance(value, Sequence) else value
        if isinstance(first, Integral):
            return int(first)
    # A single graph: its length, if it has one, is that of its attributes.
    return 1 if isinstance(getattr(data, "num_nodes", None), Integral) else None


def is_record(data: Any) -> bool:
    """True for a mapping, a dataclass and a named tuple."""
    return children(data) is not None and (not isinstance(data, SEQUENCES) or hasattr(data, "_fields"))


def is_list(data: Any) -> bool:
    """True for a list, and for a tuple without names."""
    return isinstance(data, (list, tuple)) and not hasattr(data, "_fields")


def is_array(data: Any) -> bool:
    """True for a dense tensor or an array of NumPy."""
    return is_dense(data) or isinstance(data, np.ndarray)


def has_rows(data: Any) -> bool:
    """True for a dense tensor or an array of NumPy that has dimensions."""
    return is_array(data) and data.ndim > 0
