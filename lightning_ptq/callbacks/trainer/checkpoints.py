"""Quantized checkpoints: written at the end of fit, and loaded by a Trainer into a float module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ptq.network.prepare import is_prepared, prepare
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.runtime.patching import attributes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def save_quantized(trainer: Trainer) -> None:
    """Write ``quantized.ckpt`` into the folder of each ``ModelCheckpoint``, which writes nothing without training."""
    checkpoint: Any  # attributes of ModelCheckpoint, which Lightning's base class Checkpoint does not declare
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None):
            # Set before saving, because the paths are part of the saved state. With save_last, ModelCheckpoint writes
            # its own last.ckpt after this callback; if it took this file for the previous one, it would delete it.
            checkpoint.best_model_path = path = str(Path(checkpoint.dirpath) / "quantized.ckpt")
            if not checkpoint.save_last:
                checkpoint.last_model_path = path
            trainer.save_checkpoint(path)


@contextmanager
def quantized_on_load(module: LightningModule, qconfig: QConfig) -> Iterator[None]:
    """Prepare a float module for quantization when the Trainer loads a quantized checkpoint into it."""
    original = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        quantized = any(key.endswith("qconfig_json") for key in checkpoint.get("state_dict", {}))
        if quantized and not is_prepared(module):
            prepare(module, QConfig(qconfig.default))

    with attributes(module, {"on_load_checkpoint": on_load_checkpoint}):
        yield
