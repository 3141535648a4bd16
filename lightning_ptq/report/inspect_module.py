"""inspect_module: examine a float module with one calibration batch before the run, and leave it unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_ptq.activations.memory_plan import MemoryPlan, limit_of, plan_memory
from lightning_ptq.activations.shards import make_shards
from lightning_ptq.allocation.costs import multiply_accumulates
from lightning_ptq.calibration.calibrate import calibrate
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.calibration.layer_costs import Work, count_work, packed_size
from lightning_ptq.errors import CalibrationError, PTQWarning, SurgeryError, UnfoldedBatchNormWarning, noted_warnings
from lightning_ptq.network.batch_norm import FoldableBatchNorm
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.units import BlockRule, Unit, UnitKind, unit_qconfigs
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report.facts import Finding, FloatParameters, FloatProduct, LayerFacts, UnitFacts
from lightning_ptq.report.float_parts import (
    FloatLayer,
    added_layer,
    float_layers,
    float_parameters,
    innermost,
    is_in,
    unquantized,
    with_baked,
)
from lightning_ptq.report.preflight import Preflight
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.patching import left_unchanged
from lightning_ptq.tuning.adaquant import check_arguments
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.tunable import units_for


def inspect_module(
    module: nn.Module,
    batch: Any,
    qconfig: QConfig | str = "w4a4",
    *,
    forward: Forward = default_forward,
    samples: int = 1024,
    granularity: UnitKind = "block",
    blocks: BlockRule | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    check: Callable[[Calibration], list[Finding]] | None = None,
) -> Preflight:
    """Find out what quantization will do to a module, from one batch; nothing is tuned or changed.

    Args:
        module: A float module. It is calibrated on the batch and then restored.
        batch: A calibration batch, as the loader returns it.
        qconfig: What to quantize.
        forward: Function of module and batch that runs a calibration forward.
        samples: Number of calibration samples that the estimates assume.
        granularity: ``"block"`` or ``"layer"``.
        blocks: Name patterns of the blocks, or a function of name and module; by default an automatic search.
        config: Steps and batch size of AdaQuant.
        memory_limit: Limit of the activations in memory.
        check: Function that returns further hazards of the calibrated module.

    Raises:
        SurgeryError: If there is nothing to quantize, the module is quantized already, or a layer is still lazy.
        QConfigError: If an argument does not fit.
        CalibrationError: If the batch holds NaN, or the forward reaches no layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> preflight = inspect_module(net, torch.randn(16, 4), "w4a8")
        >>> [(layer.name, layer.widths, layer.macs) for layer in preflight.layers], preflight.covered
        ([('0', 'w8a8', 32.0), ('2', 'w8a8', 16.0)], 1.0)
    """
    check_arguments("sequential", granularity, None, memory_limit)
    if samples < 1:
        raise CalibrationError(f"samples must be 1 or more, got {samples}.")
    _check_not_lazy(module)
    notes: list[PTQWarning] = []
    with ExitStack() as stack:
        for context in (left_unchanged(module), noted_warnings(notes), _warnings_ignored()):
            stack.enter_context(context)
        qconfig = QConfig.parse(qconfig)
        layers, parameters = float_layers(module, qconfig), float_parameters(module)
        calibration = calibrate(module, [batch], qconfig, forward=forward)
        stack.callback(calibration.prepared.undo)
        parameters = with_baked(parameters, calibration)
        of_units, found = stack.enter_context(units_for(calibration, granularity, blocks))
        units = [unit for unit in found if not unit.is_lookup]
        outlook = _plan(of_units, units, samples, config or ReconstructionConfig(), memory_limit)
        preflight = _preflight(calibration, layers, parameters, outlook, notes)
        return replace(preflight, hazards=[*preflight.hazards, *(check(calibration) if check else ())])


@dataclass(frozen=True)
class _Outlook:
    """Sequential AdaQuant on a whole calibration set.

    Attributes:
        samples: Number of samples in the set.
        units: The units.
        plan: Memory and time; None if they do not fit.
        hazards: Why they do not fit.
    """

    samples: int
    units: list[UnitFacts]
    plan: MemoryPlan | None
    hazards: list[Finding]


def _check_not_lazy(module: nn.Module) -> None:
    lazy = [
        name
        for name, child in module.named_modules()
        if any(nn.parameter.is_lazy(t) for t in (*child._parameters.values(), *child._buffers.values()))
    ]
    if lazy:
        raise SurgeryError(
            f"{', '.join(lazy)}: lazy, so the forward of the inspection would create their parameters. Run one forward"
            " of the module first."
        )


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """Ignore the library's warnings, which the findings list; a filter must not turn them into errors either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PTQWarning)
        yield


