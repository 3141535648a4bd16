"""StatsTuning: statistics and biases of the quantized module, inside ``trainer.fit``."""

from __future__ import annotations

from typing import Any, Literal

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import ChooseOutput, Divergence
from lightning_ptq.callbacks.base import StepCallback
from lightning_ptq.callbacks.trainer.loggers import log_scalars
from lightning_ptq.callbacks.trainer.progress import progress_task
from lightning_ptq.errors import QConfigError
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.statistics.bias import tune_bias
from lightning_ptq.statistics.normalization import para_normalize, reestimate_batch_norm

Target = Literal["auto", "batch_norm", "float"]


class StatsTuning(StepCallback):
    """Corrects the biases that quantization brings into means and deviations; integers stay as they are.

    A shell around :func:`~lightning_ptq.statistics.normalization.reestimate_batch_norm`,
    :func:`~lightning_ptq.statistics.normalization.para_normalize` and :func:`~lightning_ptq.statistics.bias.tune_bias`; the last of the
    callbacks. Each step is kept only if it brings the network closer to the float one on held-out samples.

    Args:
        target: What statistics the layers' outputs are brought back to. ``"batch_norm"``: those of the batch norms,
            folded or not; ``"float"``: the float layers' own; ``"auto"``: first the one, then the other, each kept
            only if it helps; None for no such step.
        bias: Tune the biases by distillation.
        steps: Of bias tuning.
        lr: Of bias tuning, relative to the mean magnitude of a layer's biases.
        norm_affine: Tune the affine parameters of norms with the biases.
        measure: ``"kl"`` for logits, ``"mse"`` for other outputs.
        output: Which tensor of the network's output: a key, an index or a function.
        held_out: Share of the samples that judge each step.
        memory_limit: For activations; beyond it they go to memory-mapped files.
        seed: Of all random choices.

    Attributes:
        result: A :class:`~lightning_ptq.statistics.acceptance.StatisticsResult` for each step of the last run.

    Raises:
        QConfigError: If an argument is out of its domain.
        StatisticsError: In fit, if there are too few samples.

    Example::

        callbacks = [CalibrationCapture("w4a4"), AdaQuantLayerwise(), StatsTuning()]
    """

    role = "StatsTuning"
    title = "Statistics tuning"
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
    ) -> None:
        super().__init__()
        if measure not in ("kl", "mse"):
            raise QConfigError(f"measure must be 'kl' or 'mse', got {measure!r}.")
        self.common: dict[str, Any] = {"held_out": held_out, "measure": measure, "output": output, "seed": seed}
        if target not in ("auto", "batch_norm", "float", None):
            raise QConfigError(f"target must be 'auto', 'batch_norm', 'float' or None, got {target!r}.")
        self.target = target
        self.bias = bias
        self.tuning: dict[str, Any] = {"steps": steps, "lr": lr, "norm_affine": norm_affine}
        self.memory_limit = memory_limit

    def work(self, trainer: Any, calibration: Calibration, journal: Journal | None = None) -> list[StatisticsResult]:
        """Run the steps, one after the other."""
        results: list[StatisticsResult] = []
        with progress_task(trainer, self.title) as progress:
            common: dict[str, Any] = {**self.common, "progress": progress, "journal": journal}
            store: dict[str, Any] = {"memory_limit": self.memory_limit}
            if self.target in ("auto", "batch_norm"):
                results.append(reestimate_batch_norm(calibration, **store, **common))
            if self.target in ("auto", "float"):
                results.append(para_normalize(calibration, every_layer=True, **store, **common))
            if self.bias:
                results.append(tune_bias(calibration, **self.tuning, **common))
        for step, row in enumerate(results):
            values = {"ptq/statistics/before": row.before, "ptq/statistics/after": row.after}
            log_scalars(trainer, {**values, "ptq/statistics/accepted": float(row.accepted)}, step)
        return results

    def record(self, report: PTQReport) -> None:
        """Put the steps into the report."""
        report.statistics = self.result or []
