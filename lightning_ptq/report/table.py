"""Tables of the report: built once, and written to the console, CSV, HTML and loggers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ptq.runtime.memory import format_bytes

_BYTES = ", bytes"
_WIDTH = 140  # columns of an output that is no terminal, at least
_LONG = 24  # characters from which a text with spaces is prose
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(frozen=True)
class ReportTable:
    """Rows of values below named columns.

    A quantity whose name ends in ``", bytes"`` is a size. CSV files and loggers get its number; people see it with a
    unit, as in ``1.2 MB``, and its name without that ending. Where the name contains the word "share", people see
    percent.

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

    def prose(self) -> list[bool]:
        """Return, for each column, True if it holds texts of several words, which may be wrapped between them."""
        return [any(" " in text and len(text) > _LONG for text in column) for column in zip(*self.cells(), strict=True)]

    def least_width(self) -> int:
        """Return the number of columns that a console needs so that the table breaks no name."""
        return sum(least for least, _ in self._widths()) + 3 * len(self.columns) + 1

    def _widths(self) -> list[tuple[int, int]]:
        """Return for each column the width that breaks no name, and the one that wraps no text."""
        columns = zip(self.headings(), *self.cells(), strict=True)
        return [
            (
                max(len(part) for text in column for part in (text.split() if prose else [text]) or [""]),
                max(map(len, column)),
            )
            for column, prose in zip(columns, self.prose(), strict=True)
        ]

    def _shared_out(self, width: int) -> list[int | None]:
        """Return the width of each column on a console; None where the console is too narrow for whole names.

        Rich narrows the widest columns first, without regard for their words.
        """
        widths, room = self._widths(), width - self.least_width()
        found: list[int | None] = [None] * len(widths)
        # Columns that need little more than their words get it, and the others share the rest.
        order = sorted(range(len(widths)), key=lambda i: widths[i][1] - widths[i][0]) if room >= 0 else []
        for left, i in zip(range(len(order), 0, -1), order, strict=True):
            least, most = widths[i]
            extra = min(most - least, room // left)
            found[i], room = least + extra, room - extra
        return found

    def to_rich(self, width: int | None = None) -> Table:
        """Return the table for a rich console.

        Args:
            width: Columns of the console. From :meth:`least_width` on, no name is broken; below, and without it, the
                table takes the room there is.
        """
        note = Text(self.note) if self.note else None
        table = Table(title=Text(self.title), caption=note, title_justify="left", caption_justify="left")
        exact = self._shared_out(width or 0)
        for heading, numbers, columns in zip(self.headings(), self.numeric(), exact, strict=True):
            table.add_column(Text(heading), justify="right" if numbers else "left", overflow="fold", width=columns)
        for row in self.cells():
            table.add_row(*map(Text, row))  # brackets in names and messages are no markup
        return table

    def csv(self) -> str:
        """Return comma-separated values, with all digits of the numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def default_console() -> Console:
    """Return a console on standard output, as wide as the terminal, or 140 columns where there is none."""
    console = Console()
    if not console.is_terminal and not console.is_jupyter:
        console.width = max(_WIDTH, console.width)
    return console


def print_tables(tables: Iterable[ReportTable], console: Console | None = None) -> None:
    """Print tables with whole names where the console is wide enough.

    Args:
        tables: The tables.
        console: Console to print to; by default standard output, which is made as wide as the names need if it is no
            terminal.
    """
    own, console = console is None, console or default_console()
    for table in tables:
        least, usual = table.least_width(), console.width
        if own and not console.is_terminal and not console.is_jupyter:
            console.width = max(usual, least)
        console.print(table.to_rich(console.width))
        console.width = usual


def plural(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> plural(1, "warning"), plural(2, "warning"), plural(2, "process")
        ('1 warning', '2 warnings', '2 processes')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def is_number(value: Any) -> bool:
    """Return True for integers and floats, but not for True and False."""
    # In Python, True and False are integers.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _quantity(name: str, value: Any) -> str:
    if name.endswith(_BYTES) and is_number(value):
        return format_bytes(value)
    if isinstance(value, float) and math.isfinite(value) and "share" in name.split():
        return f"{value:.1%}"
    return shown(value)


def shown(value: Any) -> str:
    """Return a value as text for people: four significant digits, from a million on with a prefix.

    Example:
        >>> shown(12345678), shown(123456), shown(0.000123456), shown(True), shown(None), shown(2.0)
        ('12.35 M', '123,456', '0.0001235', 'yes', '', '2')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    for factor, prefix in _PREFIXES if math.isfinite(value) else ():
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"
