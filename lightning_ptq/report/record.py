"""What is known of a run: gathered while it goes on, plain data when it is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ptq.allocation.costs import bit_operations
from lightning_ptq.allocation.frontier import Frontier
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.layer_costs import layer_work, packed_bytes
from lightning_ptq.errors import PTQWarning
from lightning_ptq.export.packed import packed_tensors
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.numerics.observers import HistogramObserver, MinMaxObserver
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.run import AdaQuantResult

BINS = 64


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: What was done.
        seconds: How long it took.
        peak_memory: Most bytes of memory that the process has held up to its end; None where the system does not tell.
        peak_gpu_memory: The same of the GPU; None without one.
    """

    name: str
    seconds: float
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None


@dataclass(frozen=True)
class Histogram:
    """How often values fell into bins of equal width.

    Attributes:
        edges: Ends of the bins, one more than there are counts.
        counts: Values in each bin.
    """

    edges: list[float]
    counts: list[int]


@dataclass
class LayerRecord:
    """A quantized layer.

    Attributes:
        name: Qualified name.
        kind: Its type.
        widths: For example ``"w4a8"``.
        parameters: Number of its weights.
        macs: Multiply-accumulates for one sample.
        size: Bytes of its packed weight, with scales and zero points.
        bops: Bit operations for one sample.
        low: Least input that its grid holds; None if its input stays float.
        high: Greatest input that its grid holds.
        weights: Of the float layer.
        inputs: On the calibration set; None where the observer keeps no histogram.
    """

    name: str
    kind: str
    widths: str
    parameters: int
    macs: float
    size: int = 0
    bops: float = 0.0
    low: float | None = None
    high: float | None = None
    weights: Histogram | None = None
    inputs: Histogram | None = None


@dataclass
class RunRecord:
    """Everything that a run did.

    Attributes:
        model: The module's type.
        settings: What the run was told, by callback (or whatever the caller chooses).
        stages: Parts of the run, in order.
        samples: Calibration samples.
        processes: That shared the work.
        layers: The quantized layers in execution order.
        folded: The layer that each folded batch norm went into.
        tuning: What AdaQuant did, by stage.
        allocation: The bit allocation, if there was one.
        frontier: Best predictions over a sweep of budgets.
        statistics: The steps of statistics tuning.
        warnings: All warnings of the library, in order.
        float_bytes: Of the float module's tensors.
        packed_bytes: Of the quantized module's packed tensors.
        float_bops: Bit operations of the layers for one sample at 32 bits.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    samples: int = 0
    processes: int = 1
    layers: list[LayerRecord] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, AdaQuantResult] = field(default_factory=dict)
    allocation: AllocationResult | None = None
    frontier: Frontier | None = None
    statistics: list[StatisticsResult] = field(default_factory=list)
    warnings: list[PTQWarning] = field(default_factory=list)
    float_bytes: int = 0
    packed_bytes: int = 0
    float_bops: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside the ``with`` block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages.append(Stage(name, time.perf_counter() - start, *peak_memory()))

    def calibrated(self, calibration: Calibration) -> None:
        """Take down the layers, the work that they do, and the histograms of their weights and inputs."""
        work = layer_work(calibration)
        self.samples, self.processes = calibration.samples, calibration.ranks.world
        self.folded = dict(calibration.folded)
        self.layers = [
            LayerRecord(
                name,
                type(layer).__name__.removeprefix("Quant"),
                str(layer.qconfig),
                layer.weight.numel(),
                work[name].macs,
                weights=of_values(layer.weight if layer.reference is None else layer.reference[0]),
                inputs=of_observer(calibration.observers[name]),
            )
            for name, layer in calibration.layers.items()
        ]
        self.finish(calibration)

    def finish(self, calibration: Calibration) -> None:
        """Take down the widths, ranges and sizes that the layers have now."""
        for row in self.layers:
            layer = calibration.layers[row.name]
            config = cast(LayerQConfig, layer.qconfig)
            row.widths = str(config)
            row.size = packed_bytes(layer, config.weight)
            row.bops = bit_operations(row.macs, config)
            row.low, row.high = _grid(layer)
        self.float_bytes = calibration.prepared.float_bytes
        self.packed_bytes = sum(t.numel() * t.element_size() for t in packed_tensors(calibration.module)[0].values())
        self.float_bops = sum(bit_operations(row.macs, None) for row in self.layers)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def summary(self) -> dict[str, float | int | str]:
        """The run in a few figures."""
        weights = sum(row.parameters for row in self.layers)
        rows = [row for result in self.tuning.values() for row in result.units]
        found: dict[str, float | int | str] = {
            "model": self.model,
            "calibration samples": self.samples,
            "processes": self.processes,
            "quantized layers": len(self.layers),
            "batch norms folded": len(self.folded),
            "float size, bytes": self.float_bytes,
            "packed size, bytes": self.packed_bytes,
            "times smaller": self.float_bytes / max(1, self.packed_bytes),
            "bits per quantized weight": sum(8 * row.size for row in self.layers) / max(1, weights),
            "bit operations, share of float": sum(row.bops for row in self.layers) / max(1.0, self.float_bops),
            "units tuned": sum(row.steps > 0 for row in rows),
            "units kept": sum(row.accepted for row in rows),
            "warnings": len(self.warnings),
            "seconds": self.seconds,
        }
        if self.stages and self.stages[-1].peak_memory is not None:
            found["peak memory, bytes"] = max(stage.peak_memory or 0 for stage in self.stages)
        if self.allocation is not None:
            found[f"{self.allocation.sensitivity.measure} at the allocation"] = self.allocation.measured
        return found


def of_values(values: Tensor) -> Histogram:
    """A histogram of a tensor."""
    values = values.detach().float().flatten().cpu()  # counting on a GPU is not deterministic
    low, high = (end.item() for end in values.aminmax())
    counts = torch.histc(values, BINS, low, high) if low < high else torch.tensor([values.numel()] + [0] * (BINS - 1))
    return Histogram(_edges(low, high), counts.long().tolist())


def of_observer(observer: MinMaxObserver) -> Histogram | None:
    """The observer's histogram over bins of equal width; None if it keeps none."""
    if not isinstance(observer, HistogramObserver) or not observer.counts.any():
        return None
    centres, counts = (tensor.cpu() for tensor in observer.histogram())
    low, high = observer.minimum.item(), observer.maximum.item()
    edges = torch.tensor(_edges(low, high), dtype=torch.float64)
    bins = torch.bucketize(centres, edges[1:-1])
    return Histogram(edges.tolist(), torch.zeros(BINS, dtype=torch.int64).index_add(0, bins, counts.long()).tolist())


def _edges(low: float, high: float) -> list[float]:
    if low == high:
        high = low + (abs(low) or 1.0)
    return torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()


def _grid(layer: QuantLayer) -> tuple[float | None, float | None]:
    quantizer = layer.input_fake_quant
    if quantizer is None:
        return None, None
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    spec = quantizer.spec
    return (spec.quant_min - zero_point) * scale, (spec.quant_max - zero_point) * scale


def peak_memory() -> tuple[int | None, int | None]:
    """Most bytes that the process has held so far, in main memory and on the GPU."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    try:
        import resource
    except ImportError:  # Windows
        return None, gpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), gpu
