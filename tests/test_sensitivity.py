from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, SmallNet, Snapshot, Transformer, build, same_state, seeded, state, token_batches
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


def sharp(make):
    """A net whose logits are far enough apart for divergences well above rounding."""
    net = build(make).eval()
    with torch.no_grad():
        list(net.parameters())[-2].mul_(20)
    return net


def calibration_of(name="resnet", **options):
    make, batches = NETS[name]
    return calibrate(sharp(make), batches, QConfig.parse("w8a8", **{"first_last_bits": None, **options}))


def kl(calibration):
    """The divergence of the module as it is, from full forwards over all samples at once."""
    total, samples = 0.0, 0
    for batch in range(len(calibration.batches)):
        with ops_in_mode(calibration.module, "float"):
            target = calibration.run(batch)
        output = calibration.run(batch)
        classes = -1
        p, q = target.double().log_softmax(classes), output.double().log_softmax(classes)
        each = (p.exp() * (p - q)).sum(classes).flatten(1) if output.dim() > 2 else (p.exp() * (p - q)).sum(1)
        total += each.reshape(len(output), -1).mean(1).double().sum().item()
        samples += len(output)
    return total / samples


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
    plan = 1
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
    apply_allocation(calibration, dict.fromkeys(calibration.layers, "w2a4"), states)
    for name, layer in calibration.layers.items():
        found = {key: value for key, value in state(layer).items() if key != "qconfig_json"}
        assert same_state(found, states["w2a4"][name])


def test_fisher_is_close_to_the_divergence():
    net = sharp(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)))
    calibration = calibrate(net, [seeded(seed, 512, 8) for seed in range(4)], QConfig.parse("w8", first_last_bits=None))
    exact, estimate = (measure_sensitivity(calibration, ["w8", "w3", "w2"], measure=m) for m in ("kl", "fisher"))
    for layer, row in estimate.rises.items():
        assert row["w8"] == 0.0
        for candidate in ("w3", "w2"):
            assert row[candidate] == pytest.approx(exact.rises[layer][candidate], rel=0.5), (layer, candidate)


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
    assert measure_sensitivity(calibration, CANDIDATES).rises["head"]["w2a4"] > 0  # the outputs are found behind it


def test_standard_errors_shrink_with_the_samples():
    calibration = calibrate(sharp(ResNet), list(seeded(3, 640, 2, 6, 6).split(20)), "w8a8")
    many = measure_sensitivity(calibration, ["w8a8", "w2a4"])
    calibration = calibrate(sharp(ResNet), list(seeded(3, 80, 2, 6, 6).split(20)), "w8a8")
    few = measure_sensitivity(calibration, ["w8a8", "w2a4"])
    ratios = [few.errors[n]["w2a4"] / many.errors[n]["w2a4"] for n, row in few.rises.items() if "w2a4" in row]
    assert 1.5 < sum(ratios) / len(ratios) < 5  # the root of 8 in the mean
    calibration = calibrate(sharp(ResNet), IMAGES[:1], "w8a8")
    assert math.isnan(measure_sensitivity(calibration, ["w8a8", "w2a4"]).errors["blocks.0.conv1"]["w2a4"])


def test_a_table_is_saved_and_read(tmp_path):
    table = measure_sensitivity(calibration_of(), CANDIDATES)
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == table
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SensitivityError, match=r"other.json holds no sensitivity table"):
        SensitivityTable.load(tmp_path / "other.json")


def broken(module, batch):
    return {"loss": module(batch).sum() * (math.nan if broken.on else 1.0)}


class Answers(SmallNet):
    """Puts out a dictionary of two tensors."""

    def forward(self, x):
        return {"logits": super().forward(x), "again": x}


def test_bad_input_is_told_and_leaves_the_module_as_it_was():
    calibration = calibration_of()
    before = state(calibration.module)
    cases = [
        ({"candidates": ["w4a8"], "base": "w8a8"}, QConfigError, r"base 'w8a8' of layer 'stem' is none of.*\['w4a8'\]"),
        ({"candidates": []}, QConfigError, r"must be a list of bit widths, got \[\]"),
        ({"candidates": ["w9"]}, QConfigError, "bits"),
        ({"candidates": CANDIDATES, "measure": "top1"}, QConfigError, "measure must be one of.*got 'top1'"),
        ({"candidates": CANDIDATES, "measure": "loss"}, SensitivityError, "returns its loss.*step='training'"),
        ({"candidates": CANDIDATES, "output": "logits"}, SensitivityError, "output has no 'logits'. It is a Tensor"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            measure_sensitivity(calibration, **options)
        assert same_state(state(calibration.module), before)


@pytest.mark.parametrize(("tail", "forward", "message"), [
    ([], lambda module, batch: torch.no_grad()(module)(batch), "outputs carry no gradients"),
    ([nn.Linear(4, 1), nn.Flatten(0)], lambda module, batch: module(batch), r"shape \(16,\), so there are no logits"),
])  # fmt: skip
def test_fisher_needs_logits_with_gradients(tail, forward, message):
    calibration = calibrate(nn.Sequential(nn.Linear(6, 4), *tail), [seeded(1, 16, 6)], "w8a8", forward=forward)
    with pytest.raises(SensitivityError, match=message):
        measure_sensitivity(calibration, CANDIDATES, measure="fisher")


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
    with pytest.raises(SensitivityError, match=r"keys \['logits', 'again'\].*Write output="):
        measure_sensitivity(calibration, CANDIDATES)
    by_key = measure_sensitivity(calibration, CANDIDATES, output="logits")
    by_function = measure_sensitivity(calibration, CANDIDATES, output=lambda found: found["logits"])
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
    assert measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="mse").rises["2"]["w4a4"] > 0
