"""Scales and zero points of weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from lightning_ptq.numerics.observers import MSE_RANGES
from lightning_ptq.numerics.quantize import EMPTY_SCALE, choose_qparams, fake_quantize
from lightning_ptq.numerics.spec import QuantSpec

_LARGE, _CHUNK = 2**18, 2**16  # values; rows are independent, and a chunk that fits into the cache is searched faster


def weight_qparams(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a weight, one each per row.

    A symmetric grid of b bits has the levels ``-2**(b - 1) ... 2**(b - 1) - 1``: one more below 0 than above, which is
    two against one at 2 bits. A negative scale moves the additional level above 0, so each row gets the sign with the
    smaller squared error. At 8 bits, where one more level does not matter, scales are always positive.

    Args:
        rows: The weight as (scales, values per scale).
        spec: The grid, how its range is chosen, and whether scales may be negative.

    Returns:
        Scale and zero point, each of shape (scales,).

    Example:
        >>> weight_qparams(torch.tensor([[-2.0, 0.0, 1.0], [2.0, 0.0, -1.0]]), QuantSpec(2))[0]
        tensor([ 1., -1.])
    """
    if rows.numel() > _LARGE and len(rows) > 1:  # such as a table of embeddings
        size = max(16, _CHUNK // rows.shape[1])
        scales, zero_points = zip(*(_chosen(part, spec) for part in rows.split(size)), strict=True)
        return torch.cat(scales), torch.cat(zero_points)
    return _chosen(rows, spec)


def _chosen(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    rows = rows.detach().float()
    scale, zero_point = _unsigned_qparams(rows, spec)
    # Any scale fits a row of zeros; this one is not lost in a module of half precision.
    scale = scale.masked_fill((rows == 0).all(1), EMPTY_SCALE)
    if not (spec.symmetric and spec.signed_scale and spec.bits < 8):
        return scale, zero_point
    mirrored, _ = _unsigned_qparams(-rows, spec)
    better = _row_errors(-rows, mirrored, zero_point, spec) < _row_errors(rows, scale, zero_point, spec)
    return torch.where(better, -mirrored, scale), zero_point


def _row_errors(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the squared quantization error of each row."""
    grid = fake_quantize(rows, scale[:, None], zero_point[:, None], spec.quant_min, spec.quant_max)
    return (grid - rows).square_().sum(1)


def _unsigned_qparams(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return positive scales, and zero points, of the rows."""
    if spec.observer == "percentile":
        tail = (100 - spec.percentile) / 100
        return choose_qparams(rows.quantile(tail, dim=1), rows.quantile(1 - tail, dim=1), spec)
    if spec.observer == "minmax":
        return choose_qparams(*rows.aminmax(dim=1), spec)
    low, high = rows.aminmax(dim=1)
    best = choose_qparams(low, high, spec)  # the full range is a candidate too
    best_error = torch.full_like(low, float("inf"))
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    shrinks = [*torch.linspace(0.02, 0.18, 17).tolist(), *torch.linspace(0.2, 1.2, MSE_RANGES).tolist()]
    ranges = ((low * shrink, high * shrink) for shrink in shrinks)
    for scale, zero_point in chain([best], (choose_qparams(*ends, spec) for ends in ranges)):
        error = _row_errors(rows, scale, zero_point, spec)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    return best
