"""Tuning on one process and on several, one thread each: python recipes/scaling.py --data FILE.npz --weights FILE.th"""

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
    """Tune on as many processes as there are; seconds, memory of the largest, and a checksum of the result."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = current_ranks()
    module, loader, _ = load(data, weights, calibration, 0)
    images: Any = loader.dataset
    own = Subset(images, range(ranks.rank, len(images), ranks.world))  # as a DistributedSampler deals them out
    calibrated = calibrate(module.net, DataLoader(own, loader.batch_size), QConfig.parse(qconfig), ranks=ranks)
    result = adaquant(
        calibrated,
        mode=mode,  # type: ignore[arg-type]  # adaquant checks it
        candidates=CANDIDATES if mode == "parallel" else None,
        config=ReconstructionConfig(steps=steps, tolerance=0.0 if mode == "parallel" else None),
    )
    tuned = [t for states in result.states.values() for layer in states.values() for t in layer.values()]
    found = ranks.gather((result.seconds_tuning, result.seconds_capture, peak_rss_mb()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return {
        "seconds_tuning": max(tuning for tuning, _, _ in found),
        "seconds_capture": max(capture for _, capture, _ in found),
        "peak_rss_mb": max(memory for _, _, memory in found),
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
    """Compare.

    Args:
        data: As for cifar10.py.
        weights: As for cifar10.py.
        processes: How many, beside the single one.
        qconfig: Bit widths for sequential mode; parallel mode tunes at four candidates.
        steps: Steps a unit; by default they go by the bit widths.
        calibration: Number of calibration images.
        repeats: Runs of each kind, in turn, of which the medians are told.
        mode: Measure this mode on the processes there are, and print JSON: what the recipe starts itself with.
        json: Where to write the measurements.
    """
    quiet()
    if mode is not None:
        found = measure(data, weights, mode, qconfig, steps, calibration)
        if os.environ.get("RANK", "0") == "0":
            Path(str(json)).write_text(json_.dumps(found))
        return
    table = Table("mode", "processes", "tuning, s", "times faster", "capture, s", "peak MB a process", "same bytes")
    rows: list[dict[str, Any]] = []
    for kind in ("parallel", "sequential"):
        given = ["--data", data, "--weights", weights, "--qconfig", qconfig, "--calibration", calibration]
        given += ["--mode", kind] if steps is None else ["--mode", kind, "--steps", steps]
        worlds = 1, processes
        # In turn, so that what else the machine does meanwhile meets both alike.
        runs = [[_start(world, given) for world in worlds] for _ in range(repeats)]
        alone: dict[str, Any] = {}
        for world, own in zip(worlds, zip(*runs, strict=True), strict=True):
            found = {"mode": kind, "processes": world, **_medians(own)}
            alone = alone or found
            found["times_faster"] = alone["seconds_tuning"] / found["seconds_tuning"]
            rows.append(found)
            same = "yes" if found["checksum"] == alone["checksum"] else "[red]no"
            shown = [f"{found[key]:.1f}" for key in ("seconds_tuning", "times_faster", "seconds_capture")]
            table.add_row(
                kind,
                str(world),
                shown[0],
                f"{found['times_faster']:.2f}",
                shown[2],
                f"{found['peak_rss_mb']:.0f}",
                same,
            )
    console.print(table)
    if json is not None:
        json.write_text(json_.dumps(rows, indent=1))


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure; the checksum is one if it is the same in all runs."""
    found: dict[str, Any] = {key: median(run[key] for run in runs) for key in runs[0] if key != "checksum"}
    checksums = {run["checksum"] for run in runs}
    return {**found, "runs": runs, "checksum": checksums.pop() if len(checksums) == 1 else ""}


def _start(world: int, arguments: list[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
        command = [sys.executable, *launcher, __file__, *map(str, arguments), "--json", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return dict(json_.loads(file.read_text()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
