from __future__ import annotations

from typing import Any

import pytest
from helpers import IMAGES, LABELS, classifier, same_state, state, trainer
from ranks.processes import run
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, StatsTuning

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

CANDIDATES = ["w8a8", "w4a4", "w2a4"]
SAMPLES = 37  # odd, so that the sampler fills up with a repeat


def advanced() -> list[Any]:
    return [
        CalibrationCapture("w8a8"),
        AdaQuantLayerwise("parallel", candidates=CANDIDATES, steps=4, batch_size=8),
        BitAllocator(0.3, rounds=2),
        AdaQuantLayerwise(steps=12, batch_size=8),
        StatsTuning(steps=4),
    ]


def quantized(package: str, root: Any, callbacks: Any, world: int, batch_size: int = 8, **options: Any) -> Any:
    pl = pytest.importorskip(package)
    module = classifier(pl)
    loader = DataLoader(TensorDataset(IMAGES[:SAMPLES], LABELS[:SAMPLES]), batch_size)
    found = callbacks()
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    run = trainer(pl, root, *found, **several, **options)
    run.fit(module, loader)
    allocations = [c.result.allocation.choice for c in found if isinstance(c, BitAllocator)]
    return state(module), allocations


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_any_number_of_ranks_ends_with_the_same_bytes(tmp_path, package):
    alone, allocation = run(1, quantized, package, tmp_path, advanced, 1)[0]
    for world in (2, 3):
        for found, allocated in run(world, quantized, package, tmp_path, advanced, world):
            assert allocated == allocation
            assert same_state(found, alone)
