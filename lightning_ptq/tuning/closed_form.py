"""Weights and biases of a unit's layers in closed form, from second moments of their inputs: where tuning starts.

A layer's weights first become the least-squares solution for the quantized inputs and the float outputs, shrunk
towards the float weights. They are then rounded one input after the other, each time moving what rounding has cost to
the inputs that are not rounded yet (Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022; in the order and
by the Cholesky factors of Frantar et al., "GPTQ", ICLR 2023). The bias takes up the rest of the mean. Layers are solved
in order, so that each sees the outputs of solved ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.activations.memory_plan import MOST_INPUTS
from lightning_ptq.activations.shards import ShardSamples
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.units import Unit
from lightning_ptq.numerics.quantize import quantize
from lightning_ptq.tuning.moments import Moments, calls_of, moments_of

_DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Weights of the float solution against the data that are tried, relative to the mean square of an input."""
_MARGIN = 0.45
"""How far inside the interval of its integer, in grid steps, a weight lies."""


@torch.no_grad()
def solve_layers(
    unit: Unit, samples: Sequence[ShardSamples], over_shards: Callable[[dict[int, Any]], list[Any]]
) -> None:
    """Set weights and biases of the convolutions of a unit in closed form.

    Linear layers are left out: solved token by token, they made a sentence encoder much worse at the whole sentences.

    Args:
        unit: The unit, in eval mode, quantized.
        samples: Its samples in the shards of this rank.
        over_shards: Function that returns the values of all shards, in order, from those of this rank.
    """
    counts = over_shards({own.shard.index: calls_of(unit, own) for own in samples})
    for name, layer in unit.layers.items():
        is_convolution = solvable(layer) and layer.weights["weight"].dim() > 2
        if not is_convolution or any(count.get(name, 0) > 1 for count in counts):
            continue
        found = over_shards({own.shard.index: moments_of(unit, name, layer, own) for own in samples})
        moments = [each for each in found if each is not None]
        if moments:
            # Singular up to rounding: the layer stays as it is.
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # torch exports it without listing it
                Solution.of(layer, moments).put(layer)


def solvable(layer: QuantizedOp) -> bool:
    """Return True for a convolution or linear layer with one weight on a symmetric grid of a scale or one by output."""
    if not layer.is_linear or layer.is_lookup or layer.tied or list(layer.weights) != ["weight"]:
        return False
    quantizer, weight = layer.weight_quantizers.get("weight"), layer.weights["weight"]
    if quantizer is None or weight[0].numel() > MOST_INPUTS:
        return False
    plain = layer.channels("weight").dim == 0 and quantizer.spec.symmetric
    return plain and quantizer.scale.numel() in (1, len(weight))


@dataclass(frozen=True)
class Solution:
    """The least-squares weights of a layer, before they are rounded to a grid.

    Attributes:
        weight: The weights, (groups, outputs, inputs).
        moments: The moments that they are the solution for.
        damping: Its weight of the float solution.
    """

    weight: Tensor
    moments: _Centered
    damping: float

    @classmethod
    def of(cls, layer: Any, folds: Sequence[Moments]) -> Solution:
        """Solve for the moments of several shards, with the layer's weights as those of the float layer."""
        has_bias = layer._parameters.get("bias") is not None
        folds = [Moments(fold.inputs.to(layer.weight.device), fold.outputs.to(layer.weight.device)) for fold in folds]
        whole = _centered(sum(folds[1:], folds[0]), has_bias)
        weight = layer.weight.to(whole.cross).reshape(whole.cross.shape)
        damping = _best_damping(weight, [_centered(fold, has_bias) for fold in folds])
        return cls(whole.solved(weight, damping), whole, damping)

    @torch.no_grad()
    def put(self, layer: Any) -> None:
        """Round to the grid of a layer, and set its weight and bias."""
        bias, quantizer, moments = layer._parameters.get("bias"), layer.weight_quantizers["weight"], self.moments
        # Where the samples say little, the float weights say the rest: they damp what rounding may move, too.
        damped = moments.damped(self.damping)
        shape = self.weight.shape[:2]
        scale = quantizer.scale.to(damped).flatten().expand(shape[0] * shape[1]).reshape(shape)
        rounded = _rounded(self.weight, damped, scale, quantizer)
        if bias is not None:
            bias.copy_((moments.mean_outputs - (rounded @ moments.mean_inputs[:, :, None])[..., 0]).flatten())
        margin = _MARGIN * scale.abs()[..., None]
        within = self.weight.clamp(rounded - margin, rounded + margin)
        layer.weight.copy_(within.reshape(layer.weight.shape))


