"""The trade-off of size and accuracy: python recipes/pareto.py --data FILE.npz --weights FILE.th --out FOLDER"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from cifar10 import load
from jsonargparse import auto_cli
from measuring import budget_for, console, quiet, top1
from rich.table import Table
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


def show(sweep: Frontier) -> None:
    """Print the sweep."""
    shown = Table("budget", "bytes", f"{sweep.measure} predicted", "measured", title="Rounded to nearest")
    for point in sweep.points:
        cells = (point.budget, point.allocation.costs["size"], point.predicted, point.measured)
        shown.add_row(*[f"{cell:.6g}" for cell in cells])
    console.print(shown)


def tuned_top1(calibration: Calibration, choice: dict[str, str], test: DataLoader, seed: int) -> float:
    """Accuracy of the network at these widths, tuned block by block."""
    apply_allocation(calibration, choice)
    adaquant(calibration, seed=seed)
    return top1(calibration.module, test)


def main(
    data: Path,
    weights: Path,
    out: Path,
    candidates: list[str] = ["w8a8", "w4a4", "w3a3", "w2a4"],  # noqa: B006  # jsonargparse copies it
    measure: Literal["kl", "mse", "loss", "fisher"] = "kl",
    first: float = 0.10,
    last: float = 0.25,
    step: float = 0.01,
    tuned: list[str] = ["w4a4", "w3a3"],  # noqa: B006  # jsonargparse copies it
    calibration: int = 1024,
    seed: int = 0,
) -> None:
    """Measure one sensitivity table, solve a sweep of budgets, and tune the network at some of them.

    Args:
        data: An .npz file with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: A ResNet-20 checkpoint.
        out: A folder for sensitivity.json, frontier.csv, frontier.json, frontier.png and tuned.json.
        candidates: Widths to choose from.
        measure: What the sensitivities are a rise of.
        first: Least size, as a fraction of the float model's.
        last: Greatest size.
        step: Between the sizes.
        tuned: Sizes at which the network is tuned and scored: fractions, bytes, or uniform widths, which are then
            tuned too, for comparison.
        calibration: Number of calibration images.
        seed: Of all random choices.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    module, calib, test = load(data, weights, calibration, seed)

    def calibrated() -> Any:
        labelled = calib if measure != "loss" else [tuple(batch) for batch in calib]
        forward = {"forward": lambda m, batch: m.training_step(batch, 0)} if measure == "loss" else {}
        return calibrate(copy.deepcopy(module), labelled, candidates[0], **forward)

    plain = calibrated()
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
            settings["uniform"] = Candidates(plain, [name]).at(name)
        for kind, choice in settings.items():
            console.print(f"tuning at {name}, {kind} ...")
            row = {"size": name, "widths": kind, "top1": tuned_top1(calibrated(), choice, test, seed), "choice": choice}
            rows.append(row)
    (out / "tuned.json").write_text(json.dumps(rows, indent=1))
    shown = Table("size", "widths", "top-1 %", title=f"Tuned block by block; float {top1(module, test):.2f}")
    for row in rows:
        shown.add_row(row["size"], row["widths"], f"{row['top1']:.2f}")
    console.print(shown)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
