"""The variables of one operation, and how its weights, biases and scales follow from them.

Each variable has a scale of its own: weights are in grid steps, scales relative to themselves. So one set of learning
rates serves all bit widths from 2 to 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.units import Unit
from lightning_ptq.tuning.config import ReconstructionConfig


class Tuner:
    """The variables of one operation, and the tensors that they make of its parameters and quantizer buffers.

    Args:
        prefix: Qualified name of the operation inside its unit, with a dot; empty if it is the unit.
        op: The operation.
        config: What is learned, and at which rates.

    Attributes:
        variables: Tensors to optimize by the names of what they stand for, each with its rate.
    """

    def __init__(self, prefix: str, op: QuantizedOp, config: ReconstructionConfig) -> None:
        self.prefix, self.op = prefix, op
        self.start = op.state()
        learn = set(config.learn) - ({"weight", "weight_scale"} if op.tied else set())
        self.variables: dict[str, tuple[Tensor, float]] = {}
        for what, name, rate in self._learnable(config):
            if what in learn and name in self.start:
                self.variables[name] = (self._variable(name), rate)

    def _learnable(self, config: ReconstructionConfig) -> Iterator[tuple[str, str, float]]:
        """Yield what can be learned: the option's name, the tensor's name, and the rate."""
        op = self.op
        yield from (("weight", name, config.weight_lr) for name in op.weight_names)
        yield from (("bias", name, config.bias_lr) for name in op.bias_names)
        yield from (("weight_scale", f"{name}_fake_quant.scale", config.scale_lr) for name in op.weight_names)
        yield from (("activation_scale", f"{name}_fake_quant.scale", config.scale_lr) for name in op.input_names)
        for name, quantizer in op.input_quantizers.items():
            if not quantizer.spec.symmetric:  # a symmetric grid has its zero point at 0
                yield "activation_zero_point", f"{name}_fake_quant.zero_point", config.zero_point_lr

    def _variable(self, name: str) -> Tensor:
        return torch.zeros_like(self.start[name], dtype=torch.float32).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """Return what the module is to compute with, by name, differentiable in the variables."""
        return {self.prefix + name: self._value(name, variable) for name, (variable, _) in self.variables.items()}

    def _value(self, name: str, variable: Tensor) -> Tensor:
        start = self.start[name]
        if name in self.op.weight_names:
            # Variables are float32 for modules of any type.
            return (start + self._times_step(name, variable)).to(start.dtype)
        if name in self.op.bias_names:
            return (start + variable * _magnitude(start)).to(start.dtype)
        if name.endswith("scale"):
            return start * self._bounded(name, variable).exp()
        return start + variable

    def _bounded(self, name: str, variable: Tensor) -> Tensor:
        """Return the variable of a scale, or its bound; the gradient passes, so that it can come back.

        Beyond the values that an activation has in the float network, levels would be wasted. Those of ReLU6 end at 6,
        and a grid that ends there too makes the clipping part of the quantization.
        """
        quantizer = self.op.input_quantizers.get(name.removesuffix("_fake_quant.scale"))
        if quantizer is None or not math.isfinite(quantizer.greatest_scale):
            return variable
        most = (quantizer.greatest_scale / self.start[name]).log()
        return variable - (variable.detach() - most).clamp(min=0)

    def _times_step(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the shape of weight ``name``, times the grid steps from which tuning started."""
        return self.op.weight_quantizers[name].layout.scaled(tensor, self.start[f"{name}_fake_quant.scale"])

    def penalty(self, progress: float) -> Tensor:
        """Return what is added to the loss (scalar); ``progress`` runs from 0 to 1."""
        return torch.zeros((), device=next(iter(self.start.values())).device)

    @torch.no_grad()
    def write(self) -> None:
        """Write the tuned values into the operation, the weights on their grids."""
        tensors = self.op.tensors()
        parameters = (*self.op.weight_names, *self.op.bias_names)
        for name, (variable, _) in self.variables.items():
            if name not in parameters:  # grids first: the weights are rounded to them
                value = self._value(name, variable)
                tensors[name].copy_(self._whole(name, value) if name.endswith("zero_point") else value)
        for name in self.op.weight_names if not self.op.tied else ():
            learned = self.variables.get(name)
            weight = tensors[name] if learned is None else self._final_weight(name, learned[0])
            tensors[name].copy_(self.op.weight_quantizers[name](weight))
        for name in self.op.bias_names:
            if name in self.variables:
                tensors[name].copy_(self._value(name, self.variables[name][0]))

    def _final_weight(self, name: str, variable: Tensor) -> Tensor:
        return self._value(name, variable)

    def _whole(self, name: str, zero_point: Tensor) -> Tensor:
        spec = self.op.input_quantizers[name.removesuffix("_fake_quant.zero_point")].spec
        return zero_point.round().clamp(spec.quant_min, spec.quant_max)


