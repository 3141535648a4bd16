from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, SmallNet, Snapshot, Transformer, build, same_state, seeded, sharp, state, token_batches
from torch import nn

from lightning_ptq import (
    QConfig,
    ReconstructionConfig,
    SensitivityTable,
    adaquant,
    apply_allocation,
    calibrate,
    measure_choice,
    measure_sensitivity,
)
from lightning_ptq.errors import CalibrationError, QConfigError, SensitivityError
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.op import ops_in_mode

CANDIDATES = ["w8a8", "w4a8", "w2a4"]
IMAGES = list(seeded(1, 40, 2, 6, 6).split(16))  # the last batch is smaller


class Skip(nn.Module):
    """The first layer's output reaches the result past all others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(F.relu(y))


NETS = {
    "resnet": (ResNet, IMAGES),
    "transformer": (Transformer, token_batches()),
    "skip": (Skip, list(seeded(2, 40, 6).split(16))),
}


def calibration_of(name="resnet", **options):
    make, batches = NETS[name]
    return calibrate(sharp(make), batches, QConfig.parse("w8a8", **{"first_last_bits": None, **options}))


def distances(calibration, measure):
    """The measure in the module's present state for each sample, by batch, from full forwards."""
    found = []
    for batch in range(len(calibration.batches)):
        with ops_in_mode(calibration.module, "float"):
            target = calibration.run(batch).double()
        output = calibration.run(batch).double()
        if measure == "mse":
            found.append((output - target).square().flatten(1).mean(1))
        else:
            p, q = target.log_softmax(-1), output.log_softmax(-1)
            found.append((p.exp() * (p - q)).sum(-1).reshape(len(output), -1).mean(1))
    return found


def kl(calibration):
    """The divergence in the module's present state, over all samples at once."""
    return torch.cat(distances(calibration, "kl")).mean().item()


def mse(calibration):
    """The squared difference in the module's present state, over all samples at once."""
    return torch.cat(distances(calibration, "mse")).mean().item()


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
@pytest.mark.parametrize("name", NETS)
def test_rises_are_those_of_full_forwards_and_the_module_stays(name):
    calibration = calibration_of(name)
    before = state(calibration.module)
    table = measure_sensitivity(calibration, CANDIDATES)
    assert same_state(state(calibration.module), before)
    assert list(table.rises) == list(calibration.layers)
    assert table.base == dict.fromkeys(calibration.layers, "w8a8")
    assert table.base_value == pytest.approx(kl(calibration), rel=1e-4, abs=1e-9)
    for layer, row in table.rises.items():
        assert row["w8a8"] == 0.0
        for candidate in CANDIDATES[1:]:
            apply_allocation(calibration, {**table.base, layer: candidate})
            expected = kl(calibration) - table.base_value
            assert row[candidate] == pytest.approx(expected, rel=1e-3, abs=2e-8), (layer, candidate)


def test_the_base_may_be_an_allocation():
    calibration = calibration_of()
    base = {**dict.fromkeys(calibration.layers, "w4a8"), "head": "w2a4"}
    table = measure_sensitivity(calibration, CANDIDATES, base=base)
    assert table.base == base
    assert all(table.rises[layer][candidate] == 0.0 for layer, candidate in base.items())
    assert table.base_value == pytest.approx(measure_choice(calibration, base))
    narrower = {**base, "stem": "w2a4"}
    assert table.predict(narrower) == pytest.approx(measure_choice(calibration, narrower), rel=1e-4)
    assert measure_sensitivity(calibration, CANDIDATES, base="w4a8").base == dict.fromkeys(base, "w4a8")


