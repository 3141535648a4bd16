"""Shared code of the recipes: a classifier as a user would write it, and the measurement of one PTQ run."""

from __future__ import annotations

import copy
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    Candidates,
    StatsTuning,
    calibrate,
    save_packed,
    size_cost,
)
from lightning_ptq.calibration.forward import default_forward
from lightning_ptq.callbacks import pipelines
from lightning_ptq.errors import PTQWarning
from lightning_ptq.report.tables import allocation_table

console = Console()


class Classifier(pl.LightningModule):
    """An ordinary classifier, without any code for quantization."""

    def __init__(self, net: nn.Module, classes: int, lr: float = 0.1, epochs: int = 1) -> None:
        super().__init__()
        self.net, self.lr, self.epochs = net, lr, epochs
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("top1", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def quiet() -> None:
    """Silence Lightning's advice in the output of the recipes, but not the warnings of lightning_ptq."""
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=PTQWarning)


def trainer(callbacks: list[Any] | None = None, **options: Any) -> pl.Trainer:
    """Return a Trainer that writes no files."""
    settings: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_model_summary": False, "enable_progress_bar": sys.stderr.isatty(), "callbacks": callbacks,
    }  # fmt: skip
    return pl.Trainer(**settings | options)


def validated(module: pl.LightningModule, loader: DataLoader, score: str = "top1") -> float:
    """Return the score that the module logs in validation, in percent."""
    return 100 * trainer().validate(module, loader, verbose=False)[0][score]


def top1(module: Classifier, loader: DataLoader) -> float:
    """Return the top-1 accuracy in percent."""
    return validated(module, loader)


def seconds_per_pass(module: pl.LightningModule, loader: DataLoader, batch_size: int = 32) -> float:
    """Return the seconds of one forward and backward pass over the dataset, on the Trainer's device."""
    device = trainer().strategy.root_device
    module = copy.deepcopy(module).train().to(device)
    batches = list(DataLoader(loader.dataset, batch_size=batch_size, collate_fn=loader.collate_fn))
    start = 0.0
    for batch in [batches[0], *batches]:  # the first batch warms up, before the clock starts
        module.zero_grad()
        default_forward(module, move_data_to_device(batch, device)).square().mean().backward()
        if not start:
            start = _now(device)
    return _now(device) - start


def _now(device: torch.device) -> float:
    """Return the time after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_rss_mb() -> float:
    """Return the peak resident memory of the process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def packed_size(module: nn.Module) -> int:
    """Return the bytes of the module's packed file."""
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(module, Path(folder) / "packed.safetensors")


def budget_for(module: pl.LightningModule, calibration: DataLoader, budget: str) -> float:
    """Return a size budget: the number in ``budget``, or the size in bytes at uniform widths such as w4a4."""
    try:
        return float(budget)
    except ValueError:
        batch = next(iter(calibration))
        calibrated = calibrate(copy.deepcopy(module), [batch], budget)  # sizes do not depend on the samples
        choices = Candidates(calibrated, [budget])
        return size_cost(calibrated, choices).total(choices.uniform(budget))


Pipeline = Literal["nearest", "adaquant", "light", "advanced"]


def callbacks_for(
    pipeline: Pipeline, qconfig: str, size: float | None, candidates: list[str] | None, statistics: bool, seed: int,
    tuning: dict[str, Any], first_last_bits: int | None = 8, capture: dict[str, Any] | None = None,
) -> list[Any]:  # fmt: skip
    """Return the callbacks of a pipeline."""
    widths: dict[str, Any] = {} if candidates is None else {"candidates": candidates}
    edges = {"first_last_bits": first_last_bits, **(capture or {})}
    if pipeline in ("light", "advanced"):
        if size is None:
            raise SystemExit(f"the {pipeline} pipeline allocates bit widths and needs a budget. Add --budget w4a4.")
        if pipeline == "light":
            return pipelines.light(size, seed=seed, capture=edges, **widths)
        del tuning["mode"]  # the pipeline tunes in both modes
        return pipelines.advanced(size, seed=seed, sequential=tuning, capture=edges, **widths)
    callbacks: list[Any] = [CalibrationCapture(qconfig, **edges)]
    if size is not None:
        callbacks.append(BitAllocator(size, **widths))
    if pipeline == "adaquant":
        callbacks.append(AdaQuantLayerwise(**tuning))
    return [*callbacks, StatsTuning(seed=seed)] if statistics else callbacks


