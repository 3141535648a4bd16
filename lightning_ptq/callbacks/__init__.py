"""Callbacks for the Lightning Trainer; no other part of the library imports Lightning."""

from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.allocator import BitAllocator
from lightning_ptq.callbacks.capture import CalibrationCapture
from lightning_ptq.callbacks.export import ExportONNX
from lightning_ptq.callbacks.one_call import quantize
from lightning_ptq.callbacks.preflight import inspect
from lightning_ptq.callbacks.statistics import StatsTuning

__all__ = [
    "AdaQuantLayerwise",
    "BitAllocator",
    "CalibrationCapture",
    "ExportONNX",
    "StatsTuning",
    "inspect",
    "quantize",
]
