"""PTQ of a CIFAR-10 ResNet-20: python recipes/cifar10.py --data FILE.npz --weights FILE.th --qconfig w4a4"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from measuring import Classifier, Pipeline, quiet, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class BasicBlock(nn.Module):
    """Residual block of two convolutions, with a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    """CIFAR ResNet with 3 stages of 3 blocks (He et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def images(array: np.ndarray) -> Tensor:
    """Return normalized float images from uint8 images; shape (n, 3, 32, 32)."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.from_numpy(array).float() / 255 - mean[:, None, None]) / deviation[:, None, None]


def labelled(array: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Return normalized images with their labels."""
    return TensorDataset(images(array), torch.from_numpy(labels).long())


def load(data: Path, weights: Path, calibration: int, seed: int) -> tuple[Classifier, DataLoader, DataLoader]:
    """Return the float classifier, and loaders of calibration and test images."""
    arrays = np.load(data)
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet20()
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    order = np.random.default_rng(seed).permutation(len(arrays["calib_images"]))[:calibration]
    calib_set = labelled(arrays["calib_images"][order], arrays["calib_labels"][order])
    test_set = labelled(arrays["test_images"], arrays["test_labels"])
    return Classifier(net, 10), DataLoader(calib_set, 64), DataLoader(test_set, 100)


def main(
    data: Path,
    weights: Path,
    qconfig: str = "w4a4",
    calibration: int = 1024,
    mode: Literal["sequential", "parallel"] = "sequential",
    granularity: Literal["layer", "block"] = "block",
    steps: int | None = None,
    seed: int = 0,
    json: Path | None = None,
    pipeline: Pipeline = "adaquant",
    statistics: bool = False,
    budget: str | None = None,
    candidates: list[str] | None = None,
    first_last_bits: int | None = 8,
    capture: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Quantize a trained network, and measure accuracy, size, time and memory.

    Args:
        data: File (.npz) with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: ResNet-20 checkpoint with a 'state_dict' of keys conv1, bn1, layer1.0.conv1, ..., linear.
        qconfig: Bit widths.
        calibration: Number of calibration images.
        mode: Mode of AdaQuant.
        granularity: Units of the tuning: single layers or blocks.
        steps: Steps per unit; by default they depend on the bit widths.
        seed: Seed of all random choices, also of the choice of calibration images.
        json: File for the measurements.
        pipeline: nearest, adaquant, light (calibration, allocation, statistics) or advanced (all stages).
        statistics: Also tune statistics and biases, after nearest or adaquant.
        budget: Size within which bit widths are allocated: a fraction of the float size, bytes, or uniform widths such
            as w4a4 for the size at these widths.
        candidates: Bit widths to choose from; those of BitAllocator by default.
        first_last_bits: Least bit width of the first and last layer; null if a budget may choose theirs too.
        capture: Further arguments of CalibrationCapture.
        options: Further arguments of AdaQuantLayerwise.
    """
    quiet()
    run(
        *load(data, weights, calibration, seed), model="resnet20", qconfig=qconfig, mode=mode, granularity=granularity,
        steps=steps, seed=seed, file=json, pipeline=pipeline, statistics=statistics, budget=budget,
        candidates=candidates, first_last_bits=first_last_bits, capture=capture, **options or {},
    )  # fmt: skip


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
