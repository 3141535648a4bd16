"""Run everything that needs no extra, with only the library and its dependencies: python tests/bare.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import load_packed, save_packed
from lightning_ptq.callbacks import pipelines


class Net(pl.LightningModule):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(folder: Path) -> None:
    """Quantize by the advanced pipeline, save the packed file, load it, and compare the outputs."""
    pl.seed_everything(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    module = Net()
    quick = {"steps": 2}
    callbacks = pipelines.advanced(0.2, parallel=quick, sequential=quick, statistics=quick)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, default_root_dir=folder)
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 16))
    save_packed(module, folder / "packed.safetensors")
    loaded = load_packed(Net(), folder / "packed.safetensors")
    if not torch.equal(loaded.eval()(images), module.eval()(images)):
        raise SystemExit("the loaded module and the saved one have different outputs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
