"""Reconstruction losses: how far the output of a quantized unit is from that of the float unit.

A loss is one class: what a step minimizes, what decides on held-out samples, and the normalizer of both. To add one,
derive a class from :class:`ReconstructionLoss` and enter it in :data:`LOSSES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_LEAST = 1e-4
"""Share of the variance in the squares below which all samples count as equal."""

Magnitudes = list[tuple[float, int]]
"""For each output of a unit, the summed spread of its targets, and the number of their values."""


class ReconstructionLoss(ABC):
    """A distance between outputs and targets, relative to the spread of the targets.

    A unit may have several outputs. Each is divided by its own normalizer, so that none outweighs the others.

    Args:
        shards: :meth:`magnitudes` of every shard of the samples, in the order of the shards.
    """

    def __init__(self, shards: Sequence[Magnitudes]) -> None:
        columns = [list(zip(*column, strict=True)) for column in zip(*shards, strict=True)]
        # An output that is 0 throughout must not divide by 0.
        self.normalizers = [max(sum(sums) / sum(counts), 1e-20) for sums, counts in columns]

    @classmethod
    def magnitudes(cls, columns: Iterable[Iterable[Tensor]]) -> Magnitudes:
        """Return the magnitudes of one shard.

        Args:
            columns: For each output of the unit, its targets on all calls.
        """
        return [cls.spread(targets) for targets in columns]

    def training(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the loss of some rows (scalar): the sum over the outputs of mean distances over normalizers."""
        triples = zip(outputs, targets, self.normalizers, strict=True)
        return torch.stack([self.distance(output, target) / norm for output, target, norm in triples]).sum()

    def held_out(self, pairs: Iterable[Sequence[tuple[Tensor, Tensor]]]) -> tuple[float, float]:
        """Return the summed distance of outputs from targets, and what it is relative to, in float64.

        Their ratio over all held-out samples is the error by which a tuned unit is accepted.

        Args:
            pairs: For each mini-batch, (output, target) of each output of the unit.
        """
        error = spread = 0.0
        for of_batch in pairs:
            for (output, target), norm in zip(of_batch, self.normalizers, strict=True):
                error, spread = error + self.total(output, target), spread + norm * target.numel()
        return error, spread

    @staticmethod
    @abstractmethod
    def distance(output: Tensor, target: Tensor) -> Tensor:
        """Return the mean distance of an output from its target (scalar), differentiable in the output."""

    @staticmethod
    @abstractmethod
    def total(output: Tensor, target: Tensor) -> float:
        """Return the summed distance of an output from its target."""

    @staticmethod
    @abstractmethod
    def spread(targets: Iterable[Tensor]) -> tuple[float, int]:
        """Return the summed distance of targets from their mean, and the number of their values."""


class SquaredError(ReconstructionLoss):
    """The squared error over the variance of the targets (Hubara et al., ICML 2021, eq. 2, normalized).

    The variance is that over the samples, about the mean of each value: what all samples have in common tells none from
    another, and would make an error look small.
    """

    @staticmethod
    def distance(output: Tensor, target: Tensor) -> Tensor:
        """See :class:`ReconstructionLoss`."""
        return (output - target).square().mean()

    @staticmethod
    def total(output: Tensor, target: Tensor) -> float:
        """See :class:`ReconstructionLoss`."""
        return float((output - target).double().square().sum().item())  # over many more values than a step's mean

    @staticmethod
    def spread(targets: Iterable[Tensor]) -> tuple[float, int]:
        """See :class:`ReconstructionLoss`; the summed squares, if all samples have the same values."""
        squares, count = 0.0, 0
        means: dict[torch.Size, tuple[int, Tensor]] = {}  # by shape of a sample: number and sum of the samples
        for target in targets:
            # A norm makes no copy of a large target.
            squares, count = squares + torch.linalg.vector_norm(target).item() ** 2, count + target.numel()
            samples = target if target.dim() else target[None]
            number, total = means.get(samples.shape[1:], (0, torch.zeros((), dtype=torch.float64)))
            means[samples.shape[1:]] = number + len(samples), total.to(samples.device) + samples.sum(0).double()
        common = sum(total.square().sum().item() / number for number, total in means.values() if number)
        return (squares - common if squares - common > _LEAST * squares else squares), count


LOSSES: dict[str, type[ReconstructionLoss]] = {"squared_error": SquaredError}
"""Losses by the names that :class:`~lightning_ptq.tuning.config.ReconstructionConfig` takes."""
