"""Post-training quantization for PyTorch Lightning: AdaQuant, bit allocation and statistics tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ptq.allocation.costs import Cost, bops_cost, size_cost, table_cost
from lightning_ptq.allocation.frontier import Frontier, frontier
from lightning_ptq.allocation.search import AllocationResult, apply_allocation, search_allocation
from lightning_ptq.allocation.sensitivity import measure_choice, measure_sensitivity
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation, allocate_bits
from lightning_ptq.calibration.calibrate import calibrate
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.calibrator import Calibrator
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.export.agreement import Parity
from lightning_ptq.export.checkpoint import load_quantized
from lightning_ptq.export.onnx import OnnxExport, export_onnx
from lightning_ptq.export.packed import load_packed, save_packed
from lightning_ptq.export.parity import verify_export
from lightning_ptq.export.program import export_program
from lightning_ptq.export.state_dicts import load_quantized_state_dicts as _load_quantized_state_dicts
from lightning_ptq.network.layers import QuantLayer, register_layer
from lightning_ptq.network.prepare import Prepared, prepare
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.report import PTQReport
from lightning_ptq.report.preflight import Preflight
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.statistics.bias import tune_bias
from lightning_ptq.statistics.normalization import para_normalize, reestimate_batch_norm
from lightning_ptq.tuning.adaquant import adaquant
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import AdaQuantResult

if TYPE_CHECKING:
    from lightning_ptq.callbacks import (
        AdaQuantLayerwise,
        BitAllocator,
        CalibrationCapture,
        ExportONNX,
        StatsTuning,
        inspect,
        quantize,
    )

Choices = Candidates  # its former name

_load_quantized_state_dicts()

__version__ = "0.1.0"

__all__ = [
    "AdaQuantLayerwise",
    "AdaQuantResult",
    "AllocationResult",
    "BitAllocation",
    "BitAllocator",
    "Calibration",
    "CalibrationCapture",
    "Calibrator",
    "Candidates",
    "Choices",
    "Cost",
    "ExportONNX",
    "Frontier",
    "LayerQConfig",
    "OnnxExport",
    "PTQReport",
    "Parity",
    "Preflight",
    "Prepared",
    "QConfig",
    "QuantLayer",
    "QuantSpec",
    "ReconstructionConfig",
    "SensitivityTable",
    "StatisticsResult",
    "StatsTuning",
    "UnitResult",
    "adaquant",
    "allocate_bits",
    "apply_allocation",
    "bops_cost",
    "calibrate",
    "export_onnx",
    "export_program",
    "frontier",
    "inspect",
    "load_packed",
    "load_quantized",
    "measure_choice",
    "measure_sensitivity",
    "para_normalize",
    "prepare",
    "quantize",
    "reestimate_batch_norm",
    "register_layer",
    "save_packed",
    "search_allocation",
    "size_cost",
    "table_cost",
    "tune_bias",
    "verify_export",
]


def __getattr__(name: str) -> Any:
    # The callbacks import Lightning, which the functions do without.
    if name in __all__:
        from lightning_ptq import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
