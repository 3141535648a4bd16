"""Time of tuning on one process and on several, with one thread each.

python recipes/scaling.py --data FILE.npz --weights FILE.th
"""

from __future__ import annotations

import json as json_
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from cifar10 import load
from jsonargparse import auto_cli
from measuring import console, peak_rss_mb, quiet
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.runtime.ranks import current_ranks, digest

CANDIDATES = ["w8a8", "w4a4", "w3a3", "w2a4"]


def measure(data: Path, weights: Path, mode: str, qconfig: str, steps: int | None, calibration: int) -> dict[str, Any]:
    """Tune on all processes, and return the longest times, the largest memory, and a checksum of the result."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = current_ranks()
    module, loader, _ = load(data, weights, calibration, 0)
    images: Any = loader.dataset
    share = Subset(images, range(ranks.rank, len(images), ranks.world))  # as a DistributedSampler does
    calibrated = calibrate(module.net, DataLoader(share, loader.batch_size), QConfig.parse(qconfig), ranks=ranks)
    result = adaquant(
        calibrated,
        mode=mode,  # type: ignore[arg-type]  # adaquant checks it
        candidates=CANDIDATES if mode == "parallel" else None,
        # Parallel mode tunes every unit, so that all candidates count.
        config=ReconstructionConfig(steps=steps, tolerance=0.0 if mode == "parallel" else None),
    )
    tuned = [t for states in result.states.values() for layer in states.values() for t in layer.values()]
    measured = ranks.gather((result.seconds_tuning, result.seconds_capture, peak_rss_mb()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return {
        "seconds_tuning": max(tuning for tuning, _, _ in measured),
        "seconds_capture": max(capture for _, capture, _ in measured),
        "peak_rss_mb": max(memory for _, _, memory in measured),
        "checksum": digest([*module.net.state_dict().values(), *tuned]),
    }


def main(
    data: Path,
    weights: Path,
    processes: int = 2,
    qconfig: str = "w4a4",
    steps: int | None = None,
    calibration: int = 1024,
    repeats: int = 1,
    mode: str | None = None,
    json: Path | None = None,
) -> None:
    """Time the tuning on one process and on several, in both modes, and compare the results.

    Args:
        data: Data file of cifar10.py.
        weights: Checkpoint of cifar10.py.
        processes: Number of processes that are compared with one.
        qconfig: Bit widths in sequential mode; parallel mode tunes at four candidates.
        steps: Steps per unit; by default they depend on the bit widths.
        calibration: Number of calibration images.
        repeats: Runs of each kind, in turn; the table shows medians.
        mode: Measure only this mode, in the processes that run the recipe; used when the recipe starts itself.
        json: File for the measurements.
    """
    quiet()
    if mode is not None:
        record = measure(data, weights, mode, qconfig, steps, calibration)
        if os.environ.get("RANK", "0") == "0":
            Path(str(json)).write_text(json_.dumps(record))
        return
    table = Table("mode", "processes", "tuning, s", "times faster", "capture, s", "peak MB per process", "same bytes")
    rows: list[dict[str, Any]] = []
    for kind in ("parallel", "sequential"):
        arguments = ["--data", data, "--weights", weights, "--qconfig", qconfig, "--calibration", calibration]
        arguments += ["--mode", kind] if steps is None else ["--mode", kind, "--steps", steps]
        worlds = 1, processes
        # In turn, so that other load on the machine affects both equally.
        runs = [[_start(world, arguments) for world in worlds] for _ in range(repeats)]
        alone: dict[str, Any] = {}
        for world, repeated in zip(worlds, zip(*runs, strict=True), strict=True):
            row = {"mode": kind, "processes": world, **_medians(repeated)}
            alone = alone or row
            row["times_faster"] = alone["seconds_tuning"] / row["seconds_tuning"]
            rows.append(row)
            same = "yes" if row["checksum"] == alone["checksum"] else "[red]no"
            tuning, capture = f"{row['seconds_tuning']:.1f}", f"{row['seconds_capture']:.1f}"
            faster, peak = f"{row['times_faster']:.2f}", f"{row['peak_rss_mb']:.0f}"
            table.add_row(kind, str(world), tuning, faster, capture, peak, same)
    console.print(table)
    if json is not None:
        json.write_text(json_.dumps(rows, indent=1))


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the figures, all runs, and their checksum, which is empty if the runs differ in it."""
    medians: dict[str, Any] = {key: median(run[key] for run in runs) for key in runs[0] if key != "checksum"}
    checksums = {run["checksum"] for run in runs}
    return {**medians, "runs": runs, "checksum": checksums.pop() if len(checksums) == 1 else ""}


def _start(world: int, arguments: list[Any]) -> dict[str, Any]:
    """Run this recipe in ``world`` processes, and return what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
        command = [sys.executable, *launcher, __file__, *map(str, arguments), "--json", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return dict(json_.loads(file.read_text()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
