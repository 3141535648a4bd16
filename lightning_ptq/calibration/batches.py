"""The calibration batches of a process: its own in memory, those of other processes on disk."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.containers import has_rows
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.memory import disk_room
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.scratch import ScratchFolder


class Batches(Sequence[Any]):
    """A sequence of batches, some of them in files of a temporary folder, which are read at each access.

    A calibration set that several processes share thus takes the memory of one. A batch stays in memory if there is no
    room on the disk.

    Args:
        batches: Initial batches, kept in memory.

    Example:
        >>> batches = Batches(["a"])
        >>> batches.append_to_disk("b")
        >>> len(batches), list(batches), [path.name for path in batches.files()]
        (2, ['a', 'b'], ['1.pickle'])
        >>> batches.clear()
    """

    def __init__(self, batches: Iterable[Any] = ()) -> None:
        self._entries: list[tuple[Any, Path | None]] = [(batch, None) for batch in batches]
        self._folder: ScratchFolder | None = None

    def append(self, batch: Any) -> None:
        """Append a batch that is kept in memory."""
        self._entries.append((batch, None))

    def append_to_disk(self, batch: Any) -> None:
        """Append a batch that is kept in a file, as pickle writes it."""
        data = pickle.dumps(batch)
        if len(data) > disk_room():
            self.append(batch)
            return
        if self._folder is None:
            self._folder = ScratchFolder("batches")
        path = self._folder.path / f"{len(self)}.pickle"
        path.write_bytes(data)
        self._entries.append((None, path))

    def files(self) -> list[Path]:
        """Return the paths of all files."""
        return [path for _, path in self._entries if path is not None]

    def clear(self) -> None:
        """Remove all batches, and the folder with its files."""
        self._entries.clear()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, path = self._entries[index]
        return batch if path is None else pickle.loads(path.read_bytes())  # trusted: this process wrote it


def merge_batches(
    ranks: Ranks, batches: Batches, traces: list[Trace], repeated: bool = False
) -> tuple[Batches, list[Trace]]:
    """Return the calibration batches of all ranks with their traces, in the order of the dataset.

    Batches are re-cut to the number and size that a single process would have had, if they are divisible and fit
    together, and the forward took the same course on all of them. Otherwise they are interleaved whole, rank by rank.
    Each rank keeps every ``world``-th batch in memory, which are those that it tunes on in sequential mode, and the
    others on disk.

    Args:
        ranks: Processes of the run.
        batches: Batches of this rank.
        traces: Trace of the forward on each of them.
        repeated: True if all ranks were given the same batches, of which only those of rank 0 count.
    """
    if ranks.world == 1:
        return batches, traces
    if repeated and ranks.rank:
        batches, traces = Batches(), []
    same = len(set().union(*ranks.gather({trace.digest() for trace in traces}))) == 1
    layouts = ranks.gather([_layout(batch) for batch in batches])
    recut = same and not repeated and all(_fit_together(turn) for turn in zip_longest(*layouts, fillvalue=()))
    size = next(samples for samples in ranks.gather(Batch(batches[0]).samples if batches else 0) if samples)
    merged = Batches()
    for turn in range(max(map(len, layouts))):  # by turns, so that no rank holds the whole set twice
        own = Batch(batches[turn]).copy() if turn < len(batches) else None  # pickle would store whole storages
        of_turn = [batch for batch in ranks.gather(own) if batch is not None]
        for batch in _recut(of_turn, size) if recut else of_turn:
            if ranks.owns(len(merged)):
                merged.append(batch)
            else:
                merged.append_to_disk(batch)
    if recut:
        shared = next(of_rank for of_rank in ranks.gather(traces[:1]) if of_rank)[0]
        return merged, [traces[0] if traces else shared] * len(merged)
    known: dict[str, Trace] = {}
    return merged, [known.setdefault(t.digest(), t) for t in _interleave_ranks(ranks.gather(traces))]


def _interleave_ranks(by_rank: list[list[Any]]) -> list[Any]:
    longest = max(map(len, by_rank))
    return [items[i] for i in range(longest) for items in by_rank if i < len(items)]


def _layout(batch: Any) -> tuple[Any, ...] | None:
    """Return what the columns of batches to be joined must have in common; None if the batch is not divisible."""
    if not Batch(batch).is_divisible:
        return None
    columns = Batch(batch).columns()
    return tuple((type(c), c.dtype, c.shape[1:]) if has_rows(c) else type(c) for c in columns)


def _fit_together(layouts: Sequence[tuple[Any, ...] | None]) -> bool:
    return None not in layouts and len({layout for layout in layouts if layout}) == 1


def _recut(batches: list[Any], size: int) -> list[Any]:
    """Return batches of ``size``, filled with one sample of each rank's batch in turn."""
    columns = zip(*(Batch(batch).columns() for batch in batches), strict=True)
    pieces = [_split(_interleave_samples(list(column)), size) for column in columns]
    return [Batch(batches[0]).with_columns([piece[i] for piece in pieces]) for i in range(len(pieces[0]))]


def _split(column: Any, size: int) -> list[Any]:
    if isinstance(column, Tensor):
        return [piece.clone() for piece in column.split(size)]  # views would keep the storage of the whole column
    return [column[start : start + size] for start in range(0, len(column), size)]


def _interleave_samples(columns: list[Any]) -> Any:
    """Join one column of each rank's batch: first samples of all ranks, then second ones, as a sampler dealt them."""
    order = sorted((row, rank) for rank, column in enumerate(columns) for row in range(len(column)))
    if not has_rows(columns[0]):
        return type(columns[0])(columns[rank][row] for row, rank in order)
    starts = torch.tensor([0, *map(len, columns)]).cumsum(0).tolist()
    joined = torch.cat(columns) if isinstance(columns[0], Tensor) else np.concatenate(columns)
    return joined[[starts[rank] + row for row, rank in order]]


def own_share(rank: int, world: int, samples: float) -> float:
    """Return how many of the first ``samples`` samples of the whole set belong to a rank.

    Example:
        >>> [own_share(rank, 3, 10) for rank in range(3)]
        [4, 3, 3]
    """
    return samples if samples == math.inf else (samples - rank + world - 1) // world
