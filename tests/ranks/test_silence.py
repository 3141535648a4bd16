from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Snapshot, classifier, loader, trainer
from ranks.processes import Processes

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.batches import Batches
from lightning_ptq.errors import QConfigError
from lightning_ptq.runtime.ranks import current_ranks
from lightning_ptq.runtime.scratch import ScratchFolder, remove_abandoned

pytestmark = [pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tunes(root: Any, timeout: float) -> None:
    """A run of two ranks whose tuning would take minutes."""
    import pytorch_lightning as pl

    module = classifier(pl)
    before = Snapshot(module)
    capture = CalibrationCapture("w4a4", timeout=timeout)
    tuning = AdaQuantLayerwise(steps=100_000, memory_limit=0)
    try:
        trainer(pl, root, capture, tuning, strategy="ddp", devices=2).fit(module, loader())
    finally:
        before.assert_unchanged()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_on_the_other(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("lightning_ptq.runtime.ranks._FAREWELL", 1.0)
    processes, other = Processes(2, tunes, tmp_path, 3.0), 1 - stopped
    until(lambda: any(tmp_path.glob("lightning_ptq_activations_*/*.bin")))
    processes.kill(signal.SIGSTOP, stopped)
    processes.processes[other].join(30)
    assert not processes.processes[other].is_alive()
    processes.kill(signal.SIGKILL, stopped)
    name, message = processes.wait(10)[other]
    assert name == "RankError"
    assert f"rank {stopped} has given no sign of life for 3 seconds, so all stop." in message


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, "SIGTERMException"), (signal.SIGINT, "SystemExit")])
def test_a_rank_that_waits_for_a_stopped_one_hears_signals(tmp_path, monkeypatch, signum, raised):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("lightning_ptq.runtime.ranks._FAREWELL", 1.0)
    processes = Processes(2, tunes, tmp_path, 1800.0)
    until(lambda: any(tmp_path.glob("lightning_ptq_activations_*/*.bin")))
    processes.kill(signal.SIGSTOP, 1)
    time.sleep(1.5)
    processes.kill(signum, 0)
    processes.processes[0].join(20)
    assert not processes.processes[0].is_alive()
    processes.kill(signal.SIGKILL, 1)
    assert processes.wait(10)[0][0] == raised


def works_for_long() -> Any:
    dist.init_process_group("gloo")
    ranks = current_ranks(timeout=1.0)
    time.sleep(3 * ranks.rank)  # computes without a report of progress
    if ranks.rank:
        torch.rand(300, 300).inverse()
    return ranks.gather(ranks.rank)


def test_a_rank_that_works_for_longer_than_the_timeout_is_alive():
    assert Processes(2, works_for_long).wait(30) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "1h", True])
def test_a_timeout_is_a_positive_number_of_seconds(timeout):
    with pytest.raises(QConfigError, match="timeout must be a positive number of seconds, got"):
        CalibrationCapture(timeout=timeout)


def holds(folder: Path) -> None:
    tempfile.tempdir = str(folder)
    store, batches = ActivationStore(0), Batches()
    kept = store.put(torch.ones(10))
    batches.append_to_disk(torch.ones(3))
    time.sleep(60)
    del kept


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path, monkeypatch):
    holders = [Processes(1, holds, tmp_path) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("*/*.*"))) == 4)
    theirs = set(tmp_path.iterdir())
    foreign = tmp_path / "lightning_ptq_activations_another-host_abcdefgh"
    foreign.mkdir()
    own = ScratchFolder("activations", str(tmp_path))
    holders[0].kill(signal.SIGKILL)
    holders[0].wait(10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ActivationStore("1MB")
    left = set(tmp_path.iterdir()) - {foreign, own.path}
    assert len(theirs) == 4
    assert len(left) == 2
    assert left < theirs
    holders[1].kill(signal.SIGKILL)
    holders[1].wait(10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)  # that of another user
        remove_abandoned()
    assert set(tmp_path.iterdir()) == left | {foreign, own.path}
    remove_abandoned()
    assert set(tmp_path.iterdir()) == {foreign, own.path}
    own.remove()
    assert not own.path.exists()


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    removed = []

    def vanish(path: Path) -> None:
        if not removed:
            path.rmdir()
            removed.append(path)

    monkeypatch.setattr("lightning_ptq.runtime.scratch._lock", vanish)
    folder = ScratchFolder("activations", str(tmp_path))
    assert folder.path.exists()
    assert folder.path not in removed
