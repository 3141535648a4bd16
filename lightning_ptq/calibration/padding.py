"""Padding: positions of a batch that hold no data, and so take part in no range, loss or statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.errors import CalibrationError

Mask = str | Callable[[Any], Any]
"""Key of the batch, or function of the batch, that gives a mask: true or 1 where a position holds data."""

_FOUND = "attention_mask"


def check_mask(mask: Any) -> Mask | None:
    """Return a mask; raise :class:`CalibrationError` if it is neither a key nor a function."""
    if mask is None or isinstance(mask, str):
        return mask
    if callable(mask):
        return cast(Mask, mask)
    raise CalibrationError(
        f"mask must be a key of the batch or a function of the batch, got {mask!r}. Write mask='attention_mask'."
    )


def real_positions(batch: Any, mask: Mask | None) -> Tensor | None:
    """Return which positions of a batch hold data: a boolean tensor, (samples, positions, ...); None for all.

    Args:
        batch: A batch as the loader returned it.
        mask: How to find the mask. By default the ``attention_mask`` of a ``BatchEncoding``, or of a mapping with
            ``input_ids`` of the same shape, is used.

    Raises:
        CalibrationError: If the batch has no such mask, or it has no boolean or integer values by position.
    """
    if mask is None:
        found = _found(batch)
        if found is None:
            return None
    elif isinstance(mask, str):
        found = _entry(batch, mask)
    else:
        found = _computed(mask, batch)
        if found is None:
            return None
    tensor = torch.as_tensor(found) if isinstance(found, (Tensor, np.ndarray, list)) else None
    if tensor is None or tensor.dim() < 2 or tensor.is_complex():
        shape = "" if tensor is None else f" of shape {tuple(tensor.shape)}"
        raise CalibrationError(
            f"the padding mask {mask!r} gives a {type(found).__name__}{shape}. It has to be a tensor (samples,"
            " positions) that is true or 1 where a position holds data."
        )
    samples = Batch(batch).samples
    if len(tensor) != samples:
        raise CalibrationError(
            f"the padding mask {mask!r} has shape {tuple(tensor.shape)}, but the batch has {samples} samples. Its first"
            " dimension has to be that of the samples."
        )
    real = tensor.detach().cpu() != 0
    if samples and not bool(real.any()):
        raise CalibrationError(
            f"the padding mask {mask or _FOUND!r} marks all positions of a batch of {samples} samples as padding, so"
            " there is nothing to calibrate on. It has to be true or 1 where a position holds data."
        )
    return real


def check_mask_fits(mask: Mask | None, real: Tensor | None, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise :class:`CalibrationError` if a mask that was asked for has the positions of no activation.

    Args:
        mask: How the mask is found.
        real: What :func:`real_positions` returned for the batch.
        shapes: Shapes of the inputs of all operations on the batch.
    """
    if mask is None or real is None:  # a mask found without being asked for may belong to a part of the network only
        return
    found = list(dict.fromkeys(shapes))
    if found and all(where_real(torch.empty(shape, device="meta"), real.to("meta")) is None for shape in found):
        raise CalibrationError(
            f"the padding mask {mask!r} has shape {tuple(real.shape)}, which fits no activation. It has to be (samples,"
            f" positions), as in the inputs of the layers: {', '.join(map(str, found[:4]))}."
        )


def _computed(mask: Callable[[Any], Any], batch: Any) -> Any:
    """Return what the user's function makes of a batch."""
    try:
        return mask(batch)
    except Exception as error:
        raise CalibrationError(
            f"mask={mask!r} fails on a batch of type {type(batch).__name__} with {type(error).__name__}: {error}. It"
            " gets the batch as the loader returned it."
        ) from error


def _found(batch: Any) -> Any:
    """Return the attention mask of a batch of token ids; None for other batches."""
    if not isinstance(batch, Mapping) and type(batch).__name__ != "BatchEncoding":
        return None
    try:
        mask, ids = batch[_FOUND], batch["input_ids"]
    except (KeyError, TypeError, IndexError):
        return None
    alike = isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape == ids.shape and mask.dim() == 2
    return mask if alike else None


def _entry(batch: Any, key: str) -> Any:
    places = batch if isinstance(batch, (list, tuple)) else [batch]
    for place in places:
        try:
            return place[key]
        except (KeyError, TypeError, IndexError):
            if hasattr(place, key):
                return getattr(place, key)
    kinds = ", ".join(type(place).__name__ for place in places)
    keys = sorted(str(k) for place in places if isinstance(place, Mapping) for k in place)
    raise CalibrationError(
        f"mask={key!r} is no key of the calibration batch, which holds {kinds}"
        f"{f' with the keys {keys}' if keys else ''}. Write a key that is there, or a function of the batch."
    )


def where_real(tensor: Tensor, mask: Tensor | None, square: bool = False) -> Tensor | None:
    """Return which values of an activation belong to positions with data, broadcastable to it; None for all of them.

    Positions are found by the sizes of the dimensions: samples first and positions second, positions first, both in
    one, or, as in attention, the heads in between.

    Args:
        tensor: An activation of a forward on the batch.
        mask: What :func:`real_positions` returned for the batch.
        square: Whether the last two dimensions both stand for positions where both have their number, as in the scores
            of attention.
    """
    if mask is None or tensor.dim() < 2:
        return None
    shape, dims = tuple(tensor.shape), mask.dim()
    found = None
    if tensor.dim() > dims and shape[:dims] == tuple(mask.shape):
        found = _spread(mask, tensor)
    elif dims == 2 and tensor.dim() > 2 and shape[:2] == tuple(mask.T.shape):
        found = _spread(mask.T, tensor)
    elif shape[0] == mask.numel():
        found = _spread(mask.flatten(), tensor)
    elif dims == 2 and tensor.dim() > 2 and shape[0] % len(mask) == 0:
        places = [dim for dim in range(1, tensor.dim()) if shape[dim] == mask.shape[1]]
        if places:
            place = tensor.dim() - 2 if tensor.dim() - 2 in places else places[-1]
            rows = mask.repeat_interleave(shape[0] // len(mask), 0)
            view = [1] * tensor.dim()
            view[0], view[place] = rows.shape
            found = rows.view(view)
            if square and shape[-2:] == (mask.shape[1],) * 2:
                found = found & found.transpose(-2, -1)
    return None if found is None else found.to(tensor.device)


def _spread(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (tensor.dim() - mask.dim()))


def real_values(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values at positions with data, in one dimension; ``tensor`` itself if all have data."""
    real = where_real(tensor, mask)
    return tensor if real is None else tensor[real.expand_as(tensor)]
