"""How far the outputs of an exported file are from those of the module, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ptq.arguments import number
from lightning_ptq.errors import ExportError, ParityError

MIN_SNR = 30.0
"""Least signal-to-noise ratio of an output, in decibels, unless predictions agree."""

MAX_DISAGREEMENT = 0.001
"""Greatest share of predictions that may differ, where the ratio is lower than that."""

_MARGIN = 3.0  # decibels between two measurements of the same noise
_RELIEF = 15.0  # decibels; equal predictions alone say little of a network that predicts the same for all samples


@dataclass(frozen=True)
class TensorParity:
    """How far a tensor of an exported file is from that of the module.

    Attributes:
        name: Name of the output, or of the module that computes the tensor.
        snr: Ratio of the mean square of the module's values to the mean squared difference, in decibels; infinite where
            the values are equal.
        agreement: Share of samples, or of positions, whose greatest value is at the same place; None for tensors that
            are no scores of classes.
        rounding: Ratio between the module and itself with scales that are larger by 2e-7: how much of a difference
            values cause that lie in the middle between two integers. None where it was not measured.
    """

    name: str
    snr: float
    agreement: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class Parity:
    """What :func:`verify_export` found.

    Attributes:
        path: The file.
        samples: Number of samples on which it ran.
        outputs: The outputs, in order.
        tensors: Quantized tensors inside the network, in the order of execution, by the module that computes them; only
            if they were asked for.
        min_snr: Least ratio that was allowed.
        max_disagreement: Greatest share of differing predictions that was allowed.
        saturates: Whether onnxruntime's default kernels overflow on this CPU, so that others were used.
    """

    path: Path
    samples: int
    outputs: list[TensorParity]
    tensors: list[TensorParity] = field(default_factory=list)
    min_snr: float = MIN_SNR
    max_disagreement: float = MAX_DISAGREEMENT
    saturates: bool = False

    @property
    def passed(self) -> bool:
        """True if no output is beyond the tolerance."""
        return not any(self.is_beyond(row) for row in self.outputs)

    @property
    def first_difference(self) -> TensorParity | None:
        """The first tensor inside the network whose ratio is below the tolerance; None if there is none."""
        return next((row for row in self.tensors if not self._is_near(row)), None)

    def is_beyond(self, row: TensorParity) -> bool:
        """Return True if a tensor is beyond the tolerance.

        Args:
            row: The tensor.
        """
        disagreement = 1.0 if row.agreement is None else 1 - row.agreement
        agrees = disagreement <= self.max_disagreement and row.snr >= self.min_snr - _RELIEF
        return not (self._is_near(row) or agrees)

    def _is_near(self, row: TensorParity) -> bool:
        """Return True if a tensor is as near to the module's as the tolerance, or as rounding lets it be."""
        rounding = math.inf if row.rounding is None else row.rounding - _MARGIN
        return row.snr > -math.inf and row.snr >= min(self.min_snr, rounding)

    def __str__(self) -> str:
        return "; ".join(_described(row) for row in self.outputs)


def _described(row: TensorParity) -> str:
    agreement = "" if row.agreement is None else f", {100 * row.agreement:.2f} % of the predictions equal"
    return f"{row.name}: {row.snr:.1f} dB{agreement}"


Tolerance = tuple[float, float]
"""Least signal-to-noise ratio in decibels, and greatest share of predictions that may differ where it is lower."""


def tolerance_of(min_snr: Any, max_disagreement: Any) -> Tolerance:
    """Return the tolerance; raise :class:`ExportError` if a part of it is no number of its domain."""
    decibels, share = (-math.inf, math.inf), (0.0, math.nextafter(1.0, 2.0))
    return (
        number("min_snr", min_snr, "be a number of decibels", decibels, "30", ExportError),
        number("max_disagreement", max_disagreement, "be a share of the predictions", share, "0.001", ExportError),
    )


def why_not(found: Parity) -> str:
    """Return the message about a file that is beyond the tolerance."""
    first = found.first_difference
    where = ""
    if first is not None:
        where = f" The first quantized tensor that differs is computed by {first.name} ({first.snr:.1f} dB)."
    elif not found.tensors:
        where = " verify_export(..., every_tensor=True) names the first tensor that differs."
    return (
        f"{found.path} does not compute what the quantized module computes, on {found.samples} samples ({found};"
        f" allowed are {found.min_snr:g} dB or more, or at most {100 * found.max_disagreement:g} % of differing"
        f" predictions).{where}"
    )


def _ratio(pairs: list[tuple[Any, Any]]) -> float:
    """Return the signal-to-noise ratio of pairs of (reference, result), in decibels.

    Infinities, as masked scores have them, count as nothing where both have the same, and as infinite noise elsewhere.
    """
    signal = noise = 0.0
    for reference, result in pairs:
        finite = np.isfinite(reference)
        if not np.array_equal(reference[~finite], result[~finite]) or not np.isfinite(result[finite]).all():
            return -math.inf
        signal += float((reference[finite] ** 2).sum())
        noise += float(((reference[finite] - result[finite]) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def compared(name: str, pairs: list[tuple[Any, Any]], scores: bool = False) -> TensorParity:
    """Compare tensors of all batches; each pair is (reference, result)."""
    for reference, result in pairs:
        if reference.shape != result.shape:
            raise ParityError(f"{name} has the shape {result.shape} in the exported file, and {reference.shape} here.")
    if scores and pairs[0][0].dtype.kind in "iub":  # predictions already, such as the places of the greatest scores
        same = [a == b for a, b in pairs]
        share = sum(int(s.sum()) for s in same) / max(1, sum(s.size for s in same))
        return TensorParity(name, math.inf if share == 1 else -10 * math.log10(1 - share), share)
    snr = _ratio(pairs)
    if not scores or pairs[0][0].ndim < 2:
        return TensorParity(name, snr)
    dim = -1 if pairs[0][0].ndim == 3 else 1
    if pairs[0][0].shape[dim] < 2:
        return TensorParity(name, snr)
    equal = [a.argmax(dim) == b.argmax(dim) for a, b in pairs]
    return TensorParity(name, snr, sum(int(e.sum()) for e in equal) / max(1, sum(e.size for e in equal)))
