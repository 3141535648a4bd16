"""Finished work of a run on disk, so that an interrupted run resumes after the last finished entry.

Each entry is one safetensors file. It is written under another name and then renamed, so a file is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
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
        fingerprint: Checksum of everything that the entries depend on; entries of another fingerprint are ignored.
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

    def inner(self, name: str) -> Journal:
        """Return a journal in the same directory for one part of the work."""
        return Journal(self.directory, self.fingerprint, f"{self.prefix}{name} ")

    def write(self, key: str, entry: JournalEntry) -> None:
        """Save an entry; a process killed while writing leaves no entry."""
        # safetensors has flat names only, and refuses tensors that share memory; the header keeps the two names.
        named = {(a, b): tensor for a, tensors in entry.states.items() for b, tensor in tensors.items()}
        tensors = {str(i): tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(named.values())}
        header = {
            "key": self.prefix + key,
            "names": list(named),
            "facts": entry.facts,
            "tensors": digest(tensors.values()),
        }
        text = json.dumps(header)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        data = save(tensors, {"fingerprint": self.fingerprint, "header": text, "checksum": checksum})
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on disk before the rename, or a power cut could leave an empty file
        os.replace(temporary, path)

    def read(self, key: str) -> JournalEntry | None:
        """Return an entry, or None if there is none.

        Warns:
            ProgressWarning: If its file is damaged, naming it.
        """
        loaded = _load(self._path(key))
        return loaded[1] if loaded else None

    def keys(self) -> set[str]:
        """Return the keys of all undamaged entries.

        Warns:
            ProgressWarning: Naming each damaged file.
        """
        entries = [_load(path) for path in sorted(self.directory.glob(f"{self._stem}-*.safetensors"))]
        keys = [loaded[0] for loaded in entries if loaded]
        return {key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix)}

    def remove(self) -> None:
        """Delete the files of all entries, those of inner journals included."""
        for path in self.directory.glob(f"{self._stem}-*"):
            path.unlink(missing_ok=True)

    @property
    def _stem(self) -> str:
        return self.fingerprint[:16]

    def _path(self, key: str) -> Path:
        # A digest, since keys hold characters that file names must not.
        name = hashlib.sha256((self.prefix + key).encode()).hexdigest()[:16]
        return self.directory / f"{self._stem}-{name}.safetensors"


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


def _load(path: Path) -> tuple[str, JournalEntry] | None:
    """Return the key and the entry in a file; None if the file is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata["header"])
        sound = hashlib.sha256(metadata["header"].encode()).hexdigest() == metadata["checksum"]
        ordered = [tensors[str(i)] for i in range(len(tensors))]
        if not sound or digest(ordered) != header["tensors"]:
            raise ValueError("its checksum does not match")
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        warn(
            f"the saved progress {path} is damaged ({error}), so this work is done again.",
            ProgressWarning,
            stacklevel=3,
        )
        return None
    states: LayerStates = {}
    for (first, second), tensor in zip(header["names"], ordered, strict=True):
        states.setdefault(first, {})[second] = tensor
    return header["key"], JournalEntry(states, header["facts"])
