"""Temporary folders that the next run removes if their process was killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is removed
    fcntl = None  # type: ignore[assignment]

_TRIES = 10


class ScratchFolder:
    """A temporary folder of this process, which removes itself when it is garbage-collected.

    The process holds a lock on the folder, which the system releases even if the process is killed.

    Args:
        kind: What the folder is for, in lowercase letters.
        parent: Folder to create it in; by default that of temporary files.

    Attributes:
        path: The folder.

    Example:
        >>> folder = ScratchFolder("example")
        >>> folder.path.exists(), folder.remove(), folder.path.exists()
        (True, None, False)
    """

    def __init__(self, kind: str, parent: str | None = None) -> None:
        remove_abandoned(parent)
        for _ in range(_TRIES):
            self.path = Path(tempfile.mkdtemp(prefix=f"lightning_ptq_{kind}_{_host()}_", dir=parent))
            lock = _lock(self.path)
            # Another process may have taken it for abandoned before it was locked.
            if self.path.exists():
                break
            _unlock(lock)
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        self._remove()


def remove_abandoned(parent: str | None = None) -> None:
    """Remove the scratch folders whose process is gone.

    Folders of other hosts, which may share the parent, and of other users are left alone, and so are those that cannot
    be locked.

    Args:
        parent: Folder to search; by default that of temporary files.
    """
    if fcntl is None:
        return
    pattern = re.compile(rf"lightning_ptq_[a-z]+_{re.escape(_host())}_[a-z0-9_]{{8}}")
    with suppress(OSError), os.scandir(parent or tempfile.gettempdir()) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    with suppress(OSError):
        if path.lstat().st_uid != os.getuid():
            return
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError if its process lives
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(opened)


def _lock(path: Path) -> int | None:
    """Lock a folder for the life of this process; None where that is not possible."""
    if fcntl is None:
        return None
    opened = None
    try:
        opened = os.open(path, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_SH)
    except OSError:  # a file system without locks; then no process can take the other lock either
        _unlock(opened)
        return None
    return opened


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove(path: Path, lock: int | None, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has a copy of the object, and not of the folder
        shutil.rmtree(path, ignore_errors=True)
    _unlock(lock)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
