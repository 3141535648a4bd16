"""The work of a tuning step on the samples of one shard, repeated as a CUDA graph where that is possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ptq.activations.groups import Picked
from lightning_ptq.errors import PTQError
from lightning_ptq.runtime.cuda_graphs import Recorder, Work

_WARM_UP = 2
"""Steps that run eagerly before one is recorded, so that libraries have set up what they keep."""
_MOST = 8
"""Graphs of one unit; each keeps the memory of a step."""
_TOLERANCE = 1e-2

Key = tuple[int, ...]


class Steps:
    """Runs steps, and repeats those with samples of the same shapes.

    The first repetition is compared with an eager step on the same samples and random numbers. Where anything fails or
    differs, all further steps run eagerly.

    Args:
        recorder: Records the work; None to run all steps eagerly.
        reason: Why steps of this unit cannot be recorded; empty if nothing speaks against it.

    Attributes:
        reason: The same, or what went wrong.
    """

    def __init__(self, recorder: Recorder | None, reason: str = "") -> None:
        self.recorder, self.reason = recorder, reason
        self._seen: dict[Key, int] = {}
        self._graphs: dict[Key, tuple[Picked, Work]] = {}

    def run(
        self, key: Key, picked: Picked, work: Callable[[Picked], None], result: Tensor, generator: torch.Generator
    ) -> None:
        """Run the work on some samples.

        Args:
            key: Equal for samples on which the same kernels run.
            picked: The samples.
            work: Adds to ``result``; depends on the samples, on tensors that keep their places, and on the generator.
            result: What the work adds its result to.
            generator: Source of its random numbers.
        """
        if self.recorder is None or self.reason:
            work(picked)
        elif key in self._graphs:
            static, repeat = self._graphs[key]
            static.copy_(picked)
            repeat()
        elif self._seen.get(key, 0) < _WARM_UP or len(self._graphs) == _MOST:
            self._seen[key] = self._seen.get(key, 0) + 1
            work(picked)
        else:
            self._record(key, picked, work, result, generator)

    def _record(
        self, key: Key, picked: Picked, work: Callable[[Picked], None], result: Tensor, generator: torch.Generator
    ) -> None:
        """Record the work, and compare what it does with an eager step, whose result is kept."""
        assert self.recorder is not None
        before, random = result.clone(), generator.get_state()
        static = picked.clone()
        work(picked)
        wanted, after = result.clone(), generator.get_state()
        try:
            repeat = self.recorder.record(lambda: work(static), [generator])
            result.copy_(before)
            generator.set_state(random)
            repeat()
            error = float((result - wanted).norm() / wanted.norm().clamp(min=1e-30))
            if error <= _TOLERANCE:
                self._graphs[key] = static, repeat
            else:
                self.reason = f"its repetition differs by {error:.1e}"
        except (PTQError, RuntimeError) as error:
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        result.copy_(wanted)
        generator.set_state(after)
