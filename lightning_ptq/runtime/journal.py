"""Finished pieces of a run on disk, so that a run that was cut off goes on behind the last of them.

One safetensors file a piece, written under another name and then renamed, so that a file is whole or not there.
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
"""The tuned state of each layer, by name."""


@dataclass(frozen=True)
class Piece:
    """A finished piece of work.

    Attributes:
        states: Tensors by two names, for example layer and buffer.
        facts: All else, JSON-able.
    """

    states: LayerStates = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The pieces of one stage of a run.

    Args:
        directory: Where the files are; made when the first is written.
        fingerprint: Of all that the pieces depend on; pieces of another one do not count.
        part: In front of all keys.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Journal(folder, "a").write("unit", Piece({"layer": {"bias": torch.ones(2)}}, {"steps": 3}))
        ...     Journal(folder, "a").read("unit").facts, Journal(folder, "b").read("unit")
        ({'steps': 3}, None)
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: str, part: str = "") -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        self.part = part

    def inner(self, name: str) -> Journal:
        """A journal in the same directory for a part of the work."""
        return Journal(self.directory, self.fingerprint, f"{self.part}{name} ")

    def write(self, key: str, piece: Piece) -> None:
        """Keep a piece; a kill while it is written leaves nothing of it."""
        named = {(a, b): tensor for a, tensors in piece.states.items() for b, tensor in tensors.items()}
        tensors = {str(i): tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(named.values())}
        header = {
            "key": self.part + key,
            "names": list(named),
            "facts": piece.facts,
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
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(self, key: str) -> Piece | None:
        """A piece, or None if there is none.

        Warns:
            ProgressWarning: If its file is damaged, naming it.
        """
        found = _load(self._path(key))
        return found[1] if found else None

    def keys(self) -> set[str]:
        """The keys of all sound pieces.

        Warns:
            ProgressWarning: Naming each damaged file.
        """
        found = [_load(path) for path in sorted(self.directory.glob(f"{self._prefix}-*.safetensors"))]
        keys = [loaded[0] for loaded in found if loaded]
        return {key.removeprefix(self.part) for key in keys if key.startswith(self.part)}

    def remove(self) -> None:
        """Delete the files of all pieces, also of inner journals."""
        for path in self.directory.glob(f"{self._prefix}-*"):
            path.unlink(missing_ok=True)

    @property
    def _prefix(self) -> str:
        return self.fingerprint[:16]

    def _path(self, key: str) -> Path:
        name = hashlib.sha256((self.part + key).encode()).hexdigest()[:16]
        return self.directory / f"{self._prefix}-{name}.safetensors"


def _load(path: Path) -> tuple[str, Piece] | None:
    """The key and the piece in a file; None if there is no such file, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata["header"])
        sound = hashlib.sha256(metadata["header"].encode()).hexdigest() == metadata["checksum"]
        ordered = [tensors[str(i)] for i in range(len(tensors))]
        if not sound or digest(ordered) != header["tensors"]:
            raise ValueError("its checksum does not fit")
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        warn(
            f"the saved progress {path} is damaged ({error}), so this piece is done again.",
            ProgressWarning,
            stacklevel=3,
        )
        return None
    states: LayerStates = {}
    for (first, second), tensor in zip(header["names"], ordered, strict=True):
        states.setdefault(first, {})[second] = tensor
    return header["key"], Piece(states, header["facts"])
