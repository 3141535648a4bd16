"""PTQReport: the record of a run, printed and saved."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from rich.console import Console

from lightning_ptq.errors import PTQWarning, ReportWarning, warn
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import Sheet, is_number, shown
from lightning_ptq.report.tables import all_sheets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BRIEF = ("summary", "stages", "warnings", "layers")


class PTQReport(RunRecord):
    """What a run did: tables, drawings, and files of both.

    ``CalibrationCapture.report`` holds that of the last ``trainer.fit``. Without a Trainer it is filled by hand:

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
        >>> [sheet.key for sheet in report.sheets()]
        ['summary', 'stages', 'layers', 'units_adaquant']
    """

    def sheets(self) -> list[Sheet]:
        """The tables."""
        return all_sheets(self)

    def figures(self) -> dict[str, Figure]:
        """The drawings by key; none, and a :class:`ReportWarning`, if matplotlib is not installed."""
        if importlib.util.find_spec("matplotlib") is None:
            warn("no plots were drawn, for matplotlib is not installed.", ReportWarning, stacklevel=2)
            return {}
        from lightning_ptq.report.figures import all_figures

        return all_figures(self)

    def pictures(self) -> dict[str, bytes]:
        """The drawings as PNG files."""
        return {key: png(figure) for key, figure in self.figures().items()}

    def print(self, console: Console | None = None, every: bool = False) -> None:
        """Print the summary, the stages, the warnings and a row for each layer.

        Args:
            console: Where to; standard output by default.
            every: Print all other tables too.
        """
        console = console or Console()
        for sheet in self.sheets():
            if every or sheet.key in _BRIEF:
                console.print(sheet.table())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types that JSON knows; NaN becomes None."""
        found: dict[str, Any] = plain(self)
        return {"summary": plain(self.summary()), **found}

    def save(self, folder: str | os.PathLike[str], pictures: Mapping[str, bytes] | None = None) -> Path:
        """Write ``report.json``, a CSV file for each table, a PNG file for each drawing, and ``report.html``.

        The page holds all tables and drawings in itself and needs no network.

        Args:
            folder: Made if it is not there; files of the same names are replaced.
            pictures: What :meth:`pictures` returned, if the drawings are there already.

        Returns:
            The path of the page.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = self.pictures() if pictures is None else pictures
        for key, picture in pictures.items():
            (folder / f"{key}.png").write_bytes(picture)
        for sheet in self.sheets():
            (folder / f"{sheet.key}.csv").write_text(sheet.csv(), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self._page(pictures), encoding="utf-8")
        return page

    def _page(self, pictures: Mapping[str, bytes]) -> str:
        environment = Environment(
            loader=PackageLoader("lightning_ptq", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.globals.update(shown=shown, is_number=is_number)
        sheets = {sheet.key: sheet for sheet in self.sheets()}
        inline = {key: base64.b64encode(picture).decode() for key, picture in pictures.items()}
        return environment.get_template("page.html").render(report=self, sheets=sheets, pictures=inline)


def png(figure: Figure, dpi: int = 90) -> bytes:
    """A drawing as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """A nested structure in the types of JSON; what it does not know becomes text, tensors are left out."""
    if isinstance(value, PTQWarning):
        return {"kind": type(value).__name__, "message": str(value), "remedy": value.remedy}
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__ if name != "states"}
        return {name: plain(found) for name, found in fields.items()}
    if isinstance(value, dict):
        return {str(key): plain(found) for key, found in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(found) for found in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
