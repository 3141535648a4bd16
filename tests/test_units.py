from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import ResidualBlock, attach_all
from torch import Tensor, nn
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

from lightning_ptq import prepare
from lightning_ptq.errors import QConfigError
from lightning_ptq.network.trace import trace
from lightning_ptq.network.units import find_units
from lightning_ptq.numerics.qconfig import LayerQConfig


class AttributeBlocks(nn.Module):
    """Residual blocks that are plain attributes, registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.second, self.first = ResidualBlock(4), ResidualBlock(4)
        self.stem = nn.Conv2d(3, 4, 1)
        self.twice = ResidualBlock(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        return self.head(self.twice(self.twice(x)).mean((2, 3)))


class DeepResidual(nn.Module):
    """A long body behind one skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(10)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TwoDeepResiduals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DeepResidual(), DeepResidual()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Stages(nn.Module):
    """Stages without a residual connection, each a sequence of blocks behind a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"low": Stage(), "high": Stage()})
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return self.head(x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ConvAct(), ConvAct())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ConvAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def convolutions() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())])


def vision_transformer() -> nn.Module:
    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )


IMAGE = (2, 3, 8, 8)
VIT_LAYER = "encoder.layers.encoder_layer_"

# name -> model, input shape, units, and quantized layers in each unit
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], list[int]]] = {
    "resnet18": (
        lambda: resnet18(num_classes=3),
        (1, 3, 32, 32),
        ["conv1", *[f"layer{i}.{j}" for i in range(1, 5) for j in (0, 1)], "fc"],
        [1, 2, 2, 3, 2, 3, 2, 3, 2, 1],
    ),
    "mobilenet_v2": (
        lambda: mobilenet_v2(width_mult=0.1, num_classes=3),
        (1, 3, 32, 32),
        ["features.0", *[f"features.{i}" for i in range(1, 19)], "classifier"],
        [1, 2, *[3] * 16, 1, 1],
    ),
    "vit": (
        vision_transformer,
        IMAGE,
        ["conv_proj", VIT_LAYER + "0", VIT_LAYER + "1", VIT_LAYER + "2", "heads"],
        [1, 6, 6, 6, 1],
    ),
    "encoder": (Encoder, (2, 5, 3), ["embed", "encoder.layers.0", "encoder.layers.1", "head"], [1, 6, 6, 1]),
    "convolutions": (convolutions, IMAGE, ["0", "3", "6"], [1, 1, 1]),
    "attribute_blocks": (AttributeBlocks, IMAGE, ["stem", "first", "second", "twice", "head"], [1, 2, 2, 2, 1]),
    "deep_residuals": (TwoDeepResiduals, IMAGE, ["first", "second"], [10, 10]),
    "stages": (
        Stages,
        IMAGE,
        ["stages.low", "stages.high", "head"],
        [2, 2, 1],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_in_execution_order(name: str) -> None:
    build, shape, names, sizes = MODELS[name]
    net = build()
    watched = attach_all(net, torch.randn(shape))
    units = find_units(net, watched)
    assert [unit.name for unit in units] == names
    assert [len(unit.layers) for unit in units] == sizes
    assert all(unit.module is net.get_submodule(unit.name) for unit in units)
    in_units = [layer for unit in units for layer in unit.layers]
    assert in_units == watched.layer_order

    single = find_units(net, watched, "layer")
    inside = {name: [at for at in watched.layer_order if at.startswith(f"{name}.")] for name in watched.layer_order}
    outer = [name for name in watched.layer_order if not any(name in names for names in inside.values())]
    assert [unit.name for unit in single] == outer
    assert [list(unit.layers) for unit in single] == [[name, *inside[name]] for name in outer]


def test_calls_are_counted() -> None:
    net = AttributeBlocks()
    units = find_units(net, attach_all(net, torch.randn(IMAGE)))
    assert {unit.name: unit.calls for unit in units if unit.calls != 1} == {"twice": 2}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (["layer?"], ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        (["layer1.*", "layer[234]"], ["conv1", "layer1.0", "layer1.1", "layer2", "layer3", "layer4", "fc"]),
        (lambda name, module: isinstance(module, BasicBlock), MODELS["resnet18"][2]),
        (lambda name, module: name == "", [""]),
    ],
    ids=["patterns", "outer_before_inner", "callable", "root"],
)
def test_blocks_can_be_named(blocks: object, expected: list[str]) -> None:
    net = resnet18(num_classes=3)
    watched = attach_all(net, torch.randn(1, 3, 32, 32))
    units = find_units(net, watched, blocks=blocks)  # type: ignore[arg-type]
    assert [unit.name for unit in units] == expected
    assert [layer for unit in units for layer in unit.layers] == watched.layer_order


def test_named_blocks_of_one_type() -> None:
    net = mobilenet_v2(width_mult=0.1)
    watched = attach_all(net, torch.randn(1, 3, 32, 32))
    named = find_units(net, watched, blocks=lambda name, module: isinstance(module, InvertedResidual))
    blocks = [f"features.{i}" for i in range(1, 18)]
    assert [unit.name for unit in named] == ["features.0.0", *blocks, "features.18.0", "classifier.1"]


def test_a_pattern_without_a_match_is_an_error() -> None:
    net = AttributeBlocks()
    watched = attach_all(net, torch.randn(IMAGE))
    with pytest.raises(QConfigError, match=r"blocks: no layer matches 'layer\*'.*The names here: .*second"):
        find_units(net, watched, blocks=["first", "layer*"])


def test_layers_that_stay_float_are_in_no_unit() -> None:
    net = AttributeBlocks().eval()
    layers = prepare(net, "w4").layers
    with torch.no_grad():
        watched = trace(net, lambda: net(torch.randn(IMAGE)))
    for name in ("first.conv1", "first.conv2", "second.conv1", "head"):
        layers[name].attach(LayerQConfig.parse("w4"))
    units = find_units(net, watched)
    assert {unit.name: list(unit.layers) for unit in units} == {
        "first": ["first.conv1", "first.conv2"],
        "second": ["second.conv1"],
        "head": ["head"],
    }