def test_blocks_before_the_lowered_layer_do_not_run_again(monkeypatch):
    calibration = calibration_of()
    stem, runs, own = calibration.layers["stem"], [], QuantLayer.forward
    monkeypatch.setattr(QuantLayer, "forward", lambda layer, *a, **k: runs.append(layer is stem) or own(layer, *a, **k))
    measure_sensitivity(calibration, CANDIDATES)
    float_base_own_outputs, lowered = 3 * 3, 2 * 3
    checks = 2 + len(["blocks.0", "blocks.1", "head"]) + len(["blocks.0", "blocks.1"])  # on one batch
    plan = 2  # the limit and the plan
    assert sum(runs) == float_base_own_outputs + lowered + checks + plan


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
@pytest.mark.parametrize("name", NETS)
def test_a_small_disk_means_computing_again_with_the_same_rises(name, monkeypatch):
    expected = measure_sensitivity(calibration_of(name), CANDIDATES)
    for room in ("lightning_ptq.activations.memory_plan.disk_room", "lightning_ptq.activations.store.disk_room"):
        monkeypatch.setattr(room, lambda *_: 0)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_ptq.allocation.sensitivity.keep_outputs", lambda *_, **__: True)
        with pytest.raises(CalibrationError, match="fit neither into memory_limit"):
            measure_sensitivity(calibration_of(name), CANDIDATES, memory_limit=0)
    found = measure_sensitivity(calibration_of(name), CANDIDATES, memory_limit=0)
    assert (found.base_value, found.rises) == (expected.base_value, expected.rises)


def test_first_last_and_overridden_layers_keep_to_the_config():
    calibration = calibration_of(first_last_bits=8, overrides={"blocks.0.conv1": "w4a8"})
    table = measure_sensitivity(calibration, CANDIDATES)
    assert table.rises["stem"] == table.rises["head"] == {"w8a8": 0.0}
    assert table.rises["blocks.0.conv1"] == {"w4a8": 0.0}
    assert list(table.rises["blocks.0.conv2"]) == CANDIDATES


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_tuned_states_are_used():
    calibration = calibration_of()
    config = ReconstructionConfig(steps=30, batch_size=16, weight_lr=0.05, drop=0.0)
    states = adaquant(calibration, mode="parallel", candidates=CANDIDATES, config=config).states
    plain = measure_sensitivity(calibration, CANDIDATES, measure="mse")
    tuned = measure_sensitivity(calibration, CANDIDATES, measure="mse", states=states)
    assert sum(row["w2a4"] for row in tuned.rises.values()) < 0.9 * sum(row["w2a4"] for row in plain.rises.values())
    for table, used in ((plain, None), (tuned, states)):
        for layer, row in table.rises.items():
            apply_allocation(calibration, {**table.base, layer: "w2a4"}, used)
            assert table.base_value + row["w2a4"] == pytest.approx(mse(calibration), rel=1e-4), layer
    apply_allocation(calibration, dict.fromkeys(calibration.layers, "w2a4"), states)
    for name, layer in calibration.layers.items():
        found = {key: value for key, value in state(layer).items() if key != "qconfig_json"}
        assert same_state(found, states["w2a4"][name])


def labelled(module, batch):
    images, labels = batch
    return {"loss": F.cross_entropy(module(images), labels)}


def test_the_loss_is_the_modules_own():
    batches = [(x, torch.arange(len(x)) % 4) for x in IMAGES]
    calibration = calibrate(sharp(ResNet), batches, QConfig.parse("w8a8", first_last_bits=None), forward=labelled)
    table = measure_sensitivity(calibration, CANDIDATES, measure="loss")
    choice = {**table.base, "blocks.1.conv2": "w2a4"}
    apply_allocation(calibration, choice)
    losses = [calibration.run(batch)["loss"].item() * len(x) for batch, x in enumerate(IMAGES)]
    assert table.predict(choice) == pytest.approx(sum(losses) / 40, rel=1e-5)
    # The network's output is read although the forward returns the loss.
    assert measure_sensitivity(calibration, CANDIDATES).rises == measure_sensitivity(calibration_of(), CANDIDATES).rises


