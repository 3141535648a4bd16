"""Validation before and after a run, and an accepted drop of its metric, on several processes."""

from __future__ import annotations

from typing import Any

import pytest
from callbacks.test_validation import SHORT, scoring
from helpers import IMAGES, LABELS, classifier, same_state, state, trainer
from ranks.processes import run
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist"),
]


def with_rank(base: Any) -> Any:
    """A class whose validation logs its rank, without a reduction."""

    class Ranked(scoring(base)):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("rank", float(self.global_rank), sync_dist=False)

    return Ranked


def searched(root: Any, world: int) -> Any:
    import pytorch_lightning as pl

    module = classifier(pl, with_rank)
    capture, allocator = CalibrationCapture("w8a8"), BitAllocator(monitor="val_loss", max_drop=0.01, mode="min")
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 8)
    # The loss of the last batch, so that the ranks log different values.
    trainer(pl, root, capture, allocator, AdaQuantLayerwise(**SHORT), **several).fit(module, loader, loader)
    assert capture.report is not None
    assert allocator.result is not None
    trials = [(trial.costs["size"], trial.value, trial.drop, trial.error) for trial in capture.report.trials]
    metrics = [(change.name, change.before, change.after) for change in capture.report.metrics]
    return state(module), allocator.result.allocation.choice, trials, metrics


def test_all_ranks_decide_alike(tmp_path):
    first, second = run(2, searched, tmp_path, 2)
    assert same_state(first[0], second[0])
    assert first[1:] == second[1:]
    assert first[2]
    assert {name for name, _, _ in first[3]} == {"val_acc", "val_loss", "rank"}
    assert ("rank", 0.5, 0.5) in first[3]
