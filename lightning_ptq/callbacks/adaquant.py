"""AdaQuantLayerwise: tuning of the calibrated module inside ``trainer.fit``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.base import StepCallback
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import UnitScalars
from lightning_ptq.network.units import BlockRule, UnitKind
from lightning_ptq.report import PTQReport
from lightning_ptq.report.tables import key_of
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.tuning.adaquant import AdaQuantMode, adaquant, check_arguments
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.run import AdaQuantResult

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class AdaQuantLayerwise(StepCallback):
    """Tunes weights, biases and scales unit by unit, so that each unit's output comes close to the float unit's.

    Runs :func:`lightning_ptq.adaquant` after :class:`~lightning_ptq.callbacks.capture.CalibrationCapture`. Needs no
    labels.

    Args:
        mode: ``"sequential"`` or ``"parallel"``.
        granularity: ``"block"`` or ``"layer"``.
        blocks: Name patterns of the blocks, or a function of name and module, instead of the automatic search.
        candidates: Bit widths for parallel mode, such as ``["w8a8", "w4a4"]``; by default the calibrated widths only.
        memory_limit: Limit of the activations in memory, in bytes or as text such as ``"4GiB"``. Activations beyond it
            go to memory-mapped files. ``"auto"`` allows what a forward and backward pass of the float network takes on
            the samples of a step.
        seed: Seed of all random choices.
        options: Fields of :class:`~lightning_ptq.tuning.config.ReconstructionConfig`, such as ``steps=100``.

    Attributes:
        config: The :class:`~lightning_ptq.tuning.config.ReconstructionConfig` of the options.
        result: The :class:`~lightning_ptq.tuning.run.AdaQuantResult` of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.
        TypeError: If an option does not exist; the message names the closest one.

    Example::

        trainer = Trainer(max_epochs=1, callbacks=[CalibrationCapture("w4a4"), AdaQuantLayerwise()])
        trainer.fit(module, calibration_loader)
    """

    role = "AdaQuantLayerwise"
    tunes = True
    result: AdaQuantResult | None

    def __init__(
        self,
        mode: AdaQuantMode = "sequential",
        granularity: UnitKind = "block",
        blocks: BlockRule | None = None,
        candidates: list[str] | None = None,
        *,
        memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_names(options)
        # jsonargparse reads this call to learn the names and types of the options, so the expansion must stay literal.
        self.config = ReconstructionConfig(**options)
        seed = check_arguments(mode, granularity, candidates, memory_limit, seed, blocks)
        self.mode = mode
        self.granularity = granularity
        self.blocks = blocks
        self.candidates = candidates
        self.memory_limit = memory_limit
        self.seed = seed

    @property
    def title(self) -> str:
        """Name of the work, which includes the mode."""
        return f"AdaQuant {self.mode}"

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; a parallel and a sequential instance in one list differ in it."""
        return self._generate_state_key(mode=self.mode, granularity=self.granularity, seed=self.seed)

    def work(self, trainer: Trainer, calibration: Calibration, journal: Journal = NO_JOURNAL) -> AdaQuantResult:
        """Tune the calibrated module."""
        scalars = UnitScalars(trainer, key_of(self.title))
        with self._progress(trainer) as progress:
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


def _check_names(options: Iterable[str]) -> None:
    """Raise a TypeError that suggests the closest option if one of ``options`` does not exist."""
    arguments = inspect.signature(AdaQuantLayerwise.__init__).parameters.values()
    names = [argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD][1:]
    names += [field.name for field in dataclasses.fields(ReconstructionConfig)]
    for option in options:
        if option not in names:
            (closest,) = difflib.get_close_matches(option, names, n=1, cutoff=0.0)
            raise TypeError(
                f"AdaQuantLayerwise has no option {option!r}; the closest one is {closest!r}. Choose from"
                f" {', '.join(names)}."
            )
