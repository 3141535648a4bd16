"""AdaQuantLayerwise: tuning of the calibrated module inside ``trainer.fit``."""

from __future__ import annotations

from typing import Any

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.base import StepCallback
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import UnitScalars
from lightning_ptq.callbacks.trainer.progress import progress_task
from lightning_ptq.network.units import BlockRule, Granularity
from lightning_ptq.report import PTQReport
from lightning_ptq.report.tables import key_of
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.tuning.adaquant import AdaQuantMode, adaquant, check_arguments
from lightning_ptq.tuning.config import ReconstructionConfig, Rounding
from lightning_ptq.tuning.run import AdaQuantResult

_DEFAULTS = ReconstructionConfig()


class AdaQuantLayerwise(StepCallback):
    """Tunes weights, biases and scales, unit by unit, so that each unit's output comes close to the float one's.

    A shell around :func:`lightning_ptq.adaquant`; comes behind :class:`CalibrationCapture`. Needs no labels.

    Args:
        mode: ``"sequential"`` or ``"parallel"``.
        granularity: ``"block"`` or ``"layer"``.
        blocks: Name patterns of the blocks, or a function of name and module, in place of the automatic search.
        candidates: Bit widths for parallel mode; by default the calibrated ones alone.
        steps: Optimisation steps a unit; None to go by the widths and the number of samples.
        batch_size: Samples a step.
        learn: What is tuned; see :class:`~lightning_ptq.tuning.config.ReconstructionConfig`, as for the rest.
        weight_lr: In steps of the weight grid.
        bias_lr: Relative to the mean magnitude of the layer's biases.
        scale_lr: Relative to the scale.
        zero_point_lr: In steps of the activation grid.
        rounding: ``"continuous"`` or ``"adaround"``.
        drop: Probability that an activation keeps its float value in the first step; falls to 0.
        held_out: Share of the samples that tuning is judged on.
        parts: The samples are dealt into so many parts; no more ranks than this share a step of sequential mode.
        tolerance: Units of less error than this are not tuned; None for 2e-3 at 8 bits, 0 below.
        memory_limit: For activations; beyond it they go to memory-mapped files.
        seed: Of all random choices.

    Attributes:
        result: The :class:`~lightning_ptq.tuning.run.AdaQuantResult` of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.

    Example::

        trainer = Trainer(max_epochs=1, callbacks=[CalibrationCapture("w4a4"), AdaQuantLayerwise()])
        trainer.fit(module, calibration_loader)
    """

    role = "AdaQuantLayerwise"
    result: AdaQuantResult | None

    def __init__(
        self,
        mode: AdaQuantMode = "sequential",
        granularity: Granularity = "block",
        blocks: BlockRule | None = None,
        candidates: list[str] | None = None,
        steps: int | None = _DEFAULTS.steps,
        batch_size: int = _DEFAULTS.batch_size,
        learn: list[str] | None = None,
        weight_lr: float = _DEFAULTS.weight_lr,
        bias_lr: float = _DEFAULTS.bias_lr,
        scale_lr: float = _DEFAULTS.scale_lr,
        zero_point_lr: float = _DEFAULTS.zero_point_lr,
        rounding: Rounding = _DEFAULTS.rounding,
        drop: float = _DEFAULTS.drop,
        held_out: float = _DEFAULTS.held_out,
        parts: int = _DEFAULTS.parts,
        tolerance: float | None = _DEFAULTS.tolerance,
        memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = ReconstructionConfig(
            steps=steps,
            batch_size=batch_size,
            learn=_DEFAULTS.learn if learn is None else tuple(learn),
            weight_lr=weight_lr,
            bias_lr=bias_lr,
            scale_lr=scale_lr,
            zero_point_lr=zero_point_lr,
            rounding=rounding,
            drop=drop,
            held_out=held_out,
            parts=parts,
            tolerance=tolerance,
        )
        check_arguments(mode, granularity, candidates, memory_limit)
        self.mode = mode
        self.granularity = granularity
        self.blocks = blocks
        self.candidates = candidates
        self.memory_limit = memory_limit
        self.seed = seed

    @property
    def title(self) -> str:
        """By mode."""
        return f"AdaQuant {self.mode}"

    @property
    def state_key(self) -> str:
        """Distinct for a parallel and a sequential instance in one list."""
        return self._generate_state_key(mode=self.mode, granularity=self.granularity, seed=self.seed)

    def work(self, trainer: Any, calibration: Calibration, journal: Journal | None = None) -> AdaQuantResult:
        """Tune the calibrated module."""
        scalars = UnitScalars(trainer, key_of(self.title))
        with progress_task(trainer, self.title) as progress:
            return adaquant(
                calibration,
                mode=self.mode,
                granularity=self.granularity,
                blocks=self.blocks,
                candidates=self.candidates,
                config=self.config,
                memory_limit=self.memory_limit,
                seed=self.seed,
                progress=progress,
                journal=journal,
                on_unit=scalars.log,
                announce=lambda plan: rank_zero_info(f"{self.title}: {plan}"),
            )

    def record(self, report: PTQReport) -> None:
        """Put the tuned units into the report."""
        if self.result is not None:
            again = " again" if self.title in report.tuning else ""
            report.tuning[self.title + again] = self.result
