from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from models import SamePadConv2d, randomize_norms
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import prepare
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.swapping import swapped_class
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.numerics.quantize import fake_quantize
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.tuning.drop import ActivationDrop

# name -> how the layer is made, and an input's shape
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv1d_grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 7, 6)),
    "conv2d_no_bias": (lambda: nn.Conv2d(4, 6, (3, 1), bias=False), (2, 4, 5, 4)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 5, 4)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 4)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5, 4)),
    "conv2d_one_channel": (lambda: nn.Conv2d(4, 1, 3), (2, 4, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2, padding=1), (2, 3, 3, 4, 3)),
    "conv3d_depthwise": (lambda: nn.Conv3d(3, 3, 2, groups=3, bias=False), (2, 3, 3, 4, 3)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transpose1d_grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (2, 4, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 3, 4)),
    "transpose2d_no_bias": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (2, 4, 3, 4)),
    "transpose2d_grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 3, 4)),
    "transpose2d_depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 3, 4)),
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear_no_bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build, shape = LAYERS[name]
        return build(), torch.randn(shape)


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d))


def output_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def quantized(name: str, bits: str = "w3a4") -> tuple[nn.Module, Any, Tensor, Tensor]:
    """The float layer, its counterpart with quantizers, the scale set for every output channel, and an input."""
    layer, x = make(name)
    counterpart = swapped_class(type(layer)).from_float(layer)
    counterpart.attach(LayerQConfig.parse(bits))
    scale = torch.linspace(0.02, 0.2, output_channels(layer))
    counterpart.weight_fake_quant.scale.copy_(scale.view_as(counterpart.weight_fake_quant.scale))
    if counterpart.input_fake_quant is not None:
        counterpart.input_fake_quant.scale.fill_(0.3)
        counterpart.input_fake_quant.zero_point.fill_(6)
    return layer, counterpart, scale, x


def functional(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch's functions compute for the layer's geometry."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    dims = weight.dim() - 2
    if is_transposed(layer):
        function = [F.conv_transpose1d, F.conv_transpose2d][dims - 1]
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return function(x, weight, bias, *geometry)
    padding = layer.padding
    if layer.padding_mode == "reflect":
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)], mode="reflect")
        padding = 0
    function = [F.conv1d, F.conv2d, F.conv3d][dims - 1]
    return function(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def torch_quantized_weight(layer: Any, scale: Tensor, spec: QuantSpec) -> Tensor:
    """By torch's own kernel; a grouped transposed weight group by group, for its channels lie in two dimensions."""
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if not is_transposed(layer):
        return torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, spec.quant_min, spec.quant_max)
    parts = [
        torch.fake_quantize_per_channel_affine(part, s, z, 1, spec.quant_min, spec.quant_max)
        for part, s, z in zip(*(t.chunk(layer.groups) for t in (layer.weight, scale, zero)), strict=True)
    ]
    return torch.cat(parts)


@each_layer
def test_without_quantizers_the_counterpart_is_the_float_layer(name: str) -> None:
    layer, x = make(name)
    counterpart = swapped_class(type(layer)).from_float(layer)
    assert isinstance(counterpart, QuantLayer)
    assert isinstance(counterpart, type(layer))
    assert torch.equal(counterpart(x), layer(x))
    assert counterpart.weight is layer.weight
    assert counterpart.qconfig is None
    assert list(counterpart.state_dict()) == list(layer.state_dict())


@each_layer
@pytest.mark.parametrize("bits", ["w3a4", "w5"])
def test_the_counterpart_computes_with_torch_quantized_input_and_weight(name: str, bits: str) -> None:
    layer, counterpart, scale, x = quantized(name, bits)
    expected_x = torch.fake_quantize_per_tensor_affine(x, 0.3, 6, 0, 15) if "a" in bits else x
    weight = torch_quantized_weight(layer, scale, counterpart.qconfig.weight)
    found = counterpart(x)
    torch.testing.assert_close(found, functional(layer, expected_x, weight, layer.bias), rtol=1e-6, atol=1e-6)
    assert (found - layer(x)).abs().max() > 0.01  # so the comparison says something
    assert counterpart.weight is layer.weight


@each_layer
def test_rows_hold_the_weights_of_one_output_channel(name: str) -> None:
    layer, counterpart, _, _ = quantized(name)
    rows = counterpart.weight_fake_quant.rows(counterpart.weight)
    if is_transposed(layer):
        expected = torch.cat([group.transpose(0, 1).flatten(1) for group in layer.weight.chunk(layer.groups)])
    else:
        expected = layer.weight.flatten(1)
    assert torch.equal(rows, expected)


