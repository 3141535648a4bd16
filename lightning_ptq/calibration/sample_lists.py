"""Which lists in a batch have one entry per sample, judged by their content."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_ptq.calibration.containers import TEXT, children, has_rows, is_array, is_record, own_count

_CHANNELS = (1, 3, 4)
_SIDE = 8  # pixels; smaller tensors of one shape are read as the columns of a batch, not as images
_SOUND = 4000  # samples of a wave in one or two channels; shorter rows are read as features


class SampleList(list[Any]):
    """A list with one entry per sample. The class marks this, because a slice of such a list may not imply it."""


def are_samples(entries: Any) -> bool:
    """True for texts, images, signals and objects of one class."""
    texts = len(entries) > 0 and all(isinstance(entry, TEXT) for entry in entries)
    return texts or isinstance(entries, SampleList) or are_shapes(entries) or _are_objects(entries)


def are_shapes(entries: Sequence[Any]) -> bool:
    """True for images or signals, as their shapes tell."""
    if not entries or not all(map(has_rows, entries)):
        return False
    kinds = {(type(entry), entry.dtype, entry.ndim) for entry in entries}
    if len(kinds) > 1:
        return False
    shapes = [tuple(entry.shape) for entry in entries]
    dimensions, dtype = len(shapes[0]), entries[0].dtype
    if dimensions == 3:
        return _are_images(shapes, dtype) or (isinstance(entries[0], np.ndarray) and _are_pictures(shapes, dtype))
    return dimensions < 3 and len(entries) > 1 and _are_signals(shapes, dtype)


def _are_images(shapes: list[tuple[int, ...]], dtype: Any) -> bool:
    """True for images of (channels, height, width)."""
    channels = {shape[0] for shape in shapes}
    if len(channels) > 1 or not channels.issubset(_CHANNELS) or not (_is_float(dtype) or _is_byte(dtype)):
        return False
    # Columns of sequences, (batch, time, features), have such shapes too, but are not square, and rarely of 3 samples.
    sizes = {shape[1:] for shape in shapes}
    square, side = all(height == width for height, width in sizes), min(map(min, sizes))
    large = side >= 2 * _SIDE and (len(sizes) > 1 or len(shapes) > 1)
    return channels == {3} and (large or (square and side >= _SIDE)) if len(sizes) == 1 else square or large


def _are_pictures(shapes: list[tuple[int, ...]], dtype: Any) -> bool:
    """True for images of (height, width, channels), as in arrays of NumPy."""
    channels = {shape[2] for shape in shapes}
    if len(channels) > 1 or not channels.issubset(_CHANNELS) or min(min(shape[:2]) for shape in shapes) < _SIDE:
        return False
    return _is_byte(dtype) or (_is_float(dtype) and (len(set(shapes)) > 1 or shapes[0][0] == shapes[0][1]))


def _are_signals(shapes: list[tuple[int, ...]], dtype: Any) -> bool:
    """True for signals of different lengths: (time), (time, features), or one or two channels of (channels, time)."""
    if len(set(shapes)) == 1 or not (_is_float(dtype) or dtype in (torch.int16, np.dtype("int16"))):
        return False
    # Columns of a batch have the same number of rows.
    if len({shape[0] for shape in shapes}) > 1:
        return len({shape[1:] for shape in shapes}) == 1
    return shapes[0][0] <= 2 and min(shape[1] for shape in shapes) >= _SOUND


def _is_float(dtype: Any) -> bool:
    return dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind == "f"


def _is_byte(dtype: Any) -> bool:
    return dtype in (torch.uint8, np.dtype("uint8"))


def _are_objects(entries: Sequence[Any]) -> bool:
    """True for objects of one class that are neither values, arrays nor batches themselves, such as graphs."""
    if not entries or len({type(entry) for entry in entries}) > 1:
        return False
    return all(map(_is_object, entries))


def _is_object(entry: Any) -> bool:
    if entry is None or isinstance(entry, (Tensor, PackedSequence, Number, np.generic, type, *TEXT)) or callable(entry):
        return False
    if is_array(entry) or children(entry) is not None:
        return False
    if own_count(entry) is not None:  # a single graph has no number of graphs
        return not hasattr(entry, "batch_size") and not hasattr(entry, "num_graphs")
    return hasattr(entry, "to") or not isinstance(entry, Sized)


def are_records(entries: Sequence[Any], also: type | tuple[type, ...] = ()) -> bool:
    """True if all entries are records, and a field holds samples or differs in its number of rows."""
    fit = [is_record(entry) or (isinstance(entry, also) and not are_samples(entry)) for entry in entries]
    if not entries or not all(fit):
        return False
    records = [children(entry) or {} for entry in entries]
    shared = [key for key in records[0] if all(key in record for record in records)]
    columns = [[record[key] for record in records] for key in shared]
    unequal = any(len(set(map(len, filter(has_rows, column)))) > 1 for column in columns)
    return unequal or any(map(are_samples, columns))
