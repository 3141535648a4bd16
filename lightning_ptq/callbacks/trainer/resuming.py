"""Where a run keeps its progress, and how it tells that progress on disk is its own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.base import told
from lightning_ptq.errors import ProgressWarning, warn
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.ranks import digest

log = logging.getLogger(__name__)

FOLDER = "ptq_progress"


class Journals:
    """The journals of a run's stages, in one folder.

    A stage's pieces are its own if the calibrated module, the calibration data, and the settings of this stage and all
    before it are the same.

    Args:
        folder: For the files.
        calibration: The calibrated module, before the first stage.
        stages: The callbacks that work on it, in order.
    """

    def __init__(self, folder: Path, calibration: Calibration, stages: list[Any]) -> None:
        self.folder = folder
        known = fingerprint(calibration)
        self._stages: list[tuple[Any, Journal]] = []
        for stage in stages:
            known = hashlib.sha256(f"{known} {settings(stage)}".encode()).hexdigest()
            self._stages.append((stage, Journal(folder, known)))
        found = sum(len(journal.keys()) for _, journal in self._stages)
        if found:
            log.info("going on from %d finished pieces of work in %s", found, folder)
        elif any(self._files()):
            warn(
                f"{folder} holds the progress of another run (another model, configuration or calibration set); this"
                " one starts afresh. Delete the folder if that run is not to go on.",
                ProgressWarning,
                stacklevel=2,
            )

    def of(self, stage: Any) -> Journal | None:
        """The journal of a callback."""
        return next((journal for known, journal in self._stages if known is stage), None)

    def remove(self) -> None:
        """Delete this run's files, and the folder if nothing else is in it: the run is finished."""
        with suppress(OSError):  # another rank may be at it too
            for _, journal in self._stages:
                journal.remove()
            self.folder.rmdir()

    def _files(self) -> Iterator[Path]:
        return self.folder.glob("*.safetensors")


def fingerprint(calibration: Calibration) -> str:
    """A checksum of the calibrated module and the calibration set."""
    from lightning_ptq import __version__

    found = hashlib.sha256(f"{__version__} {torch.__version__} {calibration.prepared.qconfig}".encode())
    for name, value in calibration.module.state_dict().items():
        found.update(name.encode())
        found.update(_checksum(value))
    for batch in calibration.batches:
        for leaf in tree_leaves(batch):
            found.update(_checksum(leaf))
    return found.hexdigest()


def settings(callback: Any) -> str:
    """What a callback was told, as text."""
    return f"{callback.role} { {key: _shown(value) for key, value in told(callback).items()} }"


def _shown(value: Any) -> str:
    """A value as text, the same in every process: a function by its name and its code, not by its address."""
    code = getattr(value, "__code__", None)
    return repr(value) if code is None else f"{value.__qualname__} {code.co_code.hex()} {code.co_names}"


def _checksum(value: Any) -> bytes:
    return (digest([value]) if isinstance(value, Tensor) else str(value)).encode()
