from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ACCELERATOR, IMAGES, LABELS, Snapshot, classifier, loader, trainer
from ranks.processes import Processes, run
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.callbacks.trainer.signals import StopRequest
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.runtime.ranks import ProcessRanks, Ranks, current_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Spoilt(Dataset[Any]):
    """The images, one of which is NaN, or cannot be loaded."""

    def __init__(self, bad: int, how: str) -> None:
        self.bad, self.how = bad, how

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Any:
        if index != self.bad:
            return IMAGES[index], LABELS[index]
        if self.how == "NaN":
            return IMAGES[index] * float("nan"), LABELS[index]
        raise OSError("the image cannot be read")


def fails(root: Any, how: str) -> Any:
    """A run that fails on rank 1; what it raises, and whether the float module is back."""
    import pytorch_lightning as pl

    module = classifier(pl)
    before = Snapshot(module)
    tuning = AdaQuantLayerwise(steps=30)
    data: Any = DataLoader(Spoilt(9 if how in ("NaN", "load") else -1, how), 8)  # sample 9 is rank 1's
    fitting = trainer(pl, root, CalibrationCapture("w4a4"), tuning, strategy="ddp", devices=2)
    if how == "tuning" and os.environ["RANK"] == "1":
        own = tuning.work

        def work(*args: Any, **kwargs: Any) -> Any:
            own(*args, **kwargs)
            raise ValueError("the disk is full")

        tuning.work = work  # type: ignore[method-assign]  # to fail within it
    start, raised = time.monotonic(), None
    try:
        fitting.fit(module, data)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    before.assert_unchanged()
    return raised, time.monotonic() - start


@pytest.mark.parametrize(("how", "message"), [
    ("NaN", "CalibrationError: NaN or an infinity in the input of layer 'net.0', calibration batch 0"),
    ("load", "OSError: the image cannot be read"),
    ("tuning", "ValueError: the disk is full"),
])  # fmt: skip
def test_what_fails_on_one_rank_ends_all_of_them_with_its_message(tmp_path, how, message):
    (first, _), (second, _) = run(2, fails, tmp_path, how, seconds=40)
    assert second.startswith(message)
    assert first.startswith("RankError")
    assert message in first


def exchanges() -> Any:
    backend, device = ("nccl", "cuda") if ACCELERATOR == "gpu" else ("gloo", "cpu")
    dist.init_process_group(backend, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    ranks = current_ranks()
    assert isinstance(ranks, ProcessRanks)
    tensor = torch.full((2,), float(ranks.rank), device=device)
    ranks.broadcast([tensor])
    shared = torch.full((2, 3), float(ranks.rank + 1), device=device)
    ranks.broadcast_each(list(shared))
    found = [ranks.gather(ranks.rank), ranks.on_rank_zero(lambda: f"of {ranks.rank}"), tensor.tolist(), shared.tolist()]
    ranks.check_same({"same": tensor})
    for pause in (1.5, 0.99, 1.01):  # longer than a rank waits before it looks around, or just as long
        time.sleep(pause * ranks.rank)
        assert ranks.gather(pause) == [pause, pause]
        time.sleep(pause * ranks.rank)
        shared = torch.full((2,), pause * ranks.rank, device=device)
        ranks.broadcast_each([shared[:1], shared[1:]])
        assert shared.tolist() == pytest.approx([0, pause])
    try:
        ranks.on_rank_zero(lambda: 1 / 0)
    except ZeroDivisionError as error:
        found.append(str(error))
    try:
        ranks.check_same({"a": tensor, "b": tensor + ranks.rank})
    except Exception as error:
        found.append(str(error))
    return found


def test_exchanges():
    first, second = run(2, exchanges)
    assert first == second
    assert first[:5] == [[0, 1], "of 0", [0.0, 0.0], [[1.0] * 3, [2.0] * 3], "division by zero"]
    assert "different bytes in 'b'" in first[5]
    assert current_ranks().world == 1
    assert Ranks().gather("x") == ["x"]


def waits(root: Any, world: int) -> Any:
    """A run whose tuning would take minutes."""
    import pytorch_lightning as pl

    module = classifier(pl)
    before = Snapshot(module)
    Path(root, f"started{os.environ.get('RANK', 0)}").touch()
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    capture = CalibrationCapture("w4a4", resume_dir=str(Path(root, "progress")))
    fitting = trainer(pl, root, capture, AdaQuantLayerwise(steps=100_000, memory_limit=0), **several)
    try:
        fitting.fit(module, loader())
    finally:
        before.assert_unchanged()
        assert not [child for child in module.modules() if isinstance(child, QuantLayer)]
        assert [t.name for t in threading.enumerate() if "fetch" in t.name.lower()] == []


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, "SIGTERMException"), (signal.SIGINT, "SystemExit")])
def test_a_signal_ends_the_run_in_good_order(tmp_path, monkeypatch, world, signum, raised):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    processes = Processes(world, waits, tmp_path, world)
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob("temporary/lightning_ptq_*/*.bin")):  # activations on disk: it is at work
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    processes.kill(signum, 0)
    results = processes.wait(40)
    assert results[0][0] == raised
    assert [error for error, _ in results[1:]] == ["RankError"] * (world - 1)
    assert not list(tmp_path.glob("temporary/lightning_ptq_*"))
    assert not list(tmp_path.glob("progress/*.part"))


def test_an_interrupt_that_was_swallowed_ends_the_run_at_the_next_step():
    own = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = StopRequest()
    try:
        with stop.watching(1):
            stop.check(None)
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                stop.check(None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, own)


def own_sampler(root: Any, shuffle: bool) -> Any:
    import pytorch_lightning as pl
    from torch.utils.data import DistributedSampler

    module, data = classifier(pl), TensorDataset(IMAGES[:13], LABELS[:13])
    capture = CalibrationCapture("w4a4")
    rank = int(os.environ["RANK"])
    sampler = DistributedSampler(data, 2, rank, shuffle=shuffle, seed=3)
    found: list[Any] = []

    class Look(pl.Callback):  # type: ignore[name-defined]
        def on_train_epoch_end(self, *_: Any) -> None:
            calibration = capture.calibration
            found.append((calibration.samples, torch.cat([batch[0] for batch in calibration.batches])))
            found.append(int(calibration.observers["net.0", "input"].counts.sum()))

    trainer(pl, root, capture, Look(), strategy="ddp", devices=2, use_distributed_sampler=False).fit(
        module, DataLoader(data, 4, sampler=sampler)
    )
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_repeats_of_a_sampler_count_once(tmp_path, shuffle):
    for (samples, images), counted in run(2, own_sampler, tmp_path, shuffle):
        assert samples == 13
        assert counted == 13 * 25
        assert sorted(images.flatten(1).sum(1).tolist()) == pytest.approx(
            sorted(IMAGES[:13].flatten(1).sum(1).tolist())
        )
        assert shuffle or torch.equal(images, IMAGES[:13])
