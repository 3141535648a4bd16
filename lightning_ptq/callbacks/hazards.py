"""Hazards of a Trainer, found before the run: settings that will fail or act unexpectedly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import capture_of, ptq_callbacks
from lightning_ptq.callbacks.refusals import find_refusals, limit_of
from lightning_ptq.callbacks.statistics import StatsTuning
from lightning_ptq.callbacks.trainer.lightning import callbacks_of, overrides
from lightning_ptq.callbacks.trainer.resuming import progress_folder
from lightning_ptq.errors import PTQError
from lightning_ptq.report.facts import Finding
from lightning_ptq.report.preflight import Preflight
from lightning_ptq.runtime.memory import format_bytes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def find_hazards(trainer: Trainer, module: LightningModule, preflight: Preflight) -> list[Finding]:
    """Return all hazards of ``trainer.fit(module)`` as a PTQ run.

    Args:
        trainer: The Trainer that would run; it stays unchanged.
        module: The LightningModule.
        preflight: Findings about the module.
    """
    checks = (_refusals, _missing_methods, _few_batches, _other_callbacks, _devices, _shards, _checkpoint, _progress)
    return [hazard for check in checks for hazard in check(trainer, module, preflight)]


def find_failures(trainer: Trainer | None, calibration: Calibration) -> list[Finding]:
    """Return a hazard for each callback that would refuse to work on the calibrated module."""
    found: list[Finding] = []
    if trainer is not None:
        for callback in ptq_callbacks(trainer):
            try:
                callback.check(trainer, calibration)
            except PTQError as error:
                found.append(Finding("refused", f"{callback.title}: {error}"))
    return found


def _refusals(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    """Yield the errors by which fit would refuse to start; their messages name the remedy."""
    if not ptq_callbacks(trainer):
        yield Finding(
            "callbacks",
            "the Trainer has no PTQ callback, so fit trains the module.",
            "Write Trainer(callbacks=[CalibrationCapture(...), ...]).",
        )
        return
    for message in find_refusals(trainer, module):
        yield Finding("refused", message)


def _missing_methods(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    for name in ("training_step", "configure_optimizers"):
        if not overrides(module, name):
            yield Finding(
                "refused",
                f"{type(module).__name__} has no {name}; Lightning does not fit without it.",
                f"Define a {name}; one that returns None is enough, with step='predict'.",
            )


def _few_batches(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    name, limit = limit_of(trainer)
    seen = limit * preflight.batch_size * trainer.world_size
    if isinstance(limit, float) and 0 < limit < 1:
        yield Finding("samples", f"{name}={limit}: only that share of the loader is seen.", f"Leave {name} out.")
    elif isinstance(limit, int) and 0 < seen < preflight.samples:
        yield Finding(
            "samples",
            f"{name}={limit}: with batches of {preflight.batch_size} only {seen:,} samples are seen, not"
            f" {preflight.samples:,}.",
            f"Leave {name} out; num_samples of CalibrationCapture ends the pass at the right batch.",
        )


def _other_callbacks(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        if "SpikeDetection" in {cls.__name__ for cls in type(callback).__mro__}:
            yield Finding(
                "callbacks",
                f"{name} watches the training loss, which a step may lack in a PTQ run.",
                f"Leave {name} out.",
            )


def _devices(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    device = trainer.strategy.root_device.type
    if device not in ("mps", preflight.device.split(":")[0]):  # fit refuses the former
        yield Finding(
            "accelerator",
            f"the Trainer runs on {device}, but the time was estimated on {preflight.device}.",
            f"Call module.to({device!r}) before inspect for a valid estimate.",
        )
    if str(trainer.precision).endswith("-mixed"):
        yield Finding(
            "precision",
            f"precision={trainer.precision!r}: calibration and tuning compute in float32 anyway.",
            "Nothing is wrong; expect the time and memory of float32.",
        )
    norms = len(preflight.folded) + len(preflight.unfolded)
    if norms and getattr(trainer.strategy, "_layer_sync", None) is not None:
        yield Finding(
            "batch norms",
            "sync_batchnorm=True replaces batch norms after the layers were swapped, so none can be folded.",
            "Leave sync_batchnorm out: nothing is trained.",
        )


def _shards(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    """Yield a hazard for each callback whose steps are split into fewer shards than there are processes."""
    world, name = trainer.world_size, ""
    for callback in ptq_callbacks(trainer):
        if isinstance(callback, AdaQuantLayerwise) and callback.mode == "sequential":
            name, parts, work = "AdaQuantLayerwise", callback.config.parts, "sequential tuning"
        elif isinstance(callback, StatsTuning) and callback.bias and (callback.parts is not None or not name):
            # Without parts of its own, it follows an AdaQuantLayerwise, which has a hazard already.
            name, parts, work = "StatsTuning", callback.shards(trainer), "bias tuning"
        else:
            continue
        if parts < world:
            yield Finding(
                "devices",
                f"{world} processes, but {name}(parts={parts}): no more than {parts} processes share a step of {work}.",
                f"Write {name}(parts={world}).",
            )


def _checkpoint(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    capture = capture_of(trainer)
    if capture is not None and capture.save_checkpoint and not trainer.checkpoint_callbacks:
        yield Finding(
            "checkpoint",
            "the Trainer has no ModelCheckpoint, so no quantized.ckpt is written.",
            "Leave out enable_checkpointing=False; or call save_packed or trainer.save_checkpoint after fit, and"
            " confirm that with CalibrationCapture(save_checkpoint=False).",
        )


def _progress(trainer: Trainer, module: LightningModule, preflight: Preflight) -> Iterator[Finding]:
    """Yield hazards of the saved progress, which holds tuned weights in float for each candidate of each tuning."""
    capture = capture_of(trainer)
    if capture is None or not capture.resume:
        return
    folder = progress_folder(trainer, capture.resume_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    tunings = [callback for callback in ptq_callbacks(trainer) if isinstance(callback, AdaQuantLayerwise)]
    needed = preflight.float_bytes * sum(len(callback.candidates or [None]) for callback in tunings)
    free = shutil.disk_usage(existing).free
    if needed > free:
        yield Finding(
            "progress",
            f"{folder} will take {format_bytes(needed)}, but {format_bytes(free)} are free.",
            "Write CalibrationCapture(resume_dir=...) with a folder on another disk, or resume=False.",
        )
