"""Weights and biases of a unit's layers in closed form, from second moments of their inputs: where tuning starts.

A layer's weights first become the least-squares solution for the quantized inputs and the float outputs, shrunk
towards the float weights. They are then rounded one input after the other, each time moving what rounding has cost to
the inputs that are not rounded yet (Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022; in the order and
by the Cholesky factors of Frantar et al., "GPTQ", ICLR 2023). The bias takes up the rest of the mean. Layers are solved
in order, so that each sees the outputs of solved ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_ptq.activations.groups import Group
from lightning_ptq.activations.shards import ShardSamples
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.network.op import Mode, QuantizedOp
from lightning_ptq.network.units import Unit
from lightning_ptq.numerics.quantize import quantize
from lightning_ptq.runtime.patching import hooked

_SAMPLES = 128
"""Samples of a shard that moments are taken over."""
_DAMPING = float(os.environ.get("DAMP", 0.01))
"""Weight of the float solution against the data, relative to the mean square of an input."""
_LARGEST = 8192
"""Greatest number of inputs of an output; more are not solved, as that takes cubic time."""
_FACTORS = (0.7, 0.775, 0.85, 0.925, 1.0, 1.075) if not os.environ.get("NOSCALE") else (1.0,)
"""Scales that are tried, relative to those of the calibration."""
_MARGIN = float(os.environ.get("MARGIN", 0.45))
"""How far inside the interval of its integer, in grid steps, a weight lies."""
_POSITIONS = (2**13, 2**16)
"""Least and greatest number of positions that moments are taken over, if there are as many."""

_DIMS = {F.linear: 0, F.conv1d: 1, F.conv2d: 2}


class _Reached(BaseException):
    """Ends a forward at the layer whose inputs are wanted; not an Exception, so that no forward catches it."""


@dataclass
class Moments:
    """Second moments of a layer's inputs x and float outputs y, by groups of channels, with 1 as the last input.

    Attributes:
        inputs: Sum of x xᵀ, (groups, inputs + 1, inputs + 1).
        outputs: Sum of y xᵀ, (groups, outputs of a group, inputs + 1).
    """

    inputs: Tensor
    outputs: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inputs + other.inputs.to(self.inputs), self.outputs + other.outputs.to(self.outputs))


@dataclass
class _Product:
    """A product of a layer's forward: what is called, with which arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def option(self, index: int, name: str, default: Any) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


class _Products(TorchFunctionMode):
    """Records products while ``active``."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.found: list[_Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.active and func in _DIMS:
            self.found.append(_Product(func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def solve_layers(
    unit: Unit, samples: Sequence[ShardSamples], over_shards: Callable[[dict[int, Any]], list[Any]]
) -> None:
    """Set weights, their scales and biases of the linear and convolutional layers of a unit in closed form.

    Args:
        unit: The unit, in eval mode, quantized.
        samples: Its samples in the shards of this rank.
        over_shards: Function that returns the values of all shards, in order, from those of this rank.
    """
    for name, layer in unit.layers.items():
        if not _solvable(layer):
            continue
        found = over_shards({own.shard.index: _moments(unit, name, layer, own) for own in samples})
        moments = [each for each in found if each is not None]
        if moments:
            _solve(cast(Any, layer), sum(moments[1:], moments[0]))


def _solvable(layer: QuantizedOp) -> bool:
    """Return True for a layer that multiplies one input by one weight, with a scale for each output or for all."""
    if not layer.is_linear or layer.is_lookup or layer.tied or list(layer.weights) != ["weight"]:
        return False
    quantizer, weight = layer.weight_quantizers.get("weight"), layer.weights["weight"]
    if quantizer is None or weight.dim() < 2 or weight[0].numel() > _LARGEST:
        return False
    return layer.channels("weight").dim == 0 and quantizer.scale.numel() in (1, len(weight))


def _moments(unit: Unit, name: str, layer: Any, samples: ShardSamples) -> Moments | None:
    """Return the moments of a layer on some samples of a shard; None if they cannot be found."""
    total: Moments | None = None
    weight = layer.weight
    least, most = _POSITIONS
    wanted = max(1, min(max(16 * weight[0].numel(), least), most) // (2 * _SAMPLES))
    for group, rows in samples.some(_SAMPLES):
        outputs, products = _run(unit, name, layer, samples, group, rows, "float"), None
        inputs = _run(unit, name, layer, samples, group, rows, "quantized")
        if outputs is None or inputs is None:
            return None
        (y, _), (_, products) = outputs, inputs
        if len(products) != 1:
            return None
        x = _unfolded(products[0], weight)
        if x is None:
            return None
        real = where_real(y, samples.data.padding_of(group, rows))
        mask = None if real is None else real.expand_as(y).movedim(layer.channel_dim(y), 0).flatten(1)[0]
        rows_of_y = y.movedim(layer.channel_dim(y), 0).flatten(1)  # (outputs, positions)
        if x.shape[-1] != rows_of_y.shape[1]:
            return None
        if mask is not None:
            x, rows_of_y = x[..., mask], rows_of_y[:, mask]
        count, limit = rows_of_y.shape[1], wanted * max(1, _rows(rows))
        if count > limit:
            picked = torch.randperm(count, generator=samples.generator, device=x.device)[:limit]
            x, rows_of_y = x[..., picked], rows_of_y[:, picked]
        x = torch.cat([x.double(), x.new_ones(len(x), 1, x.shape[-1], dtype=torch.float64)], 1)
        own = Moments(x @ x.mT, rows_of_y.double().unflatten(0, (len(x), -1)) @ x.mT)
        total = own if total is None else total + own
    return total


def _rows(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _run(
    unit: Unit, name: str, layer: Any, samples: ShardSamples, group: Group, rows: Tensor | slice, mode: Mode
) -> tuple[Tensor, list[_Product]] | None:
    """Return output and products of the layer's only call; None if it is called more than once."""
    outputs: list[Tensor] = []
    products = _Products()

    def before(*_: Any) -> None:
        products.active = True

    def after(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        products.active = False
        outputs.append(layer.output_tensor(output).detach())
        raise _Reached

    with suppress(_Reached), products, hooked({name: layer}, before, after):
        samples.data.run(unit.module, group, rows, mode)
    return (outputs[0], products.found) if len(outputs) == 1 else None


def _unfolded(product: _Product, weight: Tensor) -> Tensor | None:
    """Return what each position multiplies the weights of a group by, (groups, inputs, positions)."""
    x, dims = product.option(0, "input", None), _DIMS[product.func]
    if dims == 0:
        return cast(Tensor, x.flatten(0, -2).mT[None])
    stride, padding, dilation, groups = (
        product.option(index, key, default)
        for index, key, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
    )
    if isinstance(padding, str) or x.dim() != dims + 2:
        return None
    kernel = tuple(weight.shape[2:])

    def pair(value: Any, filler: int) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
        values = values * dims if len(values) < dims else values
        return (filler, *values) if dims == 1 else values

    if dims == 1:
        x, kernel = x[:, :, None], (1, *kernel)
    if math.prod(kernel) == 1 and set(pair(padding, 0)) == {0}:
        first, second = pair(stride, 1)
        x = x[:, :, ::first, ::second].flatten(2)
    else:
        x = F.unfold(x, kernel, pair(dilation, 1), pair(padding, 0), pair(stride, 1))
    return cast(Tensor, x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2))


