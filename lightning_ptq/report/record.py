"""The record of a run: collected during the run, plain data afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ptq.allocation.frontier import Frontier
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.layer_costs import layer_work, packed_size
from lightning_ptq.errors import PTQWarning
from lightning_ptq.export.onnx import OnnxExport
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.numerics.observers import HistogramObserver, MinMaxObserver
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.report.float_parts import kind_of
from lightning_ptq.report.origin import Origin
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.run import AdaQuantResult

BINS = 64
"""Number of bins of every histogram."""


@dataclass(frozen=True)
class Stage:
    """A stage of the run.

    Attributes:
        name: Name of the stage.
        seconds: Duration.
        peak_memory: Peak memory of the process from its start to the end of the stage, in bytes; None if unknown.
        peak_gpu_memory: The same for memory on the GPU; None without a GPU.
    """

    name: str
    seconds: float
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        edges: Edges of the bins, ascending; one more than there are counts.
        counts: Number of values in each bin.
    """

    edges: list[float]
    counts: list[int]


@dataclass
class LayerRecord:
    """A quantized layer.

    Where a layer has several inputs, ``low``, ``high`` and ``inputs`` describe the first one.

    Attributes:
        name: Qualified name.
        kind: Class of the float layer; the function of a call site, or ``"Parameter"``.
        widths: Bit widths, for example ``"w4a8"``.
        parameters: Number of weights.
        macs: Multiply-accumulates for one sample.
        size: Bytes of the packed weights, with scales and zero points.
        bops: Bit operations for one sample.
        low: Least value on the grid of the input; None if the input stays float.
        high: Greatest value on the grid of the input; None if the input stays float.
        weights: Histogram of the float weights; None if the layer has none.
        inputs: Histogram of the input over the calibration set; None if its observer keeps no histogram.
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


@dataclass(frozen=True)
class MetricChange:
    """A metric of the user's validation, before and after the run.

    Attributes:
        name: Name under which the module logs it.
        before: Value of the float module.
        after: Value of the quantized module.
    """

    name: str
    before: float
    after: float


@dataclass
class RunRecord:
    """The record of a run.

    Attributes:
        model: Class of the module.
        settings: Settings of the run, by callback or under any other names.
        stages: Stages of the run, in order.
        samples: Number of calibration samples.
        processes: Number of processes that shared the work.
        layers: The quantized layers in execution order.
        folded: The layer that each folded batch norm went into.
        tuning: Outcome of AdaQuant, by stage.
        allocation: The bit allocation; None if there was none.
        frontier: Predictions over a sweep of budgets; None if there was no allocation.
        statistics: The steps of statistics tuning.
        metrics: Metrics of the user's validation, before and after; empty if fit got no validation loader.
        trials: Choices that a search for an accepted drop of a metric has tried, in order.
        export: The ONNX file that was written; None if there was none.
        warnings: All warnings of the library, in order.
        float_bytes: Bytes of the float module's tensors.
        packed_bytes: Bytes of the quantized module's packed tensors.
        float_bops: Bit operations of the layers for one sample at 32 bits.
        origin: Date, command and versions when the run was last recorded.
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
    metrics: list[MetricChange] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    export: OnnxExport | None = None
    warnings: list[PTQWarning] = field(default_factory=list)
    float_bytes: int = 0
    packed_bytes: int = 0
    float_bops: float = 0.0
    origin: Origin = field(default_factory=Origin.now)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record what runs inside the ``with`` block as a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages.append(Stage(name, time.perf_counter() - start, *peak_memory()))

    def calibrated(self, calibration: Calibration) -> None:
        """Record the layers, their work, and the histograms of their weights and inputs."""
        work = layer_work(calibration)
        self.samples, self.processes = calibration.samples, calibration.ranks.world
        self.folded = dict(calibration.folded)
        self.layers = [
            LayerRecord(
                name,
                kind_of(layer),
                str(layer.qconfig),
                layer.weight_count,
                work[name].macs,
                weights=_weight_histogram(layer),
                inputs=_input_histogram(calibration, name),
            )
            for name, layer in calibration.layers.items()
        ]
        self.finish(calibration)

    def finish(self, calibration: Calibration) -> None:
        """Record the present bit widths, input grids and sizes of the layers, and the date."""
        self.origin = Origin.now()
        for row in self.layers:
            layer = calibration.layers[row.name]
            qconfig = cast(LayerQConfig, layer.qconfig)  # every layer of a calibration is quantized
            row.widths = str(qconfig)
            row.size = layer.packed_bytes(qconfig.weight)
            row.bops = layer.bit_operations(row.macs, qconfig)
            row.low, row.high = _input_grid(layer)
        self.float_bytes = calibration.prepared.float_bytes
        self.packed_bytes = packed_size(calibration.module)
        self.float_bops = sum(calibration.layers[row.name].bit_operations(row.macs) for row in self.layers)

    @property
    def seconds(self) -> float:
        """Duration of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def summary(self) -> dict[str, float | int | str]:
        """Return the key figures of the run by name; loggers get them as ``ptq/run/NAME``.

        ``bits_per_weight`` includes the scales, and ``allocated_MEASURE`` is the measure of the bit allocation.
        """
        weights = sum(row.parameters for row in self.layers)
        units = [row for result in self.tuning.values() for row in result.units]
        summary: dict[str, float | int | str] = {
            "model": self.model,
            "calibration_samples": self.samples,
            "processes": self.processes,
            "quantized_layers": len(self.layers),
            "batch_norms_folded": len(self.folded),
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "times_smaller": self.float_bytes / max(1, self.packed_bytes),
            "bits_per_weight": 8 * sum(row.size for row in self.layers) / max(1, weights),
            "bit_operations_share": sum(row.bops for row in self.layers) / max(1.0, self.float_bops),
            "units_tuned": sum(row.steps > 0 for row in units),
            "units_kept": sum(row.accepted for row in units),
            "warnings": len(self.warnings),
            "seconds": self.seconds,
        }
        if self.stages and self.stages[-1].peak_memory is not None:
            summary["peak_memory_bytes"] = max(stage.peak_memory or 0 for stage in self.stages)
        if self.allocation is not None:
            summary[f"allocated_{self.allocation.sensitivity.measure}"] = self.allocation.measured
        if self.export is not None:
            summary["onnx_bytes"] = self.export.bytes
        return summary


def _weight_histogram(layer: QuantizedOp) -> Histogram | None:
    """Return the histogram of all float weights of a layer; None if it has none."""
    # Tuning replaces the weights; the reference keeps those of the float layer until the run ends.
    weights = layer.weights if layer.reference is None else {name: layer.reference[name] for name in layer.weight_names}
    tensors = [weight.flatten() for weight in weights.values() if weight is not None]
    return of_values(torch.cat(tensors)) if tensors else None


def _first_input(layer: QuantizedOp) -> str:
    """Return the name of a layer's first input; empty if it has none."""
    return layer.input_names[0] if layer.input_names else ""


