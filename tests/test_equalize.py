from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, seeded
from torch import Tensor, nn

from lightning_ptq import QConfig, calibrate, load_packed, save_packed
from lightning_ptq.calibration.channel_peaks import ChannelPeaks
from lightning_ptq.network.equalize import Pair
from lightning_ptq.network.op import ops_in_mode

IMAGES = [seeded(i, 8, 4, 6, 6) for i in range(2)]


def spread(net: nn.Module) -> nn.Module:
    """Give the output channels of the stem very different sizes."""
    with torch.no_grad():
        sizes = torch.tensor([0.02, 0.1, 0.5, 4.0])
        net.stem.weight *= sizes[:, None, None, None]
        net.stem.bias *= sizes
    return net.eval()


class Net(nn.Module):
    """A layer, an activation, and the layer that reads it."""

    def __init__(self, activation: Callable[[Tensor], Tensor], after: nn.Module, norm: bool = False) -> None:
        super().__init__()
        self.stem, self.activation, self.after = nn.Conv2d(4, 4, 1), activation, after
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.activation(self.norm(self.stem(x)))).sigmoid())


def depthwise(**options: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, groups=4, **options)


def quantized(net: nn.Module, qconfig: str, equalization: bool = True) -> Any:
    torch.manual_seed(0)
    config = QConfig.parse(qconfig, first_last_bits=None, equalization=equalization)
    return calibrate(copy.deepcopy(net), IMAGES, config)


def changed(net: nn.Module, calibration: Any) -> bool:
    return not torch.equal(calibration.layers["stem"].reference["weight"], net.stem.weight)


ACTIVATIONS: dict[str, tuple[Any, bool]] = {
    "none": (lambda x: x, True),
    "relu": (F.relu, True),
    "relu in place": (lambda x: F.relu(x, inplace=True), True),
    "relu6": (F.relu6, True),
    "leaky": (F.leaky_relu, True),
    "clamp": (lambda x: x.clamp(min=0), True),
    "clamped above": (lambda x: x.clamp(0, 3.0), True),
    "pool": (lambda x: F.max_pool2d(x.relu(), 2, 1), True),
    "padding": (lambda x: F.pad(x.relu(), (1, 1, 1, 1)), True),
    "copy": (lambda x: x.relu().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), True),
    "silu": (F.silu, False),
    "shifted": (lambda x: x.relu() + 1, False),
    "clamped below": (lambda x: x.clamp(min=-0.01), False),
    "padded with ones": (lambda x: F.pad(x.relu(), (1, 1, 1, 1), value=1.0), False),
    "read twice": (lambda x: x.relu() * x.mean(), False),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_channels_before_a_depthwise_convolution(kind: str) -> None:
    activation, expected = ACTIVATIONS[kind]
    torch.manual_seed(0)
    net = spread(Net(activation, depthwise()))
    calibration = quantized(net, "w8a4")
    assert changed(net, calibration) is expected
    (followed,) = {id(trace): trace.outputs["stem"] for trace in calibration.traces}.values()
    assert (followed.scaled_elsewhere == "") is expected  # known without the comparison of two forwards
    with torch.no_grad():
        wanted = [net(batch) for batch in IMAGES]
        with ops_in_mode(calibration.module, "float"):
            for batch, output in zip(IMAGES, wanted, strict=True):
                assert torch.allclose(calibration.module(batch), output, atol=1e-5)
    assert not changed(net, quantized(net, "w8a4", equalization=False))


def test_small_channels_are_seen_behind_coarse_activations() -> None:
    torch.manual_seed(0)
    net = spread(Net(F.relu, depthwise()))
    captured: dict[str, Tensor] = {}
    errors = {}
    for equalization in (True, False):
        calibration = quantized(net, "w8a4", equalization)
        layer = calibration.layers["after"]
        handle = layer.register_forward_hook(lambda _m, _a, output: captured.__setitem__("out", output))
        with torch.no_grad():
            calibration.module(IMAGES[0])
            found = captured["out"]
            with ops_in_mode(calibration.module, "float"):
                calibration.module(IMAGES[0])
        handle.remove()
        channels = [relative_error(found[:, i], captured["out"][:, i]) for i in range(3)]
        errors[equalization] = max(channels)
    assert errors[True] < 0.25 * errors[False]


