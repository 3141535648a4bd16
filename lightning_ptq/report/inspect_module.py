"""A look at a module before the run: one calibration batch, every finding, and no trace left."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_ptq.activations.memory_plan import MemoryPlan, plan_memory
from lightning_ptq.activations.shards import deal_parts
from lightning_ptq.allocation.costs import bops_cost, size_cost
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.calibrator import calibrate
from lightning_ptq.calibration.candidates import Choices
from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.calibration.layer_costs import count_macs, macs_below
from lightning_ptq.errors import CalibrationError, PTQWarning, SurgeryError, UnfoldedBatchNormWarning, noted_warnings
from lightning_ptq.network.layers import FoldableBatchNorm, layers_in_mode, quantizable_types
from lightning_ptq.network.units import BlockRule, Granularity, Unit, find_units, unit_qconfigs
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report.preflight import Finding, FloatProduct, LayerFacts, Preflight, UnitFacts
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT, parse_bytes
from lightning_ptq.runtime.patching import left_as_it_was
from lightning_ptq.tuning.adaquant import check_arguments
from lightning_ptq.tuning.config import ReconstructionConfig


def inspect_module(
    module: nn.Module,
    batch: Any,
    qconfig: QConfig | str = "w4a4",
    *,
    forward: Forward = default_forward,
    samples: int = 1024,
    granularity: Granularity = "block",
    blocks: BlockRule | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
) -> Preflight:
    """What quantization will find in a module, from one batch; the module is left exactly as it was.

    The module is calibrated on the batch, looked at, and put back. Nothing is tuned.

    Args:
        module: A float module.
        batch: A calibration batch, as a loader gives it.
        qconfig: What to quantize.
        forward: How a batch is run: a function of module and batch.
        samples: Calibration samples of the run that the estimates are for.
        granularity: ``"block"`` or ``"layer"``.
        blocks: Name patterns of the blocks, or a function of name and module, in place of the automatic search.
        config: Steps and batch size of AdaQuant.
        memory_limit: For activations.

    Raises:
        SurgeryError: If there is nothing to quantize, the module is quantized already, or a layer is still lazy.
        QConfigError: If the config does not fit.
        CalibrationError: If the batch holds NaN, or the forward reaches no layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = inspect_module(net, torch.randn(16, 4), "w4a8")
        >>> [(layer.name, layer.widths, layer.macs) for layer in found.layers], found.covered
        ([('0', 'w8a8', 32.0), ('2', 'w8a8', 16.0)], 1.0)
        >>> type(net[0]).__name__
        'Linear'
    """
    check_arguments("sequential", granularity, None, memory_limit)
    if samples < 1:
        raise CalibrationError(f"samples must be 1 or more, got {samples}.")
    _check_not_lazy(module)
    notes: list[PTQWarning] = []
    with left_as_it_was(module), noted_warnings(notes), _silently():
        described = _describe(module)
        calibration = calibrate(module, [batch], qconfig, forward=forward)
        config = config or ReconstructionConfig()
        units = find_units(module, calibration.trace, granularity, blocks)
        steps = [config.steps_for(unit_qconfigs(unit), samples) for unit in units]
        plan, hazards = _plan(calibration, samples, units, steps, config, parse_bytes(memory_limit))
        macs = _macs_of_one_sample(calibration)
        folded, unfolded = calibration.folded, _unfolded(calibration, notes)
        default = str(calibration.prepared.qconfig.default)
        choices = Choices(calibration, [default])
        size, bops = size_cost(calibration, choices), bops_cost(calibration, choices)
        return Preflight(
            module=type(module).__name__,
            device=str(calibration.device),
            batch_size=calibration.samples,
            samples=samples,
            layers=_layers(calibration, described, macs),
            folded=folded,
            unfolded=unfolded,
            products=_products(calibration, set(described), macs),
            units=[_unit(unit, count) for unit, count in zip(units, steps, strict=True)],
            macs=sum(macs.values()),
            float_bytes=calibration.prepared.float_bytes,
            packed_bytes=round(size.total(choices.at(default))),
            bops=bops.total(choices.at(default)) / (bops.of_float or 1.0),
            plan=plan,
            warnings=[Finding(type(note).__name__, str(note), note.remedy) for note in notes],
            hazards=hazards,
        )


@dataclass(frozen=True)
class _Described:
    """A float layer before it was swapped."""

    kind: str
    shape: tuple[int, ...]
    parameters: int


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = layer.weight
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _describe(module: nn.Module) -> dict[str, _Described]:
    return {
        name: _Described(type(child).__name__, _shape(child), sum(p.numel() for p in child.parameters()))
        for name, child in module.named_modules()
        if isinstance(child, quantizable_types())
    }


@contextmanager
def _silently() -> Iterator[None]:
    """The library's warnings are in the findings; they are not printed, nor made errors by a filter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PTQWarning)
        yield


