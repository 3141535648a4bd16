"""What a choice of widths costs: weight bytes, bit operations, or any table of the user's."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Choices
from lightning_ptq.calibration.layer_costs import layer_work, packed_bytes
from lightning_ptq.errors import AllocationError
from lightning_ptq.export.packed import packed_tensors
from lightning_ptq.numerics.qconfig import LayerQConfig

Table = Mapping[str, Mapping[str, float]]
"""A number for each layer and candidate."""

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Cost:
    """A cost per layer and candidate.

    Attributes:
        name: What it is, for example ``"size"``.
        values: By layer and candidate, 0 or more.
        fixed: What the rest of the model costs, whatever is chosen; it counts in every budget.
        of_float: Cost of the float model, of which a budget may be a fraction; None if unknown.
        unit: For tables and messages.
    """

    name: str
    values: Table
    fixed: float = 0.0
    of_float: float | None = None
    unit: str = ""

    def limit(self, budget: float) -> float:
        """A budget in the cost's own unit; one of at most 1 is a fraction of the float model's cost, if known.

        Raises:
            AllocationError: If the budget is not a positive number.
        """
        if not (isinstance(budget, (int, float)) and math.isfinite(budget) and budget > 0):
            raise AllocationError(f"the budget for {self.name} must be a positive number, got {budget!r}.")
        return budget * self.of_float if self.of_float is not None and budget <= 1 else float(budget)

    def total(self, choice: Mapping[str, str]) -> float:
        """The cost of a choice, ``fixed`` included."""
        return self.fixed + sum(self.values[name][candidate] for name, candidate in choice.items())


def size_cost(calibration: Calibration, choices: Choices) -> Cost:
    """Bytes of the packed tensors: integers at their width, scales, zero points, and all that stays float.

    The packed file adds its header to it, some 300 bytes a layer.
    """
    layers = calibration.layers
    values = {
        name: {text: float(packed_bytes(layer, pair.weight)) for text, pair in choices.of[name].items()}
        for name, layer in layers.items()
    }
    now = sum(packed_bytes(layer, layer.weight_fake_quant.spec) for layer in layers.values() if layer.weight_fake_quant)
    whole = sum(t.numel() * t.element_size() for t in packed_tensors(calibration.module)[0].values())
    return Cost("size", values, whole - now, calibration.prepared.float_bytes, "bytes")


def bops_cost(calibration: Calibration, choices: Choices) -> Cost:
    """Bit operations of one sample: weight bits x activation bits x multiply-accumulates; float counts as 32 bits."""
    macs = multiply_accumulates(calibration)
    values = {
        name: {text: bit_operations(macs[name], pair) for text, pair in own.items()} for name, own in choices.of.items()
    }
    return Cost("bops", values, 0.0, bit_operations(sum(macs.values()), None), "bit operations")


def bit_operations(macs: float, pair: LayerQConfig | None) -> float:
    """Bit operations of so many multiply-accumulates at a pair of widths; None for float."""
    weight = pair.weight.bits if pair else _FLOAT_BITS
    activation = pair.activation.bits if pair and pair.activation else _FLOAT_BITS
    return macs * weight * activation


def multiply_accumulates(calibration: Calibration) -> dict[str, float]:
    """Multiply-accumulates of each layer for one sample, from the shapes in one calibration forward."""
    return {name: work.macs for name, work in layer_work(calibration).items()}


def table_cost(name: str, table: Table | str | os.PathLike[str], choices: Choices) -> Cost:
    """A table of the user's: a mapping of layer to candidate to cost, or a CSV file with the columns layer, w8a8, ...

    Raises:
        FileNotFoundError: If there is no such file.
        AllocationError: If a layer or candidate is missing, or a value is negative or no number.
    """
    rows = table if isinstance(table, Mapping) else _read_csv(Path(table))
    values: dict[str, dict[str, float]] = {}
    for layer, own in choices.of.items():
        if layer not in rows:
            raise AllocationError(f"the {name} table has no layer {layer!r}. Its layers: {', '.join(list(rows)[:8])}.")
        if missing := [candidate for candidate in own if candidate not in rows[layer]]:
            raise AllocationError(f"the {name} table has no {missing} for layer {layer!r}, only {list(rows[layer])}.")
        values[layer] = {candidate: float(rows[layer][candidate]) for candidate in own}
        for candidate, value in values[layer].items():
            if not (math.isfinite(value) and value >= 0):
                raise AllocationError(
                    f"the {name} table has {value} for layer {layer!r} at {candidate}. Write a number of 0 or more."
                )
    return Cost(name, values)


def _read_csv(path: Path) -> dict[str, dict[str, float]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "layer" not in (reader.fieldnames or ()):
            raise AllocationError(
                f"{path} has the columns {reader.fieldnames}. One must be 'layer', the others widths."
            )
        try:
            return {row.pop("layer"): {k: float(v) for k, v in row.items() if v not in (None, "")} for row in reader}
        except ValueError as error:
            raise AllocationError(f"{path} holds a value that is no number ({error}).") from error
