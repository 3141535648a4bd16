from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import IMAGES, LABELS, classifier, same_state, state, trainer
from ranks.processes import run
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.errors import PTQWarning, RepeatedSamplesWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Stream(IterableDataset[Any]):
    """Images one by one: the whole set, or with ``sharded`` those of the rank only."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        assert get_worker_info() is None
        start, step = 0, 1
        if self.kind != "whole" and torch.distributed.is_initialized():
            start, step = torch.distributed.get_rank(), 2
        yield from zip(IMAGES[start::step], LABELS[start::step], strict=True)


def streamed(root: Any, world: int, kind: str, num_samples: int | None) -> Any:
    import pytorch_lightning as pl

    module = classifier(pl)
    capture = CalibrationCapture("w4a4", num_samples=num_samples)
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer(pl, root, capture, AdaQuantLayerwise(steps=3, batch_size=8), **several).fit(
            module, DataLoader(Stream(kind), 8)
        )
    assert capture.report is not None
    notes = [str(n) for n in capture.report.warnings if isinstance(n, RepeatedSamplesWarning)]
    assert all(isinstance(note, PTQWarning) for note in capture.report.warnings)
    return state(module), capture.report.samples, notes


@pytest.mark.parametrize(("num_samples", "counted"), [(None, 40), (20, 24)])
def test_a_stream_that_is_not_sharded_counts_once(tmp_path, num_samples, counted):
    alone, samples, notes = run(1, streamed, tmp_path, 1, "whole", num_samples)[0]
    assert (samples, notes) == (counted, [])
    for found, samples, notes in run(2, streamed, tmp_path, 2, "whole", num_samples):
        assert samples == counted
        assert notes == [f"all 2 ranks were given the same {counted} calibration samples, so these count once."]
        assert same_state(found, alone)


def test_a_stream_that_is_sharded_is_no_repeat(tmp_path):
    alone, _, _ = run(1, streamed, tmp_path, 1, "sharded", None)[0]
    for found, samples, notes in run(2, streamed, tmp_path, 2, "sharded", None):
        assert (samples, notes) == (40, [])
        assert same_state(found, alone)
