"""The processes of a run: the one place that knows of ``torch.distributed``.

A rank that fails says so (:meth:`Ranks.leave`), and whoever waits for it in an exchange looks for that: all ranks end
with its message instead of waiting for ever.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ptq.errors import RankError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # a rank may rightly wait as long as another one tunes
_LOOK = timedelta(seconds=1)  # how often a rank that waits looks whether another one has failed
_SPIN = 0.02  # seconds that a rank waits without going to sleep, from which it would wake up late, or on another core
_FAREWELL = 20.0  # seconds that a rank that failed gives the others to learn of it

_yield: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))  # Windows has none


class Ranks:
    """A single process; the exchanges are then no exchanges.

    Attributes:
        rank: Of this process, from 0.
        world: How many there are.

    Example:
        >>> ranks = Ranks()
        >>> ranks.gather("mine"), ranks.first(lambda: 3), ranks.mine(5)
        (['mine'], 3, True)
    """

    rank = 0
    world = 1

    def mine(self, index: int) -> bool:
        """Whether piece ``index`` of work that is dealt out in turn is this rank's."""
        return index % self.world == self.rank

    def poll(self) -> None:
        """Raise :class:`RankError` if another rank has failed; looks at most once a second, and waits for nobody."""

    def leave(self, error: BaseException) -> None:
        """Tell the others, who may still be at work, that this rank has failed, and wait until they know."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank; anything that can be pickled."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises on rank 0, on all ranks."""
        return work()

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the values that tensor ``i`` has on rank ``i``, in place; there may be fewer than ranks."""

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the values that the tensors have on rank 0, in place."""

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare tensors over the ranks, bit for bit.

        Raises:
            RankError: If they differ, naming the first that does.
        """


class ProcessRanks(Ranks):
    """The processes of the default process group.

    Exchanges go over groups of their own, so that they cannot be taken for those of Lightning or the user.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Objects, and tensors on the CPU, go by gloo; others as the default group does it, for example by NCCL.
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        self._data = self._control
        if dist.get_backend() != "gloo":
            self._data = cast(dist.ProcessGroup, dist.new_group(timeout=_PATIENCE))
        self._looked = 0.0
        self._store = dist.distributed_c10d._get_default_store()
        self._key = "lightning_ptq"
        self._key += self._objects(uuid.uuid4().hex)[0]

    def poll(self) -> None:
        """See :class:`Ranks`."""
        if time.monotonic() - self._looked < _LOOK.total_seconds():
            return
        self._looked = time.monotonic()
        try:
            failed = self._store.get(self._key).decode() if self._store.check([self._key]) else ""
        except RuntimeError as lost:
            raise RankError(f"rank {self.rank} has lost rank 0: {lost}.") from lost
        if failed:
            raise RankError(f"another rank failed, so all stop. {failed}")

    def leave(self, error: BaseException) -> None:
        """See :class:`Ranks`."""
        with suppress(Exception):  # whatever is out of order now, the error itself is what matters
            if not self._store.check([self._key]):
                self._store.set(self._key, f"Rank {self.rank} says: {type(error).__name__}: {error}")
            self._store.add(f"{self._key} known", 1)
            deadline = time.monotonic() + _FAREWELL
            while self._store.add(f"{self._key} known", 0) < self.world and time.monotonic() < deadline:
                time.sleep(0.02)

    def _group(self, tensor: Tensor) -> dist.ProcessGroup:
        """What the tensor travels over.

        All ranks meet before NCCL is called: whoever waits in it, or in its start, for a rank that failed can neither
        look whether one did, nor end.
        """
        if tensor.device.type == "cpu":
            return self._control
        self._wait(dist.all_reduce(torch.zeros(1), group=self._control, async_op=True))
        return self._data

    def _wait(self, work: Any, on_gpu: bool = False) -> None:
        """Wait for an exchange, or for the news that a rank has failed."""
        deadline = time.monotonic() + _SPIN
        while not work.is_completed() and time.monotonic() < deadline:
            _yield()
        while on_gpu and not work.is_completed():  # NCCL takes a wait that times out for an error
            self.poll()
        while not work.is_completed():
            with suppress(RuntimeError):  # a wait that is over before the exchange; what else it is, the last one tells
                work.wait(_LOOK)
            self.poll()
        try:
            work.wait()
        except RuntimeError as lost:
            self._looked = 0.0
            self.poll()  # the one who is lost may have said why
            raise RankError(f"rank {self.rank} has lost another process: {lost}.") from lost

    def _objects(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self._wait(dist.all_reduce(sizes, group=self._control, async_op=True))
        found: list[Any] = []
        for rank, size in enumerate(sizes.tolist()):  # gathered at once, gloo's threads would keep room for all of them
            part = data if rank == self.rank else torch.empty(size, dtype=torch.uint8)
            self._wait(dist.broadcast(part, src=rank, group=self._control, async_op=True))
            found.append(pickle.loads(part.numpy().data))
        return found

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        return self._objects(value)

    def first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        box: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            try:
                box = (work(), None)
            except Exception as raised:
                box, error = (None, raised), raised
        value, failure = self._objects(box)[0]
        if failure is not None:
            raise error or failure
        return cast(T, value)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        group = self._group(tensors[0])
        # All at once. An all-reduce would take two rounds, and add in an order that goes by the number of ranks.
        sent = [dist.broadcast(tensor, src=r, group=group, async_op=True) for r, tensor in enumerate(tensors)]
        for tensor, work in zip(tensors, sent, strict=True):
            self._wait(work, tensor.is_cuda)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """See :class:`Ranks`."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self._wait(dist.broadcast(whole, src=0, group=self._group(whole), async_op=True), whole.is_cuda)
            tensor.detach().copy_(whole)

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Ranks`."""
        all_digests = self.gather({name: digest([tensor]) for name, tensor in tensors.items()})
        for name in sorted(set().union(*all_digests)):
            if len({found.get(name) for found in all_digests}) > 1:
                raise RankError(
                    f"the ranks hold different bytes in {name!r}, so the run cannot be trusted. Check that all of them"
                    " run the same code on the same kind of device, and please report it."
                )


def current_ranks() -> Ranks:
    """The processes of the default process group; a single one where there is none."""
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessRanks() if many else Ranks()


def digest(tensors: Iterable[Tensor]) -> str:
    """A checksum of shapes, types and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def deal_out(costs: Mapping[str, float], kept: Sequence[set[str]]) -> dict[str, int]:
    """The rank that each piece of work goes to: the costliest first, each to the rank with the least so far.

    Args:
        costs: By name.
        kept: For each rank, pieces that it has done already.

    Example:
        >>> deal_out({"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}, [set(), {"d"}])
        {'a': 0, 'b': 1, 'c': 1, 'd': 1}
    """
    owners = {name: rank for rank in reversed(range(len(kept))) for name in kept[rank]}
    load = [0.0] * len(kept)
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name not in owners:
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}
