"""Accuracy and overfitting by the number of calibration images.

python recipes/calibration_size.py --data FILE.npz --weights FILE.th --out FOLDER
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from cifar10 import load
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from measuring import Classifier, console, quiet, top1, trainer
from rich.table import Table
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, StatsTuning


def fine_tune(module: Classifier, images: TensorDataset, steps: int, lr: float, seed: int) -> None:
    """Train all weights of a quantized module on the labelled calibration images, by straight-through gradients."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(images, min(32, len(images)), shuffle=True, generator=generator, drop_last=True)
    weights = [parameter for parameter in module.net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.eval()  # batch norms keep their statistics
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break


def main(
    data: Path,
    weights: Path,
    out: Path,
    qconfig: str = "w4a4",
    sizes: list[int] = [16, 64, 256, 1024],  # noqa: B006  # jsonargparse copies it
    steps: int = 400,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    """Quantize with increasing numbers of calibration images, and compare AdaQuant with fine-tuning.

    Args:
        data: File (.npz) with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: ResNet-20 checkpoint.
        out: Folder for calibration_size.json and calibration_size.png.
        qconfig: Bit widths.
        sizes: Numbers of calibration images.
        steps: Fine-tuning steps, in batches of 32.
        lr: Learning rate of Adam in fine-tuning.
        seed: Seed of all random choices.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in sizes:
        module, calibration, test = load(data, weights, size, seed)
        row: dict[str, float] = {"images": size, "float": top1(module, test)}
        console.print(f"{size} images ...")
        for name in ("nearest", "adaquant", "fine-tuning"):
            quantized = copy.deepcopy(module)
            callbacks = [CalibrationCapture(qconfig)]
            if name == "adaquant":
                callbacks += [AdaQuantLayerwise(seed=seed), StatsTuning(seed=seed)]
            trainer(callbacks).fit(quantized, DataLoader(calibration.dataset, 32))
            if name == "fine-tuning":
                fine_tune(quantized, calibration.dataset, steps, lr, seed)
            row[name] = top1(quantized, test)
            row[f"{name} on the calibration images"] = top1(quantized, DataLoader(calibration.dataset, 100))
        rows.append(row)
    (out / "calibration_size.json").write_text(json.dumps({"qconfig": qconfig, "seed": seed, "rows": rows}, indent=1))
    table = Table(*rows[0], title=f"Top-1 in percent at {qconfig}")
    for row in rows:
        table.add_row(*[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()])
    console.print(table)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, mark in (("nearest", "^:"), ("adaquant", "o-"), ("fine-tuning", "s--")):
        axes.plot(sizes, [row[name] for row in rows], mark, label=name)
    axes.axhline(rows[0]["float"], color="gray", linewidth=1, label="float")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("calibration images")
    axes.set_ylabel("top-1, %")
    axes.legend()
    figure.savefig(out / "calibration_size.png", dpi=150)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
