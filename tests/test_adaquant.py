from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ResNet,
    Snapshot,
    Transformer,
    build,
    relative_error,
    rng_state,
    same_state,
    seeded,
    state,
    token_batches,
)
from torch import nn

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.errors import QConfigError, RolledBackWarning
from lightning_ptq.network.layers import QuantLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]

IMAGES = [
    F.relu(seeded(i, 32, 3) @ seeded(9, 3, 72) + 0.3 * seeded(10 + i, 32, 72)).view(32, 2, 6, 6) for i in range(3)
]
TOKENS = token_batches(3, 32)
NETS = {"resnet": (ResNet, IMAGES), "transformer": (Transformer, TOKENS)}
CONFIG = ReconstructionConfig(steps=20, batch_size=16, weight_lr=0.05, drop=0.0, tolerance=0.0, held_out=0.25)
MODES = [("sequential", "layer"), ("sequential", "block"), ("parallel", "layer"), ("parallel", "block")]


def calibration_of(name="resnet", bits="w3a8", **options):
    make, batches = NETS[name]
    return calibrate(build(make).eval(), batches, QConfig.parse(bits, first_last_bits=None, **options))


def summary(result):
    """The rows of a result without the times."""
    return [(row.name, row.bits, row.error_before, row.error_after, row.accepted, row.curve) for row in result.units]


def output_error(calibration, name):
    """Of the outputs before the head, whose bias would hide much of it, on samples that were not calibrated on."""
    make, batches = NETS[name]
    fresh = token_batches(6, 32)[3:] if name == "transformer" else [batch.flip(-1) for batch in batches]
    net = build(make).eval()
    spread = []
    for module in (net, calibration.module):
        head, module.head = module.head, nn.Identity()
        with torch.no_grad():
            out = [module(**batch) if isinstance(batch, dict) else module(batch) for batch in fresh]
        module.head = head
        spread.append(torch.cat(out))
    return relative_error(spread[1], spread[0])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("mode", "granularity"), MODES)
def test_outputs_come_closer_to_the_float_net(name, mode, granularity):
    # Embeddings are rounded and not tuned: at 3 bits their error would hide what tuning does elsewhere.
    calibration = calibration_of(name, overrides={"embed": "w8"} if name == "transformer" else {})
    before = output_error(calibration, name)
    result = adaquant(calibration, mode=mode, granularity=granularity, config=CONFIG)
    assert output_error(calibration, name) < 0.95 * before
    blocks = {"resnet": ["stem", "blocks.0", "blocks.1", "head"], "transformer": ["layers.0", "layers.1", "head"]}
    layers = [layer for layer in calibration.layers if layer != "embed"]
    if name == "transformer":
        products = [f"layers.{i}.attention.attention_1_{part}" for i in (0, 1) for part in ("scores", "values")]
        assert {"embed", *products} < {*calibration.layers}
    names = layers if granularity == "layer" else blocks[name]
    assert [row.name for row in result.units] == names
    assert all(row.accepted == (row.error_after < row.error_before) for row in result.units)
    assert sum(row.accepted for row in result.units) >= 2
    assert (result.states == {}) == (mode == "sequential")
    assert result.peak_activation_bytes > 0


def test_sequential_units_see_the_quantized_net_before_them_and_parallel_ones_the_float_net():
    results = [
        adaquant(calibration_of(bits="w2a8"), mode=mode, granularity="layer", config=CONFIG)
        for mode in ("sequential", "parallel")
    ]
    errors = [[row.error_before for row in result.units] for result in results]
    assert errors[0][0] == pytest.approx(errors[1][0])  # the first layer has the same input either way
    assert errors[0][1] > 1.2 * errors[1][1]  # it has to make up for the error before it


def test_units_called_by_keyword_are_tuned_as_those_called_by_position():
    found = []
    for by_keyword in (False, True):
        net = build(lambda by_keyword=by_keyword: Transformer(by_keyword=by_keyword)).eval()
        calibration = calibrate(net, TOKENS, QConfig.parse("w2a4", first_last_bits=None))
        found.append((summary(adaquant(calibration, config=CONFIG)), state(net)))
    assert found[0][0] == found[1][0]
    assert same_state(found[0][1], found[1][1])


