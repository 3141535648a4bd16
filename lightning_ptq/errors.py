"""The errors and warnings of the library, each a class of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar


class PTQError(Exception):
    """Base class of all errors that the library raises on purpose."""


class QConfigError(PTQError, ValueError):
    """A quantization configuration or an argument that is invalid, or does not fit the module."""


class SurgeryError(PTQError, RuntimeError):
    """A module that cannot be prepared: it has nothing to quantize, or is quantized already."""


class CalibrationError(PTQError, RuntimeError):
    """A calibration pass that cannot continue: no data, NaN in a batch, or a step that trains."""


class UnitError(PTQError, RuntimeError):
    """A layer or block that cannot be tuned; its message says why."""


class SensitivityError(PTQError, RuntimeError):
    """A sensitivity that cannot be measured: no loss, a loss of NaN, or an output that is not a tensor."""


class StatisticsError(PTQError, RuntimeError):
    """Statistics that cannot be tuned: too few samples, or a single batch that cannot be divided."""


class AllocationError(PTQError, ValueError):
    """A bit allocation without a solution, or costs and candidates that do not fit together."""


class CallbackError(PTQError, RuntimeError):
    """A Trainer setting or an order of callbacks with which a PTQ run is not possible."""


class RankError(PTQError, RuntimeError):
    """A failure of another process of the run, or processes whose states differ."""


class PackedFileError(PTQError, ValueError):
    """A packed file that is damaged, belongs to another model, or has a newer format."""


class CheckpointError(PTQError, RuntimeError):
    """A checkpoint that is damaged, of a float module, or of a module of another architecture."""


class ExportError(PTQError, RuntimeError):
    """A module that cannot be exported: its forward cannot be traced, or an operator has no counterpart."""


class ParityError(ExportError):
    """An exported file that does not compute what the quantized module computes."""


class PTQWarning(UserWarning):
    """Base class of all warnings of the library; the report lists them.

    Args:
        message: Text of the warning.
        details: Reason for each module that the warning names.

    Attributes:
        remedy: What the user can do about it.
        may_differ_by_rank: True if ranks may differ; otherwise all ranks raise the same warning.
    """

    remedy: ClassVar[str] = ""
    may_differ_by_rank: ClassVar[bool] = False

    def __init__(self, message: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


class UnreachedLayerWarning(PTQWarning):
    """A layer that the calibration forward never calls: it stays float."""

    remedy = (
        "Choose a calibration forward that calls it (step='predict', or a function), or exclude it by name if it is not"
        " used in inference."
    )


class UnrepeatableForwardWarning(PTQWarning):
    """A calibration forward that computes something else when it runs on the same batch again."""

    remedy = (
        "Give CalibrationCapture a step= that depends on its batch only: without clocks, files, counters outside the"
        " module, or operators that are not deterministic."
    )


class UnfoldedBatchNormWarning(PTQWarning):
    """A batch norm that could not be folded: it stays a float layer of its own."""

    remedy = "Nothing is wrong, but it costs a float operation. A batch norm right after a single layer is folded."


class FunctionalOpWarning(PTQWarning):
    """A product computed outside all quantized layers (``F.linear``, attention): it stays float."""

    remedy = "To quantize it, compute it in a layer of its own (nn.Linear, nn.Conv2d)."


class UnsupportedLayerWarning(PTQWarning):
    """A layer of a quantizable type that cannot be swapped (a lazy one, for example): it stays float."""

    remedy = "Before the PTQ run, call a lazy module once."


class BakedWeightWarning(PTQWarning):
    """A layer with weight norm, spectral norm, pruning or another parametrization: its computed weight is quantized."""

    remedy = "Nothing is wrong. The quantized layer has a plain weight; what computed it is for training only."


class TiedWeightWarning(PTQWarning):
    """A weight that several layers share: it is quantized but not tuned, so that it stays shared."""

    remedy = "Nothing is wrong. To tune it, give each layer a weight of its own."


class FewSamplesWarning(PTQWarning):
    """A calibration loader that ended before ``num_samples`` samples."""

    remedy = "Give the loader more samples, or reduce num_samples."


class ProgressWarning(PTQWarning):
    """Saved progress that cannot be used: it is damaged, or belongs to another run."""

    remedy = "Delete the folder, or set resume_dir to another one."
    may_differ_by_rank = True


class RolledBackWarning(PTQWarning):
    """A unit whose reconstruction brought no improvement on held-out samples: its initial quantization is kept."""

    remedy = (
        "Use more samples or lower learning rates (weight_lr, scale_lr), or give these units more bits by overrides."
    )


class UntunableUnitWarning(PTQWarning):
    """A block that cannot be tuned as a whole, or a layer that cannot be tuned at all."""

    remedy = (
        "Nothing is wrong: the layers of such a block are tuned one by one, and others keep their initial quantization."
        " Choose other blocks (blocks=), or give these layers more bits by overrides."
    )


class MemoryWarning(PTQWarning):
    """A device that ran out of memory, so that the work goes on with less."""

    remedy = "Nothing is wrong with the result. A smaller batch_size or memory_limit saves the repeated work."
    may_differ_by_rank = True


class SkippedStepWarning(PTQWarning):
    """A step of statistics tuning that was left out, because its effect cannot be measured or differentiated."""

    remedy = (
        "Nothing is wrong with the quantized module. To do the step, give StatsTuning an output= that can be compared,"
        " or CalibrationCapture a step= that runs the tuned network last."
    )


class UnprovenAllocationWarning(PTQWarning):
    """A bit allocation that the solver has not proven optimal within its time limit."""

    remedy = "Raise time_limit; the gap bounds the possible improvement."


class ChangedAfterwardsWarning(PTQWarning):
    """A quantized module that another callback changed at the end of ``fit``, after it was tuned."""

    remedy = (
        "Leave out the callback that changes it, such as one that restores an average of the weights; or load"
        " quantized.ckpt."
    )


class RepeatedSamplesWarning(PTQWarning):
    """Calibration samples that several ranks were given alike."""

    remedy = (
        "Give each rank its own samples: in __iter__ of an IterableDataset let each rank start at its index and step by"
        " the number of ranks (itertools.islice), or use a map-style dataset, which Lightning distributes."
    )


class SaturatingKernelsWarning(PTQWarning):
    """An ONNX file that onnxruntime computes wrongly on this CPU, which has no VNNI instructions, by default."""

    remedy = (
        "On CPUs without VNNI instructions, load the file with onnxruntime's session option"
        " session.x64quantprecision set to '1'. Other CPUs need no option."
    )
    may_differ_by_rank = True


class ReportWarning(PTQWarning):
    """A part of the report that could not be created."""

    remedy = "For plots, run pip install 'lightning-ptq[plots]'. To write the report again, call report.save(folder)."


_notes: ContextVar[tuple[tuple[list[PTQWarning], bool], ...]] = ContextVar("_notes", default=())


def warn(
    message: str, category: type[PTQWarning], stacklevel: int = 1, details: Mapping[str, str] | None = None
) -> None:
    """Issue a warning, and append it to the lists of all enclosing :func:`noted_warnings`.

    Args:
        message: Text of the warning.
        category: Class of the warning.
        stacklevel: Number of frames above the caller to which the warning is attributed, plus 1.
        details: Reason for each module that the warning names.
    """
    for notes, _ in _notes.get():
        notes.append(category(message, details))
    if category.may_differ_by_rank or all(first for _, first in _notes.get()):
        warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextmanager
def noted_warnings(notes: list[PTQWarning], first: bool = True) -> Iterator[None]:
    """Append every warning of the library to ``notes`` inside the ``with`` block, also those that filters hide.

    Args:
        notes: List to append to.
        first: True on rank 0. Other ranks issue only warnings that may differ by rank, so that all others appear once.
    """
    token = _notes.set((*_notes.get(), (notes, first)))
    try:
        yield
    finally:
        _notes.reset(token)


def add_note(error: BaseException, note: str) -> None:
    """Append a note to an exception, once; its traceback shows the note below the message.

    Python 3.10 has no notes: there the note is appended to the message.
    """
    if hasattr(error, "add_note"):
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    elif error.args and isinstance(error.args[0], str) and note not in error.args[0]:
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
