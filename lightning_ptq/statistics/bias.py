"""Bias tuning: biases alone, by distillation from the float network (Hubara et al., ICML 2021, sec. 5)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.activations.shards import DEFAULT_SHARDS
from lightning_ptq.arguments import flag, is_number, number, whole
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import ChooseOutput, Divergence, OutputReader, divergence, float_outputs
from lightning_ptq.errors import QConfigError, SensitivityError, StatisticsError
from lightning_ptq.network.batch_norm import is_folded
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.gradient import Gradient, gradient_errors
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.optimization import minimize
from lightning_ptq.runtime.patching import frozen
from lightning_ptq.runtime.progress import Progress, no_progress
from lightning_ptq.statistics.acceptance import Changes, StatisticsResult, accept_if_better, check_acceptance

_REMEDY = "Leave it out (bias=False of StatsTuning), or calibrate with a step= that runs the tuned network last."
_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


def tune_bias(
    calibration: Calibration,
    *,
    steps: int = 100,
    lr: float = 0.01,
    norm_affine: bool = False,
    measure: Divergence = "kl",
    output: ChooseOutput | None = None,
    held_out: float = 0.25,
    parts: int = DEFAULT_SHARDS,
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
) -> StatisticsResult:
    """Tune all biases of the quantized layers so that the network's output comes close to the float one's.

    Adam with cosine decay runs over the calibration batches, in a new order in each pass. The ranks of the calibration
    share each batch, if its samples are separable.

    Args:
        calibration: A calibrated (and possibly tuned) module, changed in place.
        steps: Optimization steps, of one calibration batch each.
        lr: Adam's rate, relative to the mean magnitude of the layer's biases.
        norm_affine: Tune the affine parameters of layer, group and unfolded batch norms too.
        measure: ``"kl"`` for logits, ``"mse"`` for other outputs.
        output: The tensor of the network's output; None to find it, see
            :class:`~lightning_ptq.calibration.outputs.OutputReader`.
        held_out: Share of the samples that decide whether the step is kept, and that it does not use.
        parts: Number of shards that each batch is split into; at most this many ranks share a step.
        seed: Seed of the order of the batches and of the choice of held-out samples.
        progress: Called with the steps done, the steps in total, and a text.
        journal: Where the finished step is saved, so that an interrupted run resumes; by default nowhere.

    Raises:
        StatisticsError: If there are fewer than two samples.
        SensitivityError: If the output cannot be read, compared or differentiated.
        QConfigError: If an argument is outside its domain.
    """
    steps, lr, parts, norm_affine = check_tuning(steps, lr, parts, norm_affine)
    seed, held_out = check_acceptance(calibration, seed, held_out)
    if measure not in ("kl", "mse"):
        raise QConfigError(f"bias tuning measures 'kl' or 'mse' between outputs, got {measure!r}.")
    values = _tuned_parameters(calibration, norm_affine)
    parameters = list(values.values())
    _check_gradients(calibration, OutputReader(calibration, output), parameters)

    def work(part: Calibration) -> Changes:
        distillation = _Distillation(part, measure, OutputReader(part, output), parts, seed)
        try:
            distillation.run(parameters, steps, lr, progress)
        except SensitivityError as error:
            if calibration.ranks.world == 1:
                raise
            raise StatisticsError(str(error)) from error  # other ranks are in the middle of a step, which none may skip
        return Changes(list(values))

    return accept_if_better(
        "bias", calibration, work, held_out=held_out, measure=measure, output=output, seed=seed, journal=journal
    )


def check_tuning(steps: int, lr: float, parts: int, norm_affine: bool) -> tuple[int, float, int, bool]:
    """Return arguments of :func:`tune_bias` in Python's own types; raise :class:`QConfigError` where it would."""
    if not is_number(steps) and not isinstance(steps, bool):
        whole("steps", steps)  # which it is not
    if not is_number(lr):
        number("lr", lr, "be positive")
    if not (is_number(steps) and steps >= 1 and is_number(lr) and 0 < lr < float("inf")):
        raise QConfigError(f"steps must be 1 or more and lr positive, got steps={steps!r}, lr={lr!r}.")
    return whole("steps", steps), float(lr), whole("parts", parts), flag("norm_affine", norm_affine)


