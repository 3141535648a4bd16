"""What is learned of one layer, and how: the configuration, and the variables behind weights, bias and scales.

Everything is tuned in units of what it is: weights in steps of their grid, scales relative to themselves. So one set
of learning rates serves all widths from 2 to 8 bits.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lightning_ptq.network.layers import QuantLayer, layer_tensors
from lightning_ptq.network.units import Unit
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.tuning.config import ReconstructionConfig


class Tuner:
    """The variables of one layer, and the tensors that they make of its parameters and quantizer buffers."""

    def __init__(self, prefix: str, layer: QuantLayer, config: ReconstructionConfig) -> None:
        self.prefix, self.layer, self.config = prefix, layer, config
        self.quantizer = cast(FakeQuantize, layer.weight_fake_quant)
        self.start = {name: tensor.detach().clone() for name, tensor in layer_tensors(layer).items()}
        learn = set(config.learn) - ({"weight", "weight_scale"} if layer.tied else set())
        self.variables: dict[str, tuple[Tensor, float]] = {}  # with their rates
        for name, part, rate in (
            ("weight", "weight", config.weight_lr),
            ("bias", "bias", config.bias_lr),
            ("weight_scale", "weight_fake_quant.scale", config.scale_lr),
            ("activation_scale", "input_fake_quant.scale", config.scale_lr),
            ("activation_zero_point", "input_fake_quant.zero_point", config.zero_point_lr),
        ):
            symmetric = part.endswith("zero_point") and layer.input_fake_quant and layer.input_fake_quant.spec.symmetric
            if name in learn and part in self.start and not symmetric:
                self.variables[part] = (self._variable(part), rate)

    def _variable(self, part: str) -> Tensor:
        return torch.zeros_like(self.start[part], dtype=torch.float32).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """What the module is to compute with, by name, differentiable in the variables."""
        return {self.prefix + part: self._value(part, v) for part, (v, _) in self.variables.items()}

    def _value(self, part: str, variable: Tensor) -> Tensor:
        start = self.start[part]
        if part == "weight":
            return start + self.layer.scale_channels(variable, self._weight_step())
        if part == "bias":
            return start + variable * _magnitude(start)
        if part.endswith("scale"):
            return start * variable.exp()
        return start + variable

    def _weight_step(self) -> Tensor:
        """The grid step of each output channel, as the tuning found it."""
        step = self.start["weight_fake_quant.scale"].flatten()
        shape, _ = self.layer.channel_layout()
        return step if step.numel() > 1 else step.expand(torch.Size(shape).numel())

    def penalty(self, progress: float) -> Tensor:
        """What is added to the loss; ``progress`` runs from 0 to 1."""
        return torch.zeros((), device=self.layer.weight.device)

    @torch.no_grad()
    def write(self) -> None:
        """Put the tuned values into the layer, the weight on its grid."""
        for part, (variable, _) in self.variables.items():
            if part not in ("weight", "bias"):
                buffer = layer_tensors(self.layer)[part]
                value = self._value(part, variable)
                buffer.copy_(self._whole(value) if part.endswith("zero_point") else value)
        weight, bias = self.layer.weight, self.layer.bias
        if "weight" in self.variables:
            weight = self._final_weight(self.variables["weight"][0])
        if bias is not None and "bias" in self.variables:
            bias = self._value("bias", self.variables["bias"][0])
        if not self.layer.tied:
            weight = self.quantizer(weight)
        elif "bias" not in self.variables:
            return
        _set_values(self.layer, weight, bias)

    def _final_weight(self, variable: Tensor) -> Tensor:
        return self._value("weight", variable)

    def _whole(self, zero_point: Tensor) -> Tensor:
        spec = cast(FakeQuantize, self.layer.input_fake_quant).spec
        return zero_point.round().clamp(spec.quant_min, spec.quant_max)


class AdaRoundTuner(Tuner):
    """Weights are rounded down, or up, on a fixed grid: ``s · (⌊w / s⌋ + h(v))`` with a rectified sigmoid ``h``."""

    def __init__(self, prefix: str, layer: QuantLayer, config: ReconstructionConfig) -> None:
        super().__init__(prefix, layer, config)
        self.variables.pop("weight_fake_quant.scale", None)

    def _variable(self, part: str) -> Tensor:
        if part != "weight":
            return super()._variable(part)
        step = self.layer.scale_channels(torch.ones_like(self.start["weight"]), self._weight_step())
        ratio = self.start["weight"] / step
        self.floor = ratio.floor()
        share = ((ratio - self.floor + 0.1) / 1.2).clamp(0.01, 0.99)
        return share.logit().requires_grad_()

    def _up(self, variable: Tensor) -> Tensor:
        return (variable.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def _value(self, part: str, variable: Tensor) -> Tensor:
        if part != "weight":
            return super()._value(part, variable)
        return self._on_grid(self.floor + self._up(variable))

    def _on_grid(self, integers: Tensor) -> Tensor:
        spec = self.quantizer.spec
        return self.layer.scale_channels(integers.clamp(spec.quant_min, spec.quant_max), self._weight_step())

    def _final_weight(self, variable: Tensor) -> Tensor:
        return self._on_grid(self.floor + (self._up(variable) >= 0.5))

    def penalty(self, progress: float) -> Tensor:
        """Drives every weight to up or down, harder as time goes on (Nagel et al., 2020, eq. 24)."""
        if "weight" not in self.variables or progress < 0.2:
            return super().penalty(progress)
        sharpness = 2 + 18 * (1 - (progress - 0.2) / 0.8)
        undecided = 1 - (2 * self._up(self.variables["weight"][0]) - 1).abs().pow(sharpness)
        return 0.1 * undecided.mean()


def make_tuner(unit: Unit, name: str, layer: QuantLayer, config: ReconstructionConfig) -> Tuner:
    """The tuner of the unit's layer ``name`` for the configured rounding."""
    inside = name.removeprefix(unit.name).removeprefix(".")
    kind = AdaRoundTuner if config.rounding == "adaround" else Tuner
    return kind(f"{inside}." if inside else "", layer, config)


def _magnitude(bias: Tensor) -> Tensor:
    """Mean magnitude of a bias; 1 where it is 0 throughout."""
    mean = bias.abs().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))


@torch.no_grad()
def _set_values(layer: QuantLayer, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