def _plan(
    calibration: Calibration, units: list[Unit], samples: int, config: ReconstructionConfig, memory_limit: str | int
) -> _Outlook:
    """Return the plan for ``samples`` samples, in batches like the one of the calibration."""
    steps = [config.steps_for(unit_qconfigs(unit), samples) for unit in units]
    facts = [
        UnitFacts(unit.name, tuple(unit.layers), tuple(sorted(set(map(str, unit_qconfigs(unit))))), count, unit.calls)
        for unit, count in zip(units, steps, strict=True)
    ]
    whole, size = replace(calibration, samples=samples), calibration.samples
    limit = limit_of(memory_limit, whole, config.batch_size)
    shards = make_shards([size] * max(1, samples // size), config.parts, config.batch_size)
    try:
        plan = plan_memory(whole, units, limit, steps, config.batch_size, sequential=True, shards=shards)
    except CalibrationError as error:
        return _Outlook(samples, facts, None, [Finding("memory", str(error))])
    return _Outlook(samples, facts, plan, [])


def _preflight(
    calibration: Calibration,
    float_layers: dict[str, FloatLayer],
    parameters: list[FloatParameters],
    outlook: _Outlook,
    notes: list[PTQWarning],
) -> Preflight:
    work = _work_of_one_sample(calibration)
    return Preflight(
        module=type(calibration.module).__name__,
        device=str(calibration.device),
        batch_size=calibration.samples,
        samples=outlook.samples,
        layers=_layers(calibration, float_layers, work.macs),
        folded=calibration.folded,
        unfolded=_unfolded(calibration, notes),
        products=_products(calibration, {*float_layers, *calibration.layers}, work),
        units=outlook.units,
        macs=sum(work.macs.values()),
        float_bytes=calibration.prepared.float_bytes,
        packed_bytes=packed_size(calibration.module),
        bops=_bit_operations(calibration),
        plan=outlook.plan,
        warnings=[Finding(type(note).__name__, str(note), note.remedy) for note in notes],
        hazards=outlook.hazards,
        parameters=sum(row.parameters for row in parameters),
        float_parameters=unquantized(calibration, parameters),
    )


def _work_of_one_sample(calibration: Calibration) -> Work:
    with ops_in_mode(calibration.module, "float"):
        work = count_work(calibration.module, lambda: calibration.run(0))
    return replace(work, macs={name: macs / calibration.samples for name, macs in work.macs.items()})


def _bit_operations(calibration: Calibration) -> float:
    """Return the bit operations of the quantized layers, as a fraction of those at 32 bits."""
    macs = multiply_accumulates(calibration)
    layers = calibration.layers
    quantized = sum(layer.bit_operations(macs[name], layer.qconfig) for name, layer in layers.items())
    return quantized / (sum(layer.bit_operations(macs[name]) for name, layer in layers.items()) or 1.0)


def _layers(calibration: Calibration, layers: dict[str, FloatLayer], macs: dict[str, float]) -> list[LayerFacts]:
    prepared, order = calibration.prepared, calibration.trace.layer_order
    own = _macs_of((*order, *(name for name in layers if name not in order)), macs)
    norms = {layer: norm for norm, layers in calibration.folded.items() for layer in layers.split(", ")}

    def status(name: str) -> str:
        if name in calibration.layers:
            return "quantized"
        if name not in prepared.layers:
            return "not supported"
        return "excluded" if prepared.qconfig.for_layer(name) is None else "never called"

    def facts(name: str) -> LayerFacts:
        quantized = calibration.layers.get(name)
        layer = layers.get(name) or added_layer(prepared.layers[name])
        place = "last" if name in calibration.last_layers else "first" if name in calibration.first_layers else ""
        return LayerFacts(
            name,
            layer.kind,
            layer.shape,
            "float" if quantized is None else str(quantized.qconfig),
            layer.parameters,
            own[name],
            place,
            norms.get(name, ""),
            status(name),
        )

    return [facts(name) for name in own]


def _macs_of(names: Iterable[str], macs: Mapping[str, float]) -> dict[str, float]:
    """Return the multiply-accumulates in each of some modules, outside those of them that are inside it."""
    own = dict.fromkeys(names, 0.0)
    for at, count in macs.items():
        inside = innermost(at, own)
        if inside is not None:
            own[inside] += count
    return own


def _unfolded(calibration: Calibration, notes: list[PTQWarning]) -> dict[str, str]:
    """Return why each batch norm that was not folded stays."""
    reasons: dict[str, str] = {}
    for note in notes:
        if isinstance(note, UnfoldedBatchNormWarning):
            reasons |= note.details
    norms = [name for name, child in calibration.module.named_modules() if isinstance(child, FoldableBatchNorm)]
    return {name: reasons.get(name, "it was never called") for name in norms if name not in calibration.folded}


def _products(calibration: Calibration, layers: Collection[str], work: Work) -> list[FloatProduct]:
    """Return what is computed outside the layers: per module a row of what is counted, and a row of what is not."""
    # Layers that cannot be swapped compute products too, but are among the layers already.
    places = {name for name in (*work.counted, *work.uncounted) if not is_in(name, layers)}
    order = list(calibration.trace.calls)
    products = []
    # In execution order; the root, which has no entry if it was not called itself, comes first.
    for name in sorted(places, key=lambda name: (order.index(name) if name in order else -1, name)):
        if counted := work.counted.get(name):
            products.append(FloatProduct(name, tuple(sorted(counted)), work.macs[name]))
        if uncounted := work.uncounted.get(name):
            products.append(FloatProduct(name, tuple(sorted(uncounted)), None))
    return products
