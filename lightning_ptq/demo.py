"""A small classifier to try the library on: trained in a few seconds, on images that are drawn here."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 8
"""Number of directions of the stripes."""


class Stripes(pl.LightningModule):
    """A convolutional classifier of the direction of stripes, as a user would write it."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.net = nn.Sequential(
            *block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2 * width), nn.MaxPool2d(2),
            *block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images; (n, 1, 16, 16) to (n, classes)."""
        return self.net(x)  # type: ignore[no-any-return]  # calls of torch modules are untyped

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch."""
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def images(count: int, seed: int, noise: float = 2.0) -> TensorDataset:
    """Return noisy stripes of random width and place, (count, 1, 16, 16), with the class of their direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = math.pi / CLASSES * labels
    frequency, phase = 0.8 + 0.8 * torch.rand(count, generator=generator), 6.3 * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    drawn = torch.sin(frequency[:, None, None] * along + phase[:, None, None])
    return TensorDataset((drawn + noise * torch.randn(drawn.shape, generator=generator))[:, None], labels)


Loader = DataLoader[tuple[Tensor, ...]]
"""A loader of images and classes."""


def trained_classifier(epochs: int = 4, seed: int = 0) -> tuple[Stripes, Loader, Loader]:
    """Train a classifier.

    Args:
        epochs: Number of epochs.
        seed: Seed of the weights and of the order of the images.

    Returns:
        The module, a loader of 512 images to calibrate with, and one of 2000 to validate on.
    """
    pl.seed_everything(seed, verbose=False)
    module = Stripes()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    # Processors and numbers of threads round sums differently, which 32 bits would make other weights of.
    trainer: Any = partial(pl.Trainer, precision="64-true", max_epochs=epochs)
    trainer(**quiet).fit(module, DataLoader(images(4096, 1), 64, shuffle=True))
    return module.float(), DataLoader(images(512, 2), 64), DataLoader(images(2000, 3), 100)
