"""Bias tuning: biases alone, by distillation from the float network (Hubara et al., ICML 2021, sec. 5)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.calibration.batches import is_divisible
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import batch_size
from lightning_ptq.calibration.outputs import ChooseOutput, Divergence, OutputReader, divergence, float_outputs
from lightning_ptq.errors import QConfigError
from lightning_ptq.network.layers import FoldableBatchNorm
from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.statistics.acceptance import Changes, StatisticsResult, judged
from lightning_ptq.tuning.config import ReconstructionConfig

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
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
    journal: Journal | None = None,
) -> StatisticsResult:
    """Tune all biases of the quantized layers so that the network's output comes close to the float one's.

    Adam with cosine decay over the calibration batches, as they were given, in an order drawn anew for each pass.

    Args:
        calibration: A calibrated (and possibly tuned) module, changed in place.
        steps: Optimisation steps of one calibration batch each.
        lr: Adam's rate, relative to the mean magnitude of the layer's biases.
        norm_affine: Tune the affine parameters of layer, group and unfolded batch norms too.
        measure: ``"kl"`` for logits, ``"mse"`` for other outputs.
        output: Which tensor of the network's output; see :class:`~lightning_ptq.calibration.outputs.OutputReader`.
        held_out: Share of the samples that judge the step and are not used for it.
        seed: Of the order of the batches and the choice of held-out samples.
        progress: Called with steps done, steps in all, and a text.
        journal: Where the finished step is kept, and found again.

    Several ranks (``calibration.ranks``) share each batch, if its samples can be told apart.

    Raises:
        StatisticsError: If there are fewer than two samples.
        QConfigError: If an argument is out of its domain.
    """
    if steps < 1 or not 0 < lr < float("inf"):
        raise QConfigError(f"steps must be 1 or more and lr positive, got steps={steps!r}, lr={lr!r}.")
    if measure not in ("kl", "mse"):
        raise QConfigError(f"bias tuning measures 'kl' or 'mse' between outputs, got {measure!r}.")
    values = _tuned_values(calibration, norm_affine)

    def work(part: Calibration) -> Changes:
        _distil(part, values, steps, lr, measure, OutputReader(part, output), seed, progress)
        return Changes(list(values))

    return judged(
        "bias", calibration, work, held_out=held_out, measure=measure, output=output, seed=seed, journal=journal
    )


def _tuned_values(calibration: Calibration, norm_affine: bool) -> dict[str, nn.Parameter]:
    """The parameters to tune, by name; a parameter that several layers share comes once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, layer in calibration.layers.items():
        if isinstance(layer.bias, nn.Parameter):
            found.setdefault(id(layer.bias), (f"{name}.bias", layer.bias))
    for name, norm in calibration.module.named_modules() if norm_affine else ():
        folded = isinstance(norm, FoldableBatchNorm) and norm.is_folded
        if isinstance(norm, _NORMS) and not folded:
            for key, parameter in norm.named_parameters(recurse=False):
                calibration.prepared.remember(parameter)
                found.setdefault(id(parameter), (f"{name}.{key}", parameter))
    return dict(found.values())


def _distil(
    calibration: Calibration,
    values: dict[str, nn.Parameter],
    steps: int,
    lr: float,
    measure: Divergence,
    reader: OutputReader,
    seed: int,
    progress: Progress,
) -> None:
    if not values:
        return
    targets = float_outputs(calibration, reader)
    flags = [(p, p.requires_grad) for p in calibration.module.parameters()]
    groups = [{"params": [p], "lr": lr * max(p.detach().abs().mean().item(), 1e-8)} for p in values.values()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    gradients = Gradient(list(values.values()), calibration.ranks, ReconstructionConfig.parts)
    order: list[int] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in values.values():
            parameter.requires_grad_(True)
        for step in range(steps):
            order = order or torch.randperm(len(targets), generator=generator).tolist()
            batch = order.pop()
            _differentiate(calibration, batch, targets[batch], measure, reader, gradients)
            optimizer.step()
            schedule.step()
            progress(step + 1, steps, "biases")
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in values.values():
            parameter.grad = None


def _differentiate(
    calibration: Calibration,
    batch: int,
    target: Tensor,
    measure: Divergence,
    reader: OutputReader,
    gradient: Gradient,
) -> None:
    """The gradient of a step, on one calibration batch: in parts that ranks share, or the whole of it on rank 0."""
    samples, ranks = len(target), calibration.ranks
    divisible = is_divisible(calibration.batches[batch]) and batch_size(calibration.batches[batch]) == samples
    size = -(-samples // ReconstructionConfig.parts) if divisible else samples
    for index, start in enumerate(range(0, samples, size)):
        if not ranks.mine(index):
            continue
        rows = slice(start, min(start + size, samples))
        found, _ = reader.read(partial(calibration.run, batch, True, rows if divisible else None))
        with torch.enable_grad():
            gradient.add(index, divergence(found, target[rows], measure).sum() / samples)
    gradient.reduce()
