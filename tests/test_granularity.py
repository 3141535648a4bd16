"""Scales per group: layout, calibration, tuning, statistics, packing and reload."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import ResNet, build, relative_error, same_state, seeded, state
from models import SamePadConv2d
from torch import Tensor, nn

from lightning_ptq import (
    Candidates,
    QConfig,
    QuantSpec,
    ReconstructionConfig,
    adaquant,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    prepare,
    save_packed,
    size_cost,
)
from lightning_ptq.errors import QConfigError
from lightning_ptq.network.swapping import swapped_class
from lightning_ptq.numerics.granularity import ChannelLayout, Granularity
from lightning_ptq.numerics.qconfig import LayerQConfig

LAYERS = {
    "linear": lambda: nn.Linear(70, 5),
    "conv1d": lambda: nn.Conv1d(6, 4, 5),
    "conv2d": lambda: nn.Conv2d(6, 4, 3),
    "conv2d_grouped": lambda: nn.Conv2d(8, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(3, 4, 2),
    "transpose1d": lambda: nn.ConvTranspose1d(6, 4, 5),
    "transpose2d": lambda: nn.ConvTranspose2d(6, 4, 3),
    "transpose2d_grouped": lambda: nn.ConvTranspose2d(8, 4, 3, groups=2),
    "same_pad": lambda: SamePadConv2d(6, 4, 3),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def channel_values(layer: Any, weight: Tensor) -> list[Tensor]:
    """The weights of each output channel, one by one, without any of the library's reshaping."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return [weight[channel].reshape(-1) for channel in range(weight.shape[0])]
    inputs, per_group = weight.shape[0] // layer.groups, weight.shape[1]
    return [
        torch.stack([weight[group * inputs + i, channel] for i in range(inputs)]).reshape(-1)
        for group in range(layer.groups)
        for channel in range(per_group)
    ]


@each_layer
@pytest.mark.parametrize("size", [4, 32, 1000])
def test_each_group_of_each_channel_is_rounded_with_its_own_scale(name: str, size: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    quantized = swapped_class(type(layer)).from_float(layer)
    quantized.attach(LayerQConfig(QuantSpec(4, group_size=size, observer="minmax", signed_scale=False), None))
    quantized.choose_weight_scales()
    rounded = quantized.weight_fake_quant(layer.weight)
    assert rounded.shape == layer.weight.shape
    for values, found in zip(channel_values(layer, layer.weight), channel_values(layer, rounded), strict=True):
        for group, of_group in zip(values.split(size), found.split(size), strict=True):
            scale = max(-group.min().item() / 8, group.max().item() / 7)
            expected = torch.fake_quantize_per_tensor_affine(group, scale, 0, -8, 7)
            torch.testing.assert_close(of_group, expected, rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("granularity", [Granularity(), Granularity(True), Granularity(group_size=7)])
def test_merge_is_the_inverse_of_split(name: str, granularity: Granularity) -> None:
    layer = LAYERS[name]()
    op = swapped_class(type(layer)).from_float(layer)
    layout, weight = op.layout("weight", granularity), torch.randn_like(layer.weight)
    assert torch.equal(layout.merge(layout.split(weight)), weight)
    scales = torch.rand(layout.shape)
    assert (layout.split(weight) * scales).shape == layout.split(weight).shape


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 3, 4), ChannelLayout(0)),
        ((3, 6, 4), ChannelLayout(1)),
        ((6, 4, 3), ChannelLayout(1, groups=2)),  # a grouped transposed convolution
        ((6, 4, 5), ChannelLayout(2, groups=3)),
        ((3, 4, 5), ChannelLayout(2, groups=3)),  # experts
        ((3, 4, 5), ChannelLayout(1, groups=3)),
    ],
)
def test_a_tensor_is_made_of_its_rows_again(shape: tuple[int, ...], layout: ChannelLayout) -> None:
    weight, scales = seeded(0, *shape), Granularity(per_channel=True).layout(shape, layout)
    assert torch.equal(scales.from_rows(scales.rows(weight)), weight)


