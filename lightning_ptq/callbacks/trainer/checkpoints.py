"""Quantized checkpoints, written at the end of fit.

They are loaded by :func:`lightning_ptq.load_quantized`, and where the library is imported as any checkpoint is: by
``MyModule.load_from_checkpoint``, and by ``ckpt_path`` of a Trainer, with or without the callbacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ptq.errors import CallbackError
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.runtime.ranks import Ranks

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def save_quantized(trainer: Trainer) -> None:
    """Write ``quantized.ckpt`` into the folder of each ``ModelCheckpoint``, which writes nothing without training."""
    checkpoint: Any  # attributes of ModelCheckpoint, which Lightning's base class Checkpoint does not declare
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None) and hasattr(checkpoint, "best_model_path"):
            # Set before saving, because the paths are part of the saved state. With save_last, ModelCheckpoint writes
            # its own last.ckpt after this callback; if it took this file for the previous one, it would delete it.
            checkpoint.best_model_path = path = str(Path(checkpoint.dirpath) / "quantized.ckpt")
            if not checkpoint.save_last:
                checkpoint.last_model_path = path
            trainer.save_checkpoint(path, weights_only=False)


def write_checkpoint(trainer: Trainer, ranks: Ranks, progress: Path | None) -> None:
    """Write ``quantized.ckpt`` at the end of a run.

    Args:
        trainer: Trainer of the run.
        ranks: Processes of the run.
        progress: Folder of the saved progress, which is kept if this fails.

    Raises:
        CallbackError: If it cannot be written.
    """
    try:
        save_quantized(trainer)
    except Exception as error:
        ranks.explain_loss()  # rank 0, which writes, may have failed and ended
        kept = f" The progress is kept in {str(progress)!r}." if progress is not None else ""
        raise CallbackError(
            f"quantized.ckpt cannot be written ({type(error).__name__}: {error}), so the float module is"
            f" restored.{kept} Make room, or give ModelCheckpoint another dirpath, and start the run again; or write"
            " CalibrationCapture(save_checkpoint=False)."
        ) from error


@contextmanager
def no_optimizer_states(module: LightningModule) -> Iterator[None]:
    """Keep the stand-in for optimizers out of checkpoints, so that a later training can start from one."""
    original = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        checkpoint.update({key: [] for key in ("optimizer_states", "lr_schedulers") if key in checkpoint})
        original(checkpoint)

    with attributes(module, {"on_save_checkpoint": on_save_checkpoint}):
        yield