@dataclass(frozen=True)
class _Centered:
    """Moments over positions: about the means where the layer has a bias.

    Attributes:
        second: Of the inputs, (groups, inputs, inputs).
        cross: Of outputs and inputs, (groups, outputs, inputs).
        mean_inputs: (groups, inputs).
        mean_outputs: (groups, outputs).
    """

    second: Tensor
    cross: Tensor
    mean_inputs: Tensor
    mean_outputs: Tensor

    def damped(self, damping: float) -> Tensor:
        """Return the second moments with a multiple of their mean diagonal added to the diagonal."""
        power = self.second.diagonal(dim1=1, dim2=2).mean(1)
        added = torch.where(power > 0, damping * power, torch.ones_like(power))
        return self.second + torch.diag_embed(added[:, None].expand(self.second.shape[:2]))

    def solved(self, weight: Tensor, damping: float) -> Tensor:
        """Return the weights with the least squared error, shrunk towards ``weight``."""
        factor = torch.linalg.cholesky(self.damped(damping))
        return weight + torch.cholesky_solve((self.cross - weight @ self.second).mT, factor).mT

    def error(self, weight: Tensor) -> float:
        """Return the squared error of weights, up to what does not depend on them."""
        return float(((weight @ self.second - 2 * self.cross) * weight).sum())


def _centered(moments: Moments, bias: bool) -> _Centered:
    count = moments.inputs[:, -1:, -1:]
    second, cross = moments.inputs / count, moments.outputs / count
    mean_inputs, mean_outputs = second[:, :-1, -1], cross[:, :, -1]
    second, cross = second[:, :-1, :-1], cross[:, :, :-1]
    if bias:
        second = second - mean_inputs[:, :, None] * mean_inputs[:, None]
        cross = cross - mean_outputs[:, :, None] * mean_inputs[:, None]
    return _Centered(second, cross, mean_inputs, mean_outputs)


def _best_damping(weight: Tensor, folds: Sequence[_Centered]) -> float:
    """Return the damping with which solutions for one fold have the least error on the others."""
    if len(folds) < 2:
        return _DAMPINGS[-1]
    errors = [
        sum(other.error(fold.solved(weight, damping)) for fold in folds for other in folds if other is not fold)
        for damping in _DAMPINGS
    ]
    return _DAMPINGS[min(range(len(errors)), key=errors.__getitem__)]


def _rounded(weight: Tensor, second: Tensor, scale: Tensor, quantizer: Any) -> Tensor:
    """Return weights on their grids whose outputs are close to those of ``weight``; (groups, rows, inputs).

    Args:
        weight: The weights.
        second: Second moments of the inputs, (groups, inputs, inputs).
        scale: Scale of each row, (groups, rows).
        quantizer: The weight's quantizer.
    """
    spec, zero_point = quantizer.spec, quantizer.zero_point.flatten()[0]  # 0, as the grid is symmetric
    order = second.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    groups, inputs = order.shape
    at = torch.arange(groups, device=order.device)[:, None]
    ordered = second[at[:, :, None], order[:, :, None], order[:, None]]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    weight = weight.gather(2, order[:, None].expand_as(weight))
    result = torch.empty_like(weight)
    for start in range(0, inputs, 64):
        end = min(start + 64, inputs)
        errors = weight.new_empty(*weight.shape[:2], end - start)
        for i in range(start, end):
            column = weight[:, :, i]
            q = (quantize(column, scale, zero_point, spec.quant_min, spec.quant_max) - zero_point) * scale
            result[:, :, i] = q
            errors[:, :, i - start] = error = (column - q) / factor[:, i, i, None]
            weight[:, :, i + 1 : end] -= error[:, :, None] * factor[:, None, i, i + 1 : end]
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    back = torch.empty_like(result)
    return back.scatter_(2, order[:, None].expand_as(result), result)
