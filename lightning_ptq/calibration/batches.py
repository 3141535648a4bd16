"""The calibration batches of a process: its own in memory, those of other processes in files."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ptq.calibration.forward import batch_size
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.memory import disk_room
from lightning_ptq.runtime.ranks import Ranks


class Batches(Sequence[Any]):
    """Batches, of which some lie in files of a temporary folder and are read anew at each access.

    So a set that several processes share is not in the memory of each. A batch for which the disk has no room stays in
    memory.

    Args:
        batches: To begin with, in memory.

    Example:
        >>> batches = Batches(["a"])
        >>> batches.put_away("b")
        >>> len(batches), list(batches), [path.name for path in batches.files()]
        (2, ['a', 'b'], ['1.pickle'])
        >>> batches.clear()
    """

    def __init__(self, batches: Iterable[Any] = ()) -> None:
        self._entries: list[tuple[Any, Path | None]] = [(batch, None) for batch in batches]
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, batch: Any) -> None:
        """Add a batch, in memory."""
        self._entries.append((batch, None))

    def put_away(self, batch: Any) -> None:
        """Add a batch, in a file."""
        data = pickle.dumps(batch)
        if len(data) > disk_room():
            self.append(batch)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lightning_ptq_batches_")
        path = Path(self._folder.name, f"{len(self)}.pickle")
        path.write_bytes(data)
        self._entries.append((None, path))

    def files(self) -> list[Path]:
        """The files there are."""
        return [path for _, path in self._entries if path is not None]

    def clear(self) -> None:
        """Drop all batches and remove the folder."""
        self._entries.clear()
        if self._folder is not None:
            self._folder.cleanup()
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
        return batch if path is None else pickle.loads(path.read_bytes())  # this process wrote it


def is_divisible(batch: Any) -> bool:
    """Whether every part of the batch is a tensor with one row a sample."""
    leaves, _ = tree_flatten(batch)
    return all(isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch_size(batch) for leaf in leaves)


def take_rows(batch: Any, rows: slice) -> Any:
    """Some samples of a divisible batch."""
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([leaf[rows] for leaf in leaves], spec)


def merge_batches(ranks: Ranks, batches: Batches, traces: list[Trace]) -> tuple[Batches, list[Trace]]:
    """All ranks' calibration batches with their traces, in the order of the whole set.

    Where the forward did the same on all of them and batches can be divided, they are cut anew, so that their number
    and size are what a single process would have had. Others are put behind one another, rank by rank in turn. A rank
    holds every ``world``-th in memory, which are those that it tunes on in sequential mode, and the others in files.
    """
    if ranks.world == 1:
        return batches, traces
    alike = len(set().union(*ranks.gather({trace.digest() for trace in traces}))) == 1
    recut = alike and all(ranks.gather(all(is_divisible(batch) for batch in batches)))
    size = next(found for found in ranks.gather(batch_size(batches[0]) if batches else 0) if found)
    whole = Batches()
    for turn in range(max(ranks.gather(len(batches)))):  # turn by turn, so that no set is in memory twice
        own = _compact(batches[turn]) if turn < len(batches) else None
        found = [batch for batch in ranks.gather(own) if batch is not None]
        for batch in _recut(found, size) if recut else found:
            if ranks.mine(len(whole)):
                whole.append(batch)
            else:
                whole.put_away(batch)
    if recut:
        shared = next(of_rank for of_rank in ranks.gather(traces[:1]) if of_rank)[0]
        return whole, [traces[0] if traces else shared] * len(whole)
    known: dict[str, Trace] = {}
    return whole, [known.setdefault(t.digest(), t) for t in _in_turn(ranks.gather(traces))]


def _in_turn(by_rank: list[list[Any]]) -> list[Any]:
    longest = max(len(found) for found in by_rank)
    return [found[i] for i in range(longest) for found in by_rank if i < len(found)]


def _compact(batch: Any) -> Any:
    """The batch without what its tensors are views of, which would travel with them."""
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _recut(batches: list[Any], size: int) -> list[Any]:
    """Samples in turn from one batch of each rank, in batches of ``size``."""
    spec = tree_flatten(batches[0])[1]
    columns = zip(*(tree_flatten(batch)[0] for batch in batches), strict=True)
    pieces = [_interleave(list(column)).split(size) for column in columns]
    return [tree_unflatten([piece[i].clone() for piece in pieces], spec) for i in range(len(pieces[0]))]


def _interleave(parts: list[Tensor]) -> Tensor:
    order = sorted((row, rank) for rank, part in enumerate(parts) for row in range(len(part)))
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
    return torch.cat(parts)[[starts[rank] + row for row, rank in order]]
