"""The report of a run when it is finished: on the console, in the logs, and in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import log_end, shows_pictures
from lightning_ptq.errors import CallbackError, ReportWarning, warn
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.memory import format_bytes

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def check_report_dir(report_dir: str | None) -> None:
    """Create the folder of the report now, so that a folder that cannot be created is an error before the work.

    Raises:
        CallbackError: If it cannot be created.
    """
    try:
        if report_dir is not None:
            Path(report_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CallbackError(
            f"report_dir={report_dir!r} cannot be created ({error}). Name a folder that can be written to, or leave"
            " report_dir out and call report.save(folder) after fit."
        ) from error


def publish(trainer: Trainer, report: PTQReport, report_dir: str | None) -> None:
    """Report a finished run on the console, in the logs and, unless ``report_dir`` is None, in files.

    Warns:
        ReportWarning: If the files cannot be written.
    """
    rank_zero_info(
        f"PTQ finished in {report.seconds:.0f} s: {format_bytes(report.float_bytes)} ->"
        f" {format_bytes(report.packed_bytes)}, {report.summary()['times smaller']:.1f} times smaller, with"
        f" {len(report.warnings)} warnings. CalibrationCapture.report has the details: report.print(),"
        " report.save(folder)."
    )
    if not trainer.is_global_zero:
        return
    # Plots are drawn once for all loggers and the folder, and not at all if none of them shows plots.
    pictures = report.pictures() if report_dir is not None or shows_pictures(trainer) else {}
    log_end(trainer, report, pictures)
    if report_dir is not None:
        try:
            report.save(report_dir, pictures)
        except OSError as error:
            warn(f"the report could not be written to {report_dir!r} ({error}).", ReportWarning)
