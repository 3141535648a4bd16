"""One batch of a user's data loader, of any structure: count, slice, move and copy its samples."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from functools import cached_property
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_ptq.calibration.containers import (
    SEQUENCES,
    TEXT,
    children,
    has_rows,
    is_list,
    is_record,
    leaves,
    map_leaves,
    own_count,
    parts,
)
from lightning_ptq.calibration.sample_lists import SampleList, are_records, are_samples, are_shapes
from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.ranks import digest
from lightning_ptq.runtime.structure import is_dense, map_tensors


class Batch:
    """A batch of any structure.

    Containers are lists, tuples, mappings and dataclasses. Everything else is a leaf, like a ``TensorDict`` or a graph.

    A column is a tensor or array with one row per sample, or a list with one entry per sample. A list has one entry per
    sample if it holds strings, images, signals, objects of one class that are no batches themselves (such as graphs or
    PIL images), or records (dictionaries, for example) that cannot be collated columns.

    - Tensors are images if all have three dimensions, the same 1, 3 or 4 channels, the same floating or uint8 type, and
      different sizes: all square, or of at least 16 x 16 pixels. Images of one size must have 3 channels, and be square
      and of at least 8 x 8 pixels, or several of at least 16 x 16. Arrays of NumPy are also images with the channels
      last, of at least 8 x 8 pixels.
    - Tensors are signals if all have the same floating or int16 type, and different lengths in the first of one or two
      dimensions, or 1 or 2 channels in the first and at least 4000 values in the second.

    Any other list is a list of columns, as a ``DataLoader`` makes from samples that are tuples.

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

        An object's own ``batch_size`` or ``num_graphs`` takes precedence over its length, and this over its attributes.
        Sparse tensors count only if nothing else implies a number.

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
        divisible = all(has_rows(column) or id(column) in self._list_columns for column in columns)
        return divisible and {len(column) for column in columns} == {self._count}

    def columns(self) -> list[Any]:
        """Return the columns of a divisible batch."""
        return list(leaves(self.data, self._list_columns))

    def with_columns(self, columns: Sequence[Any]) -> Any:
        """Return data of the same structure with other columns."""
        remaining = (column if has_rows(column) else SampleList(column) for column in columns)
        return map_leaves(self.data, lambda _: next(remaining), self._list_columns)

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
        return map_leaves(self.data, lambda leaf: _moved(leaf, device))

    def copy(self) -> Any:
        """Return the data in new containers, with tensors that own their storage."""
        return map_leaves(self.data, lambda leaf: map_tensors(leaf, torch.clone))

    def digest(self) -> str:
        """Return a checksum of :meth:`leaves`."""
        checksum = hashlib.sha256()
        for leaf in self.leaves():
            checksum.update((digest([leaf]) if isinstance(leaf, Tensor) else repr(leaf)).encode())
        return checksum.hexdigest()

    def leaves(self) -> Iterator[Any]:
        """Yield all tensors and plain values in a stable order; objects yield what pickle would store of them."""
        visited: dict[int, Any] = {}
        for leaf in leaves(self.data):
            yield from _stored(leaf, visited)

    @cached_property
    def _count(self) -> int | None:
        count = _count(self.data, self._lists)
        return _count(self.data, self._lists, sparse=True) if count is None else count

    @cached_property
    def _lists(self) -> set[int]:
        """Identities of the lists and tuples whose content implies one entry per sample."""
        if isinstance(self.data, list) and are_samples(self.data):
            return {id(self.data)}
        found = list(parts(self.data))
        lists = [part for part in found if is_list(part)]
        images = [part for part in lists if are_shapes(part)]
        # Pairs transposed to (images, targets): the content of the images implies it, and all lengths agree.
        lengths = {len(part) if is_list(part) or has_rows(part) else None for part in found}
        if images and lengths == {len(images[0])}:
            return {id(part) for part in lists}
        if isinstance(self.data, list) and are_records(self.data, also=tuple):
            return {id(self.data)}
        # Without that agreement, a tuple of tensors is read as several inputs, even if they look like images.
        lists = [part for part in lists if isinstance(part, list) or not are_shapes(part)]
        return {id(part) for part in lists if are_samples(part) or are_records(part)}

    @cached_property
    def _list_columns(self) -> set[int]:
        """Identities of the lists that are columns: also records, one per sample, that are not collated."""
        lists = [part for part in parts(self.data) if is_list(part) and len(part) == self._count]
        records = [part for part in lists if all(map(is_record, part))]
        collated = {id(p) for p in records if all(has_rows(x) and len(x) == self._count for x in leaves(p))}
        return self._lists | ({id(part) for part in records} - collated)


def _count(data: Any, lists: set[int], sparse: bool = False, inside: bool = False) -> int | None:
    """Return the number of samples that ``data`` implies, if any.

    Args:
        data: Any part of a batch.
        lists: Identities of the lists that have one entry per sample.
        sparse: Count the rows of sparse tensors too.
        inside: True for an attribute of an object: objects in it are not searched, as they may refer to each other.
    """
    if isinstance(data, Tensor):
        return data.size(0) if data.dim() and (sparse or is_dense(data)) else None
    if isinstance(data, PackedSequence):
        return int(data.batch_sizes[0])
    if id(data) in lists:
        return len(data)
    count = own_count(data)
    entries = dict(data.items()) if isinstance(data, Mapping) else children(data)
    is_container = entries is not None
    if count is None:
        count = _first_count(entries or {}, lists, sparse, inside)
    if count is None and isinstance(data, Sized) and not isinstance(data, (*TEXT, Mapping, *SEQUENCES)):
        with suppress(TypeError):  # an array without dimensions
            count = len(data)
    if count is None and not (is_container or inside or callable(data)):  # an object of the user's own
        count = _first_count(getattr(data, "__dict__", {}), lists, sparse, inside=True)
    return count


def _first_count(entries: Mapping[Any, Any], lists: set[int], sparse: bool, inside: bool) -> int | None:
    counts = (_count(entry, lists, sparse, inside) for entry in entries.values())
    return next((number for number in counts if number is not None), None)


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor) or not hasattr(leaf, "to"):
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf
    new = copy.copy(leaf)  # some objects move in place: themselves, or the entries of a dictionary they hold
    attributes = getattr(new, "__dict__", {})
    attributes.update({k: map_leaves(v, lambda entry: entry) for k, v in attributes.items() if type(v) in (dict, list)})
    moved = new.to(device)
    return new if moved is None else moved


def _stored(leaf: Any, visited: dict[int, Any]) -> Iterator[Any]:
    """Yield what pickle would store of a leaf, each object once; the text of an object may contain an address."""
    if is_dense(leaf) or leaf is None or isinstance(leaf, (*TEXT, Number)):
        yield leaf
    elif id(leaf) not in visited:
        visited[id(leaf)] = leaf  # keeps the object, so that no other one gets the same id
        state: Any = ()
        with suppress(TypeError):  # a function or a class
            state = leaf.__reduce_ex__(2)
        yield getattr(leaf, "__qualname__", type(leaf).__qualname__)
        for item in (state,) if isinstance(state, str) else state[1:]:
            for part in leaves(list(item) if isinstance(item, Iterator) else item):
                yield from _stored(part, visited)
