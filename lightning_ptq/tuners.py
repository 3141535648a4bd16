"""What is learned of one layer, and how: the configuration, and the variables behind weights, bias and scales.

Everything is tuned in units of what it is: weights in steps of their grid, scales relative to themselves. So one set
of learning rates serves all widths from 2 to 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_ptq.errors import QConfigError
from lightning_ptq.fake_quant import FakeQuantize
from lightning_ptq.modules import QuantLayer
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.units import Unit

Rounding = Literal["continuous", "adaround"]

LEARNABLE = ("weight", "bias", "weight_scale", "activation_scale", "activation_zero_point")


DEFAULT_STEPS = {2: 200, 3: 200, 4: 100, 5: 60, 6: 60, 7: 40, 8: 40}
"""Steps by bit width with 1024 samples or more: the coarser the grid, the more there is to gain, and the longer it
takes."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """How a unit is tuned.

    Args:
        steps: Optimisation steps a unit; None to go by the least width in the unit and, below 4 bits, the number
            of samples (:meth:`steps_for`).
        batch_size: Samples a step.
        learn: What is tuned; any of ``"weight"``, ``"bias"``, ``"weight_scale"``, ``"activation_scale"``,
            ``"activation_zero_point"``.
        weight_lr: Adam's rate for weights, in steps of the layer's weight grid; for AdaRound, of its rounding variable.
        bias_lr: For biases, relative to their mean magnitude in the layer.
        scale_lr: For weight and activation scales, relative to the scale.
        zero_point_lr: For activation zero points, in grid steps.
        rounding: ``"continuous"``: a weight may move any number of grid steps (AdaQuant); ``"adaround"``: up or down
            only, with a penalty that drives it to either (Nagel et al., 2020).
        drop: Probability that an activation keeps its float value in the first step (QDrop, Wei et al., 2022); it
            falls to 0 linearly, so that the last steps see the activations that the quantized unit will see.
        held_out: Share of the samples on which tuning is judged and which it does not see.
        parts: The calibration batches are dealt into so many parts, and each step takes samples of all of them. A
            part is captured, held and computed by one rank: the result is the same on any number of ranks, of which
            no more than this share a step.
        tolerance: A unit whose held-out error is below this to begin with is not tuned; None for 2e-3 where all widths
            are 8 bits, for there is mostly nothing to gain, and 0 below.

    Raises:
        QConfigError: If a value is out of its domain.
    """

    steps: int | None = None
    batch_size: int = 32
    learn: tuple[str, ...] = ("weight", "bias", "weight_scale", "activation_scale")
    weight_lr: float = 0.025
    bias_lr: float = 0.01
    scale_lr: float = 0.01
    zero_point_lr: float = 0.05
    rounding: Rounding = "continuous"
    drop: float = 0.5
    held_out: float = 0.0625
    parts: int = 2
    tolerance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "learn", tuple(self.learn))
        unknown = [name for name in self.learn if name not in LEARNABLE]
        if unknown:
            raise QConfigError(f"learn holds {unknown}, which cannot be learned. Choose from {list(LEARNABLE)}.")
        if self.rounding not in ("continuous", "adaround"):
            raise QConfigError(f"rounding must be 'continuous' or 'adaround', got {self.rounding!r}.")
        for name in ("steps", "batch_size", "parts"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and (name, value) != ("steps", None):
                raise QConfigError(f"{name} must be 1 or more, got {value!r}. Write a whole number.")
        for name in ("weight_lr", "bias_lr", "scale_lr", "zero_point_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise QConfigError(f"{name} must be 0 or more, got {getattr(self, name)!r}. Write for example 0.01.")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise QConfigError(f"tolerance must be 0 or more, got {self.tolerance!r}. Write for example 1e-3.")
        for name in ("drop", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise QConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}.")

    def steps_for(self, qconfigs: Iterable[LayerQConfig], samples: int) -> int:
        """Steps for a unit whose layers have these widths, with so many calibration samples.

        Below 4 bits, the fewer samples there are, the sooner tuning fits them alone: half of the table's steps at a
        quarter of its 1024 samples.
        """
        if self.steps is not None:
            return self.steps
        bits = _least_bits(qconfigs)
        share = math.sqrt(min(1.0, samples / 1024)) if bits < 4 else 1.0
        return max(1, round(DEFAULT_STEPS[bits] * share))

    def tolerance_for(self, qconfigs: Iterable[LayerQConfig]) -> float:
        """Tolerance for a unit whose layers have these widths."""
        if self.tolerance is not None:
            return self.tolerance
        return 2e-3 if _least_bits(qconfigs) == 8 else 0.0


def _least_bits(qconfigs: Iterable[LayerQConfig]) -> int:
    return min(spec.bits for pair in qconfigs for spec in (pair.weight, pair.activation) if spec is not None)


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


def layer_tensors(layer: QuantLayer) -> dict[str, Tensor]:
    """What tuning changes of a layer, by name: its parameters, scales and zero points."""
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    buffers = {name: buffer for name, buffer in layer.named_buffers() if "fake_quant" in name}
    return {**parameters, **buffers}


def layer_state(layer: QuantLayer) -> dict[str, Tensor]:
    """A copy of what tuning changes: weight, bias, scales and zero points."""
    return {name: tensor.detach().clone() for name, tensor in layer_tensors(layer).items()}


@torch.no_grad()
def set_layer_state(layer: QuantLayer, state: dict[str, Tensor]) -> None:
    """Put back what :func:`layer_state` copied; the layer must have the same widths."""
    if (layer.bias is None) != ("bias" not in state):  # statistics tuning adds biases
        layer.set_weight(layer.weight, state.get("bias"), keep_weight=True)
    for name, tensor in layer_tensors(layer).items():
        tensor.copy_(state[name])


@torch.no_grad()
def _set_values(layer: QuantLayer, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
