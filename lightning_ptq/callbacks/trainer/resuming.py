"""Resuming: where a run saves its progress, and how it recognizes that saved progress is its own."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import ProgressWarning, warn
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.ranks import digest

if TYPE_CHECKING:
    from lightning_ptq.callbacks.base import PTQCallback

log = logging.getLogger(__name__)

FOLDER = "ptq_progress"
_NO_SETTING = ("calibration", "report", "result", "log", "log_dict")  # the Trainer adds the last two


class Journals:
    """The journals of a run's stages, in one folder.

    A stage uses saved entries only if the calibrated module, the calibration data, and the settings of this stage and
    of all stages before it are the same as those of the run that saved them.

    Args:
        folder: Folder of the files.
        calibration: The calibrated module, before the first stage.
        stages: Callbacks that work on it, in order.

    Warns:
        ProgressWarning: If the folder holds only entries of another run.
    """

    def __init__(self, folder: Path, calibration: Calibration, stages: Sequence[PTQCallback]) -> None:
        self.folder = folder
        self._stages: list[tuple[PTQCallback, Journal]] = []
        # Each fingerprint includes the one before, so a changed setting invalidates its stage and all later ones only.
        chained = fingerprint(calibration)
        for stage in stages:
            chained = hashlib.sha256(f"{chained} {settings(stage)}".encode()).hexdigest()
            self._stages.append((stage, Journal(folder, chained)))
        entries = sum(len(journal.keys()) for _, journal in self._stages)
        if entries:
            log.info("resuming with %d finished entries of %s", entries, folder)
        elif any(self._files()):
            warn(
                f"{folder} holds the progress of another run (another model, configuration or calibration set), so this"
                " run starts from the beginning. Delete the folder if that run is not to be resumed.",
                ProgressWarning,
                stacklevel=2,
            )

    def of(self, stage: PTQCallback) -> Journal:
        """Return the journal of a callback."""
        return next((journal for callback, journal in self._stages if callback is stage), NO_JOURNAL)

    def remove(self) -> None:
        """Delete the files of this run, which is finished, and the folder if it is empty then."""
        with suppress(OSError):  # all ranks of a node delete the same files
            for _, journal in self._stages:
                journal.remove()
            self.folder.rmdir()

    def _files(self) -> Iterator[Path]:
        return self.folder.glob("*.safetensors")


def fingerprint(calibration: Calibration) -> str:
    """Return a checksum of the calibrated module, the calibration set, and the versions of the library and of torch."""
    checksum = hashlib.sha256(f"{_version()} {torch.__version__} {calibration.prepared.qconfig}".encode())
    for name, value in calibration.module.state_dict().items():
        checksum.update(name.encode())
        checksum.update(_checksum(value))
    for batch in calibration.batches:
        for leaf in Batch(batch).leaves():
            checksum.update(_checksum(leaf))
    return checksum.hexdigest()


def settings_of(callback: PTQCallback) -> dict[str, Any]:
    """Return the settings of a callback, by attribute name."""
    return {k: v for k, v in sorted(vars(callback).items()) if not k.startswith("_") and k not in _NO_SETTING}


def settings(callback: PTQCallback) -> str:
    """Return the settings of a callback as text."""
    return f"{callback.role} { {key: _as_text(value) for key, value in settings_of(callback).items()} }"


def _as_text(value: Any) -> str:
    """Return a value as text that is the same in every process: a function by name and code, not by its address."""
    code = getattr(value, "__code__", None)
    return repr(value) if code is None else f"{value.__qualname__} {code.co_code.hex()} {code.co_names}"


def _checksum(value: Any) -> bytes:
    return (digest([value]) if isinstance(value, Tensor) else str(value)).encode()


def _version() -> str:
    """Return the version of the library from its root package, which Python has loaded before this module."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)
