from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import build, relative_error, same_state, seeded, state
from torch import nn

from lightning_ptq import LayerQConfig, QConfig, ReconstructionConfig, calibrate
from lightning_ptq.activations.calls import Call
from lightning_ptq.activations.shards import make_shards
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.errors import QConfigError, TiedWeightWarning
from lightning_ptq.network.units import find_units
from lightning_ptq.tuning.drop import ActivationDrop
from lightning_ptq.tuning.reconstruct import reconstruct_unit


class SameConv(nn.Conv2d):
    """A derived layer with a forward of its own."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


LAYERS = {
    "linear": (lambda: nn.Linear(48, 12), (48,)),
    "linear, three dimensions": (lambda: nn.Linear(24, 12), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 8, 3), (12, 6)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 4, 4)),
    "grouped": (lambda: nn.Conv2d(16, 8, 2, groups=2, bias=False), (16, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (4, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(12, 8, 3, stride=2), (12, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(32, 8, 2, groups=2), (32, 2, 2)),
    "derived": (lambda: SameConv(8, 8, 2), (8, 4, 4)),
}
SAMPLES = 128


def inputs(shape, seed):
    """Samples that lie near a few directions, so that rounding errors of weights can make up for one another."""
    size = torch.Size(shape).numel()
    directions = seeded(seed, SAMPLES, 4) @ seeded(99, 4, size) / 2
    return F.relu(directions + 0.2 * seeded(seed + 1, SAMPLES, size) + 0.5).view(SAMPLES, *shape)


class Case:
    """One unit of a calibrated net with its data: what :func:`reconstruct_unit` takes."""

    def __init__(self, make, shape, bits="w3a8", shift=0.0, **options):
        self.x = inputs(shape, 0) + shift
        self.float_net = build(lambda: nn.Sequential(make())).eval()
        config = QConfig.parse(bits, first_last_bits=None, **options)
        batches = self.x.split(50)
        self.calibration = calibrate(build(lambda: nn.Sequential(make())).eval(), batches, config)
        (self.unit,) = find_units(self.calibration.module, self.calibration.trace, blocks=["0"])
        self.layer = next(iter(self.unit.layers.values()))
        self.batches = batches

    def data(self, parts=2, batch_size=32):
        """Of each part."""
        store, found = ActivationStore("1MB"), []
        for part in make_shards([len(x) for x in self.batches], parts, batch_size):
            data = UnitData([[Call.of(((self.batches[i],), {}), store.put)] for i in part.batches], store)
            data.set_targets(data.outputs(self.unit.module, len(part.batches), "float"), self.unit.module)
            found.append((part, data))
        return found

    def tune(self, seed=0, on_step=lambda step: None, **options):
        config = ReconstructionConfig(
            **{"steps": 60, "weight_lr": 0.05, "drop": 0.0, "batch_size": 32, "held_out": 0.25, **options}
        )
        self.parts = self.data(config.parts, config.batch_size)
        return reconstruct_unit(self.unit, self.parts, config, config.steps_for([], SAMPLES), seed, on_step)

    def effective(self):
        """What the layer computes with, by the names that ``learn`` uses."""
        activation = self.layer.input_fake_quant
        found = {
            "weight": self.layer.weight_fake_quant(self.layer.weight),
            "weight_scale": self.layer.weight_fake_quant.scale,
            "activation_scale": activation.scale,
            "activation_zero_point": activation.zero_point,
        }
        found |= {} if self.layer.bias is None else {"bias": self.layer.bias}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def raw(self):
        """All tensors of the unit."""
        return {name: tensor.clone() for name, tensor in self.unit.module.state_dict().items()}


def equal(left, right):
    return {name for name in left if torch.equal(left[name], right[name])}


@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
@pytest.mark.parametrize("name", LAYERS)
def test_tuning_lowers_the_error_of_every_layer_type_also_on_fresh_samples(name, rounding):
    case, fresh = Case(*LAYERS[name]), inputs(LAYERS[name][1], 7)
    expected = case.float_net(fresh)
    before = relative_error(case.calibration.module(fresh), expected)
    result = case.tune(rounding=rounding, weight_lr=0.1 if rounding == "adaround" else 0.025)
    assert result.accepted
    assert (result.name, result.bits) == ("0", "w3a8")
    assert result.error_after < 0.95 * result.error_before
    assert relative_error(case.calibration.module(fresh), expected) < 0.95 * before


@pytest.mark.parametrize(("bits", "factor"), [("w2a8", 0.3), ("w2a2", 0.6), ("w2", 0.4), ("w4", 0.6), ("w8", 0.9)])
def test_one_set_of_rates_serves_all_widths(bits, factor):
    case = Case(*LAYERS["linear"], bits=bits)
    result = case.tune(steps=100, weight_lr=ReconstructionConfig().weight_lr, tolerance=0.0)
    assert result.accepted
    assert result.error_after < factor * result.error_before


@pytest.mark.parametrize(("bits", "options", "tuned"), [
    ("w8a8", {}, False), ("w8a8", {"tolerance": 0.0}, True), ("w6a6", {}, True), ("w3a8", {"tolerance": 10.0}, False),
])  # fmt: skip
def test_a_unit_below_the_tolerance_is_left_alone(bits, options, tuned):
    case = Case(*LAYERS["linear"], bits=bits)
    before = state(case.calibration.module)
    result = case.tune(steps=30, weight_lr=0.05, **options)
    assert (result.steps > 0) == tuned
    if not tuned:
        assert (result.accepted, result.error_after) == (False, result.error_before)
        assert same_state(state(case.calibration.module), before)


@pytest.mark.parametrize(("bits", "samples", "steps"), [
    ("w2a4", 1024, 200), ("w2a4", 5000, 200), ("w3a3", 256, 100), ("w3a3", 1, 6), ("w4a8", 256, 100), ("w8a8", 1, 40),
])  # fmt: skip
def test_steps_go_by_the_least_width_and_the_samples(bits, samples, steps):
    widths = [LayerQConfig.parse(bits), LayerQConfig.parse("w8a8")]
    assert ReconstructionConfig().steps_for(widths, samples) == steps
    assert ReconstructionConfig(steps=7).steps_for(widths, samples) == 7


def test_dropping_falls_to_zero_over_the_steps(monkeypatch):
    case = Case(*LAYERS["linear"])
    seen, own = [], ActivationDrop.__call__
    monkeypatch.setattr(ActivationDrop, "__call__", lambda drop, x: seen.append(drop.probability) or own(drop, x))
    case.tune(steps=4, drop=0.8, parts=1, closed_form=False)
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1 / 256)


def test_the_errors_are_those_of_the_quantized_unit_on_the_held_out_samples():
    case = Case(*LAYERS["linear"])
    held, spread = [], 0.0
    for index, (part, data) in enumerate(case.data()):
        rows = torch.cat([torch.arange(SAMPLES).split(50)[batch] for batch in part.batches])
        targets = case.float_net(case.x[rows])
        spread += (targets - targets.mean(0)).square().sum().item() / SAMPLES  # of a sample
        _, samples = data.split(0.25, torch.Generator().manual_seed(10 + index))
        held += [int(rows[row]) for _, row in samples]
    x = case.x[held]
    assert len(x) == SAMPLES // 4

    def error():
        return (case.calibration.module(x) - case.float_net(x)).square().sum().item() / (spread * len(x))

    before = error()
    result = case.tune(seed=5, held_out=0.25)
    assert result.error_before == pytest.approx(before, rel=1e-5)
    assert result.error_after == pytest.approx(error(), rel=1e-5)


@pytest.mark.parametrize("rows", [lambda: nn.Linear(48, 12), lambda: nn.Sequential(nn.Linear(48, 12), nn.GELU())])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_the_loss_of_a_step_is_the_error_on_its_samples_in_however_many_parts(parts, rows):
    case = Case(rows, (48,))  # three batches of unequal size
    result = case.tune(steps=1, parts=parts, batch_size=10_000, held_out=0.0, closed_form=False)
    assert len(case.parts) == min(parts, 3)
    assert result.curve[0][1] == pytest.approx(result.error_before, rel=1e-5)


DISTURBED = {  # each leaves something to find
    "weight": lambda layer: None,
    "bias": lambda layer: layer.bias.data.add_(0.3),
    "weight_scale": lambda layer: layer.weight_fake_quant.scale.mul_(1.2),
    "activation_scale": lambda layer: layer.input_fake_quant.scale.mul_(0.5),
    "activation_zero_point": lambda layer: layer.input_fake_quant.zero_point.add_(2),
}


@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
@pytest.mark.parametrize("learn", DISTURBED)
def test_each_thing_to_learn_changes_alone(learn, rounding):
    case = Case(*LAYERS["conv2d"], bits="w8a3" if learn.startswith("activation") else "w3a8")
    DISTURBED[learn](case.layer)
    before = case.effective()
    if (learn, rounding) == ("weight_scale", "adaround"):  # which keeps the grid
        names, changed = ("weight", "weight_scale"), {"weight"}
    else:
        names, changed = (learn,), {learn, "weight"} if learn == "weight_scale" else {learn}
    result = case.tune(learn=names, rounding=rounding, weight_lr=0.1, bias_lr=0.1, scale_lr=0.02, zero_point_lr=0.5)
    assert result.accepted
    assert equal(before, case.effective()) == before.keys() - changed


def test_a_symmetric_grid_keeps_its_zero_point():
    case = Case(*LAYERS["linear"], symmetric_activations=True)
    result = case.tune(learn=("weight", "activation_zero_point"), zero_point_lr=1.0)
    assert result.accepted
    assert case.layer.input_fake_quant.zero_point == 0


def test_zero_points_stay_integers_on_the_grid():
    case = Case(*LAYERS["linear"], bits="w8a4", shift=6.0)  # a grid without 0 would suit these inputs better
    quantizer = case.layer.input_fake_quant
    quantizer.zero_point.fill_(3)
    result = case.tune(learn=("activation_zero_point",), zero_point_lr=0.5)
    assert result.accepted
    assert quantizer.zero_point.dtype == torch.int32
    assert quantizer.zero_point == 0


@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
@pytest.mark.parametrize("name", ["linear", "transposed 2d"])
def test_accepted_weights_lie_on_the_grid(name, rounding):
    case = Case(*LAYERS[name])
    result = case.tune(rounding=rounding, weight_lr=0.1 if rounding == "adaround" else 0.05)
    quantizer, weight = case.layer.weight_fake_quant, case.layer.weight.detach()
    assert result.accepted
    assert torch.equal(quantizer(weight), weight)
    integers = quantizer.integers(weight)
    assert torch.equal(integers, integers.round())
    assert integers.min() >= -4
    assert integers.max() <= 3


def test_adaround_goes_up_or_down_and_adaquant_as_far_as_it_likes():
    moved = {}
    for rounding in ("adaround", "continuous"):
        case = Case(*LAYERS["linear"], bits="w4a8")
        scale, weight = case.layer.weight_fake_quant.scale.clone(), case.float_net[0].weight.detach()
        floor = (weight / scale).floor().clamp(-8, 7)
        assert case.tune(rounding=rounding, learn=("weight",), weight_lr=0.2).accepted
        moved[rounding] = (case.layer.weight.detach() / scale).round() - floor
        assert not torch.equal(moved[rounding], (weight / scale).round() - floor)  # not just to the nearest
    assert set(moved["adaround"].flatten().tolist()) == {0.0, 1.0}
    assert not set(moved["continuous"].flatten().tolist()) <= {0.0, 1.0}


ABSURD = [{"weight_lr": 1e4}, {"scale_lr": 50.0}, {"bias_lr": 1e5}]


@pytest.mark.parametrize("options", ABSURD, ids=str)
def test_what_makes_it_worse_is_rolled_back_bit_for_bit(options):
    case = Case(*LAYERS["conv2d"])
    before = case.raw()
    learn = ("weight", "bias", "weight_scale", "activation_scale", "activation_zero_point")
    result = case.tune(learn=learn, closed_form=False, **options)
    assert not result.accepted
    assert not result.error_after < result.error_before
    assert equal(before, case.raw()) == before.keys()
    assert torch.equal(case.layer.weight, case.float_net[0].weight)  # not even put on the grid


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "linear"])
def test_the_solved_layer_is_kept_where_tuning_makes_it_worse(name):
    case = Case(*LAYERS[name])
    result = case.tune(weight_lr=1e4)
    assert result.accepted
    assert result.error_after < result.error_before
    assert torch.equal(case.layer.weight_fake_quant(case.layer.weight), case.layer.weight)
    assert not torch.equal(case.layer.bias, case.float_net[0].bias)


def test_a_smaller_rate_is_tried_where_tuning_makes_it_worse():
    case, steps = Case(*LAYERS["linear"]), []
    result = case.tune(weight_lr=6.0, bias_lr=0.0, scale_lr=0.0, closed_form=False, on_step=steps.append)
    assert result.accepted
    assert len(result.curve) == 120
    assert steps == list(range(1, 61))


def test_a_seed_gives_the_same_and_another_seed_another_result():
    cases = [Case(*LAYERS["conv2d"]) for _ in range(3)]
    results = [case.tune(seed=seed, drop=0.5) for case, seed in zip(cases, (3, 3, 4), strict=True)]
    assert equal(cases[0].raw(), cases[1].raw()) == cases[0].raw().keys()
    assert results[0].curve == results[1].curve
    assert (results[0].error_before, results[0].error_after) == (results[1].error_before, results[1].error_after)
    assert not torch.equal(cases[0].layer.weight, cases[2].layer.weight)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
def test_flags_gradients_and_quantizers_are_as_before(rounding, fails):
    class Stop(Exception):
        pass

    def on_step(step):
        seen.append(step)
        if fails and step == 5:
            raise Stop

    case, seen = Case(*LAYERS["linear"]), []
    case.layer.bias.requires_grad_(False)
    case.layer.weight.grad = torch.ones_like(case.layer.weight)
    before = case.raw()
    if fails:
        with pytest.raises(Stop):
            case.tune(rounding=rounding, on_step=on_step, drop=0.5)
        assert equal(before, case.raw()) == before.keys()
    else:
        case.tune(rounding=rounding, on_step=on_step, drop=0.5, weight_lr=0.1)
        assert seen == list(range(1, 61))
    assert [p.requires_grad for p in (case.layer.weight, case.layer.bias)] == [True, False]
    assert torch.equal(case.layer.weight.grad, torch.ones_like(case.layer.weight))
    assert case.layer.bias.grad is None
    for quantizer in (case.layer.weight_fake_quant, case.layer.input_fake_quant):
        assert (quantizer.enabled, quantizer.drop) == (True, None)
    assert torch.is_grad_enabled()


def test_dropping_lets_activations_pass_as_floats():
    losses = [
        Case(*LAYERS["linear"], bits="w8a2").tune(steps=1, drop=drop, closed_form=False).curve[0][1]
        for drop in (0.0, 0.5, 0.99)
    ]
    assert losses[0] > 1.2 * losses[1]
    assert losses[1] > 5 * losses[2]


class InPlaceMixer(nn.Module):
    """Rows depend on one another, so whole calls are taken, and the input is changed in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        x.mul_(2)
        return self.layer(x) * x.sum()