def test_standard_errors_are_those_of_the_mean_over_the_batches():
    calibration = calibrate(sharp(ResNet), list(seeded(3, 80, 2, 6, 6).split(20)), "w8a8")
    table = measure_sensitivity(calibration, ["w8a8", "w2a4"])
    inner = [layer for layer, row in table.rises.items() if "w2a4" in row]
    assert inner == ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
    apply_allocation(calibration, table.base)
    before = torch.stack(distances(calibration, "kl")).mean(1)
    for layer in inner:
        apply_allocation(calibration, {**table.base, layer: "w2a4"})
        rises = torch.stack(distances(calibration, "kl")).mean(1) - before
        assert table.errors[layer]["w2a4"] == pytest.approx(rises.std().item() / 4**0.5, rel=1e-3), layer
    calibration = calibrate(sharp(ResNet), IMAGES[:1], "w8a8")
    assert math.isnan(measure_sensitivity(calibration, ["w8a8", "w2a4"]).errors["blocks.0.conv1"]["w2a4"])


def test_a_table_is_saved_and_read(tmp_path):
    table = measure_sensitivity(calibration_of(), CANDIDATES)
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == table
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SensitivityError, match=r"other.json is not a sensitivity table"):
        SensitivityTable.load(tmp_path / "other.json")


def broken(module, batch):
    return {"loss": module(batch).sum() * (math.nan if broken.on else 1.0)}


class Answers(SmallNet):
    """Returns a dictionary of two tensors."""

    def forward(self, x):
        return {"scores": super().forward(x), "again": x}


def test_invalid_input_is_refused_and_leaves_the_module_unchanged():
    calibration = calibration_of()
    before = state(calibration.module)
    cases = [
        (
            {"candidates": ["w4a8"], "base": "w8a8"},
            QConfigError,
            r"base 'w8a8' of layer 'stem' is not one of.*\['w4a8'\]",
        ),
        ({"candidates": []}, QConfigError, r"must be a list of bit widths, got \[\]"),
        ({"candidates": ["w9"]}, QConfigError, "bits"),
        ({"candidates": CANDIDATES, "measure": "top1"}, QConfigError, "measure must be one of.*got 'top1'"),
        (
            {"candidates": CANDIDATES, "measure": "loss"},
            SensitivityError,
            "returns its loss, got one that returns a Tensor.*step='training'",
        ),
        ({"candidates": CANDIDATES, "output": "logits"}, SensitivityError, "output has no 'logits'. It is a Tensor"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            measure_sensitivity(calibration, **options)
        assert same_state(state(calibration.module), before)


def test_a_loss_that_is_nan_is_named():
    broken.on = False
    calibration = calibrate(sharp(ResNet), IMAGES, "w8a8", forward=broken)
    before = state(calibration.module)
    broken.on = True
    with pytest.raises(SensitivityError, match="the loss with the base is nan on calibration batch 0"):
        measure_sensitivity(calibration, CANDIDATES, measure="loss")
    assert same_state(state(calibration.module), before)


def test_of_several_outputs_one_is_chosen():
    net = build(Answers).eval()
    calibration = calibrate(net, [seeded(5, 8, 1, 5, 5), seeded(6, 8, 1, 5, 5)], "w8a8")
    with pytest.raises(SensitivityError, match=r"keys \['scores', 'again'\].*Set output="):
        measure_sensitivity(calibration, CANDIDATES)
    by_key = measure_sensitivity(calibration, CANDIDATES, output="scores")
    by_function = measure_sensitivity(calibration, CANDIDATES, output=lambda found: found["scores"])
    assert by_key.rises == by_function.rises


def test_the_float_net_comes_back_after_all():
    net = build(ResNet).train()
    before = Snapshot(net)
    calibration = calibrate(net, IMAGES, "w8a8")
    measure_sensitivity(calibration, CANDIDATES)
    measure_sensitivity(calibration, CANDIDATES, measure="fisher")
    calibration.prepared.undo()
    before.assert_unchanged()


@pytest.mark.parametrize("measure", ["kl", "fisher"])
def test_an_output_of_one_value_is_no_logits(measure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    calibration = calibrate(net, [torch.randn(16, 4)] * 2, "w8a8")
    with pytest.raises(SensitivityError, match=r"shape \(16, 1\).*measure='mse'"):
        measure_sensitivity(calibration, ["w8a8", "w4a4"], measure=measure)
    table = measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="mse")
    apply_allocation(calibration, {**table.base, "2": "w4a4"})
    assert table.predict({**table.base, "2": "w4a4"}) == pytest.approx(mse(calibration), rel=1e-4)
