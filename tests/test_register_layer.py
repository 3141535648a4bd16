"""Layer kinds of a user's own: registered from outside, quantized like those of torch."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from helpers import build, relative_error, seeded
from torch import Tensor, nn

from lightning_ptq import (
    Candidates,
    QConfig,
    QuantLayer,
    ReconstructionConfig,
    adaquant,
    bops_cost,
    calibrate,
    load_packed,
    para_normalize,
    register_layer,
    save_packed,
    tune_bias,
)
from lightning_ptq.errors import QConfigError, SurgeryError
from lightning_ptq.network import swapping

if os.environ.get("PTQ_TEST_INTEGRATIONS"):
    from transformers.pytorch_utils import Conv1D
else:  # with transformers installed, torchmetrics imports it, which takes every process of the tests seconds

    class Conv1D(nn.Module):
        """The layer of GPT-2 as transformers has it: a linear layer with a weight of shape (inputs, outputs)."""

        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return rows.view(*x.size()[:-1], self.nf)


@pytest.fixture(autouse=True)
def _registry_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "_REGISTRY", dict(swapping._REGISTRY))


class FeedForward(nn.Module):
    """That of GPT-2: two layers with weights of shape (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(64, 16), Conv1D(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def feed_forward() -> FeedForward:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeedForward().eval()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
        return net


def as_linear(net: FeedForward) -> nn.Module:
    """The same computation with layers that torch has."""
    linear = copy.deepcopy(net)
    for name, layer in net.named_children():
        twin = nn.Linear(*layer.weight.shape)
        twin.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        twin.bias = nn.Parameter(layer.bias.detach().clone())
        setattr(linear, name, twin)
    return linear


SAMPLES = [seeded(i, 32, 5, 16) for i in range(4)]


def test_without_a_registration_there_are_no_layers_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "_BY_NAME", {})
    with pytest.raises(SurgeryError, match="nothing to quantize"):
        calibrate(feed_forward(), SAMPLES, QConfig.parse("w4a8", operations="layers"))


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("qconfig", ["w4a8", "w3g16a8"])
def test_a_registered_layer_is_quantized_as_the_linear_layer_that_it_is(qconfig: str, tmp_path: Any) -> None:
    register_layer(Conv1D, channel_dim=1)
    net = feed_forward()
    twin = as_linear(net)
    config = QConfig.parse(qconfig, first_last_bits=None)
    results = []
    for module in (net, twin):
        calibration = calibrate(module, SAMPLES, config)
        nearest = module(SAMPLES[0]).detach()
        adaquant(calibration, config=ReconstructionConfig(steps=20, batch_size=32, closed_form=False))
        tuned = module(SAMPLES[0]).detach()
        para_normalize(calibration, measure="mse", held_out=0.0)
        macs = bops_cost(calibration, Candidates(calibration, [qconfig])).values
        results.append((nearest, tuned, module(SAMPLES[0]).detach(), macs))
    assert results[0][3] == results[1][3]  # the same multiply-accumulates
    for ours, linear in zip(results[0][:3], results[1][:3], strict=True):
        assert relative_error(ours, linear) < 1e-4  # but for the order of additions
    assert relative_error(results[0][1], results[0][0]) > 1e-6
    save_packed(net, tmp_path / "net.safetensors")
    save_packed(twin, tmp_path / "twin.safetensors")
    loaded = load_packed(feed_forward(), tmp_path / "net.safetensors")
    assert torch.equal(loaded(SAMPLES[0]), net(SAMPLES[0]))
    sizes = [(tmp_path / name).stat().st_size for name in ("net.safetensors", "twin.safetensors")]
    assert abs(sizes[0] - sizes[1]) < 64  # the names of the classes differ


def test_a_registered_layer_keeps_its_class_through_copies_and_pickles() -> None:
    register_layer(Conv1D, channel_dim=1)
    net = feed_forward()
    calibrate(net, SAMPLES, "w4a8")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin.up).__name__ == "QuantConv1D"
        assert isinstance(twin.up, Conv1D)
        assert torch.equal(twin(SAMPLES[0]), net(SAMPLES[0]))


class Gain(nn.Module):
    """A weight of another name, and a scale that is used once per sample."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        self.offset = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.offset


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_class_may_name_its_tensors_and_count_its_work() -> None:
    @register_layer(Gain)
    class QuantGain(QuantLayer, Gain):
        weight_names = ("kernel",)
        bias_names = ("offset",)
        output_channel_dim = 1

        def macs(self, args: Any, kwargs: Any, output: Any) -> float:
            return 7.0 * len(output)

    class Derived(Gain):
        """Derived classes are swapped too."""

    net = build(lambda: nn.Sequential(Derived(6, 4), nn.ReLU(), nn.Linear(4, 2))).eval()
    x = seeded(0, 256, 3) @ seeded(1, 3, 6)
    expected = net(x).detach()
    calibration = calibrate(net, [x], QConfig.parse("w2a8", first_last_bits=None))
    assert isinstance(net[0], QuantGain)
    assert net[0].kernel_fake_quant.scale.shape == (1, 4)
    assert bops_cost(calibration, Candidates(calibration, ["w2a8"])).values["0"] == {"w2a8": 7.0 * 2 * 8}
    kernel = net[0].kernel.detach().clone()
    result = adaquant(calibration, granularity="layer", config=ReconstructionConfig(steps=100, batch_size=32))
    assert result.units[0].accepted
    assert not torch.equal(net[0].kernel, kernel)
    calibration.prepared.undo()
    assert type(net[0]) is Derived
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), "Conv1D", int])
def test_what_is_no_module_class_is_refused(what: Any) -> None:
    with pytest.raises(QConfigError, match="takes a module class"):
        register_layer(what)


def test_the_decorator_keeps_the_channel_dimension_and_a_bad_one_is_refused() -> None:
    @register_layer(Gain, channel_dim=1)
    class QuantGain(QuantLayer, Gain):
        weight_names = ("kernel",)
        bias_names = ("offset",)

    assert QuantGain.output_channel_dim == 1
    with pytest.raises(QConfigError, match="channel_dim must be 0 or more"):
        register_layer(Gain, channel_dim=-1)


class Bare(nn.Module):
    """A layer that has no bias, takes keywords, and names its input second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        return y if gain is None else gain * y


def test_a_layer_without_a_bias_gets_none_and_its_first_parameter_is_its_input() -> None:
    register_layer(Bare)
    net = nn.Sequential(Bare(), nn.ReLU(), Bare()).eval()
    calibration = calibrate(net, [seeded(0, 64, 8)], QConfig.parse("w3a8", first_last_bits=None))
    result = para_normalize(calibration, every_layer=True, measure="mse", held_out=0.0)
    assert set(result.skipped.values()) == {"it has no bias"}
    assert tune_bias(calibration, measure="mse", steps=3).layers == ()
    assert "0.bias" not in net.state_dict()
    x, gain = seeded(1, 2, 8), torch.full((1,), 7.0)
    assert torch.equal(net[0](gain=gain, x=x), net[0](x, gain))
