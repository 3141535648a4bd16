"""quantize: a PTQ run in one call, for those who need no Trainer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_ptq.arguments import check_is_module, flag, keywords
from lightning_ptq.callbacks.accuracy import Direction
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.allocator import BitAllocator
from lightning_ptq.callbacks.base import PTQCallback
from lightning_ptq.callbacks.capture import CalibrationCapture
from lightning_ptq.callbacks.export import ExportONNX
from lightning_ptq.callbacks.trainer.lightning import trainer_class_of
from lightning_ptq.errors import CallbackError, QConfigError
from lightning_ptq.export.targets import TargetName
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report import PTQReport
from lightning_ptq.tuning.config import least_bits

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


def quantize(
    module: LightningModule,
    calibration_loader: Any,
    val_loader: Any = None,
    *,
    qconfig: str | QConfig | dict[str, Any] = "w8a8",
    max_drop: float | None = None,
    metric: str | None = None,
    mode: Direction | None = None,
    size: float | None = None,
    tune: bool | None = None,
    num_samples: int | None = None,
    target: TargetName | None = None,
    onnx: str | None = None,
    report_dir: str | None = None,
    seed: int = 0,
    capture: Mapping[str, Any] | None = None,
    allocator: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> PTQReport:
    """Quantize a trained LightningModule in place, with a Trainer and callbacks that are chosen here.

    - With ``max_drop``, the result is the smallest model whose metric drops by at most that.
    - With ``size``, it is the best model within this budget.
    - Else all layers get the widths of ``qconfig``.

    Layers below 8 bits are tuned by :class:`AdaQuantLayerwise`. Nothing is logged, no file is written but those that
    the arguments name, and an interrupted run is not resumed. For all else, give the callbacks to your own Trainer.

    Args:
        module: A trained float module; it is quantized in place.
        calibration_loader: A few hundred samples, as for ``trainer.fit``; or a LightningDataModule.
        val_loader: Validation data, on which the module's ``validation_step`` runs before and after.
        qconfig: Bit widths such as ``"w4a8"``.
        max_drop: Accepted drop of the metric, in its own unit: 0.01 for one point of an accuracy in [0, 1].
        metric: Name under which ``validation_step`` logs the metric.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower one is; see :class:`BitAllocator`.
        size: Budget for the packed weights: a fraction (at most 1) of the float model's bytes, or bytes.
        tune: Whether AdaQuant tunes the layers; by default True where any may have fewer than 8 bits.
        num_samples: Number of calibration samples; by default all of the loader.
        target: Inference engine; see :class:`CalibrationCapture`.
        onnx: ONNX file to write; none by default.
        report_dir: Folder for the files of the report; none by default.
        seed: Seed of all random choices.
        capture: Further arguments of :class:`CalibrationCapture`, such as ``{"step": "predict"}``.
        allocator: Further arguments of :class:`BitAllocator`, such as ``{"candidates": ["w8a8", "w4a8"]}``.
        trainer: Further arguments of the Trainer, such as ``{"accelerator": "gpu", "devices": 1}``.

    Returns:
        The report of the run: ``report.metrics`` has the metrics before and after, ``report.print()`` shows the rest.

    Raises:
        PTQError: If an argument is out of its domain, or the module cannot be quantized; it is left as it was.

    Example::

        report = quantize(module, calibration_loader, val_loader, max_drop=0.01, metric="val_acc")
        save_packed(module, "model.safetensors")
    """
    check_is_module(module)
    trainer_class = trainer_class_of(module)
    options = keywords("capture", capture, CalibrationCapture, ("qconfig", "num_samples", "target", "report_dir"))
    options = {"resume": False, "save_checkpoint": False, **options}
    first = CalibrationCapture(qconfig, num_samples, target=target, report_dir=report_dir, **options)
    has_data = val_loader is not None or hasattr(calibration_loader, "val_dataloader")  # a LightningDataModule
    chosen = _allocation(max_drop, metric, mode, size, allocator, has_data)
    if (bool(chosen) or is_narrow(first.qconfig)) if tune is None else flag("tune", tune):
        chosen.append(AdaQuantLayerwise(seed=seed))
    chosen += [] if onnx is None else [ExportONNX(onnx)]
    settings = keywords("trainer", trainer, trainer_class)
    _trainer(trainer_class, [first, *chosen], settings).fit(module, calibration_loader, val_loader)
    if first.report is None:
        raise CallbackError("the Trainer ended without a PTQ run. Leave fast_dev_run and limits of 0 batches out.")
    return first.report


def _trainer(trainer_class: Any, chosen: list[PTQCallback], settings: dict[str, Any]) -> Any:
    """Return a Trainer with these callbacks and the user's, which writes no files unless the settings say so."""
    given = settings.pop("callbacks", None) or []
    callbacks = [*chosen, *(given if isinstance(given, (list, tuple)) else [given])]
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return trainer_class(callbacks=callbacks, **{**defaults, **settings})


def _allocation(max_drop: Any, metric: Any, mode: Any, size: Any, allocator: Any, has_data: bool) -> list[PTQCallback]:
    """Return the allocator that the goals ask for, if any.

    Raises:
        QConfigError: If the goals contradict one another, or lack something.
    """
    options = keywords("allocator", allocator, BitAllocator, ("size", "monitor", "max_drop", "mode"))
    if (max_drop is None) != (metric is None):
        raise QConfigError(
            "max_drop and metric go together: write for example max_drop=0.01, metric='val_acc', with the name that"
            " validation_step logs."
        )
    if max_drop is not None:
        if size is not None:
            raise QConfigError("max_drop asks for the smallest model, size for the best of a size. Give one of them.")
        if not has_data:
            raise QConfigError(
                "max_drop needs validation data. Write quantize(module, calibration_loader, val_loader, ...)."
            )
        return [BitAllocator(monitor=metric, max_drop=max_drop, mode=mode, **options)]
    if size is not None or any(name in options for name in ("bops", "table", "max_degradation")):
        return [BitAllocator(size, **options)]
    if options:
        raise QConfigError(f"allocator={dict(options)!r} has no goal. Give max_drop and metric, or size.")
    return []


def is_narrow(qconfig: QConfig) -> bool:
    """True if any layer may have fewer than 8 bits."""
    return least_bits([qconfig.default, *(pair for _, pair in qconfig.overrides)]) < 8
