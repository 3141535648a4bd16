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
    """Two convolutions and a shortcut without parameters (option A of He et al., 2016)."""

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
    """The CIFAR ResNet with 3 stages of 3 blocks."""

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
    """Normalised float images from uint8 ones, (n, 3, 32, 32)."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.from_numpy(array).float() / 255 - mean[:, None, None]) / deviation[:, None, None]


def labelled(array: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Normalised images with their labels."""
    return TensorDataset(images(array), torch.from_numpy(labels).long())


def load(data: Path, weights: Path, calibration: int, seed: int) -> tuple[Classifier, DataLoader, DataLoader]:
    """The float classifier, and loaders of the calibration and the test images."""
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
    options: dict[str, Any] | None = None,
) -> None:
    """Quantize and measure.

    Args:
        data: An .npz file with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: A ResNet-20 checkpoint with a 'state_dict' of keys conv1, bn1, layer1.0.conv1, ..., linear.
        qconfig: Bit widths.
        calibration: Number of calibration images.
        mode: Order of the tuning.
        granularity: What is tuned together.
        steps: Steps a unit; by default they go by the bit widths.
        seed: Of all random choices, and of the choice of calibration images if there are more.
        json: Where to write the measurements.
        pipeline: nearest, adaquant, light (calibration, allocation, statistics) or advanced (all there is).
        statistics: Tune statistics and biases behind nearest or adaquant.
        budget: Allocate the widths within this size: a fraction of the float size, bytes, or the size at uniform
            widths, for example w4a4.
        candidates: Widths to allocate; those of BitAllocator by default.
        first_last_bits: Least width of the first and last layer; none for a budget that may choose theirs too.
        options: Further arguments of AdaQuantLayerwise.
    """
    quiet()
    run(
        *load(data, weights, calibration, seed), model="resnet20", qconfig=qconfig, mode=mode, granularity=granularity,
        steps=steps, seed=seed, file=json, pipeline=pipeline, statistics=statistics, budget=budget,
        candidates=candidates,
        first_last_bits=first_last_bits, **options or {},
    )  # fmt: skip


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
