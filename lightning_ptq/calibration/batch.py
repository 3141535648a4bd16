"""One batch of a user's data loader, of any structure: count, slice, move and copy its samples."""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence, Sized
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cached_property
from numbers import Integral, Number
from operator import setitem
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_ptq.errors import CalibrationError

_TEXT = (str, bytes)
_SEQUENCES = (list, tuple, deque)
_CHANNELS = (1, 3)
_SIDE = 8  # pixels; smaller tensors of one shape are read as the columns of a batch, not as images


class SampleList(list[Any]):
    """A list with one entry per sample. The class marks this, because a slice of such a list may not imply it."""


class Batch:
    """A batch of any structure.

    Containers are lists, tuples, mappings and dataclasses. Everything else is a leaf, like a ``TensorDict`` or a graph.

    A column is a tensor with one row per sample, or a list with one entry per sample. A list has one entry per sample
    if it holds strings, images, or records (dictionaries, for example) that cannot be collated columns. Tensors are
    images if all have three dimensions, the same 1 or 3 channels, the same floating or uint8 type, and different
    sizes: all square, or of at least 16 x 16 pixels. Images of one size must be square, of at least 8 x 8 pixels and
    3 channels. Any other list is a list of columns, as a ``DataLoader`` makes from samples that are tuples.

    Args:
        data: The batch as the data loader returned it. It is never changed.

    Example:
        >>> batch = Batch([torch.zeros(4, 3), torch.zeros(4)])
        >>> batch.samples, [tuple(column.shape) for column in batch.rows(slice(0, 2))]
        (4, [(2, 3), (2,)])
        >>> Batch([torch.zeros(3, 32, 32), torch.zeros(3, 40, 40)]).samples
        2
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def samples(self) -> int:
        """Number of samples, from the first part of the batch that implies one.

        An object's own ``batch_size`` or ``num_graphs`` takes precedence over its length. Sparse tensors count only if
        nothing else implies a number.

        Raises:
            CalibrationError: If nothing implies a number.
        """
        if self._count is None:
            raise CalibrationError(
                f"a calibration batch of type {type(self.data).__name__} holds no tensor or list with samples to count."
                " Return tensors (bare, or in tuples, lists, dicts or dataclasses) from the loader."
            )
        return self._count

    @property
    def is_sample_list(self) -> bool:
        """True if the batch is nothing but a list with one entry per sample."""
        return id(self.data) in self._lists

    @property
    def is_divisible(self) -> bool:
        """True if the batch consists of columns of equal length, so that some of its samples can be taken."""
        columns = self.columns()
        divisible = all(_has_rows(column) or id(column) in self._list_columns for column in columns)
        return divisible and {len(column) for column in columns} == {self._count}

    def columns(self) -> list[Any]:
        """Return the columns of a divisible batch."""
        return list(_leaves(self.data, self._list_columns))

    def with_columns(self, columns: Sequence[Any]) -> Any:
        """Return data of the same structure with other columns."""
        remaining = (column if isinstance(column, Tensor) else SampleList(column) for column in columns)
        return _map(self.data, lambda _: next(remaining), self._list_columns)

    def rows(self, rows: slice) -> Any:
        """Return the data of some samples.

        Raises:
            CalibrationError: If the batch is not divisible.
        """
        if not self.is_divisible:
            kind = type(self.data).__name__
            raise CalibrationError(f"cannot divide a {kind}. Return only tensors with one row per sample in a batch.")
        return self.with_columns([column[rows] for column in self.columns()])

    def to(self, device: torch.device) -> Any:
        """Return the data with everything that has a ``to`` method on ``device``."""
        return _map(self.data, lambda leaf: _moved(leaf, device))

    def copy(self) -> Any:
        """Return the data in new containers, with tensors that own their storage."""
        return _map(self.data, lambda leaf: leaf.clone() if _is_dense(leaf) else leaf)

    def leaves(self) -> Iterator[Any]:
        """Yield all tensors and plain values in a stable order; objects yield what pickle would store of them."""
        visited: dict[int, Any] = {}
        for leaf in _leaves(self.data):
            yield from _stored(leaf, visited)

    @cached_property
    def _count(self) -> int | None:
        count = _count(self.data, self._lists)
        return _count(self.data, self._lists, sparse=True) if count is None else count

    @cached_property
    def _lists(self) -> set[int]:
        """Identities of the lists and tuples whose content implies one entry per sample."""
        if isinstance(self.data, list) and _are_samples(self.data):
            return {id(self.data)}
        parts = list(_parts(self.data))
        lists = [part for part in parts if _is_list(part)]
        images = [part for part in lists if _are_images(part)]
        # Pairs transposed to (images, targets): the content of the images implies it, and all lengths agree.
        lengths = {len(part) if _is_list(part) or _has_rows(part) else None for part in parts}
        if images and lengths == {len(images[0])}:
            return {id(part) for part in lists}
        if isinstance(self.data, list) and _are_records(self.data, also=tuple):
            return {id(self.data)}
        # Without that agreement, a tuple of tensors is read as several inputs, even if they look like images.
        lists = [part for part in lists if isinstance(part, list) or not _are_images(part)]
        return {id(part) for part in lists if _are_samples(part) or _are_records(part)}

    @cached_property
    def _list_columns(self) -> set[int]:
        """Identities of the lists that are columns: also records, one per sample, that are not collated."""
        lists = [part for part in _parts(self.data) if _is_list(part) and len(part) == self._count]
        records = [part for part in lists if all(map(_is_record, part))]
        collated = {id(p) for p in records if all(_has_rows(x) and len(x) == self._count for x in _leaves(p))}
        return self._lists | ({id(part) for part in records} - collated)


def _map(data: Any, fn: Callable[[Any], Any], whole: Collection[int] = ()) -> Any:
    """Return new containers with ``fn(leaf)`` in place of each leaf; containers with an id in ``whole`` are leaves."""
    children = None if id(data) in whole else _children(data)
    if children is None:
        return fn(data)
    return _rebuild(data, {key: _map(child, fn, whole) for key, child in children.items()})


def _leaves(data: Any, whole: Collection[int] = ()) -> Iterator[Any]:
    children = None if id(data) in whole else _children(data)
    if children is None:
        yield data
    for child in (children or {}).values():
        yield from _leaves(child, whole)


def _children(data: Any) -> dict[Any, Any] | None:
    """Return the entries of a container by key, index or field name; None for a leaf."""
    movable = hasattr(data, "to") and not isinstance(data, (dict, UserDict, *_SEQUENCES))
    if isinstance(data, PackedSequence) or (movable and (isinstance(data, Mapping) or _own_count(data) is not None)):
        return None  # the entries of a TensorDict, for example, depend on its own device and batch size
    if isinstance(data, Mapping):
        return dict(data.items())
    if isinstance(data, _SEQUENCES):
        return dict(enumerate(data))
    if is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in fields(data) if hasattr(data, f.name)}
    return None


def _rebuild(data: Any, children: dict[Any, Any]) -> Any:
    """Return a container like ``data`` with other entries."""
    if isinstance(data, tuple):
        values = tuple(children.values())
        return data._make(values) if hasattr(data, "_make") else type(data)(values)
    if isinstance(data, Mapping) and not isinstance(data, MutableMapping):
        return type(data)(children)  # type: ignore[call-arg]
    new = copy.copy(data)
    if isinstance(new, (list, deque)):
        new.clear()
        new.extend(children.values())
        return new
    put = setitem if isinstance(new, MutableMapping) else object.__setattr__  # the latter sets frozen fields too
    for key, value in children.items():
        put(new, key, value)
    return new


def _parts(data: Any) -> Iterator[Any]:
    """Yield what may be a column; lists are not searched, except for the outermost one."""
    for child in (_children(data) or {}).values():
        yield from _parts(child) if _is_record(child) else (child,)


def _count(data: Any, lists: set[int], sparse: bool = False) -> int | None:
    """Return the number of samples that ``data`` implies, if any."""
    if isinstance(data, Tensor):
        return data.size(0) if data.dim() and (sparse or _is_dense(data)) else None
    if isinstance(data, PackedSequence):
        return int(data.batch_sizes[0])
    if id(data) in lists:
        return len(data)
    count = _own_count(data)
    if count is None:
        children = dict(data.items()) if isinstance(data, Mapping) else _children(data) or {}
        counts = (_count(child, lists, sparse) for child in children.values())
        count = next((number for number in counts if number is not None), None)
    if count is None and isinstance(data, Sized) and not isinstance(data, (*_TEXT, Mapping, *_SEQUENCES)):
        with suppress(TypeError):  # an array without dimensions
            count = len(data)
    return count


def _own_count(data: Any) -> int | None:
    for value in (getattr(data, "batch_size", None), getattr(data, "num_graphs", None)):
        first = next(iter(value), None) if isinstance(value, Sequence) else value
        if isinstance(first, Integral):
            return int(first)
    return None


def _are_samples(entries: Any) -> bool:
    texts = len(entries) > 0 and all(isinstance(entry, _TEXT) for entry in entries)
    return texts or isinstance(entries, SampleList) or _are_images(entries)


def _are_images(entries: Sequence[Any]) -> bool:
    if not entries or not all(_has_rows(entry) and entry.dim() == 3 for entry in entries):
        return False
    kinds = {(entry.dtype, len(entry)) for entry in entries}
    dtype, channels = kinds.pop()
    if kinds or channels not in _CHANNELS or not (dtype.is_floating_point or dtype == torch.uint8):
        return False
    # Columns of sequences, (batch, time, features), have such shapes too, but are not square.
    sizes = {tuple(entry.shape[1:]) for entry in entries}
    square, side = all(height == width for height, width in sizes), min(map(min, sizes))
    return square and side >= _SIDE and channels == 3 if len(sizes) == 1 else square or side >= 2 * _SIDE


def _are_records(entries: Sequence[Any], also: type | tuple[type, ...] = ()) -> bool:
    """True if all entries are records, and a field holds samples or differs in its number of rows."""
    fit = [_is_record(entry) or (isinstance(entry, also) and not _are_samples(entry)) for entry in entries]
    if not entries or not all(fit):
        return False
    records = [_children(entry) or {} for entry in entries]
    shared = [key for key in records[0] if all(key in record for record in records)]
    columns = [[record[key] for record in records] for key in shared]
    unequal = any(len(set(map(len, filter(_has_rows, column)))) > 1 for column in columns)
    return unequal or any(map(_are_samples, columns))


def _is_record(data: Any) -> bool:
    return _children(data) is not None and (not isinstance(data, _SEQUENCES) or hasattr(data, "_fields"))


def _is_list(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and not hasattr(data, "_fields")


def _is_dense(data: Any) -> bool:
    return isinstance(data, Tensor) and data.layout is torch.strided and not data.is_nested


def _has_rows(data: Any) -> bool:
    return _is_dense(data) and data.dim() > 0


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor) or not hasattr(leaf, "to"):
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf
    new = copy.copy(leaf)  # some objects move in place: themselves, or the entries of a dictionary they hold
    attributes = getattr(new, "__dict__", {})
    attributes.update({k: _map(v, lambda entry: entry) for k, v in attributes.items() if type(v) in (dict, list)})
    moved = new.to(device)
    return new if moved is None else moved


def _stored(leaf: Any, visited: dict[int, Any]) -> Iterator[Any]:
    """Yield what pickle would store of a leaf, each object once; the text of an object may contain an address."""
    if _is_dense(leaf) or leaf is None or isinstance(leaf, (*_TEXT, Number)):
        yield leaf
    elif id(leaf) not in visited:
        visited[id(leaf)] = leaf  # keeps the object, so that no other one gets the same id
        state: Any = ()
        with suppress(TypeError):  # a function or a class
            state = leaf.__reduce_ex__(2)
        yield getattr(leaf, "__qualname__", type(leaf).__qualname__)
        for item in (state,) if isinstance(state, str) else state[1:]:
            for part in _leaves(list(item) if isinstance(item, Iterator) else item):
                yield from _stored(part, visited)