def test_a_channel_layout_counts_its_channels() -> None:
    assert ChannelLayout().count((5, 7)) == 5
    assert ChannelLayout(1, 2).count((8, 3, 2, 2)) == 6


def test_a_candidate_with_a_group_size_parses_and_prints() -> None:
    pair = LayerQConfig.parse("w4g64a8")
    assert (pair.weight.bits, pair.weight.group_size, pair.weight.per_channel) == (4, 64, True)
    assert (pair.activation.bits, pair.activation.group_size) == (8, None)
    assert str(pair) == "w4g64a8"
    assert LayerQConfig.parse("w4g128").activation is None
    assert pair.at_least(8).weight == QuantSpec(8, per_channel=True, group_size=64)
    assert QConfig.parse("w8a8").default.with_bits_of(pair).weight.group_size == 64
    assert QuantSpec(group_size=64).bits == 8


@pytest.mark.parametrize(
    ("size", "message"),
    [*((size, "group_size must be 2 or more, got .* Write a whole number") for size in (0, 1, -64)),
     *((size, "group_size must be a whole number, got .* Write for example") for size in ("64",)),
     (2.5, "group_size must be .* got 2.5")],
)  # fmt: skip
def test_a_group_size_that_is_none_is_refused(size: Any, message: str) -> None:
    with pytest.raises(QConfigError, match=message):
        QuantSpec(4, group_size=size)


@pytest.mark.parametrize("text", ["w4g", "g64w4", "w4a8g64", "w4g1a8"])
def test_what_is_no_candidate_is_refused(text: str) -> None:
    with pytest.raises(QConfigError):
        LayerQConfig.parse(text)


def outlier_net() -> nn.Module:
    """Weights of very different size along the input, which one scale per channel cannot follow."""
    net = build(lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(0, -3, 128)[None])
    return net


def divergence_of(qconfig: str, **options: Any) -> tuple[float, nn.Module]:
    net, x = outlier_net(), seeded(1, 256, 128) * torch.logspace(0, 3, 128)
    expected = net(x)
    calibration = calibrate(net, x.split(64), QConfig.parse(qconfig, first_last_bits=None, **options))
    calibration.release()
    return relative_error(net(x), expected), net


def test_groups_follow_weights_that_differ_along_the_input() -> None:
    per_channel, _ = divergence_of("w3")
    grouped, net = divergence_of("w3g16")
    assert grouped < per_channel / 4
    assert net[0].weight_fake_quant.scale.shape == (64, 8, 1)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("rounding", ["continuous", "adaround"])
def test_a_convolutional_net_with_groups_goes_through_all_stages(rounding: str, tmp_path: Any) -> None:
    net = build(ResNet).eval()
    images = [seeded(i, 32, 2, 6, 6) for i in range(4)]
    expected = net(images[0]).detach()
    calibration = calibrate(net, images, QConfig.parse("w3g16a8", first_last_bits=None))
    nearest = relative_error(net(images[0]), expected)
    config = ReconstructionConfig(steps=60, batch_size=16, rounding=rounding)
    result = adaquant(calibration, config=config)
    assert any(row.accepted for row in result.units)
    assert relative_error(net(images[0]), expected) < nearest
    assert {row.bits for row in result.units} == {"w3g16a8"}
    tuned = {row.name for row in result.units if row.accepted}
    on_grid = [layer for name, layer in calibration.layers.items() if tuned & {name, name.rpartition(".")[0]}]
    assert on_grid
    for layer in on_grid:  # tuning leaves its weights on their grids
        torch.testing.assert_close(layer.weight_fake_quant(layer.weight), layer.weight)
    para_normalize(calibration, every_layer=True, measure="mse", held_out=0.0)
    packed = tmp_path / "packed.safetensors"
    save_packed(net, packed)
    loaded = load_packed(build(ResNet, seed=1).eval(), packed)
    assert torch.equal(loaded(images[1]), net(images[1]))
    assert {layer.qconfig for layer in prepared_layers(loaded)} == {layer.qconfig for layer in prepared_layers(net)}
    reloaded = build(ResNet, seed=2).eval()
    prepare(reloaded, "w8a8")
    reloaded.load_state_dict(net.state_dict())
    assert same_state(state(reloaded), state(net))
    assert torch.equal(reloaded(images[1]), net(images[1]))


