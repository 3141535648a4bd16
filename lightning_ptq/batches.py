"""The calibration batches of a process: its own in memory, those of other processes in files."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from lightning_ptq.store import disk_room


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
