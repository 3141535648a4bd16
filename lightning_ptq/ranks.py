"""The processes of a run: the one place that knows of ``torch.distributed``.

Every exchange starts with :meth:`Ranks.agree`, so a rank that fails anywhere meets the others there, and all of them
end with its message instead of waiting for it.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ptq.errors import RankError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # a rank may rightly wait as long as another one tunes
_FAREWELL = timedelta(seconds=20)


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

    def agree(self, error: BaseException | None = None) -> None:
        """Go on only if all ranks do.

        Args:
            error: Why this rank does not.

        Raises:
            BaseException: ``error``, if there is one.
            RankError: With the message of another rank that failed.
        """
        if error is not None:
            raise error

    def poll(self) -> None:
        """Raise :class:`RankError` if another rank has failed; looks at most once a second, and waits for nobody."""

    def leave(self, error: BaseException) -> None:
        """Tell the others, who may still be at work, that this rank has failed; raises nothing."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank; anything that can be pickled."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises on rank 0, on all ranks."""
        return work()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over ranks in place."""
        return tensor

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
        # On the CPU: it keeps no GPU waiting.
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        self._data = cast(dist.ProcessGroup, dist.new_group())
        self._failed = False
        self._looked = 0.0
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"lightning_ptq/{self._objects(uuid.uuid4().hex)[0]}"

    def agree(self, error: BaseException | None = None) -> None:
        """See :class:`Ranks`."""
        self._agree(error, _PATIENCE)
        if error is not None:
            raise error

    def _agree(self, error: BaseException | None, patience: timedelta) -> None:
        flag = torch.tensor([0 if error is None else 1])
        try:
            cast(Any, dist.all_reduce(flag, group=self._control, async_op=True)).wait(patience)
            said = self._objects(_told(error)) if flag.item() else []
        except RuntimeError as lost:
            self._failed = True
            raise RankError(f"rank {self.rank} has lost another process: {lost}.") from lost
        if said:
            self._failed = True
            if error is None:
                rank, message = next((rank, text) for rank, text in enumerate(said) if text)
                raise RankError(f"rank {rank} failed, so all others stop. It says: {message}")

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._control)
        return found

    def poll(self) -> None:
        """See :class:`Ranks`."""
        if self._failed or time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        if self._store.check([self._key]):
            raise RankError(f"another rank failed. It says: {self._store.get(self._key).decode()}")

    def leave(self, error: BaseException) -> None:
        """See :class:`Ranks`."""
        if self._failed:
            return
        with suppress(Exception):  # whatever is out of order now, the error itself is what matters
            if not self._store.check([self._key]):
                self._store.set(self._key, f"rank {self.rank}: {_told(error)}")
            self._agree(error, _FAREWELL)
        self._failed = True

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        self.agree()
        return self._objects(value)

    def first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        box: list[Any] = [None]
        error: BaseException | None = None
        if self.rank == 0:
            try:
                box = [(work(), None)]
            except Exception as raised:
                box, error = [(None, raised)], raised
        self.agree()
        dist.broadcast_object_list(box, src=0, group=self._control)
        value, failure = box[0]
        if failure is not None:
            raise error or failure
        return cast(T, value)

    def sum_(self, tensor: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        self.agree()
        dist.all_reduce(tensor, group=self._data)
        return tensor

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """See :class:`Ranks`."""
        self.agree()
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0, group=self._data)
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


def _told(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
