"""Batches that all ranks are given alike, as an iterable dataset without sharding gives them."""

from __future__ import annotations

from typing import Any

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.errors import RepeatedSamplesWarning, warn
from lightning_ptq.runtime.ranks import Ranks


class Repeats:
    """A comparison of the batches of all ranks, as they come, until one batch differs.

    Args:
        ranks: Processes of the run.
        sharded: True if a sampler is known to distribute the samples; equal batches are then repeats in the dataset.

    Attributes:
        alike: True as long as all ranks were given the same batches; always False on a single process.
    """

    def __init__(self, ranks: Ranks, sharded: bool = False) -> None:
        self.ranks = ranks
        self.alike = ranks.world > 1 and not sharded

    def compare(self, batch: Any) -> None:
        """Compare the next batch with those of the other ranks; None at the end of the pass."""
        if self.alike:
            self.alike = len(set(self.ranks.gather(None if batch is None else Batch(batch).digest()))) == 1

    def turn(self, index: int) -> int:
        """Return about where batch ``index`` of this rank will be in the merged set, in which ranks take turns."""
        return index if self.alike else index * self.ranks.world + self.ranks.rank

    def end(self, samples: int) -> bool:
        """Return True if all ranks were given the same batches in the whole pass.

        Args:
            samples: Number of samples that this rank was given.

        Warns:
            RepeatedSamplesWarning: If they were.
        """
        self.compare(None)
        if self.alike and samples:
            warn(
                f"all {self.ranks.world} ranks were given the same {samples} calibration samples, so these count once.",
                RepeatedSamplesWarning,
                stacklevel=3,
            )
        return self.alike