def _solve(layer: Any, moments: Moments) -> None:
    """Set the weight, its scales and the bias of a layer."""
    bias = layer._parameters.get("bias")
    quantizer = layer.weight_quantizers["weight"]
    n = moments.inputs[:, -1:, -1:]
    second, cross = moments.inputs / n, moments.outputs / n
    mean_x, mean_y = second[:, :-1, -1], cross[:, :, -1]
    second, cross = second[:, :-1, :-1], cross[:, :, :-1]
    if bias is not None:
        second = second - mean_x[:, :, None] * mean_x[:, None]
        cross = cross - mean_y[:, :, None] * mean_x[:, None]
    groups, inputs = second.shape[:2]
    weight = layer.weight.double().reshape(groups, -1, inputs)
    power = second.diagonal(dim1=1, dim2=2).mean(1)
    damped = (
        second
        + torch.eye(inputs, dtype=second.dtype, device=second.device)
        * (torch.where(power > 0, _DAMPING * power, torch.ones_like(power))[:, None, None])
    )
    if os.environ.get("REG") == "0":
        cross = weight @ second
    solution = weight + torch.linalg.solve(damped, (cross - weight @ second).mT).mT
    scale = quantizer.scale.double().flatten().expand(weight.shape[0] * weight.shape[1]).reshape(weight.shape[:2])
    factors = _FACTORS if quantizer.scale.numel() == len(layer.weight) else (1.0,)
    best_error = torch.full_like(scale, float("inf"))
    best_scale, best = scale, solution
    tried = torch.cat([scale * factor for factor in factors], 1)
    rounded = _rounded(solution.repeat(1, len(factors), 1), damped, tried, quantizer)
    for index in range(len(factors)):
        part = slice(index * weight.shape[1], (index + 1) * weight.shape[1])
        lost = rounded[:, part] - solution
        error = ((lost @ damped) * lost).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, tried[:, part], best_scale)
        best = torch.where(better[..., None], rounded[:, part], best)
    if bias is not None:
        bias.copy_((mean_y - (best @ mean_x[:, :, None])[..., 0]).flatten())
    step = best_scale.abs()[..., None]
    latent = torch.minimum(torch.maximum(solution, best - _MARGIN * step), best + _MARGIN * step)
    layer.weight.copy_(latent.reshape(layer.weight.shape))
    if quantizer.scale.numel() > 1:
        quantizer.scale.copy_(best_scale.reshape(quantizer.scale.shape))


def _rounded(weight: Tensor, second: Tensor, scale: Tensor, quantizer: Any) -> Tensor:
    """Return weights on their grids whose outputs are close to those of ``weight``; (groups, rows, inputs).

    Args:
        weight: The weights; changed.
        second: Second moments of the inputs, (groups, inputs, inputs).
        scale: Scale of each row, (groups, rows).
        quantizer: The weight's quantizer.
    """
    spec = quantizer.spec
    zero_point = quantizer.zero_point.flatten()[0]
    order = second.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    groups, inputs = order.shape
    at = torch.arange(groups, device=order.device)[:, None]
    ordered = second[at[:, :, None], order[:, :, None], order[:, None]]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    factor, scale = factor.float(), scale.float()
    weight = weight.float().gather(2, order[:, None].expand_as(weight))
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
    return back.scatter_(2, order[:, None].expand_as(result), result).double()
