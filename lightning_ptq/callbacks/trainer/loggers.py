"""Logging to Lightning's loggers: scalars to all, tables and plots to W&B, TensorBoard and MLflow.

Names are lower-case words joined by underscores, in paths such as ``ptq/run/packed_bytes``, as every logger takes them.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lightning_ptq.report import PTQReport, ReportTable
from lightning_ptq.report.record import Histogram
from lightning_ptq.report.table import shown
from lightning_ptq.tuning.reconstruct import UnitResult

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.loggers import Logger

_POINTS = 20  # most points of a unit's curve; each is a call of every logger


def log_settings(trainer: Trainer, report: PTQReport) -> None:
    """Log the settings of all callbacks as hyperparameters under ``ptq``."""
    for logger in trainer.loggers:
        logger.log_hyperparams({"ptq": report.settings})


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


class UnitScalars:
    """Logs the errors and the tuning curve of each unit as soon as the unit is tuned.

    Args:
        trainer: Trainer whose loggers are used.
        key: Key of the stage. The scalars are ``ptq/KEY/error_before``, ``error_after`` and ``accepted`` by unit, and
            ``ptq/KEY/loss`` by optimization step, counted over all units.
    """

    def __init__(self, trainer: Trainer, key: str) -> None:
        self.trainer, self.key = trainer, key
        self.units = self.steps = 0

    def log(self, row: UnitResult) -> None:
        """Log a unit."""
        stride = -(-len(row.curve) // _POINTS)  # rounded up
        for step, loss in row.curve[::stride] if row.curve else ():
            log_scalars(self.trainer, {f"ptq/{self.key}/loss": loss}, self.steps + step)
        values = {"error_before": row.error_before, "error_after": row.error_after, "accepted": float(row.accepted)}
        log_scalars(self.trainer, {f"ptq/{self.key}/{name}": value for name, value in values.items()}, self.units)
        self.units, self.steps = self.units + 1, self.steps + row.steps


def log_ranges(trainer: Trainer, report: PTQReport) -> None:
    """Log a histogram of each layer's weights and inputs."""
    histograms = {
        f"ptq/range/{row.name}/{kind}": histogram
        for row in report.layers
        for kind, histogram in (("weights", row.weights), ("inputs", row.inputs))
        if histogram is not None
    }
    for logger in _rank_zero(trainer):
        _log_histograms(logger, histograms)


def log_tables(trainer: Trainer, tables: Iterable[ReportTable]) -> None:
    """Log tables to the loggers that can show them."""
    for logger in _rank_zero(trainer):
        for table in tables:
            _log_table(logger, table)


def log_artifact(trainer: Trainer, path: Path, kind: str) -> None:
    """Give a file, with the external data beside it, to the loggers of W&B and MLflow as an artifact."""
    files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]
    for logger in _rank_zero(trainer):
        if _is(logger, "WandbLogger"):
            import wandb

            artifact = wandb.Artifact(path.stem, type=kind)
            for file in files:
                artifact.add_file(str(file))
            _experiment(logger).log_artifact(artifact)
        elif _is(logger, "MLFlowLogger"):
            for file in files:
                _experiment(logger).log_artifact(_run_id(logger), str(file), f"ptq/{kind}")


def shows_pictures(trainer: Trainer) -> bool:
    """True if any logger can show plots."""
    return any(_shows_pictures(logger) for logger in _rank_zero(trainer))


def log_end(trainer: Trainer, report: PTQReport, pictures: Mapping[str, bytes]) -> None:
    """Log what is complete only at the end: the figures of the summary, the remaining tables, and all plots."""
    summary = {f"ptq/run/{name}": value for name, value in report.summary().items() if not isinstance(value, str)}
    log_scalars(trainer, summary)
    log_tables(
        trainer,
        [table for table in report.tables() if table.key in ("metrics", "summary", "stages", "warnings", "layers")],
    )
    for logger in _rank_zero(trainer):
        for key, picture in pictures.items() if _shows_pictures(logger) else ():
            _log_picture(logger, f"ptq/{key}_plot", picture)