def _check_not_lazy(module: nn.Module) -> None:
    lazy = [
        name
        for name, child in module.named_modules()
        if any(nn.parameter.is_lazy(t) for t in (*child._parameters.values(), *child._buffers.values()))
    ]
    if lazy:
        raise SurgeryError(
            f"{', '.join(lazy)}: lazy, so that looking at it would give it its shape. Run one forward of the module"
            " first."
        )


def _macs_of_one_sample(calibration: Calibration) -> dict[str, float]:
    with layers_in_mode(calibration.module, "float"):
        found = count_macs(calibration.module, lambda: calibration.run(0))
    return {name: macs / calibration.samples for name, macs in found.items()}


def _layers(calibration: Calibration, described: dict[str, _Described], macs: dict[str, float]) -> list[LayerFacts]:
    prepared, order = calibration.prepared, calibration.trace.layer_order
    norms = {layer: norm for norm, layer in calibration.folded.items()}

    def status(name: str) -> str:
        if name in calibration.layers:
            return "quantized"
        if name not in prepared.layers:
            return "not supported"
        return "excluded" if prepared.qconfig.for_layer(name) is None else "never called"

    def facts(name: str) -> LayerFacts:
        about, layer = described[name], calibration.layers.get(name)
        place = "first" if name == order[0] else "last" if name == order[-1] else ""
        widths = "float" if layer is None else str(layer.qconfig)
        norm, own = norms.get(name, ""), macs_below(macs, name)
        return LayerFacts(name, about.kind, about.shape, widths, about.parameters, own, place, norm, status(name))

    return [facts(name) for name in (*order, *(name for name in described if name not in order))]


def _unfolded(calibration: Calibration, notes: list[PTQWarning]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for note in notes:
        if isinstance(note, UnfoldedBatchNormWarning):
            reasons |= note.details
    names = [n for n, child in calibration.module.named_modules() if isinstance(child, FoldableBatchNorm)]
    return {n: reasons.get(n, "it was never called") for n in names if n not in calibration.folded}


def _products(calibration: Calibration, layers: set[str], macs: dict[str, float]) -> list[FloatProduct]:
    operators: dict[str, list[str]] = {}
    for operator, scope in sorted(calibration.trace.float_products):
        operators.setdefault(scope, []).append(operator)
    order = list(calibration.trace.calls)
    found = [
        FloatProduct(scope, tuple(names), macs.get(scope)) for scope, names in operators.items() if scope not in layers
    ]
    return sorted(found, key=lambda product: order.index(product.module) if product.module in order else -1)


def _unit(unit: Unit, steps: int) -> UnitFacts:
    widths = tuple(sorted({str(pair) for pair in unit_qconfigs(unit)}))
    return UnitFacts(unit.name, tuple(unit.layers), widths, steps, unit.calls)


def _plan(
    calibration: Calibration,
    samples: int,
    units: list[Unit],
    steps: list[int],
    config: ReconstructionConfig,
    limit: int,
) -> tuple[MemoryPlan | None, list[Finding]]:
    """The plan for a set of ``samples``, or the hazard that it does not fit."""
    whole = replace(calibration, samples=samples)
    size = calibration.samples
    parts = deal_parts([size] * max(1, samples // size), config.parts, config.batch_size)
    try:
        return plan_memory(whole, units, limit, steps, config.batch_size, sequential=True, parts=parts), []
    except CalibrationError as error:
        return None, [Finding("memory", str(error))]
