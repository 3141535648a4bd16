"""The run in Lightning's loggers: scalars in all of them, tables and drawings in those that can show them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lightning_ptq.report import PTQReport, Sheet
from lightning_ptq.report.record import Histogram
from lightning_ptq.report.table import shown
from lightning_ptq.tuning.reconstruct import UnitResult


def log_settings(trainer: Any, report: PTQReport) -> None:
    """The settings of all callbacks, as hyperparameters under ``ptq``."""
    for logger in trainer.loggers:
        logger.log_hyperparams({"ptq": report.settings})


def log_scalars(trainer: Any, values: Mapping[str, float], step: int | None = None) -> None:
    """Numbers, to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


_POINTS = 20  # of a unit's curve; each is a call of every logger


class UnitScalars:
    """Errors and tuning curve of one unit after the other, as they come.

    Args:
        trainer: Its loggers are written to.
        key: Of the stage: scalars are ``ptq/KEY/error_before``, ``error_after`` and ``accepted`` by unit, and
            ``ptq/KEY/loss`` by optimisation step, counted over all units.
    """

    def __init__(self, trainer: Any, key: str) -> None:
        self.trainer, self.key = trainer, key
        self.units = self.steps = 0

    def log(self, row: UnitResult) -> None:
        """Log a unit."""
        for step, loss in row.curve[:: -(-len(row.curve) // _POINTS)] if row.curve else ():
            log_scalars(self.trainer, {f"ptq/{self.key}/loss": loss}, self.steps + step)
        values = {"error_before": row.error_before, "error_after": row.error_after, "accepted": float(row.accepted)}
        log_scalars(self.trainer, {f"ptq/{self.key}/{name}": value for name, value in values.items()}, self.units)
        self.units, self.steps = self.units + 1, self.steps + row.steps


def log_ranges(trainer: Any, report: PTQReport) -> None:
    """A histogram of each layer's weights and inputs."""
    found = {
        f"ptq/range/{row.name}/{kind}": histogram
        for row in report.layers
        for kind, histogram in (("weights", row.weights), ("inputs", row.inputs))
        if histogram is not None
    }
    for logger in _rank_zero(trainer):
        _log_histograms(logger, found)


def log_sheets(trainer: Any, sheets: Iterable[Sheet]) -> None:
    """Tables, to the loggers that show them."""
    for logger in _rank_zero(trainer):
        for sheet in sheets:
            _log_sheet(logger, sheet)


def shows_pictures(trainer: Any) -> bool:
    """Whether any of the loggers shows drawings."""
    return any(_shows_pictures(logger) for logger in _rank_zero(trainer))


def log_end(trainer: Any, report: PTQReport, pictures: Mapping[str, bytes]) -> None:
    """What stands at the end only: the figures of the summary, the remaining tables, all drawings."""
    summary = {f"ptq/run/{name}": value for name, value in report.summary().items() if not isinstance(value, str)}
    log_scalars(trainer, summary)
    log_sheets(
        trainer, [sheet for sheet in report.sheets() if sheet.key in ("summary", "stages", "warnings", "layers")]
    )
    for logger in _rank_zero(trainer):
        for key, picture in pictures.items() if _shows_pictures(logger) else ():
            _log_picture(logger, f"ptq/{key}_plot", picture)


def _rank_zero(trainer: Any) -> list[Any]:
    return list(trainer.loggers) if trainer.is_global_zero else []


def _is(logger: Any, name: str) -> bool:
    """By name, for each of Lightning's two packages has classes of its own, and both import theirs lazily."""
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def _shows_pictures(logger: Any) -> bool:
    return hasattr(logger, "log_image") or _is(logger, "TensorBoardLogger")


def _log_sheet(logger: Any, sheet: Sheet) -> None:
    if hasattr(logger, "log_table"):
        numeric = sheet.numeric()
        rows = [[v if n else shown(v) for v, n in zip(row, numeric, strict=True)] for row in sheet.rows]
        logger.log_table(f"ptq/{sheet.key}", columns=list(sheet.columns), data=rows)
    elif _is(logger, "TensorBoardLogger"):
        lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.cells()]
        text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        logger.experiment.add_text(f"ptq/{sheet.key}", f"{text}\n\n{sheet.note}")


def _log_picture(logger: Any, key: str, picture: bytes) -> None:
    from PIL import Image  # matplotlib, which drew the picture, brings it

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if hasattr(logger, "log_image"):
        logger.log_image(key, [image])
    else:
        logger.experiment.add_image(key, np.asarray(image), dataformats="HWC")


def _log_histograms(logger: Any, histograms: Mapping[str, Histogram]) -> None:
    arrays = {key: (np.asarray(found.counts), np.asarray(found.edges)) for key, found in histograms.items()}
    if _is(logger, "WandbLogger"):
        import wandb

        logger.experiment.log({key: wandb.Histogram(np_histogram=pair) for key, pair in arrays.items()})
    elif _is(logger, "TensorBoardLogger"):
        for key, (counts, edges) in arrays.items():
            centres = (edges[1:] + edges[:-1]) / 2
            logger.experiment.add_histogram_raw(
                key, min=edges[0], max=edges[-1], num=counts.sum(), sum=(counts * centres).sum(),
                sum_squares=(counts * centres**2).sum(), bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
            )  # fmt: skip
