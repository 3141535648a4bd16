"""Accuracy against size: python recipes/pareto.py --data FILE.npz --weights FILE.th --out FOLDER"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cifar10 import load
from jsonargparse import auto_cli
from measuring import console, quiet, top1, trainer
from torch.utils.data import DataLoader

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture
from lightning_ptq.callbacks.base import PTQCallback

WIDTHS = ["w8a8", "w6a8", "w5a8", "w4a8", "w3a8", "w2a8"]
CANDIDATES = ["w8a8", "w4a8", "w3a8", "w2a8"]


@dataclass
class Point:
    """A network of the figure: how it was made, its size as a share of the float one's, and its top-1 in percent."""

    way: str
    setting: str
    share: float
    top1: float


def measured(way: str, setting: str, module: Any, data: DataLoader, test: DataLoader, *later: PTQCallback) -> Point:
    """Quantize a copy of the module, and measure it."""
    pl.seed_everything(0, verbose=False)
    module = copy.deepcopy(module)
    capture = CalibrationCapture(setting if setting.startswith("w") else "w8a8")
    trainer([capture, *later]).fit(module, data)
    if capture.report is None:
        raise SystemExit("the run left no report")
    share = capture.report.packed_bytes / capture.report.float_bytes
    point = Point(way, setting, share, top1(module, test))
    console.print(f"{way} {setting}: {share:.3f} of the size, top-1 {point.top1:.2f}")
    return point


def draw(points: list[Point], top1_float: float, file: Path) -> None:
    """Draw accuracy against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    styles = {"nearest": ("#9aa0a6", "o--"), "AdaQuant": ("#1f77b4", "o-"), "allocated": ("#d62728", "s-")}
    labels = {
        "nearest": "rounded to the nearest", "AdaQuant": "AdaQuant, equal widths",
        "allocated": "BitAllocator, then AdaQuant",
    }  # fmt: skip
    for way, (color, style) in styles.items():
        line = sorted((point.share, point.top1) for point in points if point.way == way)
        axes.plot(*zip(*line, strict=True), style, color=color, label=labels[way], markersize=5)
    for point in points:
        if point.way == "AdaQuant":
            axes.annotate(
                point.setting,
                (point.share, point.top1),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
    axes.axhline(top1_float, color="black", linewidth=0.8, linestyle=":", label=f"float, {top1_float:.2f}")
    axes.set_ylim(min(point.top1 for point in points if point.way != "nearest") - 2, top1_float + 1)
    axes.set_xlabel("size of the packed model, share of the float model")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file)


def main(
    data: Path,
    weights: Path,
    out: Path,
    sizes: list[float] = [0.2, 0.16, 0.13, 0.11, 0.095, 0.08],  # noqa: B006  # jsonargparse copies it
    calibration: int = 1024,
    seed: int = 0,
) -> None:
    """Measure ResNet-20 at equal bit widths, with and without tuning, and at allocated ones, and draw the figure.

    Args:
        data: An .npz file with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: A ResNet-20 checkpoint.
        out: Folder for pareto.svg and pareto.json.
        sizes: Budgets of the allocation, as shares of the float model's size.
        calibration: Number of calibration images.
        seed: Seed of all random choices.
    """
    quiet()
    out.mkdir(parents=True, exist_ok=True)
    module, calib, test = load(data, weights, calibration, seed)
    points = []
    for widths in WIDTHS:
        points.append(measured("nearest", widths, module, calib, test))
        points.append(measured("AdaQuant", widths, module, calib, test, AdaQuantLayerwise(seed=seed)))
    for size in sizes:
        allocator = BitAllocator(size, candidates=CANDIDATES)
        points.append(measured("allocated", str(size), module, calib, test, allocator, AdaQuantLayerwise(seed=seed)))
    top1_float = top1(module, test)
    (out / "pareto.json").write_text(json.dumps([asdict(point) for point in points], indent=1))
    draw(points, top1_float, out / "pareto.svg")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
