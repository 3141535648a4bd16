"""Small models that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq import prepare
from lightning_ptq.network.trace import Trace, trace
from lightning_ptq.numerics.qconfig import LayerQConfig


def randomize_norms(module: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine parameters as after training; returns the module in eval mode."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.3, 3)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.3, 3)
                nn.init.normal_(norm.bias)
    return module.eval()


def attach_all(module: nn.Module, *inputs: Any, bits: str = "w8") -> Trace:
    """Prepare ``module`` and give every layer quantizers with scales still to be chosen; returns a watched forward."""
    prepared = prepare(module.eval(), bits)
    with torch.no_grad():
        watched = trace(module, lambda: module(*inputs))
    for layer in prepared.layers.values():
        layer.attach(LayerQConfig.parse(bits))
    return watched


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm and a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SamePadConv2d(nn.Conv2d):
    """A user's convolution with a forward and a parameter of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(F.pad(x, (1, 1, 1, 1), value=0.5))


class LayerScale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Zoo(nn.Module):
    """One of everything that a packed file has to keep; takes images of 3 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.block = ResidualBlock(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)
        self.up_norm = nn.BatchNorm2d(12, affine=False)
        self.depthwise = SamePadConv2d(12, 12, 3, groups=12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(48, 17, bias=False)
        self.embedding = nn.Embedding(4, 17)
        self.layer_norm = nn.LayerNorm(17)
        self.layer_scale = LayerScale(17)
        self.free_norm = nn.BatchNorm1d(17)
        self.gate = nn.Linear(17, 17)
        self.head = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.stem_norm(self.stem(x - self.mean))))
        x = self.depthwise(F.relu(self.up_norm(self.up(x))))
        x = self.hidden(self.pool(x).flatten(1))
        x = self.layer_scale(self.layer_norm(x + self.embedding.weight.sum(0)))
        x = self.free_norm(x * self.gate(x).sigmoid())
        return self.head(x.tanh())
