"""What will go wrong under a Trainer, or otherwise than expected: told before the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import capture_of, check_order, check_trainer, ptq_callbacks
from lightning_ptq.callbacks.trainer.muting import lightning_base
from lightning_ptq.callbacks.trainer.resuming import FOLDER
from lightning_ptq.errors import CallbackError
from lightning_ptq.report.preflight import Finding, Preflight

_OF_TRAINING = ("GradientAccumulationScheduler", "LearningRateFinder", "SpikeDetection", "WeightAveraging")
"""Callbacks of Lightning that fail where no optimizer steps."""


def find_hazards(trainer: Any, module: Any, found: Preflight) -> list[Finding]:
    """All hazards of ``trainer.fit(module)`` as a PTQ run.

    Args:
        trainer: As it would fit; nothing of it is changed.
        module: The LightningModule.
        found: What there is to know of the module.
    """
    checks = (_refusals, _missing_methods, _few_batches, _other_callbacks, _devices, _checkpoint, _progress)
    return [hazard for check in checks for hazard in check(trainer, module, found)]


def _refusals(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    """With these errors, which say what to write instead, fit ends before it begins."""
    if not ptq_callbacks(trainer):
        yield Finding(
            "callbacks",
            "the Trainer has no callback of PTQ, so fit trains the module.",
            "Write Trainer(callbacks=[CalibrationCapture(...), ...]).",
        )
        return
    for check in (check_order, check_trainer):
        try:
            check(trainer)
        except CallbackError as error:
            yield Finding("refused", str(error))


def _missing_methods(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    base = lightning_base(type(module))
    for name in ("training_step", "configure_optimizers"):
        if getattr(type(module), name) is getattr(base, name) and name not in vars(module):
            yield Finding(
                "module",
                f"{type(module).__name__} has no {name}, without which Lightning does not fit.",
                f"Define a {name}; one that returns None will do, with step='predict'.",
            )


def _few_batches(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    limit = trainer.limit_train_batches
    given = {"fast_dev_run": trainer.fast_dev_run, "overfit_batches": trainer.overfit_batches}
    name = next((name for name, value in given.items() if value), "limit_train_batches")
    for option, value in (("max_epochs", trainer.max_epochs), ("max_steps", trainer.max_steps), (name, limit)):
        if value == 0:
            yield Finding("samples", f"{option}=0: no calibration batch is seen.", f"Leave {option} out.")
    seen = limit * found.batch_size * trainer.world_size
    if isinstance(limit, float) and 0 < limit < 1:
        yield Finding("samples", f"{name}={limit}: only that share of the loader is seen.", f"Leave {name} out.")
    elif isinstance(limit, int) and 0 < seen < found.samples:
        yield Finding(
            "samples",
            f"{name}={limit}: with batches of {found.batch_size} only {seen:,} samples are seen, not"
            f" {found.samples:,}.",
            f"Leave {name} out; num_samples of CalibrationCapture ends the pass where there are enough.",
        )


def _other_callbacks(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    for callback in trainer.callbacks:
        kinds = {cls.__name__ for cls in type(callback).__mro__}
        name = type(callback).__name__
        if kinds.intersection(_OF_TRAINING):
            yield Finding("callbacks", f"{name} needs optimizer steps, of which there are none.", f"Leave out {name}.")
        if "EarlyStopping" in kinds:
            yield Finding(
                "callbacks",
                f"{name} monitors {callback.monitor!r}, but nothing is logged by training_step: fit ends with an"
                " error unless validation logs it.",
                f"Leave out {name}: a PTQ run ends by itself.",
            )


def _devices(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    device, world = trainer.strategy.root_device.type, trainer.world_size
    if device == "mps":
        yield Finding("accelerator", "PTQ adds up in float64, which MPS does not have.", "Use accelerator='cpu'.")
    elif device != found.device.split(":")[0]:
        yield Finding(
            "accelerator",
            f"the Trainer runs on {device}, but the time was estimated on {found.device}.",
            f"Call module.to({device!r}) before inspect for an estimate that holds.",
        )
    if str(trainer.precision).endswith("-mixed"):
        yield Finding(
            "precision",
            f"precision={trainer.precision!r}: calibration and tuning compute in float32 all the same.",
            "Nothing is wrong; expect the time and memory of float32.",
        )
    norms = len(found.folded) + len(found.unfolded)
    if norms and getattr(trainer.strategy, "_layer_sync", None) is not None:
        yield Finding(
            "batch norms",
            "sync_batchnorm=True replaces batch norms after the layers were swapped, so none can be folded.",
            "Leave sync_batchnorm out: nothing is trained.",
        )
    for callback in ptq_callbacks(trainer):
        if isinstance(callback, AdaQuantLayerwise) and callback.mode == "sequential" and callback.config.parts < world:
            yield Finding(
                "devices",
                f"{world} processes, but AdaQuantLayerwise(parts={callback.config.parts}): no more than"
                f" {callback.config.parts} share a step of sequential tuning.",
                f"Write AdaQuantLayerwise(parts={world}).",
            )


def _checkpoint(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    capture = capture_of(trainer)
    if capture is not None and capture.save_checkpoint and not trainer.checkpoint_callbacks:
        yield Finding(
            "checkpoint",
            "the Trainer has no ModelCheckpoint, so no quantized.ckpt is left.",
            "Leave out enable_checkpointing=False; or call save_packed or trainer.save_checkpoint behind fit, and"
            " say so with CalibrationCapture(save_checkpoint=False).",
        )


def _progress(trainer: Any, module: Any, found: Preflight) -> Iterator[Finding]:
    """Every tuning keeps the tuned weights in float, for each candidate."""
    capture = capture_of(trainer)
    if capture is None or not capture.resume:
        return
    folder = Path(capture.resume_dir or Path(trainer.default_root_dir) / FOLDER).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        yield Finding(
            "progress",
            f"{there} is not writable, but the progress of the run goes to {folder}.",
            "Write CalibrationCapture(resume_dir=...), or resume=False.",
        )
    tunings = [callback for callback in ptq_callbacks(trainer) if isinstance(callback, AdaQuantLayerwise)]
    needed = found.float_bytes * sum(len(callback.candidates or [None]) for callback in tunings)
    free = shutil.disk_usage(there).free
    if needed > free:
        yield Finding(
            "progress",
            f"{folder} will take {decimal(needed)}, but {decimal(free)} are free.",
            "Write CalibrationCapture(resume_dir=...) with a folder on another disk, or resume=False.",
        )