@pytest.mark.parametrize(
    ("qconfig", "expected"), [("w4a4", True), ("w8a4", True), ("w8a8", False), ("w4a8", False), ("w4", False)]
)
@pytest.mark.parametrize(
    "after",
    [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 2)],
    ids=["conv", "groups", "up"],
)
def test_other_layers_take_a_part_where_activations_are_the_coarser_ones(
    after: nn.Module, qconfig: str, expected: bool
) -> None:
    torch.manual_seed(0)
    net = spread(Net(F.relu, copy.deepcopy(after)))
    calibration = quantized(net, qconfig)
    assert changed(net, calibration) is expected
    with torch.no_grad(), ops_in_mode(calibration.module, "float"):
        assert torch.allclose(calibration.module(IMAGES[0]), net(IMAGES[0]), atol=1e-5)


def test_a_linear_layer_behind_flattened_channels() -> None:
    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.activation(self.stem(x)).flatten(1))

    torch.manual_seed(0)
    net = spread(Flat(F.relu, nn.Linear(4 * 36, 3)))
    del net.head
    calibration = quantized(net, "w4a4")
    assert changed(net, calibration)
    with torch.no_grad(), ops_in_mode(calibration.module, "float"):
        assert torch.allclose(calibration.module(IMAGES[0]), net(IMAGES[0]), atol=1e-5)


def test_a_folded_norm_between_them_and_files_and_undo(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = spread(Net(F.relu6, depthwise(padding=1), norm=True))
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calibration = quantized(net, "w4a4")
    assert calibration.folded == {"norm": "stem"}
    with torch.no_grad():
        expected = calibration.module(IMAGES[0])
        save_packed(calibration.module, tmp_path / "packed.safetensors")
        loaded = copy.deepcopy(net)
        load_packed(loaded, tmp_path / "packed.safetensors")
        assert torch.equal(loaded.eval()(IMAGES[0]), expected)
    calibration.prepared.undo()
    found = calibration.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())


def test_a_dead_channel_and_a_shared_layer_stay() -> None:
    torch.manual_seed(0)
    net = spread(Net(F.relu, depthwise()))
    with torch.no_grad():
        net.stem.weight[1], net.stem.bias[1] = 0.0, -1.0
    calibration = quantized(net, "w8a4")
    assert torch.equal(calibration.layers["stem"].reference["bias"][1], net.stem.bias[1])

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.after(self.stem(self.stem(x).relu()).relu()))

    net = spread(Twice(F.relu, depthwise()))
    assert not changed(net, quantized(net, "w8a4"))


def test_factors_are_powers_of_the_ratio_of_peaks() -> None:
    peaks = torch.tensor([4.0, 1.0, 0.25, 0.0, 1e-6])
    assert Pair("a", "b", torch.arange(5)).factors(peaks).tolist() == [1, 4, 16, 1, 64]
    assert Pair("a", "b", torch.arange(5), 0.5).factors(peaks).tolist() == [1, 2, 4, 1, 64]
    # Several inputs may hold the same channel.
    assert Pair("a", "b", torch.tensor([0, 0, 1])).factors(torch.tensor([1.0, 4.0, 2.0])).tolist() == [1, 2]


def test_peaks_are_magnitudes_of_channels() -> None:
    layer, peaks = quantized(spread(Net(F.relu, depthwise())), "w8a4").layers["after"], ChannelPeaks()
    x = torch.zeros(2, 4, 3, 3)
    x[0, 0, 1, 1], x[1, 1, 0, 2], x[1, 3, 2, 0] = -3.0, 2.0, 1.0
    for part in x.split(1):
        peaks.update("after", layer, part)
    assert peaks.peaks["after"].tolist() == [3, 2, 0, 1]


class Plus(nn.Conv2d):
    """A convolution that adds to its input, so that its weight alone does not tell what it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


def test_a_pair_that_does_not_hold_is_taken_back_alone() -> None:
    torch.manual_seed(0)
    good, bad = spread(Net(F.relu, depthwise())), spread(Net(F.relu, Plus(4, 4, 1, groups=4)))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = good, bad

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.good(x), self.bad(x)

    net = Two().eval()
    calibration = quantized(net, "w8a4")
    weights = {name: layer.reference["weight"] for name, layer in calibration.layers.items()}
    assert not torch.equal(weights["good.stem"], good.stem.weight)
    assert torch.equal(weights["bad.stem"], bad.stem.weight)
    assert torch.equal(weights["bad.after"], bad.after.weight)


def test_samples_without_a_batch_dimension() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 0, 6)[:, None]
    x = [seeded(i, 4) for i in range(3)]
    calibration = calibrate(copy.deepcopy(net), x, QConfig.parse("w4a4", first_last_bits=None))
    assert not torch.equal(calibration.layers["0"].reference["weight"], net[0].weight)
    with torch.no_grad(), ops_in_mode(calibration.module, "float"):
        assert torch.allclose(calibration.module(x[0]), net(x[0]), atol=1e-6)
