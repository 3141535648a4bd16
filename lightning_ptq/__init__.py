"""Post-training quantization for PyTorch Lightning: AdaQuant, bit allocation and statistics tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ptq.adaquant import AdaQuantResult, adaquant
from lightning_ptq.calibration import Calibration, Calibrator, calibrate
from lightning_ptq.export.packed import load_packed, save_packed
from lightning_ptq.qconfig import LayerQConfig, QConfig, QuantSpec
from lightning_ptq.reconstruct import UnitResult
from lightning_ptq.surgery import Prepared, prepare
from lightning_ptq.tuners import ReconstructionConfig

if TYPE_CHECKING:
    from lightning_ptq.callbacks import AdaQuantLayerwise, CalibrationCapture

__version__ = "0.1.0"

__all__ = [
    "AdaQuantLayerwise",
    "AdaQuantResult",
    "Calibration",
    "CalibrationCapture",
    "Calibrator",
    "LayerQConfig",
    "Prepared",
    "QConfig",
    "QuantSpec",
    "ReconstructionConfig",
    "UnitResult",
    "adaquant",
    "calibrate",
    "load_packed",
    "prepare",
    "save_packed",
]


def __getattr__(name: str) -> Any:
    # The callbacks import Lightning, which the functions do without.
    if name in ("AdaQuantLayerwise", "CalibrationCapture"):
        from lightning_ptq import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
