"""The defaults on a panel of networks: python recipes/panel.py --data DIR --json panel.json

A default holds if it holds on networks that it was not chosen on. Four networks need no data beside the packages: a
residual network and a plain chain of depthwise convolutions on digits, a denoising U-Net, and CREPE for pitches.
With a folder of data there are also ResNet-20, EfficientNet-Lite0, MobileNetV2 and MiniLM. Each run has its own
process, so that its peak memory is its own.
"""

from __future__ import annotations

import copy
import json as json_
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import console, peak_rss_mb, quiet, seconds_per_pass, trainer
from panel_networks import NETWORKS, Case, load
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.calibration.forward import default_forward

SETTINGS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
Half = Literal["first", "second", "both"]
_RESAMPLES = 200


@dataclass
class Row:
    """What was measured of a network at a setting; scores are in the network's unit, most in percent.

    Attributes:
        network: Name of the network.
        setting: Bit widths.
        float_score: Score of the float network.
        nearest: Score after rounding to the nearest.
        tuned: Score after AdaQuant.
        error: Standard error of the difference between the float network and the tuned one.
        distance: KL divergence of the tuned network's classes from the float one's, or the squared error of its outputs
            relative to the float ones.
        distance_error: Standard error of the distance.
        distance_nearest: The distance after rounding to the nearest.
        passes: Duration of calibration and tuning, in float passes forward and backward over the calibration set.
        memory: Peak memory, as a multiple of the peak of one such float pass.
        megabytes: Peak memory.
    """

    network: str
    setting: str
    float_score: float
    nearest: float
    tuned: float
    error: float
    distance: float
    distance_error: float
    distance_nearest: float
    passes: float
    memory: float
    megabytes: float


