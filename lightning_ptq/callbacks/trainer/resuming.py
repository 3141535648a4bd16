"""Resuming: where a run saves its progress, and how it recognizes that saved progress is its own."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.errors import CallbackError
from lightning_ptq.runtime.fingerprint import fingerprint as fingerprint_of
from lightning_ptq.runtime.fingerprint import module_fingerprint
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.ranks import digest

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_ptq.callbacks.base import PTQCallback
    from lightning_ptq.callbacks.trainer.muting import Step

log = logging.getLogger(__name__)

FOLDER = "ptq_progress"
_PROBE = 2**16  # bytes; a few would find room in a block that the disk has reserved already
_NO_SETTING = ("calibration", "report", "result", "scores", "log", "log_dict")  # the Trainer adds the last two


class Journals:
    """The journals of a run's stages, in one folder.

    A stage uses saved entries only if the calibration forward, the calibrated module, the calibration data, the
    settings of this stage and of all stages before it, and the module at the beginning of the stage are the same as
    those of the run that saved them.

    Args:
        folder: Folder of the files.
        calibration: The calibrated module, before the first stage.
        stages: Callbacks that work on it, in order.
        forward: Checksum of the calibration forward.
    """

    def __init__(
        self, folder: Path, calibration: Calibration, stages: Sequence[PTQCallback], forward: str = ""
    ) -> None:
        self.folder, self.calibration = folder, calibration
        # Those of rank 0, since settings may hold what differs between ranks.
        chain = calibration.ranks.on_rank_zero(lambda: _chain(calibration, stages, forward))
        self._stages = [(stage, Journal(folder, link)) for stage, link in zip(stages, chain, strict=True)]
        entries = sum(len(journal.files()) for _, journal in self._stages)
        if entries:
            log.info("resuming with %d finished entries of %s", entries, folder)
        elif any(folder.glob("*.safetensors")):
            # No warning: it would come again after every failed run, until somebody deletes the folder.
            rank_zero_info(
                f"{folder} holds the progress of another run (another model, step, configuration or calibration set),"
                " so this run starts from the beginning. Delete the folder if that run is not to be resumed."
            )

    def of(self, stage: PTQCallback) -> Journal:
        """Return the journal of a callback that begins its work now."""
        found = next((journal for callback, journal in self._stages if callback is stage), None)
        if found is None:
            return NO_JOURNAL
        # What the stages before have made of the module can depend on more than their settings: on a file of costs, or
        # on how far the solver came within its time.
        now = self.calibration.ranks.on_rank_zero(lambda: _state_fingerprint(self.calibration.module))
        return Journal(self.folder, f"{found.fingerprint} {now}")

    def remove(self) -> None:
        """Delete the files of this run, which is finished, and the folder if it is empty then."""
        with suppress(OSError):  # all ranks of a node delete the same files
            for _, journal in self._stages:
                journal.remove()
            self.folder.rmdir()


def progress_folder(trainer: Trainer, resume_dir: str | None) -> Path:
    """Return the folder of the progress of a run."""
    return Path(resume_dir or Path(trainer.default_root_dir) / FOLDER).absolute()


def check_resume_dir(trainer: Trainer, resume_dir: str | None) -> Path:
    """Return the folder of the progress, after a file was written on its disk: one without room is an error now.

    Raises:
        CallbackError: If that fails.
    """
    folder = progress_folder(trainer, resume_dir)
    # The folder itself is not made: several ranks may share it, and none could remove it without disturbing another.
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(_PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise CallbackError(
            f"the progress of the run cannot be saved in resume_dir, which is {str(folder)!r} ({error}). Name a folder"
            " with room that can be written to, as in CalibrationCapture(resume_dir=...), or write resume=False."
        ) from error
    return folder


def forward_fingerprint(module: nn.Module, step: Step) -> str:
    """Return a checksum of the calibration forward: the step, and the module's code and plain attributes."""
    return f"{fingerprint_of(step)} {module_fingerprint(module)}"


def _chain(calibration: Calibration, stages: Sequence[PTQCallback], forward: str) -> list[str]:
    """Return the fingerprint of each stage."""
    # Each fingerprint includes the one before, so a changed setting invalidates its stage and all later ones only.
    links = [fingerprint(calibration, forward)]
    for stage in stages:
        links.append(hashlib.sha256(f"{links[-1]} {settings(stage)}".encode()).hexdigest())
    return links[1:]


def fingerprint(calibration: Calibration, forward: str = "") -> str:
    """Return a checksum of the calibrated module, the calibration set, and the versions of the library and of torch."""
    checksum = hashlib.sha256(_state_fingerprint(calibration.module).encode())
    checksum.update(f"{_version()} {torch.__version__} {calibration.prepared.qconfig} {forward}".encode())
    for batch in calibration.batches:
        checksum.update(Batch(batch).digest().encode())
    return checksum.hexdigest()


def settings_of(callback: PTQCallback) -> dict[str, Any]:
    """Return the settings of a callback, by attribute name."""
    return {k: v for k, v in sorted(vars(callback).items()) if not k.startswith("_") and k not in _NO_SETTING}


def settings(callback: PTQCallback) -> str:
    """Return a text that tells the class and the settings of a callback, the same in every process."""
    return f"{callback.role} {fingerprint_of([type(callback), settings_of(callback)])}"


def checksums(module: nn.Module) -> dict[str, bytes]:
    """Return a checksum of each entry of a module's state dict."""
    return {name: _checksum(value) for name, value in module.state_dict().items()}


def _state_fingerprint(module: nn.Module) -> str:
    """Return a checksum of what the state dict of a module holds."""
    return hashlib.sha256(repr(checksums(module)).encode()).hexdigest()


def _checksum(value: Any) -> bytes:
    return (digest([value]) if isinstance(value, Tensor) else str(value)).encode()


def _version() -> str:
    """Return the version of the library from its root package, which Python has loaded before this module."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)
