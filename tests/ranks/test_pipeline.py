from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import IMAGES, LABELS, ResNet, build, classifier, same_state, seeded, state, trainer
from ranks.processes import run
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, StatsTuning, calibrate
from lightning_ptq.calibration.batches import Batches
from lightning_ptq.errors import PTQWarning
from lightning_ptq.runtime.ranks import current_ranks
from lightning_ptq.tuning.solved_states import solved_states

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


def quantized(package: str, root: Any, callbacks: Any, world: int, nodes: int = 1) -> Any:
    pl = pytest.importorskip(package)
    module = classifier(pl)
    loader = DataLoader(TensorDataset(IMAGES[:SAMPLES], LABELS[:SAMPLES]), 8)
    found = callbacks()
    several = {"strategy": "ddp", "devices": world // nodes, "num_nodes": nodes} if world > 1 else {}
    trainer(pl, root, *found, **several).fit(module, loader)
    allocations = [c.result.allocation.choice for c in found if isinstance(c, BitAllocator)]
    return state(module), allocations


@pytest.mark.parametrize(("package", "worlds"), [("pytorch_lightning", (2, 3)), ("lightning.pytorch", (2,))])
def test_any_number_of_ranks_ends_with_the_same_bytes(tmp_path, package, worlds):
    alone, allocation = run(1, quantized, package, tmp_path, advanced, 1)[0]
    for world in worlds:
        for found, allocated in run(world, quantized, package, tmp_path, advanced, world):
            assert allocated == allocation
            assert same_state(found, alone)


def test_two_nodes_end_with_the_same_bytes(tmp_path):
    alone, _ = run(1, quantized, "pytorch_lightning", tmp_path, advanced, 1)[0]
    for found, _ in run(2, quantized, "pytorch_lightning", tmp_path, advanced, 2, 2, nodes=True):
        assert same_state(found, alone)


def warned(root: Any) -> Any:
    capture = CalibrationCapture("w4a4", num_samples=1000)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quantized("pytorch_lightning", root, lambda: [capture], 2)
    assert capture.report is not None
    ours = [str(warning.message) for warning in heard if issubclass(warning.category, PTQWarning)]
    return [str(note) for note in capture.report.warnings], ours


def test_what_all_ranks_warn_of_alike_is_shown_once_and_noted_by_all(tmp_path):
    (noted, shown), (also_noted, shown_too) = run(2, warned, tmp_path)
    assert noted == also_noted == shown
    assert "37 samples, 1000 were asked" in shown[0]
    assert shown_too == []


def dealt(world: int) -> Any:
    """The calibration set as a rank has it, and which of it lies in files."""
    images = seeded(0, SAMPLES, 2, 6, 6)
    if world > 1:
        dist.init_process_group("gloo")
    ranks = current_ranks()
    own = images[ranks.rank :: world]
    batches = calibrate(build(ResNet).eval(), own.split(8), "w4a4", ranks=ranks).batches
    found = list(batches), [int(path.stem) for path in batches.files()], batches.files()[:1]
    batches.clear()
    return *found[:2], [path.parent.exists() for path in found[2]]


def test_each_rank_has_all_batches_and_those_of_others_in_files():
    whole, filed, _ = run(1, dealt, 1)[0]
    assert filed == []
    for rank, (batches, filed, left) in enumerate(run(2, dealt, 2)):
        assert len(batches) == len(whole) == 5
        assert all(torch.equal(a, b) for a, b in zip(batches, whole, strict=True))
        assert filed == [index for index in range(5) if index % 2 != rank]
        assert left == [False]


def solved(world: int) -> Any:
    """The states in closed form, and the names of the layers that a rank has solved."""
    images = seeded(0, 64, 2, 6, 6)
    if world > 1:
        dist.init_process_group("gloo")
    ranks, names = current_ranks(), []
    calibration = calibrate(build(ResNet).eval(), images[ranks.rank :: world].split(8), "w8a8", ranks=ranks)
    states = solved_states(calibration, CANDIDATES, lambda done, total, text: names.append(text))
    return states, set(names[:-1])


def test_ranks_share_the_layers_that_are_solved():
    alone, names = run(1, solved, 1)[0]
    (first, some), (second, others) = run(2, solved, 2)
    assert some | others == names
    assert not some & others
    assert alone.keys() == {"w4a4", "w2a4"}
    for candidate, states in alone.items():
        for found in (first, second):
            assert found[candidate].keys() == states.keys()
            assert all(same_state(found[candidate][name], states[name]) for name in states)


def test_batches_stay_in_memory_where_the_disk_has_no_room(monkeypatch):
    monkeypatch.setattr("lightning_ptq.calibration.batches.disk_room", lambda: 100)
    batches, large = Batches(), torch.zeros(100)
    for batch in ({"ids": [1, 2]}, large):
        batches.append_to_disk(batch)
    assert [path.name for path in batches.files()] == ["0.pickle"]
    assert pickle.loads(batches.files()[0].read_bytes()) == batches[0] == {"ids": [1, 2]}
    assert batches[1] is large
    assert batches[-1:] == [large]
    batches.clear()
