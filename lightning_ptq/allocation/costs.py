"""Costs of a choice of bit widths: packed bytes, bit operations, or a table of the user's own."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ptq.arguments import is_number
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates, Choice
from lightning_ptq.calibration.layer_costs import float_bytes, layer_work
from lightning_ptq.errors import AllocationError

Table = Mapping[str, Mapping[str, float]]
"""A number for each layer and candidate."""


@dataclass(frozen=True)
class Cost:
    """A cost per layer and candidate.

    Attributes:
        name: Name of the cost, for example ``"size"``.
        values: Cost by layer and candidate, 0 or more. An infinite cost forbids the candidate.
        fixed: Cost of the rest of the model, which no choice changes; it counts in every budget.
        of_float: Cost of the float model, to which budgets of at most 1 are relative; None if unknown.
        unit: Unit for tables and messages.
    """

    name: str
    values: Table
    fixed: float = 0.0
    of_float: float | None = None
    unit: str = ""

    def limit(self, budget: float) -> float:
        """Return a budget in the cost's unit.

        Args:
            budget: A value in the cost's unit, or a fraction (at most 1) of the float model's cost if that is known.

        Raises:
            AllocationError: If the budget is not a positive number.
        """
        if not (is_number(budget) and math.isfinite(budget) and budget > 0):
            raise AllocationError(f"the budget for {self.name} must be a positive number, got {budget!r}.")
        return float(budget * self.of_float if self.of_float is not None and budget <= 1 else budget)

    def total(self, choice: Choice) -> float:
        """Return the cost of a choice, including :attr:`fixed`."""
        return self.fixed + sum(self.values[name][candidate] for name, candidate in choice.items())


def size_cost(calibration: Calibration, choices: Candidates) -> Cost:
    """Return the bytes of the tensors in the packed file: packed integers, scales, zero points, and float tensors.

    Bytes are computed from shapes; nothing is packed. The file's header, about 300 bytes per layer, is not included.

    Args:
        calibration: A calibrated module.
        choices: The candidates.
    """
    values = {
        name: {text: float(layer.packed_bytes(pair.weight)) for text, pair in choices.by_layer[name].items()}
        for name, layer in calibration.layers.items()
    }
    return Cost("size", values, float_bytes(calibration.module), calibration.prepared.float_bytes, "bytes")


def bops_cost(calibration: Calibration, choices: Candidates) -> Cost:
    """Return the bit operations of one sample: multiply-accumulates times the bit widths of both operands.

    Float tensors count as 32 bits.

    Args:
        calibration: A calibrated module.
        choices: The candidates.
    """
    macs = multiply_accumulates(calibration)
    values = {
        name: {text: layer.bit_operations(macs[name], pair) for text, pair in choices.by_layer[name].items()}
        for name, layer in calibration.layers.items()
    }
    of_float = sum(layer.bit_operations(macs[name]) for name, layer in calibration.layers.items())
    return Cost("bops", values, 0.0, of_float, "bit operations")


def multiply_accumulates(calibration: Calibration) -> dict[str, float]:
    """Return the multiply-accumulates of each layer for one sample, from the shapes in one calibration forward."""
    return {name: work.macs for name, work in layer_work(calibration).items()}


def table_cost(name: str, table: Table | str | os.PathLike[str], choices: Candidates) -> Cost:
    """Return the cost that a table of the user's describes.

    Args:
        name: Name of the cost.
        table: Cost by layer and candidate, or a CSV file with a column ``layer`` and a column per candidate. Infinity
            (``inf`` in a file) forbids a candidate.
        choices: The candidates; the table may have more of them, and more layers.

    Raises:
        FileNotFoundError: If there is no such file.
        AllocationError: If a layer or candidate is missing, or a value is negative or not a number.
    """
    check_table(table)
    rows = table if isinstance(table, Mapping) else _read_csv(Path(table))
    values: dict[str, dict[str, float]] = {}
    for layer, candidates in choices.by_layer.items():
        if layer not in rows:
            shown = ", ".join(map(str, list(rows)[:8]))
            raise AllocationError(f"the {name} table has no layer {layer!r}. Its layers: {shown}.")
        if missing := [candidate for candidate in candidates if candidate not in rows[layer]]:
            raise AllocationError(f"the {name} table has no {missing} for layer {layer!r}, only {list(rows[layer])}.")
        values[layer] = {
            candidate: _cost_of(name, layer, candidate, rows[layer][candidate]) for candidate in candidates
        }
    return Cost(name, values)


def check_table(table: Any) -> None:
    """Raise :class:`AllocationError` unless ``table`` is a table of costs, or the name of a file."""
    if isinstance(table, (str, os.PathLike)):
        return
    if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
        raise AllocationError(
            f"a table must be a CSV file or a dictionary of costs by layer and candidate, got {table!r:.200}. Write for"
            " example {'head': {'w8a8': 1.5, 'w4a4': 0.9}}."
        )


def _cost_of(name: str, layer: str, candidate: str, value: Any) -> float:
    with suppress(TypeError, ValueError, RuntimeError):  # texts of numbers and tensors of one element are numbers too
        if not isinstance(value, bool) and float(value) >= 0:
            return float(value)
    raise AllocationError(
        f"the {name} table has {value!r} for layer {layer!r} at {candidate}. Write a number of 0 or more, or infinity"
        " to forbid the candidate."
    )


def _read_csv(path: Path) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Write a CSV file with the columns layer, w8a8, ...")
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "layer" not in (reader.fieldnames or ()):
                raise AllocationError(
                    f"{path} has the columns {reader.fieldnames}. One must be 'layer', the others candidates, for"
                    " example 'w8a8'."
                )
            for row in reader:
                layer = row.pop("layer")
                # An empty cell means that the layer does not have the candidate.
                rows[layer] = {candidate: float(text) for candidate, text in row.items() if text not in (None, "")}
    except (ValueError, TypeError, csv.Error) as error:
        if isinstance(error, AllocationError):
            raise
        raise AllocationError(f"{path} has a value that is not a number ({error}). Write numbers only.") from error
    return rows
