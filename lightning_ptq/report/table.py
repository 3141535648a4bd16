"""Tables of the report: built once, and written to the console, CSV, HTML and loggers."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lightning_ptq.runtime.memory import format_bytes

_BYTES = ", bytes"


@dataclass(frozen=True)
class ReportTable:
    """Rows of values below named columns.

    A quantity whose name ends in ``", bytes"`` is a size. CSV files and loggers get its number; people see it with a
    unit, as in ``1.2 MB``, and its name without that ending.

    Attributes:
        key: Short name, for files and loggers.
        title: Heading of the table.
        columns: Names of the columns, with units.
        rows: One value per column: text, a number, True or False, or None for an empty cell.
        note: Sentence below the table.
        named_rows: True if each row is a quantity, a name and a value, so that rows and not columns name the units.

    Example:
        >>> table = ReportTable("units", "Units", ("unit", "error", "size, bytes"), [("conv", 0.01235, 1_234_567)])
        >>> table.headings(), table.cells()
        (['unit', 'error', 'size'], [['conv', '0.01235', '1.2 MB']])
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    note: str = ""
    named_rows: bool = False

    def numeric(self) -> list[bool]:
        """Return, for each column, True if it holds numbers and empty cells only."""
        return [all(is_number(row[i]) or row[i] is None for row in self.rows) for i in range(len(self.columns))]

    def headings(self) -> list[str]:
        """Return the names of the columns as people see them."""
        return [column.removesuffix(_BYTES) for column in self.columns]

    def cells(self) -> list[list[str]]:
        """Return the rows as text for people."""
        if self.named_rows:
            return [[name.removesuffix(_BYTES), _quantity(name, value)] for name, value in self.rows]
        return [[_quantity(*pair) for pair in zip(self.columns, row, strict=True)] for row in self.rows]

    def to_rich(self) -> Table:
        """Return the table for a rich console."""
        table = Table(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for heading, numbers in zip(self.headings(), self.numeric(), strict=True):
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
        for row in self.cells():
            table.add_row(*row)
        return table

    def csv(self) -> str:
        """Return comma-separated values, with all digits of the numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def is_number(value: Any) -> bool:
    """Return True for integers and floats, but not for True and False."""
    # In Python, True and False are integers.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _quantity(name: str, value: Any) -> str:
    return format_bytes(value) if name.endswith(_BYTES) and is_number(value) else shown(value)


def shown(value: Any) -> str:
    """Return a value as text for people: four significant digits, thousands separated by commas.

    Example:
        >>> shown(12345678), shown(0.000123456), shown(True), shown(None), shown(2.0)
        ('12,345,678', '0.0001235', 'yes', '', '2')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
