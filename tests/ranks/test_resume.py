from __future__ import annotations

import random
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, LABELS, classifier, same_state, state, trainer
from ranks.processes import Processes, run
from ranks.test_pipeline import CANDIDATES, SAMPLES
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, StatsTuning
from lightning_ptq.callbacks.trainer.resuming import settings
from lightning_ptq.errors import ProgressWarning
from lightning_ptq.runtime.journal import Journal, JournalEntry

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]


def quantized(
    root: Path,
    world: int = 1,
    steps: int = 12,
    scale: float = 1.0,
    qconfig: str = "w8a8",
    measure: Any = "kl",
    step: Any = "training",
    output: Any = None,
) -> Any:
    import pytorch_lightning as pl

    module = classifier(pl)
    with torch.no_grad():
        module.net[0].weight.mul_(scale)
    callbacks = [
        CalibrationCapture(qconfig, step=step),
        AdaQuantLayerwise("parallel", candidates=CANDIDATES, steps=steps, batch_size=8),
        BitAllocator(0.3, measure=measure, output=output),
        AdaQuantLayerwise(steps=steps, batch_size=8),
        StatsTuning(steps=steps),
    ]
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    loader = DataLoader(TensorDataset(IMAGES[:SAMPLES], LABELS[:SAMPLES]), 8)
    trainer(pl, root, *callbacks, **several).fit(module, loader)
    return state(module)