@each_layer
def test_the_chosen_weight_scale_fits_each_channel(name: str) -> None:
    layer, counterpart, _, _ = quantized(name)
    counterpart.attach(LayerQConfig(QuantSpec(8, per_channel=True, observer="minmax"), None))
    factor = torch.logspace(-3, 3, output_channels(layer))
    counterpart.set_parameters(
        {"weight": counterpart.scale_channels("weight", layer.weight, factor), "bias": layer.bias}
    )
    counterpart.choose_weight_scales()
    found, expected = counterpart.weight_fake_quant(counterpart.weight), counterpart.weight
    relative = counterpart.weight_fake_quant.rows((found - expected).abs()).amax(
        1
    ) / counterpart.weight_fake_quant.rows(expected).abs().amax(1)
    assert (relative < 1 / 127).all()


@each_layer
def test_scaled_channels_scale_the_output_channels(name: str) -> None:
    layer, x = make(name)
    counterpart = swapped_class(type(layer)).from_float(layer)
    factor = torch.linspace(-1, 2, output_channels(layer))
    scaled = counterpart.scale_channels("weight", layer.weight, factor)
    assert scaled.shape == layer.weight.shape
    along = factor if isinstance(layer, nn.Linear) else factor.view(-1, *[1] * (layer.weight.dim() - 2))
    torch.testing.assert_close(functional(layer, x, scaled, None), functional(layer, x, layer.weight, None) * along)


def test_attached_quantizers_have_their_shape_from_the_start() -> None:
    shapes = {name: tuple(quantized(name)[1].weight_fake_quant.scale.shape) for name in LAYERS if name[-1] != "s"}
    assert shapes == {
        "conv1d": (6, 1, 1),
        "conv1d_grouped": (6, 1, 1),
        "conv2d": (6, 1, 1, 1),
        "conv2d_grouped": (6, 1, 1, 1),
        "conv2d_depthwise": (8, 1, 1, 1),
        "conv2d_reflect": (6, 1, 1, 1),
        "conv2d_one_channel": (1, 1, 1, 1),
        "conv3d": (5, 1, 1, 1, 1),
        "conv3d_depthwise": (3, 1, 1, 1, 1),
        "transpose1d": (1, 6, 1),
        "transpose1d_grouped": (2, 1, 3, 1),
        "transpose2d": (1, 6, 1, 1),
        "transpose2d_grouped": (2, 1, 3, 1, 1),
        "transpose2d_depthwise": (4, 1, 1, 1, 1),
        "linear": (7, 1),
    }


def test_output_size_reaches_a_transposed_convolution() -> None:
    _, counterpart, _, _ = quantized("transpose2d", "w8")
    x = torch.randn(1, 4, 3, 4)
    assert counterpart(x, output_size=(8, 9)).shape == (1, 6, 8, 9)
    assert counterpart(x, [7, 9]).shape == (1, 6, 7, 9)


def test_a_derived_class_keeps_its_forward() -> None:
    layer, x = SamePadConv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    counterpart = swapped_class(SamePadConv2d).from_float(layer)
    assert isinstance(counterpart, SamePadConv2d)
    assert torch.equal(counterpart(x), layer(x))
    counterpart.attach(LayerQConfig.parse("w2"))
    counterpart.choose_weight_scales()
    scale = counterpart.weight_fake_quant.scale.flatten()
    weight = torch_quantized_weight(layer, scale, counterpart.qconfig.weight)
    expected = layer.gain * F.conv2d(F.pad(x, (1, 1, 1, 1), value=0.5), weight, layer.bias)
    torch.testing.assert_close(counterpart(x), expected)