def test_each_candidate_is_tuned_from_the_float_weights_and_the_calibrated_widths_stay():
    # Channels are equalized for the widths of the calibration.
    several = calibration_of(bits="w4a4", overrides={"head": "w5a5"}, equalization=False)
    widths = {name: str(layer.qconfig) for name, layer in several.layers.items()}
    result = adaquant(several, mode="parallel", candidates=["w4a4", "w3a8", "w2"], config=CONFIG)
    assert {name: str(layer.qconfig) for name, layer in several.layers.items()} == widths
    assert result.states.keys() == {"w4a4", "w3a8", "w2"}
    assert all(states.keys() == several.layers.keys() for states in result.states.values())
    assert len(result.units) == 3 * 3 + 1  # the head is at w5a5 throughout
    alone = calibration_of(bits="w3a8", equalization=False)
    expected = adaquant(alone, mode="parallel", config=CONFIG)
    assert expected.states.keys() == {"w3a8"}
    for name, layer in alone.layers.items():
        assert same_state(result.states["w3a8"][name], expected.states["w3a8"][name]) == (name != "head")
        assert same_state({k: v for k, v in state(layer).items() if k != "qconfig_json"}, expected.states["w3a8"][name])
    for name, layer in several.layers.items():
        tuned = {k: v for k, v in state(layer).items() if k != "qconfig_json"}
        assert same_state(tuned, result.states["w4a4"][name])


def test_sequential_tuning_starts_from_the_float_weights_also_behind_parallel_tuning():
    config = ReconstructionConfig(steps=5, batch_size=16, tolerance=0.0)
    alone = adaquant(calibration_of(), config=config)
    calibration = calibration_of()
    adaquant(calibration, mode="parallel", config=config)
    behind = adaquant(calibration, config=config)
    assert behind.units[0].curve[:5] == alone.units[0].curve[:5]
    assert behind.units[0].error_before != alone.units[0].error_before  # the state that it has to beat


def test_a_bias_that_was_added_is_there_again_when_tuning_is_taken_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    calibration = calibrate(net, [torch.randn(32, 4)], QConfig.parse("w4a8", first_last_bits=None))
    layer = calibration.layers["0"]
    layer.set_parameters({"bias": torch.full((8,), 1e-4)})
    config = ReconstructionConfig(steps=2, weight_lr=1e6, closed_form=False)
    with pytest.warns(RolledBackWarning):
        result = adaquant(calibration, granularity="layer", config=config)
    assert not result.units[0].accepted
    assert torch.equal(layer.bias, torch.full((8,), 1e-4))


def test_first_and_last_layer_are_tuned_at_no_less_than_their_least_width():
    calibration = calibrate(build(ResNet).eval(), IMAGES, "w4a4")
    result = adaquant(calibration, mode="parallel", candidates=["w2a3"], granularity="layer", config=CONFIG)
    bits = {row.name: row.bits for row in result.units}
    assert (bits.pop("stem"), bits.pop("head")) == ("w8a8", "w8a8")
    assert set(bits.values()) == {"w2a3"}


@pytest.mark.parametrize(
    ("name", "mode", "granularity"),
    [("resnet", *MODES[1]), ("resnet", *MODES[2]), ("transformer", *MODES[0]), ("transformer", *MODES[3])],
)
def test_a_small_memory_limit_changes_nothing(tmp_path, monkeypatch, name, mode, granularity):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = []
    for limit in ("1GiB", "3KB"):
        calibration = calibration_of(name)
        result = adaquant(calibration, mode=mode, granularity=granularity, config=CONFIG, memory_limit=limit)
        found.append((summary(result), state(calibration.module), result.peak_activation_bytes))
    assert found[0][0] == found[1][0]
    assert same_state(found[0][1], found[1][1])
    assert found[1][2] <= 3000 < found[0][2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_seed_gives_the_same_result_whatever_the_global_random_state_which_stays(mode):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = rng_state()
        calibration = calibration_of()
        config = ReconstructionConfig(steps=10, batch_size=16, drop=0.5)
        result = adaquant(calibration, mode=mode, config=config, seed=seed)
        assert rng_state() == before
        found.append((summary(result), state(calibration.module)))
    assert found[0][0] == found[1][0]
    assert same_state(found[0][1], found[1][1])
    assert not same_state(found[0][1], found[2][1])


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 4 * 20),
        ({"granularity": "layer"}, 6 * 20),
        ({"mode": "parallel", "candidates": ["w8a8", "w4a4"]}, 4 * 2 * 20),
    ],
)
def test_progress_grows_to_the_total(options, total):
    reports = []
    result = adaquant(calibration_of(), config=CONFIG, progress=lambda *report: reports.append(report), **options)
    done = [report[0] for report in reports]
    assert all(earlier <= later for earlier, later in pairwise(done))
    assert sorted(set(done)) == list(range(total + 1))
    assert {report[1] for report in reports} == {total}
    names = dict.fromkeys(report[2] for report in reports)
    assert list(names) == list(dict.fromkeys(row.name for row in result.units))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_undo_gives_the_float_net_back_untouched(mode):
    net = build(ResNet).train()
    before = Snapshot(net)
    calibration = calibrate(net, IMAGES, "w3a3")
    flags = [child.training for child in net.modules()]
    adaquant(calibration, mode=mode, config=CONFIG)
    assert [child.training for child in net.modules()] == flags
    calibration.prepared.undo()
    before.assert_unchanged()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.TiedWeightWarning")
