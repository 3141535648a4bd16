"""The errors and warnings that a user of the library can meet, each of its own class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar


class PTQError(Exception):
    """Base class of every error the library raises on purpose."""


class QConfigError(PTQError, ValueError):
    """A quantization configuration that cannot be read or does not fit the module."""


class SurgeryError(PTQError, RuntimeError):
    """A module that cannot be prepared: nothing to quantize, or quantized already."""


class CalibrationError(PTQError, RuntimeError):
    """A calibration pass that cannot go on: no data, NaN in a batch, a step that trains."""


class SensitivityError(PTQError, RuntimeError):
    """A sensitivity that cannot be measured: no loss, NaN in it, an output that is no tensor."""


class StatisticsError(PTQError, RuntimeError):
    """Statistics that cannot be tuned: too few samples, or a batch of which nothing can be held out."""


class AllocationError(PTQError, ValueError):
    """A bit allocation that has no solution, or costs and candidates that do not fit together."""


class CallbackError(PTQError, RuntimeError):
    """A Trainer or an order of callbacks under which the PTQ run cannot work."""


class RankError(PTQError, RuntimeError):
    """Another process of the run failed or is gone, or the processes have come apart."""


class PackedFileError(PTQError, ValueError):
    """A packed file that is damaged, of another model, or of a newer format."""


class PTQWarning(UserWarning):
    """Base class of every warning of the library; the report lists them all.

    Args:
        message: The warning.
        details: For each part of the model that it names, why.

    Attributes:
        remedy: What can be done about it.
        of_rank: Whether it may be about what one rank alone has; others are alike on all ranks.
    """

    remedy: ClassVar[str] = ""
    of_rank: ClassVar[bool] = False

    def __init__(self, message: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


class UnreachedLayerWarning(PTQWarning):
    """A layer that the calibration forward never called: it stays float."""

    remedy = (
        "Choose a calibration forward that runs it (step='predict', or a function), or exclude it by name if it is not"
        " to be shipped."
    )


class UnfoldedBatchNormWarning(PTQWarning):
    """A batch norm that could not be folded: it stays a float layer of its own."""

    remedy = (
        "Nothing is wrong; it costs a float operation. To fold it, have it directly follow the one layer it normalises."
    )


class FunctionalOpWarning(PTQWarning):
    """A product computed outside any quantized layer (``F.linear``, attention): it stays float."""

    remedy = "Put the product into a layer of its own (nn.Linear, nn.Conv2d) if it is to be quantized."


class UnsupportedLayerWarning(PTQWarning):
    """A layer of a quantizable type that cannot be swapped (lazy or re-parametrized): it stays float."""

    remedy = "Run a lazy module once, and remove parametrizations (weight norm, for example), before the PTQ run."


class TiedWeightWarning(PTQWarning):
    """A weight shared by several layers: it is quantized, but not tuned, so that the tie holds."""

    remedy = "Nothing is wrong. To have it tuned, give each layer a weight of its own."


class FewSamplesWarning(PTQWarning):
    """A calibration loader that ended before ``num_samples`` were seen."""

    remedy = "Give the loader more samples, or lower num_samples."


class ProgressWarning(PTQWarning):
    """Saved progress that cannot be used: damaged, or of another run."""

    remedy = "Delete the folder, or point resume_dir to another."
    of_rank = True


class RolledBackWarning(PTQWarning):
    """A unit that reconstruction did not improve on held-out samples: it keeps its initial quantization."""

    remedy = "Give these units more samples or smaller rates (weight_lr, scale_lr), or more bits by overrides."


class UnprovenAllocationWarning(PTQWarning):
    """A bit allocation that the solver did not prove optimal within its time limit."""

    remedy = "Raise time_limit; the gap says how much is at stake."


class ReportWarning(PTQWarning):
    """A part of the report that could not be made."""

    remedy = "For plots, pip install 'lightning-ptq[plots]'. To write the report again, call report.save(folder)."


_notes: ContextVar[tuple[tuple[list[PTQWarning], bool], ...]] = ContextVar("_notes", default=())


def warn(
    message: str, category: type[PTQWarning], stacklevel: int = 1, details: Mapping[str, str] | None = None
) -> None:
    """Issue a warning, and note it wherever :func:`noted_warnings` is open."""
    for notes, _ in _notes.get():
        notes.append(category(message, details))
    if category.of_rank or all(first for _, first in _notes.get()):
        warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextmanager
def noted_warnings(notes: list[PTQWarning], first: bool = True) -> Iterator[None]:
    """Append every warning of the library to ``notes`` inside the ``with`` block, also those that filters hide.

    Unless this is the ``first`` rank, those that all ranks have alike are noted only.
    """
    token = _notes.set((*_notes.get(), (notes, first)))
    try:
        yield
    finally:
        _notes.reset(token)