def run(
    float_module: pl.LightningModule,
    calibration: DataLoader,
    test: DataLoader,
    *,
    model: str,
    score: str = "top1",
    qconfig: str,
    mode: Literal["sequential", "parallel"],
    granularity: Literal["layer", "block"],
    steps: int | None,
    seed: int,
    file: Path | None,
    pipeline: Pipeline = "adaquant",
    statistics: bool = False,
    budget: str | None = None,
    candidates: list[str] | None = None,
    first_last_bits: int | None = 8,
    capture: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a copy of the module by ``trainer.fit``, measure it, print tables, and write the record as JSON.

    With a budget, bit widths are allocated before the tuning, and ``qconfig`` only sets the widths of the comparison
    with rounding to the nearest.
    """
    record: dict[str, Any] = {
        "model": model, "qconfig": qconfig, "mode": mode, "granularity": granularity, "steps": steps, "seed": seed,
        "pipeline": pipeline, "statistics": statistics, "budget": budget, "first_last_bits": first_last_bits,
        "capture": capture, "options": options, "score": score,
    }  # fmt: skip
    record[f"{score}_float"] = validated(float_module, test, score)
    record["seconds_per_pass"] = seconds_per_pass(float_module, calibration)
    pl.seed_everything(seed, verbose=False)
    nearest = copy.deepcopy(float_module)
    trainer([CalibrationCapture(qconfig, **(capture or {}))]).fit(nearest, calibration)
    record[f"{score}_rtn"] = validated(nearest, test, score)
    del nearest

    module = copy.deepcopy(float_module)
    size = None if budget is None else budget_for(float_module, calibration, budget)
    tuning = {"mode": mode, "granularity": granularity, "steps": steps, "seed": seed, **options}
    callbacks = callbacks_for(pipeline, qconfig, size, candidates, statistics, seed, tuning, first_last_bits, capture)
    start = time.perf_counter()
    trainer(callbacks).fit(module, calibration)
    record["seconds"] = time.perf_counter() - start
    record[f"{score}_quantized"] = validated(module, test, score)
    record["peak_rss_mb"] = peak_rss_mb()
    record["device"] = str(trainer().strategy.root_device)
    if torch.cuda.is_initialized():
        record["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    record["size_bytes"] = packed_size(module)
    record["size_bytes_float"] = sum(t.numel() * t.element_size() for t in float_module.state_dict().values())
    for callback in callbacks:
        _take(record, callback)
    _print(record)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1))
    return record


def _take(record: dict[str, Any], callback: Any) -> None:
    """Add the result of a callback to the record."""
    if isinstance(callback, AdaQuantLayerwise) and callback.result is not None:
        for key in ("seconds_tuning", "seconds_capture"):
            record[key] = record.get(key, 0.0) + getattr(callback.result, key)
        fields = ("name", "bits", "steps", "error_before", "error_after", "accepted")
        record["units"] = [{name: getattr(unit, name) for name in fields} for unit in callback.result.units]
    elif isinstance(callback, BitAllocator) and callback.result is not None:
        record["allocation"] = callback.result.allocation.to_dict()
        record["allocation"]["rounds"] = [asdict(each) for each in callback.result.rounds]
        console.print(allocation_table(callback.result).to_rich())
    elif isinstance(callback, StatsTuning):
        record["statistics_steps"] = [asdict(row) for row in callback.result or []]


def _print(record: dict[str, Any]) -> None:
    units = Table("unit", "bits", "error before", "error after", "kept", title=f"{record['model']} {record['qconfig']}")
    for row in record.get("units", []):
        kept = "yes" if row["accepted"] else "[red]no" if row["steps"] else "not tuned"
        units.add_row(row["name"], row["bits"], f"{row['error_before']:.2e}", f"{row['error_after']:.2e}", kept)
    steps = Table("statistics", "before", "after", "kept")
    for row in record.get("statistics_steps", []):
        kept = "yes" if row["accepted"] else "[red]no"
        steps.add_row(row["step"], f"{row['before']:.4g}", f"{row['after']:.4g}", kept)
    for table in (units, steps):
        if table.row_count:
            console.print(table)
    table = Table("what", "value", title=f"{record['model']}: {record['pipeline']}")
    score = record["score"]
    float_score, nearest, quantized = (record[f"{score}_{which}"] for which in ("float", "rtn", "quantized"))
    table.add_row(f"{score} float, %", f"{float_score:.2f}")
    table.add_row(f"{score} rounded to nearest at {record['qconfig']}", f"{nearest:.2f}")
    table.add_row(f"{score} quantized", f"{quantized:.2f}, a drop of {float_score - quantized:.2f}")
    passes = record["seconds"] / record["seconds_per_pass"]
    table.add_row("seconds", f"{record['seconds']:.1f}, or {passes:.1f} passes forward and backward")
    gpu = f", and {record['peak_gpu_mb']:.0f} on the GPU" if "peak_gpu_mb" in record else ""
    table.add_row("peak memory, MB", f"{record['peak_rss_mb']:.0f}{gpu}")
    times = record["size_bytes_float"] / record["size_bytes"]
    table.add_row("packed file, KB", f"{record['size_bytes'] / 1e3:.1f}, {times:.2f} times smaller than float")
    console.print(table)
