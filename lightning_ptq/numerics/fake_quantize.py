"""Fake quantization as a module: a scale and a zero point that tuning may move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ptq.numerics.qconfig import QuantSpec
from lightning_ptq.numerics.quantize import dequantize, fake_quantize, quantize


class FakeQuantize(nn.Module):
    """Fake quantization of one tensor, with its scale and zero point as buffers.

    Args:
        spec: The grid.
        shape: Shape of scale and zero point as they broadcast against the tensor; ``()`` for per-tensor.
        groups: For grouped transposed convolutions: the tensor's first dimension is split into so many before
            broadcasting.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), groups: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.groups = groups
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.drop: Callable[[Tensor, Tensor], Tensor] | None = None  # set while a unit is tuned
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``; same shape and dtype."""
        if not self.enabled:
            return x
        y = self._split(x)
        y = fake_quantize(y, self.scale, self.zero_point, self.spec.quant_min, self.spec.quant_max).view_as(x)
        return y if self.drop is None else self.drop(x, y)

    def integers(self, x: Tensor) -> Tensor:
        """The integers of ``x`` on the grid, as floats; same shape."""
        spec = self.spec
        return quantize(self._split(x), self.scale, self.zero_point, spec.quant_min, spec.quant_max).view_as(x)

    def values(self, q: Tensor) -> Tensor:
        """The float values of integers ``q``; same shape."""
        return dequantize(self._split(q), self.scale, self.zero_point).view_as(q)

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as (channels, values per channel), in the order of the scale's entries."""
        split = self._split(x)
        kept = [d for d, size in enumerate(self.scale.shape) if size > 1]
        rest = [d for d in range(split.dim()) if d not in kept]
        return split.permute(*kept, *rest).reshape(self.scale.numel(), -1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.groups, -1)) if self.groups > 1 else x

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        kind = "symmetric" if self.spec.symmetric else "affine"
        return f"{self.spec.bits} bits, {kind}, scale {tuple(self.scale.shape)}"
