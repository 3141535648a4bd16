"""StatsTuning: correction of statistics and biases inside ``trainer.fit``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from lightning_ptq import arguments
from lightning_ptq.activations.shards import DEFAULT_SHARDS
from lightning_ptq.arguments import flag, number, one_of, whole
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import ChooseOutput, Divergence, check_choice, check_output
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.base import StepCallback, ptq_callbacks
from lightning_ptq.callbacks.trainer.loggers import log_scalars
from lightning_ptq.errors import QConfigError, SensitivityError
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT, parse_limit
from lightning_ptq.statistics.acceptance import StatisticsResult, left_out
from lightning_ptq.statistics.bias import check_tuning, tune_bias
from lightning_ptq.statistics.normalization import para_normalize, reestimate_batch_norm

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

Target = Literal["auto", "batch_norm", "float"]


class StatsTuning(StepCallback):
    """Corrects the shifts of means and deviations that quantization causes; no integer weight changes.

    Runs :func:`~lightning_ptq.statistics.normalization.reestimate_batch_norm`,
    :func:`~lightning_ptq.statistics.normalization.para_normalize` and
    :func:`~lightning_ptq.statistics.bias.tune_bias`, as the last of the callbacks. Each step is kept only if it brings
    the network closer to the float network on held-out samples. A step that cannot be measured or differentiated is
    left out with a warning.

    Args:
        target: Statistics that the layers' outputs are corrected to. ``"batch_norm"``: those of the batch norms, folded
            or not; ``"float"``: those of the float layers; ``"auto"``: the one after the other, each kept only if it
            helps; None for no correction.
        bias: True to tune the biases by distillation.
        steps: Number of steps of bias tuning.
        lr: Rate of bias tuning, relative to the mean magnitude of a layer's biases.
        norm_affine: True to tune the affine parameters of norms together with the biases.
        measure: ``"kl"`` for logits, ``"mse"`` for other outputs.
        output: Tensor of the network's output that is compared: a key, an index or a function; by default
            the only floating-point tensor, or the ``logits``.
        held_out: Share of the samples on which each step is evaluated.
        memory_limit: Limit of the activations in memory, in bytes or as text such as ``"4GiB"``. Activations beyond it
            go to memory-mapped files. ``"auto"`` allows what a forward and backward pass of the float network takes on
            the samples of a step.
        seed: Seed of all random choices.
        parts: Number of shards that bias tuning splits a batch into; no more ranks than this share a step. None for
            the ``parts`` of the last AdaQuantLayerwise before this callback, or 2 without one.

    Attributes:
        result: A :class:`~lightning_ptq.statistics.acceptance.StatisticsResult` for each step of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.
        StatisticsError: In fit, if there are too few samples.
        SensitivityError: In fit, before the work of any callback, if the network's output cannot be read.

    Warns:
        SkippedStepWarning: In fit, naming a step that was left out, and why.

    Example::

        callbacks = [CalibrationCapture("w4a4"), AdaQuantLayerwise(), StatsTuning()]
    """

    role = "StatsTuning"
    title = "Statistics tuning"
    tunes = True
    result: list[StatisticsResult] | None

    def __init__(
        self,
        target: Target | None = "auto",
        bias: bool = True,
        steps: int = 100,
        lr: float = 0.01,
        norm_affine: bool = False,
        measure: Divergence = "kl",
        output: ChooseOutput | None = None,
        held_out: float = 0.25,
        memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
        seed: int = 0,
        parts: int | None = None,
    ) -> None:
        super().__init__()
        one_of("measure", measure, ("kl", "mse"))
        seed, held_out = arguments.seed(seed), number("held_out", held_out, "lie in [0, 1)", (0, 1), "0.25")
        self.common: dict[str, Any] = {
            "held_out": held_out,
            "measure": measure,
            "output": check_choice(output),
            "seed": seed,
        }
        if target not in ("auto", "batch_norm", "float", None):
            raise QConfigError(f"target must be 'auto', 'batch_norm', 'float' or None, got {target!r}.")
        if parts is not None:
            parts = whole("parts", parts, none=True)
        steps, lr, _, norm_affine = check_tuning(steps, lr, 1, norm_affine)
        parse_limit(memory_limit)
        self.target = target
        self.bias = flag("bias", bias)
        self.tuning: dict[str, Any] = {"steps": steps, "lr": lr, "norm_affine": norm_affine}
        self.memory_limit = memory_limit
        self.parts = parts

    def check(self, trainer: Trainer, calibration: Calibration) -> None:
        """Check that the network's output can be read."""
        if self.target is not None or self.bias:
            check_output(calibration, self.common["measure"], self.common["output"])

    def work(self, trainer: Trainer, calibration: Calibration, journal: Journal = NO_JOURNAL) -> list[StatisticsResult]:
        """Run the steps one after the other."""
        steps: dict[str, Callable[..., StatisticsResult]] = {}
        if self.target in ("auto", "batch_norm"):
            steps["batch_norm"] = partial(reestimate_batch_norm, memory_limit=self.memory_limit)
        if self.target in ("auto", "float"):
            steps["para_normalization"] = partial(para_normalize, every_layer=True, memory_limit=self.memory_limit)
        if self.bias:
            steps["bias"] = partial(tune_bias, parts=self.shards(trainer), **self.tuning)
        results: list[StatisticsResult] = []
        with self._progress(trainer) as progress:
            for name, step in steps.items():
                try:
                    results.append(step(calibration, progress=progress, journal=journal, **self.common))
                except SensitivityError as error:
                    results.append(left_out(name, str(error)))
        for index, row in enumerate(results):
            values = {"ptq/statistics/before": row.before, "ptq/statistics/after": row.after}
            log_scalars(trainer, {**values, "ptq/statistics/accepted": float(row.accepted)}, index)
        return results

    def shards(self, trainer: Trainer) -> int:
        """Return the number of shards that bias tuning splits a batch into, in this Trainer."""
        if self.parts is not None:
            return self.parts
        before = takewhile(lambda callback: callback is not self, ptq_callbacks(trainer))
        counts = [callback.config.parts for callback in before if isinstance(callback, AdaQuantLayerwise)]
        return counts[-1] if counts else DEFAULT_SHARDS

    def record(self, report: PTQReport) -> None:
        """Put the steps into the report."""
        report.statistics = self.result or []
