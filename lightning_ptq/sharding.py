"""The calibration set of several ranks put together: all of them end up with what a single process would have.

Batches are dealt to ranks as ``DistributedSampler`` deals samples: rank ``r`` of ``w`` has samples ``r, r + w, ...``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ptq.batches import Batches
from lightning_ptq.forward import batch_size
from lightning_ptq.observers import MinMaxObserver
from lightning_ptq.ranks import Ranks
from lightning_ptq.trace import Trace


def is_divisible(batch: Any) -> bool:
    """Whether every part of the batch is a tensor with one row a sample."""
    leaves, _ = tree_flatten(batch)
    return all(isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch_size(batch) for leaf in leaves)


def take_rows(batch: Any, rows: slice) -> Any:
    """Some samples of a divisible batch."""
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([leaf[rows] for leaf in leaves], spec)


def own_share(rank: int, world: int, samples: float) -> float:
    """How many of the first so many samples of the whole set are a rank's.

    Example:
        >>> [own_share(rank, 3, 10) for rank in range(3)]
        [4, 3, 3]
    """
    return samples if samples == math.inf else (samples - rank + world - 1) // world


def merge_observers(
    ranks: Ranks, observers: dict[str, MinMaxObserver], make: Callable[[str], MinMaxObserver]
) -> dict[str, MinMaxObserver]:
    """Merge the observers of each layer over the ranks, by the reductions that their states declare.

    Args:
        ranks: The processes.
        observers: This rank's, by layer; changed in place.
        make: A new observer for a layer that this rank never reached.
    """
    if ranks.world == 1:
        return observers

    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        return [found.to(state.device) for found in ranks.gather(state.cpu())]

    names = list(dict.fromkeys(name for found in ranks.gather(list(observers)) for name in found))
    for name in names:
        observer = observers.setdefault(name, make(name))
        with observer.sync_context(dist_sync_fn=gather, distributed_available=lambda: True):
            merged = observer.metric_state
        for state, value in merged.items():  # it keeps them, where a sync for good keeps its own beside them
            setattr(observer, state, value)
    return {name: observers[name] for name in names}


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
