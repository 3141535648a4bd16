"""Granularity: which values of a tensor share a scale, and how scales broadcast against the tensor.

A weight has one scale for the whole tensor, one per output channel, or one per group of consecutive input values of an
output channel. No other module knows how scales are laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight lie.

    Args:
        dim: Dimension of the output channels: 0 for convolutions and linear layers, 1 for transposed convolutions.
        groups: Number of blocks that the first dimension consists of, each with output channels of its own. Only
            grouped transposed convolutions have more than one.
    """

    dim: int = 0
    groups: int = 1

    def count(self, shape: Sequence[int]) -> int:
        """Return the number of output channels of a weight of this shape."""
        return shape[self.dim] * self.groups


class ScaleLayout:
    """One scale for the whole tensor; the base class of the other layouts.

    Attributes:
        shape: Shape of scale and zero point, which broadcast against :meth:`split` of the tensor.
    """

    shape: tuple[int, ...] = ()

    def split(self, x: Tensor) -> Tensor:
        """Return ``x`` in the shape against which the scales broadcast."""
        return x

    def merge(self, y: Tensor) -> Tensor:
        """Return a tensor of :meth:`split`'s shape in the tensor's own shape."""
        return y

    def rows(self, x: Tensor) -> Tensor:
        """Return ``x`` as (scales, values per scale), in the order of the flattened scales."""
        return x.reshape(1, -1)

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """Return ``x`` with the values that share scale ``i`` multiplied by ``factors[i]``; differentiable."""
        return self.merge(self.split(x) * factors.reshape(self.shape))

    def of_channels(self, values: Tensor) -> Tensor | None:
        """Return a vector over output channels in a shape that broadcasts against the scales.

        None if channels share a scale, so that the scale of one channel cannot change alone.
        """
        return values.reshape(()) if values.numel() == 1 else None


PER_TENSOR = ScaleLayout()


class ChannelScales(ScaleLayout):
    """One scale per output channel.

    Args:
        weight_shape: Shape of the weight.
        channels: Where its output channels lie.
    """

    def __init__(self, weight_shape: Sequence[int], channels: ChannelLayout) -> None:
        self.weight_shape, self.groups = tuple(weight_shape), channels.groups
        ones = [1] * (len(weight_shape) - channels.dim - 1)
        inner = (*[1] * channels.dim, weight_shape[channels.dim], *ones)
        self.shape = inner if self.groups == 1 else (self.groups, *inner)

    def split(self, x: Tensor) -> Tensor:
        """See :class:`ScaleLayout`."""
        return x if self.groups == 1 else x.unflatten(0, (self.groups, -1))

    def merge(self, y: Tensor) -> Tensor:
        """See :class:`ScaleLayout`."""
        return y if self.groups == 1 else y.reshape(self.weight_shape)

    def rows(self, x: Tensor) -> Tensor:
        """See :class:`ScaleLayout`."""
        split = self.split(x)
        # Dimensions along which the scale varies come first, in their order; a single channel gives a single row.
        kept = [d for d, size in enumerate(self.shape) if size > 1]
        rest = [d for d in range(split.dim()) if d not in kept]
        return split.permute(*kept, *rest).reshape(prod(self.shape), -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return the tensor that :meth:`rows` made (scales, values per scale) of."""
        split = (self.groups, self.weight_shape[0] // self.groups, *self.weight_shape[1:])
        split = split if self.groups > 1 else self.weight_shape
        kept = [d for d, size in enumerate(self.shape) if size > 1]
        order = [*kept, *(d for d in range(len(split)) if d not in kept)]
        back = [order.index(d) for d in range(len(split))]
        return self.merge(rows.reshape([split[d] for d in order]).permute(back))

    def of_channels(self, values: Tensor) -> Tensor | None:
        """See :class:`ScaleLayout`."""
        return values.reshape(self.shape)


class GroupScales(ScaleLayout):
    """One scale per group of consecutive input values of an output channel.

    The input values of a channel are its weights over input channels and kernel positions, in memory order. Where their
    number is not a multiple of the group size, the last group of each channel is shorter.

    Args:
        weight_shape: Shape of the weight.
        channels: Where its output channels lie.
        size: Values per group.
    """

    def __init__(self, weight_shape: Sequence[int], channels: ChannelLayout, size: int) -> None:
        self.weight_shape, self.channels = tuple(weight_shape), channels
        self.outputs = channels.count(weight_shape)
        self.inputs = prod(weight_shape) // max(1, self.outputs)
        self.size = max(1, min(size, self.inputs))  # a larger group is the whole channel
        self.padding = -self.inputs % self.size  # zeros that fill the last group
        self.shape = (self.outputs, (self.inputs + self.padding) // self.size, 1)

    def split(self, x: Tensor) -> Tensor:
        """See :class:`ScaleLayout`."""
        dim, groups = self.channels.dim, self.channels.groups
        if groups > 1:  # (groups, inputs, outputs, kernel): bring each block's outputs before its inputs
            x = x.unflatten(0, (groups, -1)).movedim(dim + 1, 1).flatten(0, 1)
        else:
            x = x.movedim(dim, 0)
        rows = x.reshape(self.outputs, self.inputs)
        # A zero stays a zero on every grid.
        rows = F.pad(rows, (0, self.padding)) if self.padding else rows
        return rows.reshape(self.outputs, -1, self.size)

    def merge(self, y: Tensor) -> Tensor:
        """See :class:`ScaleLayout`."""
        rows = y.reshape(self.outputs, -1)[:, : self.inputs]
        dim, groups = self.channels.dim, self.channels.groups
        shape = list(self.weight_shape)
        if groups > 1:
            inputs = shape.pop(0) // groups
            outputs = shape.pop(dim - 1)  # one less, as the first dimension is gone
            return rows.reshape(groups, outputs, inputs, *shape).movedim(1, dim + 1).reshape(self.weight_shape)
        outputs = shape.pop(dim)
        return rows.reshape(outputs, *shape).movedim(0, dim)

    def rows(self, x: Tensor) -> Tensor:
        """See :class:`ScaleLayout`; the last row of a channel repeats its values where it is shorter."""
        groups = self.split(x)
        if self.padding:  # zeros would count as values of the weight, in percentiles for example
            repeated = torch.arange(self.size, device=x.device) % (self.size - self.padding)
            groups = torch.cat([groups[:, :-1], groups[:, -1:, repeated]], 1)
        return groups.reshape(-1, self.size)

    def of_channels(self, values: Tensor) -> Tensor | None:
        """See :class:`ScaleLayout`."""
        return values.reshape(-1, 1, 1)


@dataclass(frozen=True)
class Granularity:
    """Which values of a weight share a scale.

    Args:
        per_channel: True for one scale per output channel, False for one per tensor.
        group_size: Input values of an output channel that share a scale; None for all of them.

    Example:
        >>> Granularity(per_channel=True).layout((8, 4, 3, 3), ChannelLayout()).shape
        (8, 1, 1, 1)
        >>> Granularity(group_size=32).layout((8, 100), ChannelLayout()).shape
        (8, 4, 1)
    """

    per_channel: bool = False
    group_size: int | None = None

    def layout(self, weight_shape: Sequence[int], channels: ChannelLayout) -> ScaleLayout:
        """Return the layout of the scales of a weight.

        Args:
            weight_shape: Shape of the weight.
            channels: Where its output channels lie.
        """
        if self.group_size is not None:
            return GroupScales(weight_shape, channels, self.group_size)
        return ChannelScales(weight_shape, channels) if self.per_channel else PER_TENSOR