def pieces(root: Path) -> list[Path]:
    with suppress(FileNotFoundError):  # a run that is over removes the folder, also in the middle of a look
        return sorted(root.glob("ptq_progress/*.safetensors"))
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run that nobody cuts off ends with."""
    return run(1, quantized, tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (1, 1), (2, 1)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, whole, world, seed):
    draw = random.Random(seed)
    kills = 0
    while True:
        processes = Processes(world, quantized, tmp_path, world)
        before, more, deadline = len(pieces(tmp_path)), draw.randint(1, 5), time.monotonic() + 60
        while any(p.is_alive() for p in processes.processes) and len(pieces(tmp_path)) < before + more:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if not any(p.is_alive() for p in processes.processes):
            break
        time.sleep(draw.random() * 0.03)
        processes.kill(signal.SIGKILL)
        for process in processes.processes:
            process.join()
        kills += 1
    assert kills >= 2
    for found in processes.wait():
        assert same_state(found, whole)
    assert not (tmp_path / "ptq_progress").exists()


def cut_off(root: Path, monkeypatch: Any, **options: Any) -> None:
    """A run that fails in its last stage."""
    with monkeypatch.context() as patch:
        patch.setattr(StatsTuning, "work", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized(root, **options)
    assert pieces(root)


def test_damaged_progress_is_named_and_done_again(tmp_path, monkeypatch, whole):
    cut_off(tmp_path, monkeypatch)
    for damage, path in zip((b"", b"{", b"\0" * 400), pieces(tmp_path)[::5], strict=False):
        path.write_bytes(damage)
    flipped = bytearray(pieces(tmp_path)[1].read_bytes())
    flipped[-3] ^= 1
    pieces(tmp_path)[1].write_bytes(bytes(flipped))
    damaged = [str(path) for path in (pieces(tmp_path)[1], *pieces(tmp_path)[::5][:3])]
    with pytest.warns(ProgressWarning) as caught:
        found = quantized(tmp_path)
    assert same_state(found, whole)
    assert all(any(path in str(warning.message) for warning in caught) for path in damaged)


def doubled(module: Any, batch: Any) -> Any:
    return 2 * module.loss(batch)


@pytest.mark.parametrize(
    "change",
    [{"steps": 13}, {"scale": 1.01}, {"qconfig": "w6a6"}, {"step": doubled}],
    ids=lambda change: next(iter(change)),
)
def test_progress_of_another_run_is_not_used(tmp_path, monkeypatch, whole, change):
    cut_off(tmp_path, monkeypatch, **change)
    theirs = pieces(tmp_path)
    told: list[str] = []
    monkeypatch.setattr("lightning_ptq.callbacks.trainer.resuming.rank_zero_info", told.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProgressWarning)
        found = quantized(tmp_path)
    assert [text for text in told if "progress of another run" in text] == told != []
    assert same_state(found, whole)
    assert pieces(tmp_path) == theirs


def forwarded(module: Any, batch: Any) -> Any:
    return module(batch[0])


def by_functions() -> dict[str, Any]:
    """Options with functions that are new objects at each call."""
    return {"measure": "kl", "step": forwarded, "output": lambda logits: logits[:, :2]}


@pytest.mark.parametrize("options", [lambda: {"measure": "kl"}, lambda: {"measure": "fisher"}, by_functions])
def test_nothing_is_done_twice(tmp_path, monkeypatch, options):
    whole = quantized(tmp_path / "whole", **options())
    cut_off(tmp_path, monkeypatch, **options())
    with monkeypatch.context() as patch:
        patch.setattr("lightning_ptq.tuning.run.reconstruct_unit", lambda *args: 1 / 0)
        patch.setattr("lightning_ptq.allocation.sensitivity._Sweep._rise", lambda *args: 1 / 0)
        patch.setattr("lightning_ptq.allocation.sensitivity.fisher_rises", lambda *args: 1 / 0)
        assert same_state(quantized(tmp_path, **options()), whole)


def test_a_piece_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path / "new", "fingerprint")
    states = {"a.b": {"scale": torch.rand(3, 1), "zero_point": torch.tensor(3, dtype=torch.int32)}, "": {}}
    assert journal.read("unit") is None
    assert journal.keys() == set()
    journal.write("unit", JournalEntry(states, {"row": [1, 2.5, None]}))
    found = journal.read("unit")
    assert found.facts == {"row": [1, 2.5, None]}
    assert {n: {k: v.tolist() for k, v in s.items()} for n, s in found.states.items()} == {
        "a.b": {k: v.tolist() for k, v in states["a.b"].items()}
    }
    assert journal.keys() == {"unit"}
    assert journal.inner("table").read("unit") is None
    assert Journal(tmp_path / "new", "another").keys() == set()
    journal.remove()
    assert journal.keys() == set()


def test_a_piece_of_other_work_under_our_name_is_refused(tmp_path):
    journal = Journal(tmp_path, "f" * 64)
    journal.write("unit", JournalEntry(facts={"of": "unit"}))
    (own,) = journal.files()
    other = Journal(tmp_path, "f" * 63 + "e")  # its file has the same name
    with pytest.warns(ProgressWarning, match=f"{own} cannot be used .it was saved by another run or for other work"):
        assert other.read("unit") is None
    with pytest.warns(ProgressWarning, match=str(own)):
        assert other.keys() == set()
    journal.write("another", JournalEntry(facts={"of": "another"}))
    (copied,) = set(journal.files()) - {own}
    copied.write_bytes(own.read_bytes())
    with pytest.warns(ProgressWarning, match=str(copied)):
        assert journal.read("another") is None
    with pytest.warns(ProgressWarning, match=str(copied)):
        assert journal.keys() == {"unit"}
    assert journal.read("unit").facts == {"of": "unit"}


def test_progress_of_a_stage_that_begins_elsewhere_is_refused(tmp_path, monkeypatch):
    """What the stages before made of the module may depend on a file, or on the time that a solver had."""
    cut_off(tmp_path, monkeypatch)
    own = BitAllocator.work

    def spoil(self: Any, trainer: Any, calibration: Any, journal: Any) -> Any:
        result = own(self, trainer, calibration, journal)
        with torch.no_grad():
            calibration.layers["net.9"].bias.add_(0.5)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(BitAllocator, "work", spoil)
        expected = quantized(tmp_path / "elsewhere")
        with pytest.warns(ProgressWarning, match="saved by another run or for other work"):
            assert same_state(quantized(tmp_path), expected)


def test_settings_are_told_by_what_a_function_does():
    blocks = [AdaQuantLayerwise(blocks=rule) for rule in (lambda n, m: n.lower(), lambda n, m: n.upper())]
    again = AdaQuantLayerwise(blocks=lambda n, m: n.lower())
    assert settings(blocks[0]) == settings(again) != settings(blocks[1])
    assert settings(AdaQuantLayerwise(steps=3)) != settings(AdaQuantLayerwise(steps=4))
