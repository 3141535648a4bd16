"""Operations that are no layer with one weight: several inputs, no weight, several weights. All stages iterate them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import (
    Candidates,
    QConfig,
    QuantLayer,
    QuantSpec,
    ReconstructionConfig,
    adaquant,
    bops_cost,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    prepare,
    reestimate_batch_norm,
    register_layer,
    save_packed,
    size_cost,
    tune_bias,
)
from lightning_ptq.network import swapping
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")


class Product(nn.Module):
    """A matrix product of two activations, as in attention."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class Cell(nn.Module):
    """Two weights for two inputs, as in a recurrent cell."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(hidden, inputs) * 0.3)
        self.weight_hh = nn.Parameter(torch.randn(hidden, hidden) * 0.3)
        self.offset = nn.Parameter(torch.randn(hidden) * 0.1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih) + F.linear(state, self.weight_hh, self.offset)


class Mixer(nn.Module):
    """A recurrent step, attention without projections, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.scores, self.mix, self.head = Cell(8, 16), Product(), Product(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.cell(x, state=torch.tanh(x.repeat(1, 1, 2)))
        attention = self.scores(hidden, hidden.transpose(1, 2)).softmax(-1)
        return self.head(self.mix(attention, right=hidden).mean(1))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "_REGISTRY", dict(swapping._REGISTRY))

    @register_layer(Product)
    class QuantProduct(QuantLayer, Product):
        input_names = ("left", "right")
        weight_names = ()
        bias_names = ()

        def macs(self, args: Any, kwargs: Any, output: Any) -> float:
            return output.numel() * args[0].shape[-1]

    @register_layer(Cell)
    class QuantCell(QuantLayer, Cell):
        input_names = ("x", "state")
        weight_names = ("weight_ih", "weight_hh")
        bias_names = ("offset",)


