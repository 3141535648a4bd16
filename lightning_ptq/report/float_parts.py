"""The layers and parameters of a float module, recorded before it is quantized, and which of them stay float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.network.call_sites import CallSite, WeightedSite
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.parameters import ParameterOp
from lightning_ptq.network.swapping import counterpart_of, float_class_of
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report.facts import FloatParameters


@dataclass(frozen=True)
class FloatLayer:
    """Facts about a float layer, recorded before it is replaced."""

    kind: str
    shape: tuple[int, ...]
    parameters: int


def float_layers(module: nn.Module, qconfig: QConfig) -> dict[str, FloatLayer]:
    """Return the layers of quantizable types by qualified name, also those that cannot be swapped."""
    layers = {}
    for name, child in module.named_modules():
        counterpart = counterpart_of(child, qconfig.operations)
        if counterpart is not None and issubclass(counterpart, QuantizedOp):
            weights = [getattr(child, weight_name, None) for weight_name in counterpart.weight_names]
            # A re-parametrized weight is a computed attribute, not a parameter.
            shape = next((tuple(weight.shape) for weight in weights if isinstance(weight, Tensor)), ())
            layers[name] = FloatLayer(type(child).__name__, shape, sum(p.numel() for p in child.parameters()))
    for name, inner in list(layers.items()):
        around = innermost(name.rpartition(".")[0], layers) if name else None
        if around is not None:  # the parameters of a layer inside another are its own
            layers[around] = replace(layers[around], parameters=layers[around].parameters - inner.parameters)
    return layers


def kind_of(op: QuantizedOp) -> str:
    """Return the class of the float layer of an operation, or what a call site or a parameter is called in tables."""
    if isinstance(op, CallSite):
        return op.function
    if isinstance(op, WeightedSite):
        return "linear"
    return "Parameter" if isinstance(op, ParameterOp) else type(op).__name__.removeprefix("Quant")


def added_layer(op: QuantizedOp) -> FloatLayer:
    """Return the facts about an operation that is no layer of the float module: a call site or a parameter."""
    shape = tuple(op.weight.shape) if isinstance(op, ParameterOp) else ()
    return FloatLayer(kind_of(op), shape, op.weight_count)


def float_parameters(module: nn.Module) -> list[FloatParameters]:
    """Return the parameters that each module holds itself; shared ones belong to the first module that has them."""
    found: list[FloatParameters] = []
    visited: set[int] = set()
    for name, child in module.named_modules():
        own = [p for p in child._parameters.values() if p is not None and id(p) not in visited]
        visited.update(map(id, own))
        if own:
            found.append(FloatParameters(name, type(child).__name__, sum(p.numel() for p in own)))
    return found


def with_baked(parameters: list[FloatParameters], calibration: Calibration) -> list[FloatParameters]:
    """Return the parameters with those of layers that compute their weight counted as once it is computed."""
    baked, modules = calibration.prepared.baked, dict(calibration.module.named_modules())
    former = [f"{name}.parametrizations" for name in baked]
    rows = [row for row in parameters if row.module not in baked and not is_in(row.module, former)]
    return rows + [FloatParameters(name, float_class_of(modules[name]).__name__, n) for name, n in baked.items()]


def unquantized(calibration: Calibration, parameters: list[FloatParameters]) -> list[FloatParameters]:
    """Return the parameters that stay float, without those that a folded batch norm loses; most of them first."""
    quantized: Counter[str] = Counter()
    for name, layer in calibration.layers.items():
        # A parameter that a module multiplies by itself belongs to that module.
        quantized[name.rpartition(".")[0] if isinstance(layer, ParameterOp) else name] += layer.weight_count
    rest = [replace(row, parameters=row.parameters - quantized.get(row.module, 0)) for row in parameters]
    return sorted((row for row in rest if row.parameters > 0), key=lambda row: -row.parameters)


def innermost(name: str, names: Collection[str]) -> str | None:
    """Return which of ``names`` is that of the module called ``name`` or of the nearest one around it."""
    while name not in names:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def is_in(name: str, layers: Collection[str]) -> bool:
    """Return True for a layer and for a module inside one."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)