class Adapter(nn.Linear):
    """A layer that holds layers."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down = nn.Linear(4, 2)
        self.up = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def test_layers_inside_a_layer_are_swapped_too() -> None:
    net = nn.Sequential(Adapter(), nn.ReLU())
    original = net[0]
    prepared = prepare(net, "w4")
    assert list(prepared.layers) == ["0", "0.down", "0.up"]
    assert all(isinstance(layer, QuantLayer) for layer in (net[0], net[0].down, net[0].up))
    prepared.undo()
    assert net[0] is original
    assert [type(child) for child in net.modules()] == [nn.Sequential, Adapter, nn.Linear, nn.Linear, nn.ReLU]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("attached", [False, True], ids=["float", "quantized"])
def test_copies_keep_outputs_and_are_independent(make_copy: Callable, attached: bool) -> None:
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), SamePadConv2d(4, 4, 3)))
    layers = prepare(net, "w3a5").layers.values()
    for layer in layers if attached else ():
        layer.attach(LayerQConfig.parse("w3a5"))
        layer.choose_weight_scales()
    net[1].set_folded(attached)
    x = torch.randn(1, 3, 6, 6)
    expected = net(x)
    twin = make_copy(net)
    assert torch.equal(twin(x), expected)
    assert list(twin.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(net(x), expected)
    assert not torch.equal(twin(x), expected)


def test_a_whole_module_goes_through_torch_save() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)
    for layer in prepare(net, "w2").layers.values():
        layer.attach(LayerQConfig.parse("w2"))
        layer.choose_weight_scales()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))


def test_a_fused_transformer_layer_computes_with_quantized_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    root = nn.ModuleDict({"layer": layer})
    x, twin = torch.randn(2, 5, 8), copy.deepcopy(layer)
    with torch.no_grad():
        float_output = layer(x)
        prepare(root, "w2")
        torch.testing.assert_close(layer(x), float_output, rtol=1e-4, atol=1e-5)
        for name in ("linear1", "linear2"):
            counterpart = getattr(layer, name)
            counterpart.attach(LayerQConfig.parse("w2"))
            counterpart.choose_weight_scales()
            getattr(twin, name).weight.copy_(counterpart.weight_fake_quant(counterpart.weight))
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-4, atol=1e-5)
        assert (layer(x) - float_output).abs().max() > 0.05


def test_float_mode_computes_with_the_reference_and_ends() -> None:
    layer, counterpart, _, x = quantized("conv2d")
    counterpart.keep_reference()
    counterpart.set_parameters({"weight": layer.weight + 1, "bias": layer.bias + 1})
    tuned = counterpart(x)

    def run_and_fail() -> None:
        with ops_in_mode(nn.ModuleList([counterpart]), "float"):
            assert torch.equal(counterpart(x), layer(x))
            raise KeyError

    with pytest.raises(KeyError):
        run_and_fail()
    assert torch.equal(counterpart(x), tuned)
    assert (tuned - layer(x)).abs().max() > 0.5


def test_dropped_elements_keep_their_float_value() -> None:
    quantizer, x = FakeQuantize(QuantSpec(4)), torch.rand(20_000)
    rounded = quantizer(x)
    quantizer.drop = ActivationDrop(torch.Generator().manual_seed(0))
    quantizer.drop.probability = 0.25
    mixed = quantizer(x)
    dropped = mixed == x
    assert torch.equal(mixed[~dropped], rounded[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropping_has_the_gradients_of_a_mixture(symmetric: bool, dtype: torch.dtype) -> None:
    spec, x = QuantSpec(4, symmetric=symmetric), seeded(0, 2000).to(dtype)
    keep = (seeded(1, 2000) > 0).float()
    found = []
    for fused in (True, False):
        values = x.clone().requires_grad_()
        scale, zero_point = torch.tensor(0.2, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        given = (values, scale, zero_point, spec.quant_min, spec.quant_max)
        y = fake_quantize(*given, keep) if fused else torch.where(keep > 0, fake_quantize(*given), values)
        grads = torch.autograd.grad((y.float() * seeded(2, 2000)).sum(), (values, scale, zero_point))
        found.append([y.detach(), *grads])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=1e-4)


def test_gradients_reach_weight_bias_and_input() -> None:
    _, counterpart, _, x = quantized("conv2d", "w8a8")
    counterpart(x.requires_grad_()).square().sum().backward()
    for tensor in (x, counterpart.weight, counterpart.bias):
        assert tensor.grad.abs().sum() > 0


def test_a_per_tensor_weight_scale() -> None:
    layer, x = make("transpose2d_grouped")
    counterpart = swapped_class(type(layer)).from_float(layer)
    counterpart.attach(LayerQConfig(QuantSpec(3, observer="minmax"), None))
    counterpart.choose_weight_scales()
    low, high = layer.weight.min().item(), layer.weight.max().item()
    weight = torch.fake_quantize_per_tensor_affine(layer.weight, max(-low / 4, high / 3), 0, -4, 3)
    torch.testing.assert_close(counterpart(x), functional(layer, x, weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_what_has_no_counterpart() -> None:
    assert [swapped_class(kind) for kind in (nn.ReLU, nn.LayerNorm, nn.Sequential)] == [None] * 3
    assert swapped_class(swapped_class(nn.Conv2d)) is None
