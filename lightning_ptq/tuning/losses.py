"""Reconstruction losses: how far the output of a quantized unit is from that of the float unit.

A loss is one class: what a step minimizes, what decides on held-out samples, and the normalizer of both. To add one,
derive a class from :class:`ReconstructionLoss` and enter it in :data:`LOSSES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Magnitudes = list[tuple[float, int]]
"""For each output of a unit, the summed magnitude of its targets, and the number of their values."""


class ReconstructionLoss(ABC):
    """A distance between outputs and targets, relative to the magnitude of the targets.

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
        found = []
        for targets in columns:
            sums, count = 0.0, 0
            for target in targets:
                sums, count = sums + cls.magnitude(target), count + target.numel()
            found.append((sums, count))
        return found

    def training(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the loss of some rows (scalar): the sum over the outputs of mean distances over normalizers."""
        triples = zip(outputs, targets, self.normalizers, strict=True)
        return torch.stack([self.distance(output, target) / norm for output, target, norm in triples]).sum()

    @classmethod
    def held_out(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Return the summed distance and the summed magnitude of (output, target) pairs, in float64.

        Their ratio over all held-out samples is the error by which a tuned unit is accepted.
        """
        error = magnitude = 0.0
        for output, target in pairs:
            of_pair = cls.sums(output, target)
            error, magnitude = error + of_pair[0], magnitude + of_pair[1]
        return error, magnitude

    @staticmethod
    @abstractmethod
    def distance(output: Tensor, target: Tensor) -> Tensor:
        """Return the mean distance of an output from its target (scalar), differentiable in the output."""

    @staticmethod
    @abstractmethod
    def sums(output: Tensor, target: Tensor) -> tuple[float, float]:
        """Return the summed distance of an output from its target, and the summed magnitude of the target."""

    @staticmethod
    @abstractmethod
    def magnitude(target: Tensor) -> float:
        """Return the summed magnitude of a target."""


class SquaredError(ReconstructionLoss):
    """The squared error over the mean square of the targets (Hubara et al., ICML 2021, eq. 2, normalized)."""

    @staticmethod
    def distance(output: Tensor, target: Tensor) -> Tensor:
        """See :class:`ReconstructionLoss`."""
        return (output - target).square().mean()

    @staticmethod
    def sums(output: Tensor, target: Tensor) -> tuple[float, float]:
        """See :class:`ReconstructionLoss`."""
        # float64: the sums run over many more values than a step's mean.
        return (output - target).double().square().sum().item(), target.double().square().sum().item()

    @staticmethod
    def magnitude(target: Tensor) -> float:
        """See :class:`ReconstructionLoss`."""
        return float(torch.linalg.vector_norm(target).item() ** 2)  # a norm makes no copy of a large target


LOSSES: dict[str, type[ReconstructionLoss]] = {"squared_error": SquaredError}
"""Losses by the names that :class:`~lightning_ptq.tuning.config.ReconstructionConfig` takes."""
