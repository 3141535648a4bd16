"""PTQReport: the record of a run, printed and saved."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lightning_ptq.errors import PTQWarning, ReportWarning, warn
from lightning_ptq.report.headline import headline
from lightning_ptq.report.page import INSTALL, html_page
from lightning_ptq.report.plots import Plot, all_plots
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import ReportTable, default_console, print_tables
from lightning_ptq.report.tables import all_tables
from lightning_ptq.report.verdict import Statement, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BRIEF = ("metrics", "summary", "stages", "warnings", "trials", "layers")  # tables that are printed by default


class PTQReport(RunRecord):
    """The record of a run as tables, plots and files.

    ``CalibrationCapture.report`` is the report of the last ``trainer.fit``. Without a Trainer, fill a report by hand:

    Example:
        >>> import torch
        >>> from lightning_ptq import adaquant, calibrate
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = PTQReport("my net")
        >>> with report.stage("calibration"):
        ...     calibration = calibrate(net, [torch.randn(16, 4)], "w4a8")
        >>> report.calibrated(calibration)
        >>> with report.stage("AdaQuant"):
        ...     report.tuning["AdaQuant"] = adaquant(calibration)
        >>> report.finish(calibration)
        >>> [table.key for table in report.tables()]
        ['summary', 'stages', 'layers', 'units_adaquant']
    """

    def headline(self) -> str:
        """Return the result in one line, the metric first.

        Example:
            >>> PTQReport("net", float_bytes=6_700, packed_bytes=1_000).headline()
            '6.7 times smaller'
        """
        return headline(self)

    def verdict(self) -> list[Statement]:
        """Return what the figures say in one to four statements, with code where there is a remedy."""
        return verdict(self)

    def tables(self) -> list[ReportTable]:
        """Return the tables, without those of stages that did not run."""
        return all_tables(self)

    sheets = tables
    """Former name of :meth:`tables`."""

    def plots(self) -> dict[str, Plot]:
        """Return the plots as plain data, by key."""
        return all_plots(self)

    def figures(self) -> dict[str, Figure]:
        """Return the plots as matplotlib figures, by key.

        Warns:
            ReportWarning: If matplotlib is not installed; there are no plots then.
        """
        if importlib.util.find_spec("matplotlib") is None:
            warn(
                f"matplotlib is not installed, so no PNG files were drawn. Run {INSTALL}.", ReportWarning, stacklevel=2
            )
            return {}
        from lightning_ptq.report.figures import draw

        return {key: draw(plot) for key, plot in self.plots().items()}

    def pictures(self) -> dict[str, bytes]:
        """Return the plots as PNG files, by key."""
        return {key: png(figure) for key, figure in self.figures().items()}

    def print(self, console: Console | None = None, every: bool = False) -> None:
        """Print the result, what it means, and the tables of metrics, summary, stages, warnings, trials and layers.

        Args:
            console: Console to print to; by default standard output, with 140 columns or more if it is no terminal.
            every: True to print all other tables too.
        """
        lines = console or default_console()
        lines.print(Text(f"{self.model}: {self.headline()}", style="bold"))
        for statement in self.verdict():
            lines.print(Text(f"- {statement}"))
        print_tables([table for table in self.tables() if every or table.key in _BRIEF], console)

    def to_dict(self) -> dict[str, Any]:
        """Return headline, verdict, summary and record in types that JSON knows; NaN and infinities become None."""
        fields: dict[str, Any] = plain(self)
        heading = {"headline": self.headline(), "verdict": plain(self.verdict()), "summary": plain(self.summary())}
        return {**heading, **fields}

    def save(self, folder: str | os.PathLike[str], pictures: Mapping[str, bytes] | None = None) -> Path:
        """Write ``report.json``, a CSV file for each table, a PNG file for each plot, and ``report.html``.

        The page contains all tables and plots and loads nothing from the network. Its plots are interactive if plotly
        is installed, and pictures otherwise.

        Args:
            folder: Folder to write to, created if it does not exist; existing files are overwritten.
            pictures: What :meth:`pictures` returned, so that the plots are not drawn again.

        Returns:
            The path of the page.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = self.pictures() if pictures is None else pictures
        for key, picture in pictures.items():
            (folder / f"{key}.png").write_bytes(picture)
        for table in self.tables():
            (folder / f"{table.key}.csv").write_text(table.csv(), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(html_page(self, pictures), encoding="utf-8")
        return page


def png(figure: Figure, dpi: int = 90) -> bytes:
    """Return a figure as the bytes of a PNG file.

    Args:
        figure: A matplotlib figure.
        dpi: Pixels per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """Return a nested structure in types that JSON knows; values of other types become text.

    Tuned states are left out, as they hold tensors.
    """
    if isinstance(value, PTQWarning):
        return {"kind": type(value).__name__, "message": str(value), "remedy": value.remedy}
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__ if name != "states"}
        return {name: plain(item) for name, item in fields.items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
