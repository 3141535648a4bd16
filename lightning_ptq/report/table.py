"""A table that is made once, and shown by rich, CSV, HTML and loggers."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """Rows under named columns.

    Attributes:
        key: Short name, for files and loggers.
        title: Heading.
        columns: Their names, with units where there are any.
        rows: One value for each column: text, numbers, True or False, or None for nothing.
        note: A sentence below the table.

    Example:
        >>> sheet = Sheet("units", "Units", ("unit", "error", "kept"), [("conv", 0.01235, True)])
        >>> sheet.cells()
        [['conv', '0.01235', 'yes']]
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    note: str = ""

    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, and nothing else but gaps."""
        return [all(is_number(row[i]) or row[i] is None for row in self.rows) for i in range(len(self.columns))]

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[shown(value) for value in row] for row in self.rows]

    def table(self) -> Table:
        """For a rich console."""
        table = Table(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column, numbers in zip(self.columns, self.numeric(), strict=True):
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in self.cells():
            table.add_row(*row)
        return table

    def csv(self) -> str:
        """As comma-separated values; numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def is_number(value: Any) -> bool:
    """True for integers and floats, not for True and False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as text for people: four digits, thousands set apart.

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
