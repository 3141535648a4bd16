"""CUDA graphs: work that is launched many times with the same kernels is launched once, and then repeated.

A small network waits for the launches of its kernels, not for the kernels. A graph has one launch for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Work = Callable[[], None]
"""Computes on tensors that keep their places, and writes its results into such tensors."""


class Recorder(Protocol):
    """Records work, so that it can be repeated."""

    def record(self, work: Work, generators: Sequence[torch.Generator] = ()) -> Work:
        """Return a function that repeats ``work``, which must not wait for the device.

        Args:
            work: What is recorded; recording does not compute anything.
            generators: Generators of random numbers that it draws from.

        Raises:
            Exception: Whatever the work or the recording raises.
        """


class CudaRecorder:
    """Records CUDA graphs, which share their memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Work, generators: Sequence[torch.Generator] = ()) -> Work:
        """See :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads, such as those of data loaders, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a recorder for work on a device; None where there is nothing to gain."""
    return CudaRecorder() if device.type == "cuda" else None