def test_a_unit_that_works_in_place_is_tuned_on_its_true_inputs():
    case = Case(InPlaceMixer, (6,))
    case.tune(steps=5, parts=1)
    _, data = case.parts[0]
    assert not data.separable
    assert torch.equal(data.groups[0].inputs[0], case.x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
def test_tied_weights_are_not_tuned_but_biases_and_activation_scales_are(rounding):
    with pytest.warns(TiedWeightWarning, match=r"0\.a, 0\.b"):
        case = Case(Tied, (6,), bits="w2a2")
    before = case.raw()
    result = case.tune(rounding=rounding, bias_lr=0.05, scale_lr=0.05, closed_form=False)
    assert result.accepted
    assert case.unit.module.a.weight is case.unit.module.b.weight
    kept = {f"{layer}.{part}" for layer in "ab" for part in ("weight", "weight_fake_quant.scale")}
    changed = {f"{layer}.{part}" for layer in "ab" for part in ("bias", "input_fake_quant.scale")}
    assert kept <= equal(before, case.raw())
    assert not changed & equal(before, case.raw())


BAD = [
    ({"steps": 0}, "steps must be.*got 0"),
    ({"batch_size": -1}, "batch_size must be.*got -1"),
    ({"drop": 1.0}, r"drop must lie in \[0, 1\), got 1.0"),
    ({"drop": -0.1}, "drop must lie"),
    ({"held_out": 1}, "held_out must lie"),
    ({"held_out": float("nan")}, "held_out must lie"),
    ({"learn": ("weights",)}, r"\['weights'\].*Choose from \['weight', 'bias'"),
    ({"rounding": "nearest"}, "rounding must be 'continuous' or 'adaround', got 'nearest'"),
    ({"weight_lr": -0.1}, "weight_lr"),
    ({"scale_lr": float("nan")}, "scale_lr"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_values_out_of_their_domain_are_refused(options, message):
    with pytest.raises(QConfigError, match=message):
        ReconstructionConfig(**options)


def test_what_is_learned_may_be_a_list():
    assert ReconstructionConfig(learn=["bias"]) == ReconstructionConfig(learn=("bias",))
