"""Time of logging and report in a run: python recipes/logging_cost.py --data FILE.npz --weights FILE.th --out FOLDER"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cifar10 import load
from jsonargparse import auto_cli
from measuring import budget_for, console, quiet, trainer
from rich.table import Table

from lightning_ptq.callbacks import allocator, base, capture, pipelines, statistics
from lightning_ptq.callbacks.trainer import loggers as ptq_loggers
from lightning_ptq.callbacks.trainer import reporting
from lightning_ptq.report import PTQReport

# A function is replaced in the module that calls it, because that module has imported it by name.
WATCHED: dict[Any, tuple[str, ...]] = {
    ptq_loggers.UnitScalars: ("log",),
    allocator: ("log_scalars", "frontier_around"),
    base: ("log_tables",),
    capture: ("log_ranges", "log_settings"),
    reporting: ("log_end",),
    statistics: ("log_scalars",),
    PTQReport: ("calibrated", "finish", "pictures", "save", "tables"),
}


class Clock:
    """Measures the seconds inside the functions it watches; nested calls count for the outermost one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, timed under ``name``."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return call(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return timed


def main(
    data: Path,
    weights: Path,
    out: Path,
    logger: Literal["WandbLogger", "TensorBoardLogger", "CSVLogger"] = "WandbLogger",
    calibration: int = 1024,
    seed: int = 0,
) -> None:
    """Run the advanced pipeline with a logger and a report on disk, and add up the time of both.

    Args:
        data: File (.npz) with calib_images, calib_labels, test_images, test_labels (uint8, n x 3 x 32 x 32).
        weights: ResNet-20 checkpoint.
        out: Folder for logs and report.
        logger: Lightning logger; W&B runs offline.
        calibration: Number of calibration images.
        seed: Seed of the choice of calibration images.
    """
    quiet()
    import pytorch_lightning.loggers as loggers

    out.mkdir(parents=True, exist_ok=True)
    offline = {"offline": True, "project": "ptq"} if logger == "WandbLogger" else {}
    made = getattr(loggers, logger)(save_dir=out, **offline)
    module, calib, _ = load(data, weights, calibration, seed)
    clock = Clock()
    for owner, names in WATCHED.items():
        for name in names:
            setattr(owner, name, clock.watch(name, getattr(owner, name)))
    callbacks = pipelines.advanced(budget_for(module, calib, "w4a4"), capture={"report_dir": str(out / "report")})
    start = time.perf_counter()
    trainer(callbacks, logger=made).fit(module, calib)
    whole = time.perf_counter() - start
    table = Table("what", "seconds", "share of fit", title=f"ResNet-20, advanced pipeline, {logger}")
    rows = sorted(clock.seconds.items(), key=lambda row: -row[1])
    for name, seconds in [*rows, ("logging and report", sum(clock.seconds.values())), ("fit", whole)]:
        table.add_row(name, f"{seconds:.2f}", f"{seconds / whole:.2%}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
