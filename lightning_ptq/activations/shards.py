"""The calibration set in parts: what ranks share a step of tuning by.

A step takes some samples of every part. A part's samples are captured, held and computed by one process, whichever
that is, and nothing of it depends on the other parts: so the result is the same bytes on any number of processes, and
the more there are, the less each of them holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ptq.activations.calls import float_leaves, run_unit
from lightning_ptq.activations.unit_data import Group, Minibatch, UnitData


@dataclass(frozen=True)
class Part:
    """Some of the calibration batches.

    Attributes:
        index: From 0.
        batches: Which.
        weight: Its share of all samples; the weights of all parts add up to 1.
        size: Samples that a step takes from it.
    """

    index: int
    batches: tuple[int, ...]
    weight: float
    size: int


def deal_parts(samples: Sequence[int], parts: int, batch_size: int) -> list[Part]:
    """Deal batches out in turn.

    Args:
        samples: In each batch.
        parts: How many, if there are enough batches.
        batch_size: Samples a step, from all parts together; at least one from each.

    Example:
        >>> [(part.batches, part.size) for part in deal_parts([64, 64, 64, 8], 2, 32)]
        [((0, 2), 20), ((1, 3), 12)]
    """
    found = []
    for index in range(min(parts, len(samples))):
        batches = tuple(range(index, len(samples), parts))
        weight = sum(samples[batch] for batch in batches) / sum(samples)
        found.append(Part(index, batches, weight, max(1, round(batch_size * weight))))
    return found


class PartSamples:
    """The samples of one unit that belong to a part: those to tune on, drawn step by step, and those held out.

    Args:
        part: Which part.
        data: The unit's calls on the part's batches, with targets set.
        held_out: Share of the samples that are held out.
        seed: Seed of the random choices of this part.

    Attributes:
        generator: Source of all random numbers of this part.
    """

    def __init__(self, part: Part, data: UnitData, held_out: float, seed: int) -> None:
        self.part, self.data = part, data
        self.generator = torch.Generator(data.device).manual_seed(seed)
        self._tune, rest = data.split(held_out, self.generator)
        judged = data.batches(rest, 64)
        self._held_out = [(group, rows) for group, all_rows in judged for rows, _ in data.chunks(all_rows)]
        self._queue: list[Minibatch] = []

    def draw(self) -> list[tuple[Group, Tensor | slice, float]]:
        """What a step takes, epoch after epoch, each in a new order: rows of a group, with their share of the whole."""
        self._queue = self._queue or self.data.batches(self._tune, self.part.size, self.generator)
        group, all_rows = self._queue.pop()
        return [(group, rows, share) for rows, share in self.data.chunks(all_rows)]

    def power(self) -> list[tuple[float, int]]:
        """Of each output of the float unit: the sum of its squares, and how many values those are."""
        found = []
        for column in zip(*(group.targets or [] for group in self.data.groups), strict=True):
            calls = [(call, target.device) for target in column for call in target.calls]
            # A norm copies nothing, but from files to the GPU.
            squares = sum(torch.linalg.vector_norm(call.to(device)).item() ** 2 for call, device in calls)
            found.append((squares, sum(call.numel() for call, _ in calls)))
        return found

    def held_out_error(self, module: nn.Module) -> tuple[float, float]:
        """Squared error of the quantized module's outputs on the held-out samples, and the squared targets."""
        error = power = 0.0
        for group, rows in self._held_out:
            outputs = float_leaves(run_unit(module, *group.arguments(rows), mode="quantized"))
            for output, target in zip(outputs, group.wanted(rows), strict=True):
                error += (output - target).double().square().sum().item()
                power += target.double().square().sum().item()
        return error, power
