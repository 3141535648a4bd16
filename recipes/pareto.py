"""The trade-off between size and accuracy: python recipes/pareto.py --data FILE.npz --weights FILE.th --out FOLDER"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cifar10 import load
from jsonargparse import auto_cli
from measuring import budget_for, console, quiet, top1
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from lightning_ptq import (
    Calibration,
    Candidates,
    Frontier,
    adaquant,
    allocate_bits,
    apply_allocation,
    calibrate,
    frontier,
    measure_choice,
    measure_sensitivity,
    size_cost,
)
from lightning_ptq.allocation.sensitivity_table import Measure


def calibrated(module: nn.Module, loader: DataLoader, qconfig: str, measure: Measure) -> Calibration:
    """Calibrate a copy of the module, with its training step as the forward where the loss is measured."""
    if measure != "loss":
        return calibrate(copy.deepcopy(module), loader, qconfig)
    batches = [tuple(batch) for batch in loader]
    return calibrate(copy.deepcopy(module), batches, qconfig, forward=lambda m, batch: m.training_step(batch, 0))


def show(sweep: Frontier) -> None:
    """Print the points of a sweep."""
    table = Table("budget", "bytes", f"{sweep.measure} predicted", "measured", title="Rounded to nearest")
    for point in sweep.points:
        cells = (point.budget, point.allocation.costs["size"], point.predicted, point.measured)
        table.add_row(*[f"{cell:.6g}" for cell in cells])
    console.print(table)


def tuned_top1(calibration: Calibration, choice: dict[str, str], test: DataLoader, seed: int) -> float:
    """Return the top-1 accuracy in percent of the network at these bit widths, tuned block by block."""
    apply_allocation(calibration, choice)
    adaquant(calibration, seed=seed)
    return top1(calibration.module, test)


def show_scores(rows: list[dict[str, Any]], top1_float: float) -> None:
    """Print the accuracy of the tuned networks."""
    table = Table("size", "bit widths", "top-1 %", title=f"Tuned block by block; float {top1_float:.2f}")
    for row in rows:
        table.add_row(row["size"], row["widths"], f"{row['top1']:.2f}")
    console.print(table)


def main(
    data: Path,
    weights: Path,
    out: Path,
    candidates: list[str] = ["w8a8", "w4a4", "w3a3", "w2a4"],  # noqa: B006  # jsonargparse copies it
    measure: Measure = "kl",
    first: float = 0.10,
    last: float = 0.25,
    step: float = 0.01,
    tuned: list[str] = ["w4a4", "w3a3"],  # noqa: B006  # jsonargparse copies it
    calibration: int = 1024,
    seed: int = 0,
) -> None:
    """Measure a sensitivity table, solve the allocation for a sweep of budgets, and tune the network at some of them.

    Args:
        data: An .npz file with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: A ResNet-20 checkpoint.
        out: Folder for sensitivity.json, frontier.csv, frontier.json, frontier.png and tuned.json.
        candidates: Bit widths to choose from.
        measure: Measure of the degradation.
        first: Least size, as a fraction of the float model's size.
        last: Greatest size, as a fraction.
        step: Distance between the sizes, as a fraction.
        tuned: Sizes at which the network is tuned and evaluated: fractions, bytes, or uniform bit widths, which are
            then tuned too for comparison.
        calibration: Number of calibration images.
        seed: Seed of all random choices.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    module, calib, test = load(data, weights, calibration, seed)

    plain = calibrated(module, calib, candidates[0], measure)
    size = size_cost(plain, choices := Candidates(plain, candidates))
    console.print(f"measuring the sensitivities of {len(choices.by_layer)} layers ...")
    table = measure_sensitivity(plain, candidates, measure=measure)
    table.save(out / "sensitivity.json")
    budgets = [round(first + i * step, 6) for i in range(round((last - first) / step) + 1)]
    console.print(f"solving and measuring {len(budgets)} budgets ...")
    sweep = frontier(table, size, budgets, measure=lambda choice: measure_choice(plain, choice))
    for ending in ("csv", "json", "png"):
        sweep.save(out / f"frontier.{ending}")
    show(sweep)

    rows = []
    for name in tuned:
        settings = {"allocated": allocate_bits(table, size, {"size": budget_for(module, calib, name)}).choice}
        if name.startswith("w"):
            settings["uniform"] = Candidates(plain, [name]).uniform(name)
        for kind, choice in settings.items():
            console.print(f"tuning at {name}, {kind} ...")
            score = tuned_top1(calibrated(module, calib, candidates[0], measure), choice, test, seed)
            rows.append({"size": name, "widths": kind, "top1": score, "choice": choice})
    (out / "tuned.json").write_text(json.dumps(rows, indent=1))
    show_scores(rows, top1(module, test))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
