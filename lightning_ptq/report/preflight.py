"""The findings about a PTQ run before it starts, and their tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from lightning_ptq.activations.memory_plan import MemoryPlan
from lightning_ptq.report.facts import Finding, FloatParameters, FloatProduct, LayerFacts, UnitFacts
from lightning_ptq.report.table import ReportTable, print_tables
from lightning_ptq.runtime.memory import format_bytes

ESTIMATE = (
    "Sizes are upper bounds from the shapes; a run typically holds about 0.6 of them. The time is extrapolated from one"
    " forward of this batch on the present device, and correct within a factor of two or three."
)
"""Note on the accuracy of the estimates."""

_MOST = 3  # modules that the overview names


@dataclass(frozen=True)
class Preflight:
    """The findings about a module and a Trainer, before anything is tuned.

    Attributes:
        module: Class of the module.
        device: Device of the module.
        batch_size: Number of samples in the batch that was run.
        samples: Number of calibration samples that the estimates assume.
        layers: Layers of quantizable types in execution order, followed by those that did not run.
        folded: The layer that each folded batch norm goes into.
        unfolded: Why each other batch norm stays.
        products: Computations outside the layers, which stay float.
        units: Units of sequential AdaQuant.
        macs: Multiply-accumulates of the whole module for one sample.
        float_bytes: Bytes of the float module's tensors.
        packed_bytes: Bytes of the packed tensors.
        bops: Bit operations of the quantized layers, as a fraction of those at 32 bits.
        plan: Memory and time of sequential AdaQuant; None if it cannot run, which a hazard explains.
        warnings: Warnings that the run will raise.
        hazards: What will fail, or behave in an unexpected way.
        parameters: Number of parameters of the whole module; shared ones count once.
        float_parameters: Parameters that stay float, by module, most of them first. A quantized layer's bias and the
            parameters of folded batch norms are among them.
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
    parameters: int = 0
    float_parameters: list[FloatParameters] = field(default_factory=list)

    @property
    def covered(self) -> float:
        """Fraction of the multiply-accumulates that quantized layers compute, of those that torch can count."""
        inside = sum(layer.macs for layer in self.layers if layer.status == "quantized")
        return inside / self.macs if self.macs else 0.0

    @property
    def covered_parameters(self) -> float:
        """Fraction of all parameters that are quantized."""
        rest = sum(row.parameters for row in self.float_parameters)
        return 1 - rest / self.parameters if self.parameters else 0.0

    @property
    def uncounted(self) -> bool:
        """True if an operator ran that there is no formula for; all sums lack it."""
        return any(product.macs is None for product in self.products)

    def percent(self, macs: float | None) -> float | None:
        """Return multiply-accumulates in percent of those of the module; None if either is unknown."""
        return None if macs is None or not self.macs else round(100 * macs / self.macs, 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings in types that JSON knows."""
        return {**asdict(self), "covered": self.covered, "covered_parameters": self.covered_parameters}

    def print(self, console: Console | None = None) -> None:
        """Print the tables, the overview last, where it stays visible above the prompt.

        Args:
            console: Console to print to; by default standard output, with 140 columns or more if it is no terminal.
        """
        print_tables(reversed(self.tables()), console)

    def tables(self) -> list[ReportTable]:
        """Return the tables, the most important first, without those that have no rows."""
        builders = (_overview, _hazards, _warnings, _widths, _products, _norms, _units, _layers)
        return [table for table in (build(self) for build in builders) if table.rows]

    sheets = tables
    """Former name of :meth:`tables`."""


def _overview(preflight: Preflight) -> ReportTable:
    quantized = [layer for layer in preflight.layers if layer.status == "quantized"]
    norms = len(preflight.folded) + len(preflight.unfolded)
    countable = " of those that torch can count" if preflight.uncounted else ""
    missing = sorted({name for row in preflight.products if row.macs is None for name in row.operators})
    steps = sum(unit.steps for unit in preflight.units)
    sizes = format_bytes(preflight.float_bytes), format_bytes(preflight.packed_bytes)
    plan = str(preflight.plan) if preflight.plan else "does not fit; see the hazards"
    rows = [
        ("layers quantized", f"{len(quantized)} of {len(preflight.layers)}"),
        ("multiply-accumulates for one sample", f"{preflight.macs:,.0f}"),
        ("share in quantized layers", f"{_percent(preflight.covered)}{countable}"),
        *([("operators not counted", ", ".join(missing))] if missing else []),
        ("parameters", f"{preflight.parameters:,}"),
        ("share of the parameters that is quantized", _percent(preflight.covered_parameters)),
        *([("float parameters are in", _where(preflight))] if preflight.float_parameters else []),
        ("bit operations of quantized layers", f"{preflight.bops:.1%} of those in float"),
        ("batch norms folded", f"{len(preflight.folded)} of {norms}" if norms else "there are none"),
        ("size", f"{sizes[0]} in float, {sizes[1]} packed"),
        ("units of AdaQuant", f"{len(preflight.units)}, with {steps:,} steps in total"),
        (f"AdaQuant on {preflight.samples:,} samples", plan),
        ("warnings", str(len(preflight.warnings))),
        ("hazards", str(len(preflight.hazards))),
    ]
    title = f"Preflight: {preflight.module} on {preflight.device}, from a batch of {preflight.batch_size}"
    return ReportTable("overview", title, ("quantity", "value"), rows, ESTIMATE if preflight.plan else "")


def _percent(share: float) -> str:
    """Return a share as text that says neither 0 nor 100 % of something close to it."""
    return f"{share:.1%}" if share in (0, 1) or 0.001 <= share < 0.999 else f"{share:.3%}"


def _where(preflight: Preflight) -> str:
    """Name the modules with the most float parameters."""
    rows = preflight.float_parameters
    named = [
        f"{row.module or preflight.module} ({row.kind}, {_percent(row.parameters / preflight.parameters)})"
        for row in rows[:_MOST]
    ]
    return ", ".join(named) + (f", and {len(rows) - _MOST} other modules" if len(rows) > _MOST else "")


def _hazards(preflight: Preflight) -> ReportTable:
    return _findings("hazards", "Hazards", preflight.hazards)


def _warnings(preflight: Preflight) -> ReportTable:
    return _findings("warnings", "Warnings", preflight.warnings)


def _findings(key: str, title: str, findings: list[Finding]) -> ReportTable:
    rows = [(finding.category, finding.message, finding.remedy) for finding in findings]
    return ReportTable(key, title, ("kind", "message", "remedy"), rows)


def _widths(preflight: Preflight) -> ReportTable:
    groups: dict[str, tuple[int, float]] = {}
    for layer in preflight.layers:
        count, macs = groups.get(layer.widths, (0, 0.0))
        groups[layer.widths] = count + 1, macs + layer.macs
    rows: list[tuple[Any, ...]] = [
        (widths, count, round(macs), preflight.percent(macs)) for widths, (count, macs) in groups.items()
    ]
    if any(product.macs for product in preflight.products):
        rest = preflight.macs - sum(macs for _, macs in groups.values())
        rows.append(("float, outside any layer", None, round(rest), preflight.percent(rest)))
    columns = ("bit widths", "layers", "MACs", "MACs, %")
    return ReportTable("widths", "Multiply-accumulates by bit widths", columns, rows)


def _products(preflight: Preflight) -> ReportTable:
    rows = [
        (
            row.module or preflight.module,
            ", ".join(row.operators),
            row.macs and round(row.macs),
            preflight.percent(row.macs),
        )
        for row in preflight.products
    ]
    note = "torch has no formula for operators without MACs; all sums lack them." if preflight.uncounted else ""
    columns = ("module", "operators", "MACs", "MACs, %")
    return ReportTable("products", "Computed in float, outside any layer", columns, rows, note)


def _norms(preflight: Preflight) -> ReportTable:
    rows = list(preflight.unfolded.items())
    return ReportTable("norms", "Batch norms that are not folded", ("batch norm", "reason"), rows)


def _units(preflight: Preflight) -> ReportTable:
    rows = [(unit.name, len(unit.layers), " ".join(unit.widths), unit.steps, unit.calls) for unit in preflight.units]
    columns = ("unit", "layers", "bit widths", "steps", "calls per forward")
    return ReportTable("units", "Units of AdaQuant", columns, rows)


def _layers(preflight: Preflight) -> ReportTable:
    columns = ("layer", "type", "weight", "bit widths", "parameters", "MACs", "MACs, %", "batch norm", "status")
    rows = [
        (
            row.name,
            row.kind,
            "x".join(map(str, row.shape)),
            row.widths,
            row.parameters,
            round(row.macs),
            preflight.percent(row.macs),
            row.norm,
            f"{row.status}, {row.place}" if row.place else row.status,
        )
        for row in preflight.layers
    ]
    return ReportTable("layers", "Layers", columns, rows)