def _tuned_parameters(calibration: Calibration, norm_affine: bool) -> dict[str, nn.Parameter]:
    """Return the parameters to tune, by name; a parameter that several layers share is there once."""
    parameters: dict[int, tuple[str, nn.Parameter]] = {}  # by id: layers may share one
    for name, layer in calibration.layers.items():
        for which in layer.bias_names:
            bias = layer._parameters.get(which)
            if bias is not None:
                parameters.setdefault(id(bias), (f"{name}.{which}", bias))
    for name, norm in calibration.module.named_modules() if norm_affine else ():
        if isinstance(norm, _NORMS) and not is_folded(norm):
            for key, parameter in norm.named_parameters(recurse=False):
                calibration.prepared.remember(parameter)  # norms are not swapped, so undo() needs their values
                parameters.setdefault(id(parameter), (f"{name}.{key}", parameter))
    return dict(parameters.values())


def _check_gradients(calibration: Calibration, reader: OutputReader, parameters: list[nn.Parameter]) -> None:
    """Check that the output has a gradient with respect to some of the parameters, before they are tuned.

    Raises:
        SensitivityError: If it has none on a batch of each course of the forward.
    """
    if not parameters:
        return
    with no_inference_mode(), frozen(calibration.module, trained=parameters), gradient_errors(_REMEDY):
        for batch in calibration.one_batch_per_course():
            output, _ = reader.read(partial(calibration.run, batch, gradients=True))
            if output.requires_grad:
                with torch.enable_grad():
                    torch.autograd.grad(output.sum(), parameters, allow_unused=True)
                return
    name = next(reversed(reader.networks), "") or type(calibration.module).__name__
    raise SensitivityError(
        f"the network's output, which is that of {name!r}, carries no gradient to the biases, so that they cannot be"
        f" tuned. {_REMEDY}"
    )


class _Distillation:
    """Gradient steps on the divergence between the outputs of the quantized and the float network.

    Args:
        calibration: The module, and the samples to tune on.
        measure: Divergence between outputs.
        reader: Reads the network's output.
        shards: Number of shards that each batch is split into.
        seed: Seed of the order of the batches.
    """

    def __init__(
        self, calibration: Calibration, measure: Divergence, reader: OutputReader, shards: int, seed: int
    ) -> None:
        self.calibration, self.measure, self.reader, self.shards = calibration, measure, reader, shards
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.targets: list[Tensor] = []

    def run(self, parameters: list[nn.Parameter], steps: int, lr: float, progress: Progress) -> None:
        """Tune the parameters, each at a rate relative to its mean magnitude."""
        if not parameters:
            return
        # Targets come from the float network, so they do not depend on the biases.
        self.targets = float_outputs(self.calibration, self.reader)
        rates = [lr * max(parameter.detach().abs().mean().item(), 1e-8) for parameter in parameters]
        variables = list(zip(parameters, rates, strict=True))
        with frozen(self.calibration.module, trained=parameters):
            for step, _ in minimize(variables, steps, self.shards, self.calibration.ranks, self._differentiate):
                progress(step + 1, steps, "biases")

    def _differentiate(self, step: int, gradient: Gradient) -> None:
        """Add the gradient on the next batch: in shards that ranks share, or the whole batch on rank 0."""
        self.order = self.order or torch.randperm(len(self.targets), generator=self.generator).tolist()
        index = self.order.pop()
        target, batch = self.targets[index], self.calibration.batches[index]
        samples, padding = len(target), self.calibration.padding(index)
        # Random numbers belong to whole batches, and so do the targets that were computed with them.
        divisible = (
            Batch(batch).is_divisible and Batch(batch).samples == samples and not self.calibration.isolation.draws
        )
        size = -(-samples // self.shards) if divisible else samples  # rounded up, so that no sample is left over
        for shard, start in enumerate(range(0, samples, size)):
            if not self.calibration.ranks.owns(shard):
                continue
            rows = slice(start, min(start + size, samples))
            # The target is a constant, but the caller may have gradients switched off.
            with torch.enable_grad(), gradient_errors(_REMEDY):
                output, _ = self.reader.read(partial(self.calibration.run, index, True, rows if divisible else None))
                compared = None if padding is None or len(padding) != samples else padding[rows]
                loss = divergence(output, target[rows], self.measure, compared).sum() / samples
                if loss.requires_grad:  # else no bias takes part on this batch
                    gradient.add(shard, loss)