def _input_histogram(calibration: Calibration, name: str) -> Histogram | None:
    """Return the histogram of the first input of layer ``name``; None if its observer keeps none."""
    observer = calibration.observers.get((name, _first_input(calibration.layers[name])))
    return None if observer is None else of_observer(observer)


def _input_grid(layer: QuantizedOp) -> tuple[float | None, float | None]:
    """Return the least and the greatest value on the grid of a layer's first input; None if it stays float."""
    quantizer = layer.input_quantizers.get(_first_input(layer))
    if quantizer is None:
        return None, None
    scale, zero_point, spec = float(quantizer.scale), float(quantizer.zero_point), quantizer.spec
    return (spec.quant_min - zero_point) * scale, (spec.quant_max - zero_point) * scale


def of_values(values: Tensor) -> Histogram:
    """Return the histogram of a tensor of any shape."""
    values = values.detach().float().flatten().cpu()  # counting on a GPU is not deterministic
    low, high = (end.item() for end in values.aminmax())
    counts = torch.histc(values, BINS, low, high) if low < high else torch.tensor([values.numel()] + [0] * (BINS - 1))
    return Histogram(_edges(low, high), counts.long().tolist())


def of_observer(observer: MinMaxObserver) -> Histogram | None:
    """Return an observer's histogram over bins of equal width; None if it keeps none."""
    if not isinstance(observer, HistogramObserver) or not observer.counts.any():
        return None
    centres, counts = (tensor.cpu() for tensor in observer.histogram())
    low, high = observer.minimum.item(), observer.maximum.item()
    edges = torch.tensor(_edges(low, high), dtype=torch.float64)
    # Each of the observer's fine bins goes as a whole to the bin that holds its centre. The outer edges are not passed:
    # the centre of an outermost fine bin may lie beyond the extreme value.
    bins = torch.bucketize(centres, edges[1:-1])
    return Histogram(edges.tolist(), torch.zeros(BINS, dtype=torch.int64).index_add(0, bins, counts.long()).tolist())


def _edges(low: float, high: float) -> list[float]:
    if low == high:  # equal values all lie in the first bin; its width is arbitrary
        high = low + (abs(low) or 1.0)
    return torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()


def peak_memory() -> tuple[int | None, int | None]:
    """Return the peak memory of the process so far, in bytes: main memory and GPU; None where it is unknown."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    try:
        import resource
    except ImportError:  # Windows
        return None, gpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), gpu  # macOS counts bytes, Linux KiB
