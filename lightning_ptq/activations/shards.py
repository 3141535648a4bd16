"""Shards of the calibration set, by which ranks share a tuning step.

A step takes some samples of every shard. The samples of a shard are captured, held and computed by one process, and
nothing about them depends on other shards. So the result has the same bytes on any number of processes, and the more
processes there are, the less each of them holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_ptq.activations.groups import Group, count_of
from lightning_ptq.activations.unit_data import Minibatch, UnitData
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.structure import float_tensors_in

T = TypeVar("T")

DEFAULT_SHARDS = 2
"""Default number of shards."""


@dataclass(frozen=True)
class Shard:
    """Some of the calibration batches.

    Attributes:
        index: Index of the shard, from 0.
        batches: Indices of its batches.
        weight: Its share of all samples; the weights of all shards add up to 1.
        size: Number of its samples in each step.
    """

    index: int
    batches: tuple[int, ...]
    weight: float
    size: int


def make_shards(samples: Sequence[int], count: int, batch_size: int) -> list[Shard]:
    """Split batches into shards, round-robin.

    Args:
        samples: Number of samples in each batch.
        count: Number of shards, if there are as many batches.
        batch_size: Samples per step, over all shards; each shard contributes at least one.

    Example:
        >>> [(shard.batches, shard.size) for shard in make_shards([64, 64, 64, 8], 2, 32)]
        [((0, 2), 20), ((1, 3), 12)]
    """
    shards = []
    for index in range(min(count, len(samples))):
        batches = tuple(range(index, len(samples), count))  # those that merge_batches() leaves in this rank's memory
        weight = sum(samples[batch] for batch in batches) / sum(samples)
        shards.append(Shard(index, batches, weight, max(1, round(batch_size * weight))))
    return shards


def over_shards(ranks: Ranks, values: dict[int, T]) -> list[T]:
    """Return the values of all shards in the order of the shards, so that sums do not depend on who computed them.

    Args:
        ranks: The processes that hold the shards.
        values: The values of this rank's shards, by index.
    """
    merged = ranks.merge(values)
    return [merged[index] for index in sorted(merged)]


class ShardSamples:
    """The samples of one unit in one shard: those to tune on, drawn step by step, and those held out.

    Args:
        shard: The shard.
        data: The unit's calls on the batches of the shard, with targets set.
        held_out: Share of the samples that are held out.
        seed: Seed of the random choices in this shard.

    Attributes:
        generator: Source of all random numbers of this shard.
        empty: True if the unit got no sample in this shard.
    """

    def __init__(self, shard: Shard, data: UnitData, held_out: float, seed: int) -> None:
        self.shard, self.data = shard, data
        self.generator = torch.Generator(data.device).manual_seed(seed)
        self._tuned, rest = data.split(held_out, self.generator)
        batches = data.batches(rest, 64)  # not shuffled: held-out errors are added in the same order every time
        self.empty = not self._tuned
        self._held_out = [(group, rows) for group, all_rows in batches for rows, _ in data.chunks(all_rows)]
        self._queue: list[Minibatch] = []

    def draw(self) -> list[tuple[Group, Tensor | slice, float]]:
        """Return the samples of the next step: rows of a group, with their share of the step.

        One epoch follows another, each in a new order. An empty shard has no samples.
        """
        if self.empty:
            return []
        self._queue = self._queue or self.data.batches(self._tuned, self.shard.size, self.generator)
        group, all_rows = self._queue.pop()
        return [(group, rows, share) for rows, share in self.data.chunks(all_rows)]

    def some(self, count: int) -> list[tuple[Group, Tensor | slice]]:
        """Return about ``count`` of the samples to tune on, the same ones each time."""
        found: list[tuple[Group, Tensor | slice]] = []
        for group, all_rows in self.data.batches(self._tuned, min(count, 64)):
            for rows, _ in self.data.chunks(all_rows):
                found.append((group, rows))
                count -= count_of(rows)
                if count <= 0:
                    return found
        return found

    def targets(self) -> Iterator[Iterator[Tensor]]:
        """Yield, for each output of the float unit, its values on all calls, on the unit's device."""
        for column in zip(*(group.targets or [] for group in self.data.groups), strict=True):
            yield (target.of_call(call) for target in column for call in range(len(target.calls)))

    def held_out(self, module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield (output, target) of each output of the quantized module, by mini-batch of the held-out samples."""
        for group, rows in self._held_out:
            outputs = float_tensors_in(self.data.run(module, group, rows, "quantized"))
            yield list(zip(group.without_padding(outputs, rows), group.wanted(rows), strict=True))
