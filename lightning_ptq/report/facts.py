"""The single findings of a preflight: layers, products, parameters, units, warnings and hazards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A warning or a hazard.

    Attributes:
        category: Class of the warning, or topic of the hazard.
        message: The finding.
        remedy: What the user can do about it.
    """

    category: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class LayerFacts:
    """A layer of a quantizable type.

    Attributes:
        name: Qualified name.
        kind: Class of the float layer; the function of a call site, or ``"Parameter"``.
        shape: Shape of the weight, or of the first one if there are several; empty without a weight.
        widths: Bit widths, such as ``"w4a8"``, or ``"float"``.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one sample.
        place: ``"first"`` or ``"last"`` in execution order; otherwise empty.
        norm: Name of the batch norm that is folded into the layer; empty if there is none.
        status: ``"quantized"``, ``"excluded"``, ``"never called"`` or ``"not supported"``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    widths: str
    parameters: int
    macs: float
    place: str
    norm: str
    status: str


@dataclass(frozen=True)
class FloatProduct:
    """Matrix products, convolutions and attention that a module computes outside any layer.

    Attributes:
        module: Qualified name of the module; empty for the root.
        operators: Names of the operators.
        macs: Multiply-accumulates for one sample; None if there is no formula for these operators.
    """

    module: str
    operators: tuple[str, ...]
    macs: float | None


@dataclass(frozen=True)
class FloatParameters:
    """Parameters of a module that stay float.

    Attributes:
        module: Qualified name of the module; empty for the root.
        kind: Class of the module.
        parameters: Number of parameters, without those of modules inside it.
    """

    module: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class UnitFacts:
    """A block or layer that AdaQuant tunes as one unit.

    Attributes:
        name: Qualified name of the block or layer.
        layers: Names of its layers.
        widths: Bit widths of its layers, without repeats.
        steps: Number of optimization steps.
        calls: Number of calls in one forward.
    """

    name: str
    layers: tuple[str, ...]
    widths: tuple[str, ...]
    steps: int
    calls: int
