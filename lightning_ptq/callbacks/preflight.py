"""inspect: what a PTQ run will find and what will go wrong, before anything is tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import ptq_callbacks
from lightning_ptq.callbacks.capture import CalibrationCapture
from lightning_ptq.callbacks.hazards import find_hazards
from lightning_ptq.callbacks.trainer.muting import Step, calibration_forward
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.units import BlockRule, Granularity
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report.inspect_module import inspect_module
from lightning_ptq.report.preflight import Preflight
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.tuning.config import ReconstructionConfig


def inspect(
    module: nn.Module,
    batch: Any,
    qconfig: QConfig | str | None = None,
    *,
    trainer: Any = None,
    step: Step | None = None,
    samples: int | None = None,
    granularity: Granularity | None = None,
    blocks: BlockRule | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int | None = None,
) -> Preflight:
    """What a PTQ run will find in a module, and the hazards of the Trainer; nothing is tuned or changed.

    The layers with their widths and multiply-accumulates, batch norms, what stays float, the units with their steps,
    size, an estimate of memory and time. The module is calibrated on the one batch, looked at, and put back.

    What is None is as in the Trainer's ``CalibrationCapture`` and sequential ``AdaQuantLayerwise``; without them, as
    said below.

    Args:
        module: A float LightningModule, or any module (run without ``step="training"``: on the inputs of the batch).
        batch: A calibration batch, as the loader gives it.
        qconfig: What to quantize; else ``"w4a4"``.
        trainer: What would run it; its hazards are told too.
        step: The calibration forward: ``"training"``, ``"predict"``, or a function of module and batch; else
            ``"training"``.
        samples: Calibration samples that the estimates are for; else 1024.
        granularity: ``"block"`` or ``"layer"``; else ``"block"``.
        blocks: Name patterns of the blocks, or a function of name and module; else found.
        config: Steps and batch size of AdaQuant.
        memory_limit: For activations; else ``"4GiB"``.

    Returns:
        The findings: ``print()`` them, or take ``sheets()`` or ``to_dict()``.

    Raises:
        SurgeryError: If there is nothing to quantize, the module is quantized already, or a layer is still lazy.
        QConfigError: If an argument does not fit.
        CalibrationError: If the batch holds NaN, or the step trains or reaches no layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> found = inspect(net, torch.randn(8, 1, 4, 4), "w8a8")
        >>> found.folded, found.covered, found.hazards
        ({'1': '0'}, 1.0, [])
    """
    given = {
        "qconfig": qconfig, "step": step, "samples": samples, "granularity": granularity, "blocks": blocks,
        "config": config, "memory_limit": memory_limit,
    }  # fmt: skip
    settings = _settings(trainer) | {name: value for name, value in given.items() if value is not None}
    forward = _forward(module, settings.pop("step"))
    # A step may look at its Trainer.
    attached = {"_trainer": trainer} if trainer is not None and _is_lightning(module) else {}
    with attributes(module, attached):
        found = inspect_module(module, batch, forward=forward, **settings)
    if trainer is None:
        return found
    return replace(found, hazards=[*found.hazards, *find_hazards(trainer, module, found)])


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _settings(trainer: Any) -> dict[str, Any]:
    """What the Trainer's callbacks were told; where there are none, the defaults."""
    settings: dict[str, Any] = {"qconfig": "w4a4", "step": "training", "samples": 1024}
    for callback in [] if trainer is None else ptq_callbacks(trainer):
        if isinstance(callback, CalibrationCapture):
            samples = callback.num_samples or settings["samples"]
            settings |= {"qconfig": callback.qconfig, "step": callback.step, "samples": samples}
        if isinstance(callback, AdaQuantLayerwise) and callback.mode == "sequential":
            names = ("granularity", "blocks", "config", "memory_limit")
            settings |= {name: getattr(callback, name) for name in names}
    return settings


def _forward(module: nn.Module, step: Step) -> Forward:
    if _is_lightning(module):
        return calibration_forward(module, step)
    if callable(step):
        return step
    if step not in ("training", "predict"):
        raise CalibrationError(f"step must be 'training', 'predict' or a function of module and batch, got {step!r}.")
    return default_forward
