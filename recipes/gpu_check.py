"""Check a GPU, or several, in a few minutes: python recipes/gpu_check.py --data DIR

Tuning with and without CUDA graphs (time, memory, and whether the results agree), a device that runs out of memory, and
NCCL with an interrupt and a resumed run. Ends with status 1 if a check fails. Without a folder of data, the network is
the residual one of the digits, which needs no data beside the packages.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from measuring import console, quiet, seconds_per_pass, trainer
from panel import distances, outputs_of
from panel_networks import Case, load
from rich.table import Table

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.errors import MemoryWarning

_SLOWER = 1.5  # graphs may take this much longer on a network whose kernels are large, but not more


@dataclass
class Check:
    """The outcome of a check.

    Attributes:
        name: What was checked.
        passed: None if it could not be run here.
        found: What was measured.
    """

    name: str
    passed: bool | None
    found: str


def tune(case: Case, setting: str, **options: Any) -> tuple[pl.LightningModule, AdaQuantLayerwise, float]:
    """Return a tuned copy of a network, its callback, and the seconds."""
    module, tuning = copy.deepcopy(case.module), AdaQuantLayerwise(**options)
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    trainer([CalibrationCapture(setting), tuning]).fit(module, case.calibration)
    return module, tuning, time.perf_counter() - start


def check_graphs(name: str, setting: str, data: Path | None, cache: Path) -> Check:
    """Compare steps as CUDA graphs with eager ones: the same network within rounding, in less time."""
    case = load(name, data, cache, 0)
    expected, of_pass = outputs_of(case, case.module), seconds_per_pass(case.module, case.calibration)
    tune(case, setting, steps=3)  # libraries are loaded before the clock starts
    seconds, memory, far = {}, {}, {}
    for graphs in (False, True):
        torch.cuda.reset_peak_memory_stats()
        module, tuning, seconds[graphs] = tune(case, setting, cuda_graphs=graphs)
        memory[graphs] = torch.cuda.max_memory_allocated() / 1e6
        far[graphs] = distances(case, outputs_of(case, module.cpu()), expected).mean().item()
    units = tuning.result.units if tuning.result else []
    eager = {unit.name: unit.eager for unit in units if unit.eager}
    passed = len(eager) < len(units) and seconds[True] < _SLOWER * seconds[False]
    passed = passed and far[True] < 1.2 * far[False] + 1e-6  # two runs with other rounding differ as well
    return Check(
        f"CUDA graphs, {name} {setting}",
        passed,
        f"{seconds[False]:.1f} s eager, {seconds[True]:.1f} s with graphs ({seconds[False] / of_pass:.1f} and"
        f" {seconds[True] / of_pass:.1f} float passes), {memory[False]:.0f} and {memory[True]:.0f} MB, distance"
        f" {far[False]:.5f} and {far[True]:.5f}; eager units: {eager or 'none'}",
    )


def check_memory(data: Path | None, cache: Path) -> Check:
    """Let the device run out of memory in the middle: the unit is repeated, and the run ends as usual."""
    case = load("digits", data, cache, 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    tune(case, "w4a4", steps=3, batch_size=2048, cuda_graphs=False)
    share = 0.6 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            tune(case, "w4a4", steps=3, batch_size=2048, cuda_graphs=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = [str(note.message) for note in noted if issubclass(note.category, MemoryWarning)]
    return Check("out of memory", bool(found), found[0] if found else "the device never ran out of memory")


def check_nccl(cache: Path) -> Check:
    """Interrupt a run on all devices, and resume it."""
    devices = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "worker", "--folder", folder, "--cache", str(cache)]
        first = subprocess.Popen([*command, "--steps", "20000"], start_new_session=True)
        deadline = time.monotonic() + 120
        while not any(Path(folder).glob("progress/*")) and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.5)
        time.sleep(5)
        os.killpg(first.pid, signal.SIGINT)
        start = time.monotonic()
        try:
            status: Any = first.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(first.pid, signal.SIGKILL)
            status = "it did not end"
        ended = time.monotonic() - start
        resumed = subprocess.run([*command, "--steps", "30"], check=False, timeout=180).returncode
    passed = isinstance(status, int) and status != 0 and resumed == 0
    return Check(
        f"NCCL, {devices} devices", passed,
        f"interrupted: status {status} after {ended:.0f} s; run again: status {resumed}"
        + ("" if devices > 1 else " (one device, so nothing was exchanged)"),
    )  # fmt: skip


def worker(folder: Path, cache: Path, steps: int) -> None:
    """Tune the network of the digits on all devices, in the processes that Lightning starts."""
    quiet()
    case = load("digits", None, cache, 0)
    devices = torch.cuda.device_count()
    capture = CalibrationCapture("w4a4", resume_dir=str(folder / "progress"))
    several: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer([capture, AdaQuantLayerwise(steps=steps)], **several).fit(case.module, case.calibration)


def check(data: Path | None = None, networks: list[str] | None = None, settings: list[str] = ["w4a4", "w2a4"]) -> None:  # noqa: B006
    """Run all checks, and print what was found.

    Args:
        data: Folder of data, as for panel.py.
        networks: Networks of the panel that are timed; by default resnet20 and mobilenet_v2 with data, else digits.
        settings: Bit widths of the first of them; the others are timed at the first setting.
    """
    quiet()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is available to torch, so there is nothing to check.")
    names = networks or (["resnet20", "mobilenet_v2"] if data else ["digits"])
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        load("digits", None, cache, 0)  # trained once, for all checks
        work: list[Callable[[], Check]] = [lambda: check_nccl(cache), lambda: check_memory(data, cache)]
        for name in names:
            for setting in settings if name == names[0] else settings[:1]:
                work.append(lambda name=name, setting=setting: check_graphs(name, setting, data, cache))  # type: ignore[misc]
        table = Table("check", "result", "found", title=torch.cuda.get_device_name(0))
        failed = False
        for one in work:
            try:
                result = one()
            except Exception as error:  # the other checks still say something
                result = Check(getattr(one, "__name__", "check"), False, f"{type(error).__name__}: {error}")
            failed |= result.passed is False
            table.add_row(result.name, "passed" if result.passed else "FAILED", result.found)
            console.print(f"{result.name}: {'passed' if result.passed else 'FAILED'}: {result.found}", soft_wrap=True)
    console.print(table)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        sys.argv.pop(1)
        auto_cli(worker, as_positional=False)
    else:
        auto_cli(check, as_positional=False)
