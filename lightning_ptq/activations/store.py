"""Store activations in memory up to a limit, and beyond it in memory-mapped files."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.memory import disk_room, parse_bytes, trim_heap
from lightning_ptq.runtime.scratch import ScratchFolder, remove_abandoned

_TRIM_EVERY = 2**23  # bytes stored between trims; forwards leave several times as much in the heap
# MAP_PRIVATE: shared anonymous mappings, the default, fault pages more slowly.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class ActivationStore:
    """Allocates tensors for activations and counts their bytes until they are garbage-collected.

    Args:
        limit: Bytes to hold in memory; further tensors go to memory-mapped files.
        directory: Parent of the temporary folder of the files, which :meth:`close` removes. Folders of runs that were
            killed are removed from it at once.

    Attributes:
        in_memory: Bytes held in memory now.
        on_disk: Bytes held in files now.
        peak: Most bytes held in memory so far.

    Example:
        >>> with ActivationStore(limit=1000) as store:
        ...     small, large = store.put(torch.zeros(10)), store.put(torch.zeros(1000))
        ...     store.in_memory, store.on_disk
        (40, 4000)
    """

    def __init__(self, limit: str | int, directory: str | None = None) -> None:
        self.limit = parse_bytes(limit)
        self.in_memory = self.on_disk = self.peak = self._since_trim = 0
        self._parent = directory
        self._directory: ScratchFolder | None = None
        self._files = 0
        remove_abandoned(directory)

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and the files in it."""
        if self._directory is not None:
            self._directory.remove()
            self._directory = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor, on ``device`` while the limit allows, else in a file."""
        size = torch.Size(shape).numel() * dtype.itemsize
        self._since_trim += size
        if self._since_trim > _TRIM_EVERY:
            self._since_trim = 0
            trim_heap()
        if size == 0 or self.in_memory + size <= self.limit:
            self.in_memory += size
            self.peak = max(self.peak, self.in_memory)
            if device.type == "cpu" and size:
                # A separate mapping returns to the system at once, while the heap would keep much of it. It lives as
                # long as any view of the tensor.
                mapping = mmap.mmap(-1, size, **_PRIVATE)
                weakref.finalize(mapping, self._released, size, None)
                return torch.frombuffer(mapping, dtype=dtype).view(tuple(shape))
            tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
            weakref.finalize(tensor, self._released, size, None)
            return tensor
        if size > disk_room(self._parent):
            raise CalibrationError(
                f"{size} bytes of activations fit neither into memory_limit nor onto the disk, which has"
                f" {disk_room(self._parent)} to spare. Raise memory_limit, point TMPDIR to a larger disk, or calibrate"
                " with fewer samples."
            )
        if self._directory is None:
            self._directory = ScratchFolder("activations", self._parent)
        path = os.path.join(self._directory.path, f"{self._files}.bin")
        self._files += 1
        tensor = torch.from_file(path, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(tuple(shape))
        self.on_disk += size
        weakref.finalize(tensor, self._released, size, path)
        return tensor

    def put(self, tensor: Tensor) -> Tensor:
        """Return a stored copy of ``tensor``: on its device, or in a file, which is on the CPU."""
        copy = self.empty(tensor.shape, tensor.dtype, tensor.device)
        return copy.copy_(tensor.detach())

    def stack(self, parts: list[Tensor], device: torch.device) -> Tensor:
        """Concatenate tensors along the first dimension.

        The list is emptied meanwhile, which frees each tensor after its copy.
        """
        rows = sum(len(part) for part in parts)
        whole = self.empty((rows, *parts[0].shape[1:]), parts[0].dtype, device)
        start = 0
        parts.reverse()  # pop() from the end takes constant time and frees each part before the next is copied
        while parts:
            part = parts.pop()
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def _released(self, size: int, path: str | None) -> None:
        if path is None:
            self.in_memory -= size
            return
        self.on_disk -= size
        if os.path.exists(path):
            os.unlink(path)