class AdaRoundTuner(Tuner):
    """Weights are rounded down or up on a fixed grid: ``s · (⌊w / s⌋ + h(v))`` with a rectified sigmoid ``h``."""

    def __init__(self, prefix: str, op: QuantizedOp, config: ReconstructionConfig) -> None:
        self.floor: dict[str, Tensor] = {}
        super().__init__(prefix, op, config)
        for name in op.weight_names:  # the grid is fixed
            self.variables.pop(f"{name}_fake_quant.scale", None)

    def _variable(self, name: str) -> Tensor:
        if name not in self.op.weight_names:
            return super()._variable(name)
        ratio = self.start[name] / self._times_step(name, torch.ones_like(self.start[name]))
        self.floor[name] = ratio.floor()
        # The rectified sigmoid runs from -0.1 to 1.1; its inverse gives the variable that stands for the fraction.
        share = ((ratio - self.floor[name] + 0.1) / 1.2).clamp(0.01, 0.99)
        return share.logit().requires_grad_()

    def _up(self, variable: Tensor) -> Tensor:
        return (variable.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def _value(self, name: str, variable: Tensor) -> Tensor:
        if name not in self.op.weight_names:
            return super()._value(name, variable)
        return self._on_grid(name, self.floor[name] + self._up(variable)).to(self.start[name].dtype)

    def _on_grid(self, name: str, integers: Tensor) -> Tensor:
        spec = self.op.weight_quantizers[name].spec
        return self._times_step(name, integers.clamp(spec.quant_min, spec.quant_max))

    def _final_weight(self, name: str, variable: Tensor) -> Tensor:
        return self._on_grid(name, self.floor[name] + (self._up(variable) >= 0.5))

    def penalty(self, progress: float) -> Tensor:
        """Return the term that drives every weight up or down, harder over time (Nagel et al., 2020, eq. 24)."""
        total = super().penalty(progress)
        if progress < 0.2:
            return total
        sharpness = 2 + 18 * (1 - (progress - 0.2) / 0.8)
        for name in self.op.weight_names:
            if name in self.variables:
                undecided = 1 - (2 * self._up(self.variables[name][0]) - 1).abs().pow(sharpness)
                total = total + 0.1 * undecided.mean()
        return total


def share_scales(tuners: Mapping[str, Tuner]) -> None:
    """Let inputs that are to keep the same scale learn one, and keep a scale that other units read too.

    Args:
        tuners: The tuners of a unit by the names of their operations.
    """
    for name, tuner in tuners.items():
        for which, quantizer in tuner.op.input_quantizers.items():
            group = sorted(quantizer.shared_by)
            for key in ("scale", "zero_point") if group else ():
                tensor = f"{which}_fake_quant.{key}"
                if not all(member in tuners for member, _ in group):
                    tuner.variables.pop(tensor, None)
                    continue
                first, of = group[0]
                shared = tuners[first].variables.get(f"{of}_fake_quant.{key}")
                same = tuners[first].op.input_quantizers[of].spec == quantizer.spec
                if (name, which) != group[0] and shared is not None and tensor in tuner.variables and same:
                    tuner.variables[tensor] = shared


def make_tuner(unit: Unit, name: str, op: QuantizedOp, config: ReconstructionConfig) -> Tuner:
    """Return the tuner of the unit's operation ``name`` for the configured rounding."""
    inside = unit.inside(name)
    kind = AdaRoundTuner if config.rounding == "adaround" else Tuner
    return kind(f"{inside}." if inside else "", op, config)


def _magnitude(bias: Tensor) -> Tensor:
    """Return the mean magnitude of a bias; 1 where it is 0 throughout."""
    mean = bias.abs().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))
