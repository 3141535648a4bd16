"""The smallest network within an accepted drop of top-1, and what equal bit widths would have taken:

python recipes/accuracy_target.py --network resnet20 --data FILE.npz --labels FILE.th --max_drop 0.5
python recipes/accuracy_target.py --network efficientnet_lite0 --data DIR --labels FILE.tsv --max_drop 2
"""

from __future__ import annotations

import copy
import json as json_
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import cifar10
import imagenet
import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import console, quiet, seconds_per_pass, top1, trainer
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, PTQReport

UNIFORM = ["w8a8", "w4a8", "w3a8", "w2a8", "w4a4", "w3a3", "w2a4"]


def split(loader: DataLoader, validation: int) -> tuple[DataLoader, DataLoader]:
    """Return loaders of validation and of test images, drawn from one loader's images."""
    count, size = len(loader.dataset), loader.batch_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    parts = order[:validation], order[validation:]
    validating, testing = (DataLoader(Subset(loader.dataset, part), min(size or 50, 50)) for part in parts)
    return validating, testing


def fitted(module: Any, data: DataLoader, val: DataLoader, *callbacks: Any) -> tuple[PTQReport, float]:
    """Run PTQ on a module, and return the report and the seconds."""
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    trainer([*callbacks]).fit(module, data, val)
    report = callbacks[0].report
    return report, time.perf_counter() - start


def costs(report: PTQReport) -> dict[str, float]:
    """Return size and bit operations as shares of those of the float network."""
    return {"size": report.packed_bytes / report.float_bytes, "bops": float(report.summary()["bit_operations_share"])}


def show_trials(report: PTQReport) -> None:
    """Print what the search has tried, with drops in points."""
    for trial in report.trials:
        error = math.nan if trial.error is None else trial.error
        console.print(
            f"trial: {trial.costs['size'] / report.float_bytes:.3f} of the size, a drop of {100 * trial.drop:.2f} ±"
            f" {100 * error:.2f}{', chosen' if trial.chosen else ''}"
        )


def main(
    network: Literal["resnet20", "efficientnet_lite0"],
    data: Path,
    labels: Path,
    max_drop: float = 0.5,
    validation: int | None = None,
    minimise: Literal["size", "bops"] = "size",
    uniform: list[str] = UNIFORM,
    candidates: list[str] | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Search, then tune each uniform setting, and print both on validation and test images.

    Args:
        network: ResNet-20 on CIFAR-10, or EfficientNet-Lite0 on photographs of ImageNet's classes.
        data: As for cifar10.py and imagenet.py.
        labels: The weights (ResNet-20) or the names of the classes (EfficientNet-Lite0), as for these recipes.
        max_drop: Accepted drop of top-1 on the validation images, in points.
        validation: Number of validation images; 1000 for ResNet-20, half of the images for EfficientNet-Lite0.
        minimise: Whether the smallest network is sought, or that of the fewest bit operations.
        uniform: Bit widths for comparison.
        candidates: Bit widths that the search chooses from; by default those of BitAllocator.
        seed: Seed of all random choices.
        json: File for the measurements.
    """
    quiet()
    if network == "resnet20":
        module, calib, images = cifar10.load(data, labels, 1024, seed)
    else:
        module, calib, images = imagenet.load(data, labels)
    val, test = split(images, validation or (1000 if network == "resnet20" else len(images.dataset) // 2))
    per_pass = seconds_per_pass(module, calib)
    before = {"val": top1(module, val), "test": top1(module, test)}
    console.print(f"float: {before['val']:.2f} on validation images, {before['test']:.2f} on test images")
    console.print(f"a pass takes {per_pass:.1f} s")

    found = copy.deepcopy(module)
    allocator = BitAllocator(monitor="top1", max_drop=max_drop / 100, minimise=minimise, candidates=candidates)
    report, seconds = fitted(found, calib, val, CalibrationCapture("w8a8"), allocator, AdaQuantLayerwise(seed=seed))
    rows: list[dict[str, Any]] = [
        {
            "way": "BitAllocator", **costs(report), "passes": seconds / per_pass,
            "val": top1(found, val), "test": top1(found, test), "trials": [asdict(trial) for trial in report.trials],
        }
    ]  # fmt: skip
    show_trials(report)
    for widths in uniform:
        tuned = copy.deepcopy(module)
        report, seconds = fitted(tuned, calib, val, CalibrationCapture(widths), AdaQuantLayerwise(seed=seed))
        scores = {"val": top1(tuned, val), "test": top1(tuned, test)}
        rows.append({"way": widths, **costs(report), "passes": seconds / per_pass, **scores})
    table = Table("widths", "share of float size", "of bit operations", "drop, validation", "drop, test", "passes")
    for row in rows:
        drops = [f"{before[part] - row[part]:.2f}" for part in ("val", "test")]
        table.add_row(row["way"], f"{row['size']:.4f}", f"{row['bops']:.4f}", *drops, f"{row['passes']:.1f}")
    console.print(table)
    if json is not None:
        json.write_text(json_.dumps({"float": before, "rows": rows}, indent=1))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