@pytest.mark.parametrize(("mode", "candidates"), [("sequential", None), ("parallel", ["w8a8", "w2a2"])])
def test_undo_gives_a_net_with_tied_weights_back_untouched(mode, candidates):
    net = build(Tied)
    before = Snapshot(net)
    calibration = calibrate(net, [seeded(i, 40, 6) for i in range(2)], QConfig.parse("w2a2", first_last_bits=None))
    biases = {name: layer.bias.detach().clone() for name, layer in calibration.layers.items()}
    config = ReconstructionConfig(steps=25, batch_size=16, bias_lr=0.05, drop=0.0)
    adaquant(calibration, mode=mode, granularity="layer", candidates=candidates, config=config)
    assert not torch.equal(calibration.layers["b"].bias, biases["b"])
    for name, layer in calibration.layers.items():
        assert torch.equal(layer.reference["bias"], biases[name])
    calibration.prepared.undo()
    before.assert_unchanged()


@pytest.mark.parametrize(("mode", "granularity"), MODES)
def test_nothing_changes_where_nothing_improves(mode, granularity):
    calibration = calibration_of()
    before = state(calibration.module)
    config = ReconstructionConfig(steps=3, batch_size=16, weight_lr=1e4, bias_lr=1e4, closed_form=False)
    with pytest.warns(RolledBackWarning, match=r"stem \(w3a8\), blocks.*head \(w3a8\)"):
        result = adaquant(calibration, mode=mode, granularity=granularity, config=config)
    assert [row.accepted for row in result.units] == [False] * len(result.units)
    assert same_state(state(calibration.module), before)


def test_finished_units_hand_on_their_outputs_instead_of_running_again(monkeypatch):
    calibration = calibration_of(name="transformer")
    runs, own = Counter(), QuantLayer.forward

    def counted(layer, *args, **kwargs):
        runs[id(layer)] += not torch.is_grad_enabled()  # not the steps of its own tuning
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(QuantLayer, "forward", counted)
    adaquant(calibration, granularity="layer", config=replace(CONFIG, parts=1, closed_form=False))
    first = calibration.layers["layers.0.attention.qkv"]
    batches, layers = len(TOKENS), len(calibration.layers)
    assert runs[id(first)] <= 2 * batches + 2 * (layers - 1) + 6  # both streams: outputs, a check a unit; and errors


def test_blocks_can_be_given():
    calibration = calibration_of()
    result = adaquant(calibration, blocks=["blocks"], config=CONFIG)
    assert [row.name for row in result.units] == ["stem", "blocks", "head"]
    result = adaquant(calibration_of(), blocks=lambda name, module: name == "blocks.1", config=CONFIG)
    assert [row.name for row in result.units] == ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1", "head"]


BAD = [
    ({"mode": "sequentiel"}, "mode must be 'sequential' or 'parallel', got 'sequentiel'"),
    ({"granularity": "net"}, "granularity must be 'layer' or 'block', got 'net'"),
    ({"candidates": ["w4a4"]}, "candidates need mode='parallel'"),
    ({"mode": "parallel", "candidates": ["w9a4"]}, "bits must be a whole number from 2 to 8, got 9"),
    ({"mode": "parallel", "candidates": ["four"]}, "cannot read 'four' as bit widths"),
    ({"blocks": ["stages.*"]}, r"no layer matches 'stages\.\*'"),
    ({"memory_limit": "much"}, "cannot read 'much' as a size"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_arguments_that_do_not_fit_are_refused_before_any_work(options, message):
    calibration = calibration_of()
    before = state(calibration.module)
    with pytest.raises(QConfigError, match=message):
        adaquant(calibration, **options)
    assert same_state(state(calibration.module), before)


def test_an_interrupt_leaves_each_layer_tuned_or_as_it_was_and_computing():
    calibration = calibration_of()
    before = {name: state(layer) for name, layer in calibration.layers.items()}

    def progress(done, total, text):
        if done == 50:  # in the third of four units
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaquant(calibration, config=CONFIG, progress=progress)
    unchanged = {name for name, layer in calibration.layers.items() if same_state(state(layer), before[name])}
    assert {"blocks.1.conv1", "blocks.1.conv2", "head"} <= unchanged
    assert not {"blocks.0.conv1", "blocks.0.conv2"} & unchanged
    assert {layer.mode for layer in calibration.module.modules() if isinstance(layer, QuantLayer)} == {"quantized"}
    assert not [module for module in calibration.module.modules() if "forward" in vars(module)]
