"""inspect: what a PTQ run will quantize and what will go wrong, before anything is tuned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lightning_ptq.arguments import check_is_module, whole
from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import ptq_callbacks
from lightning_ptq.callbacks.capture import CalibrationCapture
from lightning_ptq.callbacks.hazards import find_failures, find_hazards
from lightning_ptq.callbacks.trainer.muting import Step, calibration_forward
from lightning_ptq.errors import CalibrationError
from lightning_ptq.export.targets import TargetName, configured
from lightning_ptq.network.units import BlockRule, UnitKind
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.report.inspect_module import inspect_module
from lightning_ptq.report.preflight import Preflight
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.tuning.adaquant import check_arguments
from lightning_ptq.tuning.config import ReconstructionConfig

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def inspect(
    module: nn.Module,
    batch: Any,
    qconfig: QConfig | str | None = None,
    *,
    trainer: Trainer | None = None,
    step: Step | None = None,
    samples: int | None = None,
    granularity: UnitKind | None = None,
    blocks: BlockRule | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int | None = None,
    target: TargetName | None = None,
) -> Preflight:
    """Find out what a PTQ run will quantize and what will go wrong; nothing is tuned or changed.

    An argument that is None takes its value from the Trainer's ``CalibrationCapture`` and sequential
    ``AdaQuantLayerwise``, or without these the default below.

    Args:
        module: A float LightningModule, or any other module, which runs on the inputs of the batch by default.
        batch: A calibration batch, as the loader returns it.
        qconfig: What to quantize; default ``"w4a4"``.
        trainer: The Trainer of the run, whose hazards are reported too; without one, none are.
        step: The calibration forward: ``"training"`` (default), ``"predict"``, or a function of module and batch.
        samples: Number of calibration samples that the estimates assume; default 1024.
        granularity: ``"block"`` or ``"layer"``; default ``"block"``.
        blocks: Name patterns of the blocks, or a function of name and module; by default a search.
        config: Steps and batch size of AdaQuant; default ``ReconstructionConfig()``.
        memory_limit: Limit of the activations in memory; default ``"auto"``.
        target: Inference engine, as for :class:`CalibrationCapture`; the default of ``qconfig`` is then ``"w8a8"``.

    Returns:
        Layers, batch norms, what stays float, units, sizes, estimates of memory and time, and hazards; with
        ``print()``, ``tables()`` and ``to_dict()``.

    Raises:
        SurgeryError: If there is nothing to quantize, or the module is quantized already.
        QConfigError: If an argument does not fit, or the target does not take the config.
        CalibrationError: If the batch holds NaN, or the step trains or reaches no layer.
    """
    module = _unwrapped(module)
    given = {
        "qconfig": qconfig, "step": step, "samples": samples, "granularity": granularity, "blocks": blocks,
        "config": config, "memory_limit": memory_limit,
    }  # fmt: skip
    settings = _checked(
        _settings(trainer, target) | {name: value for name, value in given.items() if value is not None}
    )
    settings["qconfig"] = configured(settings["qconfig"], target)
    forward = _forward(module, settings.pop("step"))
    # A training_step may use self.trainer, which Lightning sets in fit.
    attached = {"_trainer": trainer} if trainer is not None and _is_lightning(module) else {}
    with attributes(module, attached):
        preflight = inspect_module(module, batch, forward=forward, check=partial(find_failures, trainer), **settings)
    hazards = find_hazards(trainer, cast(Any, module), preflight) if trainer is not None else []
    return replace(preflight, hazards=[*preflight.hazards, *hazards])


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the LightningModule that ``torch.compile`` has wrapped, or the module itself."""
    check_is_module(module)
    original = vars(module).get("_modules", {}).get("_orig_mod")
    return original if original is not None and _is_lightning(original) else module


def _is_lightning(module: nn.Module) -> bool:
    """True for a LightningModule of either package."""
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings; raise a QConfigError if one is outside its domain."""
    check_arguments(
        "sequential", settings.get("granularity", "block"), None, settings.get("memory_limit", DEFAULT_MEMORY_LIMIT),
        blocks=settings.get("blocks"), config=settings.get("config"),
    )  # fmt: skip
    return {**settings, "samples": whole("samples", settings["samples"])}


def _settings(trainer: Trainer | None, target: TargetName | None) -> dict[str, Any]:
    """Return the settings of the Trainer's callbacks, with defaults for absent callbacks."""
    settings: dict[str, Any] = {"qconfig": "w8a8" if target else "w4a4", "step": "training", "samples": 1024}
    for callback in [] if trainer is None else ptq_callbacks(trainer):
        if isinstance(callback, CalibrationCapture):
            samples = callback.num_samples or settings["samples"]
            settings |= {"qconfig": callback.qconfig, "step": callback.step, "samples": samples}
        if isinstance(callback, AdaQuantLayerwise) and callback.mode == "sequential":
            names = ("granularity", "blocks", "config", "memory_limit")
            settings |= {name: getattr(callback, name) for name in names}
    return settings


def _forward(module: Any, step: Step) -> Forward:
    """Return the calibration forward of a LightningModule, or of another module, which has no steps."""
    if _is_lightning(module):
        return calibration_forward(module, step)
    if callable(step):
        return step
    if step not in ("training", "predict"):
        raise CalibrationError(f"step must be 'training', 'predict' or a function of module and batch, got {step!r}.")
    return default_forward