def _rank_zero(trainer: Trainer) -> list[Logger]:
    return list(trainer.loggers) if trainer.is_global_zero else []


def _is(logger: Logger, name: str) -> bool:
    """True if a class of the logger has this name.

    Each of Lightning's two packages has its own logger classes, and importing them would import their dependencies.
    """
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def _experiment(logger: Logger) -> Any:
    """Return the object that a logger writes to, of the logger's own library."""
    return cast(Any, logger).experiment


def _shows_pictures(logger: Logger) -> bool:
    return hasattr(logger, "log_image") or _is(logger, "TensorBoardLogger") or _is(logger, "MLFlowLogger")


def _run_id(logger: Logger) -> str:
    """Return the run of an ``MLFlowLogger``, which every call of its client names."""
    return str(cast(Any, logger).run_id)


def _rows(table: ReportTable) -> list[list[Any]]:
    """Return the rows with numbers in columns of numbers, and text in all others."""
    numeric = table.numeric()
    return [[v if n else shown(v) for v, n in zip(row, numeric, strict=True)] for row in table.rows]


def _log_table(logger: Logger, table: ReportTable) -> None:
    if hasattr(logger, "log_table"):
        logger.log_table(f"ptq/{table.key}", columns=list(table.columns), data=_rows(table))
    elif _is(logger, "MLFlowLogger"):
        _log_mlflow_table(logger, table)
    elif _is(logger, "TensorBoardLogger"):
        # A bar inside a cell would end the cell of the Markdown table.
        lines = [table.headings(), ["---"] * len(table.columns), *table.cells()]
        text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        _experiment(logger).add_text(f"ptq/{table.key}", f"{text}\n\n{table.note}")


def _log_mlflow_table(logger: Logger, table: ReportTable) -> None:
    client, run, file = _experiment(logger), _run_id(logger), f"ptq/{table.key}.json"
    columns, rows = list(table.columns), _rows(table)
    if importlib.util.find_spec("pandas") is not None:
        client.log_table(run, dict(zip(columns, zip(*rows, strict=True), strict=True)), file)
    else:  # mlflow-skinny: log_table, which writes the same, needs pandas
        client.log_dict(run, {"columns": columns, "data": rows}, file)


def _log_picture(logger: Logger, key: str, picture: bytes) -> None:
    from PIL import Image  # a dependency of matplotlib, which drew the picture

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if hasattr(logger, "log_image"):
        logger.log_image(key, [image])
    elif _is(logger, "MLFlowLogger"):
        _experiment(logger).log_image(_run_id(logger), image, f"{key}.png")
    else:
        _experiment(logger).add_image(key, np.asarray(image), dataformats="HWC")


def _log_histograms(logger: Logger, histograms: Mapping[str, Histogram]) -> None:
    arrays = {key: (np.asarray(each.counts), np.asarray(each.edges)) for key, each in histograms.items()}
    if _is(logger, "MLFlowLogger"):  # it has no histograms, so that all go into one file
        file = {key: {"edges": edges.tolist(), "counts": counts.tolist()} for key, (counts, edges) in arrays.items()}
        _experiment(logger).log_dict(_run_id(logger), file, "ptq/ranges.json")
    elif _is(logger, "WandbLogger"):
        import wandb

        _experiment(logger).log({key: wandb.Histogram(np_histogram=pair) for key, pair in arrays.items()})
    elif _is(logger, "TensorBoardLogger"):
        for key, (counts, edges) in arrays.items():
            centres = (edges[1:] + edges[:-1]) / 2
            _experiment(logger).add_histogram_raw(
                key, min=edges[0], max=edges[-1], num=counts.sum(), sum=(counts * centres).sum(),
                sum_squares=(counts * centres**2).sum(), bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
            )  # fmt: skip
