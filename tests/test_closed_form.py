"""The closed form that tuning starts from: least squares on quantized inputs, and rounding that makes up for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import build, same_state, seeded, state
from torch import Tensor, nn

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.activations.calls import Call
from lightning_ptq.activations.shards import ShardSamples, make_shards
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.units import find_units
from lightning_ptq.tuning import closed_form, means
from lightning_ptq.tuning.closed_form import solve_layers
from lightning_ptq.tuning.moments import moments_of


class SameConv(nn.Conv2d):
    """Pads in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class StaticConv(nn.Conv2d):
    """Calls the function itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, 1, self.dilation, groups=self.groups)


LAYERS: dict[str, Any] = {
    "one position": (lambda: nn.Conv1d(24, 6, 1), (24, 1)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (6, 12)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(12, 8, 1, stride=2), (12, 8, 8)),
    "dilated": (lambda: nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 2), dilation=2), (6, 8, 8)),
    "grouped": (lambda: nn.Conv2d(8, 8, 2, groups=2, bias=False), (8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), (8, 8, 8)),
    "padded in its forward": (lambda: SameConv(6, 8, 2), (6, 8, 8)),
    "called by its forward": (lambda: StaticConv(6, 8, 3), (6, 8, 8)),
}


class Case:
    """A calibrated layer with its samples, whose inputs lie near a few directions."""

    def __init__(self, make: Any, shape: tuple[int, ...], bits: str = "w3a8", samples: int = 128) -> None:
        size = torch.Size(shape).numel()
        x = seeded(0, samples, 4) @ seeded(1, 4, size) / 2 + 0.2 * seeded(2, samples, size) + 0.3
        batches = F.relu(x).view(samples, *shape).split(32)
        self.calibration = calibrate(
            build(lambda: nn.Sequential(make())).eval(), batches, QConfig.parse(bits, first_last_bits=None)
        )
        (self.unit,) = find_units(self.calibration.module, self.calibration.trace, blocks=["0"])
        (self.layer,) = self.unit.layers.values()
        self.samples = []
        for shard in make_shards([len(batch) for batch in batches], 2, 32):
            store = ActivationStore("10MB")
            data = UnitData([[Call.of(((batches[i],), {}), store.put)] for i in shard.batches], store)
            data.set_targets(data.outputs(self.unit.module, len(shard.batches), "float"), self.unit.module)
            self.samples.append(ShardSamples(shard, data, 0.25, shard.index))

    def error(self) -> float:
        """On samples that are not used."""
        pairs = [pair for own in self.samples for batch in own.held_out(self.unit.module) for pair in batch]
        return sum((found - wanted).square().sum().item() for found, wanted in pairs)

    def solve(self) -> None:
        solve_layers(self.unit, self.samples, lambda own: [own[index] for index in sorted(own)])


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer_gets_closer_on_samples_that_are_not_used(name: str) -> None:
    case = Case(*LAYERS[name])
    before, scale = case.error(), case.layer.weight_fake_quant.scale.clone()
    case.solve()
    # The two groups have next to no inputs in common with others, which leaves nothing to make up for.
    assert case.error() <= before if name == "grouped" else case.error() < 0.95 * before
    assert torch.equal(case.layer.weight_fake_quant.scale, scale)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_what_the_layer_multiplies(name: str) -> None:
    case = Case(*LAYERS[name])
    weight = case.layer.reference["weight"].double()
    for own in case.samples:
        moments = moments_of(case.unit, "0", case.layer, own)
        assert moments is not None
        rows = weight.reshape(len(moments.inputs), -1, moments.inputs.shape[-1] - 1)
        bias = case.layer.reference.get("bias")
        last = weight.new_zeros(*rows.shape[:2], 1) if bias is None else bias.double().reshape(*rows.shape[:2], 1)
        expected = torch.cat([rows, last], 2) @ moments.inputs  # what the float layer gives for quantized inputs
        assert (moments.outputs - expected).norm() < 0.03 * expected.norm()


def test_without_rounding_it_is_least_squares() -> None:
    case = Case(*LAYERS["one position"], bits="w8a3", samples=4096)
    group_data = [own.data.groups[0] for own in case.samples]
    x = torch.cat([case.layer.input_fake_quant(group.inputs[0]) for group in group_data]).double()[..., 0]
    y = torch.cat([group.targets[0].whole for group in group_data if group.targets]).double()[..., 0]
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(ones, y).solution
    least = (ones @ best - y).square().mean().item()
    before = (x @ case.layer.weight[..., 0].double().T + case.layer.bias.double() - y).square().mean().item()
    case.solve()
    found = (x @ case.layer.weight[..., 0].double().T + case.layer.bias.double() - y).square().mean().item()
    assert found - least < 0.6 * (before - least)


def test_rounding_makes_up_for_itself_where_inputs_are_alike() -> None:
    torch.manual_seed(0)
    second = torch.randn(1, 40, 8) @ torch.randn(1, 8, 40)
    second = second @ second.mT / 40 + 0.1 * torch.eye(40)
    case = Case(lambda: nn.Linear(40, 6), (40,), "w3a8")
    weight, quantizer = case.layer.weight.detach()[None], case.layer.weight_fake_quant
    rounded = closed_form._rounded(weight, second, quantizer.scale.flatten()[None], quantizer)
    nearest = quantizer(weight[0])[None]
    assert torch.equal(quantizer(rounded[0]), rounded[0])  # on the grid

    def loss(found: Tensor) -> float:
        return (((found - weight) @ second) * (found - weight)).sum().item()

    assert loss(rounded) < 0.5 * loss(nearest)


@pytest.mark.parametrize("make", [
    lambda: nn.Linear(5, 6), lambda: nn.Conv3d(4, 6, 2), lambda: nn.ConvTranspose2d(4, 6, 2),
    lambda: nn.Conv2d(4, 6, 3, padding="same"),
])  # fmt: skip
def test_other_layers_stay_as_they_are(make: Any) -> None:
    dims = 3 if isinstance(make(), nn.Conv3d) else 2
    case = Case(make, (4, *[5] * dims))
    before = state(case.calibration.module)
    case.solve()
    assert same_state(state(case.calibration.module), before)


class Twice(nn.Module):
    """Runs one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


