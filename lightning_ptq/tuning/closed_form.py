"""Weights and biases of a unit's layers in closed form, from second moments of their inputs: where tuning starts.

A layer's weights first become the least-squares solution for the quantized inputs and the float outputs, shrunk
towards the float weights. They are then rounded one input after the other, each time moving what rounding has cost to
the inputs that are not rounded yet (Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022; in the order and
by the Cholesky factors of Frantar et al., "GPTQ", ICLR 2023). The bias takes up the rest of the mean. Layers are solved
in order, so that each sees the outputs of solved ones.
"""

from __future__ import annotations

import math
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
_DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Weights of the float solution against the data that are tried, relative to the mean square of an input."""
_SMALL = 64
"""Greatest number of inputs that float64 is used for; it is slow for more, and damping makes float32 exact enough."""
_LARGEST = 8192
"""Greatest number of inputs of an output; more are not solved, as that takes cubic time."""
_MARGIN = 0.45
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
        return Moments(self.inputs + other.inputs, self.outputs + other.outputs)


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
    counts = over_shards({own.shard.index: _calls(unit, own) for own in samples})
    for name, layer in unit.layers.items():
        if not _solvable(layer) or any(count.get(name, 0) > 1 for count in counts):
            continue
        found = over_shards({own.shard.index: _moments(unit, name, layer, own) for own in samples})
        moments = [each for each in found if each is not None]
        if moments:
            _solve(cast(Any, layer), moments)


def _calls(unit: Unit, samples: ShardSamples) -> dict[str, int]:
    """Return the number of calls of each layer in a forward of the unit."""
    counts: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    for group, rows in samples.some(1)[:1]:
        with hooked(dict(unit.layers), count):
            samples.data.run(unit.module, group, rows, "float")
    return counts


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
    least, most = _POSITIONS
    of_sample = min(max(16 * layer.weight[0].numel(), least), most) // (2 * _SAMPLES)
    for group, rows in samples.some(_SAMPLES):
        wanted, given = (_run(unit, name, layer, samples, group, rows, mode) for mode in ("float", "quantized"))
        if wanted is None or given is None or len(given[1]) != 1:
            return None
        y, x = wanted[0], _unfolded(given[1][0], layer.weight)
        real = where_real(y, samples.data.padding_of(group, rows))
        dim = layer.channel_dim(y)
        outputs = y.movedim(dim, 0).flatten(1)  # (outputs, positions)
        if x is None or x.shape[-1] != outputs.shape[1]:
            return None
        picked = torch.arange(x.shape[-1], device=x.device)
        if real is not None:
            picked = picked[real.expand_as(y).movedim(dim, 0).flatten(1)[0]]
        if len(picked) > (most := of_sample * max(1, _count(rows))):
            order = torch.randperm(len(picked), generator=samples.generator, device=samples.generator.device)
            picked = picked[order[:most].to(picked.device)]
        x, outputs = x[..., picked].double(), outputs[:, picked].double()
        x = torch.cat([x, x.new_ones(len(x), 1, x.shape[-1])], 1)
        own = Moments((x @ x.mT).cpu(), (outputs.unflatten(0, (len(x), -1)) @ x.mT).cpu())  # ranks exchange them
        total = own if total is None else total + own
    return total


def _count(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _run(
    unit: Unit, name: str, layer: Any, samples: ShardSamples, group: Group, rows: Tensor | slice, mode: Mode
) -> tuple[Tensor, list[_Product]] | None:
    """Return output and products of the layer's call; None if it is not called."""
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
    return (outputs[0], products.found) if outputs else None


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


def _solve(layer: Any, folds: Sequence[Moments]) -> None:
    """Set the weight, its scales and the bias of a layer from the moments of several shards."""
    bias, quantizer = layer._parameters.get("bias"), layer.weight_quantizers["weight"]
    folds = [Moments(fold.inputs.to(layer.weight.device), fold.outputs.to(layer.weight.device)) for fold in folds]
    whole = _centered(sum(folds[1:], folds[0]), bias is not None)
    weight = layer.weight.to(whole.cross).reshape(whole.cross.shape)
    parts = [_centered(fold, bias is not None) for fold in folds]
    damping = _best_damping(weight, parts)
    # Where the samples say little, the float weights say the rest: they damp what rounding may move, too.
    solution, damped = whole.solved(weight, damping), whole.damped(damping)
    scale = quantizer.scale.to(damped).flatten().expand(weight.shape[0] * weight.shape[1]).reshape(weight.shape[:2])
    rounded = _rounded(solution, damped, scale, quantizer)
    if bias is not None:
        bias.copy_((whole.mean_outputs - (rounded @ whole.mean_inputs[:, :, None])[..., 0]).flatten())
    margin = _MARGIN * scale.abs()[..., None]
    within = solution.clamp(rounded - margin, rounded + margin)
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
    if second.shape[-1] > _SMALL:
        second, cross, mean_inputs, mean_outputs = (each.float() for each in (second, cross, mean_inputs, mean_outputs))
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
    spec = quantizer.spec
    zero_point = quantizer.zero_point.flatten()[0]
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