def prepared_layers(net: nn.Module) -> list[Any]:
    return [child for child in net.modules() if getattr(child, "qconfig", None) is not None]


def test_statistics_scale_every_group_of_a_channel() -> None:
    net, x = outlier_net(), seeded(1, 256, 128) * torch.logspace(0, 3, 128)
    calibration = calibrate(net, x.split(64), QConfig.parse("w2g32", first_last_bits=None))
    layer = calibration.layers["0"]
    integers = layer.weight_fake_quant.integers(layer.weight)
    before = layer.weight_fake_quant.scale.clone()
    result = para_normalize(calibration, measure="mse", held_out=0.0)
    assert result.accepted
    ratio = layer.weight_fake_quant.scale / before
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert (ratio - 1).abs().max() > 0.01
    assert torch.equal(layer.weight_fake_quant.integers(layer.weight), integers)


def test_sensitivities_and_sizes_know_the_groups() -> None:
    net, x = outlier_net(), seeded(1, 128, 128) * torch.logspace(0, 3, 128)
    calibration = calibrate(net, x.split(64), QConfig.parse("w8", first_last_bits=None))
    names = ["w8", "w3", "w3g16"]
    table = measure_sensitivity(calibration, names, measure="mse")
    assert table.rises["0"]["w3g16"] < table.rises["0"]["w3"]
    cost = size_cost(calibration, Candidates(calibration, names))
    weights = 128 * 64
    assert cost.values["0"] == {
        "w8": weights + 64 * 4,
        "w3": weights * 3 / 8 + 64 * 4,
        "w3g16": weights * 3 / 8 + 64 * 8 * 4,
    }


def test_observer_and_signed_scales_survive_a_state_dict_and_a_packed_file(tmp_path: Any) -> None:
    net = build(ResNet).eval()
    options = {"weight_observer": "percentile", "percentile": 99.0, "activation_observer": "minmax"}
    calibration = calibrate(
        net, [seeded(0, 16, 2, 6, 6)], QConfig.parse("w4a8", signed_scales=False, first_last_bits=None, **options)
    )
    expected = calibration.layers["stem"].qconfig
    assert (expected.weight.observer, expected.weight.percentile, expected.weight.signed_scale) == (
        "percentile", 99.0, False
    )  # fmt: skip
    save_packed(net, tmp_path / "packed.safetensors")
    loaded = load_packed(build(ResNet), tmp_path / "packed.safetensors")
    reloaded = build(ResNet)
    prepare(reloaded, "w8a8")
    reloaded.load_state_dict(copy.deepcopy(net.state_dict()))
    assert loaded.stem.qconfig == reloaded.stem.qconfig == expected


def test_a_group_of_all_inputs_or_more_is_the_whole_channel() -> None:
    rows = {}
    for group in (None, 40, 64):
        layer = swapped_class(nn.Linear).from_float(build(lambda: nn.Linear(40, 4)))
        spec = QuantSpec(4, per_channel=True, group_size=group, observer="percentile", percentile=90.0)
        layer.attach(LayerQConfig(spec, None))
        layer.choose_weight_scales()
        rows[group] = layer.weight_fake_quant.scale.flatten()
    assert torch.equal(rows[40], rows[None])
    assert torch.equal(rows[64], rows[None])


def test_an_activation_has_no_groups() -> None:
    with pytest.raises(QConfigError, match="activations have one scale per tensor"):
        LayerQConfig(QuantSpec(4), QuantSpec(8, group_size=2))