def test_a_layer_that_runs_twice_stays_as_it_is() -> None:
    case = Case(Twice, (8, 3))
    before = state(case.calibration.module)
    case.solve()
    assert same_state(state(case.calibration.module), before)


@pytest.mark.parametrize("net", [
    lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()),  # one channel
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4)),
    lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(2), nn.Sequential(Twice(), nn.Conv1d(8, 2, 1)), nn.Flatten()),
])  # fmt: skip
@pytest.mark.parametrize("samples", [1, 3, 40])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_few_constant_and_small_units(net: Any, samples: int, factor: float) -> None:
    batches = (factor * seeded(0, samples, 1, 4, 4)).split(16)
    calibration = calibrate(build(net), batches, "w3a3")
    result = adaquant(calibration, config=ReconstructionConfig(steps=3))
    assert all(row.error_after <= row.error_before or not row.accepted for row in result.units)
    assert all(tensor.isfinite().all() for tensor in calibration.module.state_dict().values())


@pytest.mark.parametrize(("signs", "damping"), [((1, 1), 0.01), ((1, -1), 10.0)])
def test_the_damping_is_small_where_the_shards_agree(signs: tuple[int, int], damping: float) -> None:
    second, change = torch.eye(6)[None] + 0.2, seeded(0, 1, 4, 6)
    weight, none = seeded(1, 1, 4, 6), torch.zeros(1, 6)
    folds = [
        closed_form._Centered(second, (weight + sign * change) @ second, none, torch.zeros(1, 4)) for sign in signs
    ]
    assert closed_form._best_damping(weight, folds) == damping


def test_means_are_those_of_positions_with_data() -> None:
    difference = torch.full((2, 5, 3), 50.0)
    real = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()[..., None]
    difference[real.expand_as(difference)] = 2.0
    assert means._shift(difference, 2, real).tolist() == pytest.approx([2.0] * 3)
    assert means._shift(difference, 2, torch.zeros_like(real)).tolist() == [0.0] * 3


def test_singular_moments_leave_a_layer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise torch.linalg.LinAlgError("the leading minor of order 3 is not positive-definite")

    case = Case(*LAYERS["conv2d"])
    before = state(case.calibration.module)
    monkeypatch.setattr(torch.linalg, "cholesky", fails)
    case.solve()
    assert same_state(state(case.calibration.module), before)


def test_the_option_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form.Solution, "of", lambda *_: pytest.fail("it was called"))
    net = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1))
    adaquant(calibrate(net, [seeded(0, 32, 8, 1)], "w3a3"), config=ReconstructionConfig(steps=2, closed_form=False))
