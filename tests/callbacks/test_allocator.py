from __future__ import annotations

import pytest
import torch
from helpers import IMAGES, Snapshot, classifier, loader, same_state, state, trainer

from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    Candidates,
    PTQReport,
    ReconstructionConfig,
    adaquant,
    apply_allocation,
    bops_cost,
    calibrate,
    load_packed,
    prepare,
    save_packed,
    search_allocation,
    size_cost,
)
from lightning_ptq.errors import AllocationError, QConfigError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")

CANDIDATES = ["w8a8", "w4a4", "w2a4"]
SHORT = {"steps": 6, "batch_size": 8}


def costs(calibration):
    choices = Candidates(calibration, CANDIDATES)
    return [size_cost(calibration, choices), bops_cost(calibration, choices)]


def test_the_callback_does_what_the_functions_do_between_two_tunings(pl, tmp_path):
    module = classifier(pl)
    allocator = BitAllocator(size=0.25)
    tuners = [AdaQuantLayerwise("parallel", candidates=CANDIDATES, **SHORT), AdaQuantLayerwise(**SHORT)]
    callbacks = [CalibrationCapture("w4a4"), tuners[0], allocator, tuners[1]]
    trainer(pl, tmp_path, *callbacks).fit(module, loader())

    net = classifier(pl)
    calibration = calibrate(net, IMAGES.split(8), "w4a4")
    config = ReconstructionConfig(**SHORT)
    states = adaquant(calibration, mode="parallel", candidates=CANDIDATES, config=config).states
    found = search_allocation(
        calibration, CANDIDATES, costs(calibration), {"size": 0.25}, states=states,
        measuring={"measure": "fisher"},
    )  # fmt: skip
    apply_allocation(calibration, found.allocation, states)
    adaquant(calibration, config=config)
    assert allocator.result.allocation.choice == found.allocation.choice
    assert allocator.result.measured == pytest.approx(found.measured)
    assert same_state(state(module), state(net))


def test_the_light_way_needs_no_tuning_and_the_widths_survive(pl, tmp_path):
    module = classifier(pl)
    allocator = BitAllocator(size=0.3, candidates=CANDIDATES, measure="loss", rounds=1)
    capture = CalibrationCapture("w8a8", first_last_bits=None)
    run = trainer(pl, tmp_path, capture, allocator)
    run.fit(module, loader())
    choice = allocator.result.allocation.choice
    assert len(set(choice.values())) > 1
    quantized = {name: layer for name, layer in module.named_modules() if name in choice}
    assert {name: str(layer.qconfig) for name, layer in quantized.items()} == choice
    module.eval()
    expected = module(IMAGES)

    run.save_checkpoint(tmp_path / "quantized.ckpt")
    fresh = classifier(pl)
    prepare(fresh, "w8a8")
    fresh.load_state_dict(torch.load(tmp_path / "quantized.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(fresh.eval()(IMAGES), expected)
    save_packed(module, tmp_path / "packed.safetensors")
    assert torch.equal(load_packed(classifier(pl), tmp_path / "packed.safetensors").eval()(IMAGES), expected)


def test_an_impossible_budget_leaves_the_float_module(pl, tmp_path):
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(
        AllocationError, match=r"budget of .* for size is below the least cost of the candidates. Reachable: size from"
    ):
        trainer(pl, tmp_path, CalibrationCapture(), BitAllocator(size=0.01)).fit(module, loader())
    before.assert_unchanged()


def test_other_budgets_ties_and_pins(pl, tmp_path):
    names = list(calibrate(classifier(pl), IMAGES.split(8), "w8a8").layers)
    table = {name: {"w8a8": 4.0, "w4a4": 2.0, "w2a4": 1.0} for name in names}
    allocator = BitAllocator(
        table=table, limit=2.0 * len(names), bops=0.03, candidates=CANDIDATES, pins={names[1]: "w4a4"}, ties=names[:1],
        rounds=1,
    )  # fmt: skip
    trainer(pl, tmp_path, CalibrationCapture("w8a8", first_last_bits=None), allocator).fit(classifier(pl), loader())
    found = allocator.result.allocation
    assert found.choice[names[1]] == "w4a4"
    assert found.costs["table"] <= 2.0 * len(names)
    assert found.costs["bops"] <= found.limits["bops"]
    report = PTQReport("net")
    allocator.record(report)
    assert report.frontier.cost == "bops"
    assert len(report.frontier.points) > 1
    assert all(point.allocation.costs["table"] <= 2.0 * len(names) for point in report.frontier.points)
    assert all(point.allocation.choice[names[1]] == "w4a4" for point in report.frontier.points)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({}, AllocationError, "needs a budget or an accepted drop. Write for example"),
    ({"table": {}}, AllocationError, "table and limit go together"),
    ({"size": 0.2, "measure": "top1"}, QConfigError, "measure must be one of.*got 'top1'"),
    ({"size": 0.2, "candidates": ["w44"]}, QConfigError, "from 2 to 8, got 44"),
])  # fmt: skip
def test_arguments_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        BitAllocator(**options)