def outputs_of(case: Case, module: pl.LightningModule) -> Tensor:
    """Return the outputs on all test batches, (samples, ...)."""
    module = module.eval()
    with torch.inference_mode():
        return torch.cat([default_forward(module, batch).float().cpu() for batch in case.test])


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def difference(case: Case, found: Tensor, expected: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """Return both scores on some samples, and the standard error of their difference, by resampling."""
    generator = torch.Generator().manual_seed(0)
    draws = [rows[torch.randint(len(rows), (len(rows),), generator=generator)] for _ in range(_RESAMPLES)]
    spread = torch.tensor([case.score(found, draw) - case.score(expected, draw) for draw in draws]).std().item()
    return case.score(expected, rows), case.score(found, rows), spread


def distances(case: Case, found: Tensor, expected: Tensor) -> Tensor:
    """Return how far each sample's output is from the float one."""
    if case.classes:
        given, wanted = found.log_softmax(1), expected.log_softmax(1)
        return (wanted.exp() * (wanted - given)).sum(1)
    found, expected = found.flatten(1), expected.flatten(1)
    return (found - expected).square().sum(1) / expected.square().sum(1)


def measure(
    network: str, setting: str, data: Path | None, cache: Path, half: Half, seed: int, options: dict[str, Any],
    capture: dict[str, Any],
) -> Row:  # fmt: skip
    """Quantize a network at one setting, and measure it."""
    quiet()
    case = load(network, data, cache, seed)
    chosen = {"both": slice(None), "first": slice(0, None, 2), "second": slice(1, None, 2)}[half]
    expected = outputs_of(case, case.module)
    rows = torch.arange(case.samples)[chosen]
    of_pass = seconds_per_pass(case.module, case.calibration)
    of_float = peak_rss_mb()
    nearest = copy.deepcopy(case.module)
    pl.seed_everything(seed, verbose=False)
    trainer([CalibrationCapture(setting, **capture)]).fit(nearest, case.calibration)
    rounded = outputs_of(case, nearest)
    del nearest
    tuned = copy.deepcopy(case.module)
    pl.seed_everything(seed, verbose=False)
    start = time.perf_counter()
    trainer([CalibrationCapture(setting, **capture), AdaQuantLayerwise(seed=seed, **options)]).fit(
        tuned, case.calibration
    )
    seconds, peak = time.perf_counter() - start, peak_rss_mb()
    found = outputs_of(case, tuned)
    score, tuned_score, error = difference(case, found, expected, rows)
    distance, distance_error = mean_and_error(distances(case, found, expected)[rows])
    return Row(
        network, setting, score, case.score(rounded, rows), tuned_score, error, distance, distance_error,
        distances(case, rounded, expected)[rows].mean().item(), seconds / of_pass, peak / of_float, peak,
    )  # fmt: skip


def table_of(rows: list[Row]) -> Table:
    """Return a table of the measurements."""
    table = Table(
        "network", "setting", "float", "nearest", "AdaQuant", "drop", "KL or error", "nearest's", "passes", "memory",
        title="Float network against AdaQuant with its defaults",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.network, row.setting, f"{row.float_score:.2f}", f"{row.nearest:.2f}", f"{row.tuned:.2f}",
            f"{row.float_score - row.tuned:.2f} ± {row.error:.2f}", f"{row.distance:.4f} ± {row.distance_error:.4f}",
            f"{row.distance_nearest:.4f}", f"{row.passes:.1f}", f"{row.memory:.1f} x, {row.megabytes:.0f} MB",
        )  # fmt: skip
    return table


def main(
    data: Path | None = None,
    networks: list[str] | None = None,
    settings: list[str] | None = None,
    half: Half = "both",
    seeds: list[int] = [0],  # noqa: B006  jsonargparse shows it
    json: Path | None = None,
    options: dict[str, Any] | None = None,
    capture: dict[str, Any] | None = None,
    cache: Path | None = None,
) -> None:
    """Quantize each network at each setting, print a table, and write the rows as JSON.

    Args:
        data: Folder with cifar10_sample.npz, cifar10_resnet20.th, imagenet500, imagenet_classes.tsv, mobilenet_v2
            .safetensors with networks.py, and text; without it, only networks that need no data run.
        networks: Names of networks; all by default.
        settings: Bit widths.
        half: Test samples that are scored: to choose defaults on one half and to report on the other.
        seeds: Seeds of all random choices; each is a run of its own.
        json: File for the rows.
        options: Arguments of AdaQuantLayerwise that differ from the defaults.
        capture: Arguments of CalibrationCapture that differ from the defaults.
        cache: Folder for the weights of networks that the recipe trains; a temporary one by default.
    """
    if settings is None:
        settings = list(SETTINGS)
    quiet()
    names = networks or [name for name, network in NETWORKS.items() if data is not None or not network.needs_data]
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise SystemExit(f"unknown networks: {unknown}. Choose from {list(NETWORKS)}.")
    context = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        kept = cache or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for name in names:
            for setting in settings:
                for seed in seeds:
                    given = (name, setting, data, kept, half, seed, options or {}, capture or {})
                    rows.append(_alone(context, measure, given))
                    console.print(_line(rows[-1]), soft_wrap=True)
                    if json is not None:  # after each run, so that an interruption loses one only
                        json.write_text(json_.dumps([asdict(row) for row in rows], indent=1))
    Console(width=max(console.width, 150)).print(table_of(rows))  # its columns do not fit into a log's 80


def _alone(context: Any, function: Callable[..., Row], given: tuple[Any, ...]) -> Row:
    """Call a function in a new process."""
    with context.Pool(1) as pool:
        return pool.apply(function, given)  # type: ignore[no-any-return]


def _line(row: Row) -> str:
    return (
        f"{row.network} {row.setting}: {row.float_score:.2f} to {row.tuned:.2f} ± {row.error:.2f} (nearest"
        f" {row.nearest:.2f}), {row.distance:.4f} (nearest {row.distance_nearest:.4f}), {row.passes:.1f} passes,"
        f" {row.memory:.1f} x memory"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
