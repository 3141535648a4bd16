"""The processes of a run: the only module that uses ``torch.distributed``.

A rank that fails announces it (:meth:`Ranks.leave`). Ranks that wait for it in an exchange poll for that announcement,
so all ranks end with its message instead of waiting forever. They also end if a rank gives no sign of life for long.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ptq.errors import RankError
from lightning_ptq.runtime.heartbeat import Heartbeat

K = TypeVar("K")
T = TypeVar("T")

DEFAULT_TIMEOUT = 1800.0
"""Default number of seconds without a sign of life after which a rank counts as dead."""

_PATIENCE = timedelta(days=7)  # a rank may have to wait for as long as another one tunes
_LOOK = timedelta(seconds=1)  # interval at which a waiting rank checks whether another one has failed
_SPIN = 0.02  # seconds of busy waiting; a sleeping rank would wake up late, or on another core
_FAREWELL = 20.0  # seconds that a failed rank waits for the others to notice


def _go_on() -> None:
    """Do nothing: nobody has asked the run to stop."""


_yield: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))  # Windows has none


class Ranks:
    """A single process, whose exchanges return its own values.

    Attributes:
        rank: Index of this process, from 0.
        world: Number of processes.

    Example:
        >>> ranks = Ranks()
        >>> ranks.gather("mine"), ranks.on_rank_zero(lambda: 3), ranks.owns(5)
        (['mine'], 3, True)
    """

    rank = 0
    world = 1

    def close(self) -> None:
        """End the exchanges: this process has finished its part of the run."""

    def owns(self, index: int) -> bool:
        """True if this rank owns item ``index`` of work that is distributed round-robin."""
        return index % self.world == self.rank

    def poll(self) -> None:
        """Raise if the run is to stop, or :class:`RankError` if another rank has failed or is silent."""

    def leave(self, error: BaseException) -> None:
        """Announce to the other ranks, which may still be working, that this one has failed; wait until they know."""

    def explain_loss(self) -> None:
        """Raise :class:`RankError` if a rank that has ended, or whose connection broke, announced the reason."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; a value is anything that can be pickled."""
        return [value]

    def merge(self, items: Mapping[K, T]) -> dict[K, T]:
        """Return the items of all ranks in one dictionary, those of rank 0 first.

        Example:
            >>> Ranks().merge({"a": 1})
            {'a': 1}
        """
        return {key: value for of_rank in self.gather(dict(items)) for key, value in of_rank.items()}

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0, and return or raise its outcome on all ranks."""
        return work()

    def broadcast_each(self, tensors: Sequence[Tensor]) -> None:
        """Send tensor ``i`` from rank ``i`` to all ranks, in place; there may be fewer tensors than ranks."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Send the tensors from rank 0 to all ranks, in place."""

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that tensors have the same bytes on all ranks.

        Raises:
            RankError: If they differ, naming the first that does.
        """


class ProcessRanks(Ranks):
    """The processes of the default process group.

    Exchanges use process groups of their own, so that they cannot be confused with those of Lightning or the user.

    Args:
        timeout: Seconds without a sign of life after which a rank counts as dead; see
            :class:`~lightning_ptq.runtime.heartbeat.Heartbeat`.
        check_stop: Called while this rank waits for others; raises if the run is to stop.
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT, check_stop: Callable[[], None] = _go_on) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._timeout, self._check_stop = timeout, check_stop
        self._heartbeat: Heartbeat | None = None
        # gloo carries objects and CPU tensors; other tensors use the backend of the default group, for example NCCL.
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        self._data = self._control
        if dist.get_backend() != "gloo":
            self._data = cast(dist.ProcessGroup, dist.new_group(timeout=_PATIENCE))
        key = f"lightning_ptq {self._objects(uuid.uuid4().hex)[0]}"
        store = dist.distributed_c10d._get_default_store()
        self._heartbeat = Heartbeat(store, key, self.rank, self.world, timeout)
        self._close = weakref.finalize(self, Heartbeat.close, self._heartbeat)

    def close(self) -> None:
        """See :class:`Ranks`."""
        self._close()
        self._check_stop = _go_on

    def poll(self) -> None:
        """See :class:`Ranks`."""
        self._check_stop()
        if self._heartbeat is None:
            return
        if self._heartbeat.failure:
            raise RankError(f"another rank failed, so all stop. {self._heartbeat.failure}")
        if self._heartbeat.lost:
            raise RankError(f"rank {self.rank} has lost rank 0: {self._heartbeat.lost}.")
        if silent := self._heartbeat.silent():
            raise RankError(
                f"rank {', '.join(map(str, silent))} has given no sign of life for {self._timeout:.0f} seconds, so all"
                " stop. Its process is stopped, or its node is dead or cut off. Start the run again to resume."
            )

    def leave(self, error: BaseException) -> None:
        """See :class:`Ranks`."""
        if self._heartbeat is not None:
            self._heartbeat.announce(f"Rank {self.rank} says: {type(error).__name__}: {error}", _FAREWELL)
        self.close()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup:
        """Return the process group that carries the tensor.

        All ranks meet over gloo before NCCL is called, because a rank that waits inside NCCL, or for its start, can
        neither poll for failures nor end.
        """
        if tensor.device.type == "cpu":
            return self._control
        self._wait(dist.all_reduce(torch.zeros(1), group=self._control, async_op=True))
        return self._data

    def _wait(self, work: Any, on_gpu: bool = False) -> None:
        """Wait for an exchange to complete, or raise if the run is to stop, or a rank has failed or is silent."""
        start = time.monotonic()
        while not work.is_completed() and time.monotonic() - start < _SPIN:
            _yield()
        try:
            while not work.is_completed():
                if not on_gpu:  # NCCL treats a wait that times out as an error
                    with suppress(RuntimeError):  # the wait timed out; the last wait reports real errors
                        work.wait(_LOOK)
                self.poll()
                if self._heartbeat is None and time.monotonic() - start > self._timeout:
                    raise RankError(f"rank {self.rank} got no answer of another rank for {self._timeout:.0f} seconds.")
        except BaseException:
            # The destructor of a gloo group waits for its exchanges, and one with a stopped rank would block the exit.
            for abandoned in (work, self._control, self._data):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(abandoned))
            raise
        try:
            work.wait()
        except RuntimeError as lost:
            self.explain_loss()
            raise RankError(f"rank {self.rank} has lost another process: {lost}.") from lost

    def explain_loss(self) -> None:
        """See :class:`Ranks`."""
        if self._heartbeat is not None:
            self._heartbeat.refresh(2.0)
        self.poll()

    def _objects(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self._wait(dist.all_reduce(sizes, group=self._control, async_op=True))
        found: list[Any] = []
        for rank, size in enumerate(sizes.tolist()):  # one at a time: all_gather would make gloo buffer all of them
            part = data if rank == self.rank else torch.empty(size, dtype=torch.uint8)
            self._wait(dist.broadcast(part, src=rank, group=self._control, async_op=True))
            found.append(pickle.loads(part.numpy().data))
        return found

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        return self._objects(value)

    def on_rank_zero(self, work: Callable[[], T]) -> T:
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

    def broadcast_each(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        group = self._group(tensors[0])
        # All broadcasts run at once. An all-reduce takes two rounds, and its order of additions depends on the world.
        sent = [dist.broadcast(tensor, src=r, group=group, async_op=True) for r, tensor in enumerate(tensors)]
        for tensor, work in zip(tensors, sent, strict=True):
            self._wait(work, tensor.is_cuda)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
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


def current_ranks(timeout: float = DEFAULT_TIMEOUT, check_stop: Callable[[], None] = _go_on) -> Ranks:
    """Return the processes of the default process group, or a single process if there is none.

    Args:
        timeout: Seconds without a sign of life after which a rank counts as dead.
        check_stop: Called while this rank waits for others; raises if the run is to stop.
    """
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessRanks(timeout, check_stop) if many else Ranks()


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of the shapes, types and bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def assign_to_ranks(costs: Mapping[str, float], kept: Sequence[set[str]]) -> dict[str, int]:
    """Assign items of work to ranks: the costliest first, each to the rank with the least work so far.

    Args:
        costs: Cost of each item, by name.
        kept: For each rank, the items that it has finished already.

    Returns:
        The rank of each item.

    Example:
        >>> assign_to_ranks({"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}, [set(), {"d"}])
        {'a': 0, 'b': 1, 'c': 1, 'd': 1}
    """
    owners = {name: rank for rank in reversed(range(len(kept))) for name in kept[rank]}
    load = [0.0] * len(kept)
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name not in owners:
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}
