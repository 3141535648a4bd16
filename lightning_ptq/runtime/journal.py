"""Finished work of a run on disk, so that an interrupted run resumes after the last finished entry.

Each entry is one safetensors file. It is written under another name and then renamed, so a file is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_ptq.errors import ProgressWarning, warn
from lightning_ptq.runtime.ranks import digest

LayerStates = dict[str, dict[str, Tensor]]
"""Tensors by layer and name: the tuned state of each layer."""


@dataclass(frozen=True)
class JournalEntry:
    """One finished piece of work.

    Attributes:
        states: Tensors by two names, for example layer and buffer.
        facts: Everything else, as JSON-compatible types.
    """

    states: LayerStates = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The entries of one stage of a run.

    Args:
        directory: Folder of the files; created with the first entry.
        fingerprint: Checksum of everything that the entries depend on. Entries of another fingerprint are refused with
            a warning, if their file has a name of this journal, or else ignored.
        prefix: Text that is put before all keys.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Journal(folder, "a").write("unit", JournalEntry({"layer": {"bias": torch.ones(2)}}, {"steps": 3}))
        ...     Journal(folder, "a").read("unit").facts, Journal(folder, "b").read("unit")
        ({'steps': 3}, None)
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: str, prefix: str = "") -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        self.prefix = prefix
        self._failed = False

    def inner(self, name: str) -> Journal:
        """Return a journal in the same directory for one part of the work."""
        return Journal(self.directory, self.fingerprint, f"{self.prefix}{name} ")

    def write(self, key: str, entry: JournalEntry) -> None:
        """Save an entry; a process killed while writing leaves no entry.

        Warns:
            ProgressWarning: If it cannot be written, for example because the disk is full; the run goes on.
        """
        # safetensors has flat names only, and refuses tensors that share memory; the header keeps the two names.
        named = {(a, b): tensor for a, tensors in entry.states.items() for b, tensor in tensors.items()}
        tensors = {str(i): tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(named.values())}
        header = {
            "fingerprint": self.fingerprint,
            "key": self.prefix + key,
            "names": list(named),
            "facts": entry.facts,
            "tensors": digest(tensors.values()),
        }
        text = json.dumps(header)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        try:
            write_whole(self._path(self.prefix + key), save(tensors, {"header": text, "checksum": checksum}))
        except OSError as error:
            if not self._failed:
                warn(
                    f"finished work cannot be saved in {self.directory} ({error}), so a run that is interrupted would"
                    " repeat it.",
                    ProgressWarning,
                    stacklevel=2,
                )
            self._failed = True

    def read(self, key: str) -> JournalEntry | None:
        """Return an entry, or None if there is none.

        Warns:
            ProgressWarning: If its file is damaged or holds another entry, naming it.
        """
        loaded = self._load(self._path(self.prefix + key))
        return loaded[1] if loaded else None

    def keys(self) -> set[str]:
        """Return the keys of all undamaged entries.

        Warns:
            ProgressWarning: Naming each file that is damaged or holds another entry.
        """
        entries = [self._load(path) for path in self.files()]
        keys = [loaded[0] for loaded in entries if loaded]
        return {key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix)}

    def files(self) -> list[Path]:
        """Return the paths of all entries, those of inner journals included."""
        return sorted(self.directory.glob(f"{self._stem}-*.safetensors"))

    def remove(self) -> None:
        """Delete the files of all entries, those of inner journals included."""
        for path in self.directory.glob(f"{self._stem}-*"):
            path.unlink(missing_ok=True)

    @property
    def _stem(self) -> str:
        return self.fingerprint[:16]

    def _path(self, whole_key: str) -> Path:
        # A digest, since keys hold characters that file names must not.
        name = hashlib.sha256(whole_key.encode()).hexdigest()[:16]
        return self.directory / f"{self._stem}-{name}.safetensors"

    def _load(self, path: Path) -> tuple[str, JournalEntry] | None:
        """Return the whole key and the entry in a file; None if it is absent, damaged, or of another journal or key."""
        try:
            header, tensors = _read(path)
            if header["fingerprint"] != self.fingerprint or self._path(header["key"]) != path:
                raise ValueError("it was saved by another run or for other work")
            states: LayerStates = {}
            for (first, second), tensor in zip(header["names"], tensors, strict=True):
                states.setdefault(first, {})[second] = tensor
            return header["key"], JournalEntry(states, header["facts"])
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            warn(
                f"the saved progress {path} cannot be used ({error}), so this work is done again.",
                ProgressWarning,
                stacklevel=3,
            )
            return None


class _NoJournal(Journal):
    """A journal that keeps nothing, for runs that need not resume."""

    def __init__(self) -> None:
        super().__init__("", "")

    def inner(self, name: str) -> Journal:
        """Return this journal."""
        return self

    def write(self, key: str, entry: JournalEntry) -> None:
        """Do nothing."""

    def read(self, key: str) -> JournalEntry | None:
        """Return None."""
        return None

    def keys(self) -> set[str]:
        """Return no keys."""
        return set()

    def remove(self) -> None:
        """Do nothing."""


NO_JOURNAL: Journal = _NoJournal()
"""The journal of a run that does not save its progress."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and its folder if there is none; a process killed meanwhile leaves no file of this name.

    Raises:
        OSError: If it cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on disk before the rename, or a power cut could leave an empty file
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the header and the tensors in a file, after a check of their checksums."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    header = json.loads(metadata["header"])
    sound = hashlib.sha256(metadata["header"].encode()).hexdigest() == metadata["checksum"]
    ordered = [tensors[str(i)] for i in range(len(tensors))]
    if not sound or digest(ordered) != header["tensors"]:
        raise ValueError("its checksum does not match")
    return header, ordered
