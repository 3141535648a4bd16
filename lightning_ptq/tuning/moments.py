"""Second moments of the inputs and float outputs of a convolution inside a unit, from forwards that end at the layer.

What it multiplies its weight by is read from the call of torch's function in its forward, so that layers with a forward
of their own are seen as they compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_ptq.activations.groups import Group, count_of
from lightning_ptq.activations.shards import ShardSamples
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.network.op import Mode
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.patching import hooked

_SAMPLES = 128
"""Samples of a shard that moments are taken over."""
SMALL = 64
"""Greatest number of inputs that float64 is used for; it is slow for more, and damping makes float32 exact enough."""
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
class Product:
    """A product of a layer's forward: what is called, with which arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def option(self, index: int, name: str, default: Any) -> Any:
        """Return an argument by its position or name, or its default."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def of(self, rows: slice) -> Product:
        """Return the product for some rows of its input."""
        if self.args:
            return Product(self.func, (self.args[0][rows], *self.args[1:]), self.kwargs)
        return Product(self.func, (), {**self.kwargs, "input": self.kwargs["input"][rows]})


class Products(TorchFunctionMode):
    """Records the products inside the ``with`` block, while ``active``."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.found: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.active and func in _DIMS:
            self.found.append(Product(func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def calls_of(unit: Unit, samples: ShardSamples) -> dict[str, int]:
    """Return the number of calls of each layer in a forward of the unit."""
    counts: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    for group, rows in samples.some(1)[:1]:
        with hooked(dict(unit.layers), count):
            samples.data.run(unit.module, group, rows, "float")
    return counts


def moments_of(unit: Unit, name: str, layer: Any, samples: ShardSamples) -> Moments | None:
    """Return the moments of a layer on some samples of a shard; None if they cannot be found."""
    total: Moments | None = None
    for group, rows in samples.some(_SAMPLES):
        wanted, given = (_run(unit, name, layer, samples, group, rows, mode) for mode in ("float", "quantized"))
        if wanted is None or given is None:
            return None
        real = where_real(wanted[0], samples.data.padding_of(group, rows))
        most = positions_of(layer, count_of(rows), 2 * _SAMPLES)
        own = moments_of_products(layer, given[1], wanted[0], real, most, samples.generator)
        if own is None:
            return None
        total = own if total is None else total + own
    return total


def positions_of(layer: Any, samples: int, of: int) -> int:
    """Return the greatest number of positions of some samples of a layer's inputs, out of ``of`` samples in all."""
    (least, most), inputs = _POSITIONS, int(layer.weight[0].numel())
    return max(1, min(max(16 * inputs, least), most) // of) * max(1, samples)


def moments_of_products(
    layer: Any, products: Sequence[Product], wanted: Tensor, real: Tensor | None, most: int, generator: torch.Generator
) -> Moments | None:
    """Return the moments of one call of a layer; None if it does not compute one product of a known kind.

    Args:
        layer: The layer.
        products: The products of its forward on the quantized inputs.
        wanted: Its float output.
        real: Which values of the output belong to positions with data; None for all of them.
        most: Greatest number of positions; more are drawn from.
        generator: Draws the positions.
    """
    if len(products) != 1:
        return None
    x, dim = _unfolded(products[0], layer.weight), layer.channel_dim(wanted)
    outputs = wanted.movedim(dim, 0).flatten(1)  # (outputs, positions)
    if x is None or x.shape[-1] != outputs.shape[1]:
        return None
    picked = torch.arange(x.shape[-1], device=x.device)
    if real is not None:
        picked = picked[real.expand_as(wanted).movedim(dim, 0).flatten(1)[0]]
    if len(picked) > most:
        order = torch.randperm(len(picked), generator=generator, device=generator.device)
        picked = picked[order[:most].to(picked.device)]
    dtype = torch.float64 if layer.weight[0].numel() <= SMALL else torch.float32
    x, outputs = x[..., picked].to(dtype), outputs[:, picked].to(dtype)
    x = torch.cat([x, x.new_ones(len(x), 1, x.shape[-1])], 1)
    return Moments((x @ x.mT).cpu(), (outputs.unflatten(0, (len(x), -1)) @ x.mT).cpu())  # ranks exchange them


def _run(
    unit: Unit, name: str, layer: Any, samples: ShardSamples, group: Group, rows: Tensor | slice, mode: Mode
) -> tuple[Tensor, list[Product]] | None:
    """Return output and products of the layer's call; None if it is not called."""
    outputs: list[Tensor] = []
    products = Products()
    products.active = False

    def before(*_: Any) -> None:
        products.active = True

    def after(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        products.active = False
        outputs.append(layer.output_tensor(output).detach())
        raise _Reached

    with suppress(_Reached), products, hooked({name: layer}, before, after):
        samples.data.run(unit.module, group, rows, mode)
    return (outputs[0], products.found) if outputs else None


def _unfolded(product: Product, weight: Tensor) -> Tensor | None:
    """Return what each position multiplies the weights of a group by, (groups, inputs, positions)."""
    x, dims = product.option(0, "input", None), _DIMS[product.func]
    if not dims:
        return cast(Tensor, x.flatten(0, -2).T[None])
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
