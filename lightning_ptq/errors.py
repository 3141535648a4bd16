"""The errors and warnings that a user of the library can meet, each of its own class."""


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
    """Base class of every warning of the library; the report lists them all."""


class UnreachedLayerWarning(PTQWarning):
    """A layer that the calibration forward never called: it stays float."""


class UnfoldedBatchNormWarning(PTQWarning):
    """A batch norm that could not be folded: it stays a float layer of its own."""


class FunctionalOpWarning(PTQWarning):
    """A product computed outside any quantized layer (``F.linear``, attention): it stays float."""


class UnsupportedLayerWarning(PTQWarning):
    """A layer of a quantizable type that cannot be swapped (lazy or re-parametrized): it stays float."""


class TiedWeightWarning(PTQWarning):
    """A weight shared by several layers: it is quantized, but not tuned, so that the tie holds."""


class FewSamplesWarning(PTQWarning):
    """A calibration loader that ended before ``num_samples`` were seen."""


class ProgressWarning(PTQWarning):
    """Saved progress that cannot be used: damaged, or of another run."""


class RolledBackWarning(PTQWarning):
    """A unit that reconstruction did not improve on held-out samples: it keeps its initial quantization."""


class UnprovenAllocationWarning(PTQWarning):
    """A bit allocation that the solver did not prove optimal within its time limit."""
