"""The report of a run when it is finished: on the console, in the logs, and in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.base import ptq_callbacks
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import log_end, log_scalars, shows_pictures
from lightning_ptq.callbacks.trainer.resuming import checksums
from lightning_ptq.callbacks.trainer.validation import Scores, validate, validates
from lightning_ptq.errors import CallbackError, ChangedAfterwardsWarning, ReportWarning, warn
from lightning_ptq.report import PTQReport
from lightning_ptq.report.record import MetricChange
from lightning_ptq.report.table import plural
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.runtime.ranks import Ranks

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


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


def finish(report: PTQReport, calibration: Calibration) -> dict[str, bytes]:
    """Record the result of a finished run.

    Returns:
        Checksums of the entries of the module's state dict.

    Warns:
        ReportWarning: If the result cannot be recorded.
    """
    with _failure_is_a_warning("the result could not be recorded in the report"):
        report.finish(calibration)
    return checksums(calibration.module)


def warn_if_changed(module: LightningModule, finished: Mapping[str, bytes], saved: bool = True) -> None:
    """Warn if a state dict is no longer that of the finished run.

    Args:
        module: The quantized module.
        finished: Checksums of the state dict's entries when the run was finished; empty if no run was.
        saved: Whether the checkpoint has been written already.

    Warns:
        ChangedAfterwardsWarning: If an entry has another checksum.
    """
    changed = finished and [name for name, found in checksums(module).items() if finished.get(name) != found]
    if changed:
        files = "Files that were written before, such as quantized.ckpt, hold the tuned ones."
        remedy = "The result is not what was tuned, also in quantized.ckpt. Leave that callback out of the PTQ run."
        named = ", ".join(changed[:3]) + (" and others" if len(changed) > 3 else "")
        warn(
            f"another callback has changed {len(changed)} of {len(finished)} tensors of the quantized module at the"
            f" end of fit: {named}. {files if saved else remedy}",
            ChangedAfterwardsWarning,
            stacklevel=2,
        )


def validate_before(trainer: Trainer, module: LightningModule, ranks: Ranks, report: PTQReport) -> Scores | None:
    """Validate the float module, if fit was given validation data."""
    if not validates(trainer):
        return None
    with report.stage("Validation of the float module"):
        return validate(trainer, module, ranks)


def validate_after(
    trainer: Trainer, module: LightningModule, ranks: Ranks, report: PTQReport, before: Scores | None
) -> None:
    """Validate the quantized module, and put each metric beside that of the float module into report and logs.

    Warns:
        ReportWarning: If the validation fails; the run is complete all the same.
    """
    if before is None:
        return
    with _failure_is_a_warning("the quantized module could not be validated"):
        with report.stage("Validation of the quantized module"):
            after = validate(trainer, module, ranks).values
        if missing := [name for name in before.names() if name not in after]:
            warn(
                f"the validation of the quantized module has not logged {', '.join(missing)}, as that of the float"
                " module did. Log them in every validation, and give fit a loader that can be iterated several times.",
                ReportWarning,
                stacklevel=2,
            )
        monitored = [name for callback in ptq_callbacks(trainer) for name in callback.monitored]
        names = [name for name in (*monitored, *before.names()) if name in after and name in before.values]
        report.metrics = [MetricChange(name, before.values[name], after[name]) for name in dict.fromkeys(names)]
        for change in report.metrics:
            path = f"ptq/validation/{change.name}"
            log_scalars(trainer, {f"{path}_float": change.before, f"{path}_quantized": change.after})


def publish(trainer: Trainer, report: PTQReport, report_dir: str | None) -> None:
    """Report a finished run on the console, in the logs and, unless ``report_dir`` is None, in files.

    Warns:
        ReportWarning: For each of these that fails; the others follow all the same.
    """
    with _failure_is_a_warning("the report could not be summarized"):
        sizes = f"{format_bytes(report.float_bytes)} -> {format_bytes(report.packed_bytes)}"
        rank_zero_info(
            f"{report.headline()}\nPTQ finished in {report.seconds:.0f} s: {sizes}, with"
            f" {plural(len(report.warnings), 'warning')}. {_whereabouts(trainer, report_dir)}"
        )
    if not trainer.is_global_zero:
        return
    pictures: dict[str, bytes] = {}
    with _failure_is_a_warning("the plots could not be drawn"):
        # Plots are drawn once for all loggers and the folder, and not at all if none of them shows plots.
        pictures = report.pictures() if report_dir is not None or shows_pictures(trainer) else {}
    with _failure_is_a_warning("the report could not be logged"):
        log_end(trainer, report, pictures)
    if report_dir is not None:
        with _failure_is_a_warning(f"the report could not be written to {report_dir!r}"):
            report.save(report_dir, pictures)


def _whereabouts(trainer: Trainer, report_dir: str | None) -> str:
    """Return where the result and the details lie."""
    folders: list[Any] = [getattr(checkpoint, "dirpath", None) for checkpoint in trainer.checkpoint_callbacks]
    folder = next(filter(None, folders), None)
    file = None if folder is None else Path(folder) / "quantized.ckpt"
    lies = "The module is quantized in place: save_packed(module, file) keeps it."
    if file is not None and file.is_file():
        lies = f"The module is quantized in place and in {file}."
    details = "CalibrationCapture.report has the details: report.print(), report.save(folder)."
    return f"{lies}\n{details}" if report_dir is None else f"{lies}\nReport: {Path(report_dir) / 'report.html'}"


@contextmanager
def _failure_is_a_warning(what: str) -> Iterator[None]:
    """Turn an exception into a warning: the run is finished, and its result is worth more than its report."""
    try:
        yield
    except Exception as error:
        warn(f"{what} ({type(error).__name__}: {error}).", ReportWarning, stacklevel=3)
