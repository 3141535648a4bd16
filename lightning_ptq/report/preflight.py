"""What there is to know of a PTQ run before it starts, as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from lightning_ptq.activations.memory_plan import MemoryPlan
from lightning_ptq.report.table import Sheet

ESTIMATE = (
    "Bytes: an upper bound from the shapes; what is held is mostly some 0.6 of it. Time: from one forward of this"
    " batch where the module is now; right within a factor of two or three."
)


@dataclass(frozen=True)
class Finding:
    """Something that the user should know.

    Attributes:
        category: What it is about, in a word.
        message: What was found.
        remedy: What to do about it.
    """

    category: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class LayerFacts:
    """A layer of a quantizable type.

    Attributes:
        name: Qualified name.
        kind: Class of the float layer.
        shape: Of the weight.
        widths: Such as ``"w4a8"``; ``"float"`` where it stays float.
        parameters: Their number.
        macs: Multiply-accumulates of one sample.
        place: ``"first"`` or ``"last"`` in execution order; else empty.
        norm: The batch norm that is folded into it, if any.
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
        module: Its qualified name; empty for the root.
        operators: Names of the operators.
        macs: Multiply-accumulates of one sample; None if torch has no formula for them.
    """

    module: str
    operators: tuple[str, ...]
    macs: float | None


@dataclass(frozen=True)
class UnitFacts:
    """What is tuned at a time.

    Attributes:
        name: Qualified name of the block or layer.
        layers: Names of its layers.
        widths: Theirs, each once.
        steps: Optimisation steps.
        calls: How often it runs in one forward.
    """

    name: str
    layers: tuple[str, ...]
    widths: tuple[str, ...]
    steps: int
    calls: int


@dataclass(frozen=True)
class Preflight:
    """What was found about a module and a Trainer, before anything is tuned.

    Attributes:
        module: Class of the module.
        device: Where it is.
        batch_size: Samples of the batch that was run.
        samples: Calibration samples that the estimates are for.
        layers: Those of quantizable types, in execution order, those that did not run last.
        folded: The layer that each folded batch norm goes into.
        unfolded: Why the other batch norms stay.
        products: What stays float outside the layers.
        units: What sequential AdaQuant would tune.
        macs: Multiply-accumulates of one sample, in all.
        float_bytes: Of the float module's state.
        packed_bytes: Of the packed tensors.
        bops: Bit operations of the quantized layers, as a fraction of the same in float.
        plan: Memory and time of sequential AdaQuant; None if it cannot run (a hazard says why).
        warnings: What the library would warn of.
        hazards: What will go wrong, or otherwise than expected.
    """

    module: str
    device: str
    batch_size: int
    samples: int
    layers: list[LayerFacts]
    folded: dict[str, str]
    unfolded: dict[str, str]
    products: list[FloatProduct]
    units: list[UnitFacts]
    macs: float
    float_bytes: int
    packed_bytes: int
    bops: float
    plan: MemoryPlan | None = None
    warnings: list[Finding] = field(default_factory=list)
    hazards: list[Finding] = field(default_factory=list)

    @property
    def covered(self) -> float:
        """The share of all multiply-accumulates that is in quantized layers."""
        inside = sum(layer.macs for layer in self.layers if layer.status == "quantized")
        return inside / self.macs if self.macs else 0.0

    @property
    def uncounted(self) -> bool:
        """Whether anything ran that torch has no formula for; it is missing in all sums."""
        return any(product.macs is None for product in self.products)

    def percent(self, macs: float | None) -> float | None:
        """A part of all multiply-accumulates, for the tables."""
        return None if macs is None or not self.macs else round(100 * macs / self.macs, 2)

    def to_dict(self) -> dict[str, Any]:
        """As plain, JSON-able types."""
        return {**asdict(self), "covered": self.covered}

    def print(self, console: Console | None = None) -> None:
        """Print the tables, the overview last, next to the prompt."""
        console = console or Console()
        for sheet in reversed(self.sheets()):
            console.print(sheet.table())

    def sheets(self) -> list[Sheet]:
        """The tables, the most important first; those without rows are left out."""
        own = (_overview, _hazards, _warnings, _widths, _products, _norms, _units, _layers)
        return [sheet for sheet in (make(self) for make in own) if sheet.rows]


def _overview(found: Preflight) -> Sheet:
    quantized = [layer for layer in found.layers if layer.status == "quantized"]
    norms = len(found.folded) + len(found.unfolded)
    unknown = " of those that torch can count" if found.uncounted else ""
    steps = sum(unit.steps for unit in found.units)
    rows = [
        ("layers quantized", f"{len(quantized)} of {len(found.layers)}"),
        ("multiply-accumulates of one sample", f"{found.macs:,.0f}"),
        ("of them in quantized layers", f"{found.covered:.1%}{unknown}"),
        ("bit operations of these layers", f"{found.bops:.1%} of those in float"),
        ("batch norms folded", f"{len(found.folded)} of {norms}" if norms else "there are none"),
        ("size", f"{decimal(found.float_bytes)} in float, {decimal(found.packed_bytes)} packed"),
        ("units of AdaQuant", f"{len(found.units)}, with {steps:,} steps in all"),
        (f"AdaQuant on {found.samples:,} samples", str(found.plan) if found.plan else "does not fit; see the hazards"),
        ("warnings", str(len(found.warnings))),
        ("hazards", str(len(found.hazards))),
    ]
    title = f"Preflight: {found.module} on {found.device}, from a batch of {found.batch_size}"
    return Sheet("overview", title, ("what", "value"), rows, ESTIMATE if found.plan else "")


def _hazards(found: Preflight) -> Sheet:
    rows = [(hazard.category, hazard.message, hazard.remedy) for hazard in found.hazards]
    return Sheet("hazards", "Hazards", ("kind", "what", "what to do"), rows)


def _warnings(found: Preflight) -> Sheet:
    rows = [(warning.category, warning.message, warning.remedy) for warning in found.warnings]
    return Sheet("warnings", "Warnings", ("kind", "what", "what to do"), rows)


def _widths(found: Preflight) -> Sheet:
    parts: dict[str, tuple[int | None, float]] = {}
    for layer in found.layers:
        count, macs = parts.get(layer.widths, (0, 0.0))
        parts[layer.widths] = ((count or 0) + 1, macs + layer.macs)
    rest = found.macs - sum(macs for _, macs in parts.values())
    if found.products:
        parts["float, outside any layer"] = (None, rest)
    rows = [(widths, count, round(macs), found.percent(macs)) for widths, (count, macs) in parts.items()]
    return Sheet("widths", "Multiply-accumulates by widths", ("widths", "layers", "MACs", "MACs, %"), rows)


def _products(found: Preflight) -> Sheet:
    rows = [
        (row.module or found.module, ", ".join(row.operators), row.macs and round(row.macs), found.percent(row.macs))
        for row in found.products
    ]
    note = "Torch has no formula for those without MACs; they are missing in all sums." if found.uncounted else ""
    columns = ("module", "operators", "MACs", "MACs, %")
    return Sheet("products", "Computed outside any layer, so it stays float", columns, rows, note)


def _norms(found: Preflight) -> Sheet:
    return Sheet("norms", "Batch norms that stay", ("batch norm", "because"), list(found.unfolded.items()))


def _units(found: Preflight) -> Sheet:
    rows = [(unit.name, len(unit.layers), " ".join(unit.widths), unit.steps, unit.calls) for unit in found.units]
    return Sheet("units", "Units of AdaQuant", ("unit", "layers", "widths", "steps", "runs in a forward"), rows)


def _layers(found: Preflight) -> Sheet:
    columns = ("layer", "type", "weight", "widths", "parameters", "MACs", "MACs, %", "batch norm", "status")
    rows = [
        (
            row.name,
            row.kind,
            "x".join(map(str, row.shape)),
            row.widths,
            row.parameters,
            round(row.macs),
            found.percent(row.macs),
            row.norm,
            f"{row.status}, {row.place}" if row.place else row.status,
        )
        for row in found.layers
    ]
    return Sheet("layers", "Layers", columns, rows)