def mixer(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mixer().eval()


SAMPLES = [seeded(i, 16, 5, 8) for i in range(4)]


def test_each_input_and_each_weight_is_rounded_by_its_own_quantizer() -> None:
    net = mixer()
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a5", first_last_bits=None))
    assert {key for key in calibration.observers if key[0] == "mix"} == {("mix", "left"), ("mix", "right")}
    cell, mix, x, state = net.cell, net.mix, seeded(7, 2, 8), seeded(8, 2, 16)
    q = {name: getattr(cell, f"{name}_fake_quant") for name in ("x", "state", "weight_ih", "weight_hh")}
    expected = F.linear(q["x"](x), q["weight_ih"](cell.weight_ih))
    expected = expected + F.linear(q["state"](state), q["weight_hh"](cell.weight_hh), cell.offset)
    torch.testing.assert_close(cell(x, state), expected)
    torch.testing.assert_close(cell(x=x, state=state), expected)
    left, right = seeded(9, 2, 5, 5).softmax(-1), seeded(10, 2, 5, 16)
    torch.testing.assert_close(mix(left, right), mix.left_fake_quant(left) @ mix.right_fake_quant(right))
    assert not torch.allclose(mix.left_fake_quant.scale, mix.right_fake_quant.scale)
    assert mix.is_quantized
    assert mix.weight_quantizers == {}


def test_all_stages_work_on_them(tmp_path: Any) -> None:
    net = mixer()
    expected = [net(x).detach() for x in SAMPLES]
    calibration = calibrate(net, SAMPLES, QConfig.parse("w3a8", first_last_bits=None))
    assert list(calibration.layers) == ["cell", "scores", "mix", "head"]
    choices = Candidates(calibration, ["w8a8", "w3a8"])
    sizes, bops = size_cost(calibration, choices).values, bops_cost(calibration, choices).values
    assert sizes["scores"] == {"w8a8": 0.0, "w3a8": 0.0}
    assert sizes["cell"]["w8a8"] == 16 * 8 + 16 * 16 + 2 * 16 * 4
    assert bops["scores"] == {"w8a8": 5 * 5 * 16 * 64, "w3a8": 5 * 5 * 16 * 64}  # both operands are inputs
    assert bops["cell"]["w8a8"] == 5 * (16 * 8 + 16 * 16) * 64
    table = measure_sensitivity(calibration, ["w8a8", "w3a8"], measure="mse")
    assert table.rises["scores"]["w3a8"] == 0  # it has no weights, and its inputs keep their bits
    assert table.rises["cell"]["w3a8"] > 0
    before = sum(relative_error(net(x), y) for x, y in zip(SAMPLES, expected, strict=True))
    result = adaquant(calibration, granularity="layer", config=ReconstructionConfig(steps=60, batch_size=32))
    assert [row.name for row in result.units] == ["cell", "scores", "mix", "head"]
    after = sum(relative_error(net(x), y) for x, y in zip(SAMPLES, expected, strict=True))
    assert after < before
    for step in (reestimate_batch_norm, para_normalize, tune_bias):
        step(calibration, measure="mse")
    save_packed(net, tmp_path / "net.safetensors")
    loaded = load_packed(mixer(1), tmp_path / "net.safetensors")
    assert torch.equal(loaded(SAMPLES[0]), net(SAMPLES[0]))


def test_parallel_tuning_and_preflight_know_them() -> None:
    net = mixer()
    found = inspect_module(net, SAMPLES[0], "w4a8")
    assert [layer.name for layer in found.layers if layer.status == "quantized"] == ["cell", "scores", "mix", "head"]
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a8", first_last_bits=None))
    result = adaquant(
        calibration, mode="parallel", candidates=["w8a8", "w2a8"], config=ReconstructionConfig(steps=5, batch_size=16)
    )
    assert set(result.states) == {"w8a8", "w2a8"}


def test_groups_run_within_each_weight() -> None:
    net = mixer()
    calibrate(net, SAMPLES, QConfig.parse("w4g4a8", first_last_bits=None))
    assert net.cell.weight_ih_fake_quant.scale.shape == (16, 2, 1)
    assert net.cell.weight_hh_fake_quant.scale.shape == (16, 4, 1)
    assert net.cell.qconfig.weight == QuantSpec(4, per_channel=True, group_size=4)


class Gated(nn.Module):
    """Two weights one after the other, and an output that is a tuple, as in a fused recurrent layer."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(hidden, inputs) * 0.3)
        self.up = nn.Parameter(torch.randn(inputs, hidden) * 0.3)
        self.offset = nn.Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(F.linear(x, self.down))
        return F.linear(hidden, self.up, self.offset), hidden.sum()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated, self.head = Gated(8, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gated(x)[0].mean(1))


def test_an_operation_with_a_tuple_as_output_that_is_not_linear_in_its_weights(tmp_path: Any) -> None:
    @register_layer(Gated)
    class QuantGated(QuantLayer, Gated):
        weight_names = ("down", "up")
        bias_names = ("offset",)
        is_linear = False

    def stack(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Stack().eval()

    net = stack(0)
    calibration = calibrate(net, SAMPLES, QConfig.parse("w3a8", first_last_bits=None))
    choices = Candidates(calibration, ["w8a8", "w3a8"])
    assert size_cost(calibration, choices).values["gated"]["w8a8"] == 2 * 6 * 8 + (6 + 8) * 4
    assert bops_cost(calibration, choices).values["gated"]["w8a8"] > 0
    for measure in ("fisher", "kl"):
        assert measure_sensitivity(calibration, ["w8a8", "w3a8"], measure=measure).rises["gated"]["w3a8"] > 0
    adaquant(calibration, config=ReconstructionConfig(steps=10, batch_size=16))
    result = para_normalize(calibration, every_layer=True, measure="mse", held_out=0.0)
    assert result.skipped["gated"] == "its output is not linear in its weights"
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(stack(1), tmp_path / "net.safetensors")(SAMPLES[0]), net(SAMPLES[0]))
    reloaded = stack(2)
    prepare(reloaded, "w8a8")
    reloaded.load_state_dict(net.state_dict())
    assert torch.equal(reloaded(SAMPLES[0]), net(SAMPLES[0]))


class QuantProductOfItsOwn(swapping.Swapped, QuantizedOp):
    """An operation that is no layer."""

    input_names = ("left", "right")

    def _init_swapped(self) -> None:
        self.init_op()
        self.left_fake_quant = self.right_fake_quant = None

    def input_tensors(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        return dict(zip(self.input_names, args, strict=True))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.mode == "quantized" and self.is_quantized:
            left, right = self.left_fake_quant(left), self.right_fake_quant(right)
        return super().forward(left, right)


def test_an_operation_that_is_no_layer_is_reloaded_from_a_state_dict() -> None:
    swapping.register_swap(Product, QuantProductOfItsOwn)
    nets = [nn.Sequential(), nn.Sequential()]
    for net in nets:
        net.add_module("product", Product())
        net.forward = lambda x, net=net: net.product(x, x.transpose(1, 2))
    prepare(nets[1], "w8a8")
    calibrate(nets[0], SAMPLES, QConfig.parse("w4a4", first_last_bits=None))
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[1](SAMPLES[0]), nets[0](SAMPLES[0]))
    assert not torch.equal(nets[0](SAMPLES[0]), SAMPLES[0] @ SAMPLES[0].transpose(1, 2))
