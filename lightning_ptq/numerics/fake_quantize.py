"""Fake quantization as a module: a scale and a zero point that tuning may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.numerics.granularity import PER_TENSOR, ScaleLayout
from lightning_ptq.numerics.quantize import dequantize, fake_quantize, quantize
from lightning_ptq.numerics.spec import QuantSpec


class FakeQuantize(nn.Module):
    """Fake quantization of one tensor, with its scale and zero point as buffers.

    Args:
        spec: How the tensor is quantized.
        layout: How the scales broadcast against the tensor; one scale for the whole tensor by default.

    Attributes:
        drop: Function of a tensor that says where it is quantized while a unit is tuned: 1, and 0 where it keeps its
            float values, as floats of its shape; None otherwise.
        enabled: False to pass tensors through unchanged.
        shared_by: Inputs of operations, (operation, input), that are to keep this scale and zero point together.
        greatest_scale: Scale beyond which tuning is not to widen the grid of an activation.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, layout: ScaleLayout = PER_TENSOR) -> None:
        super().__init__()
        self.spec = spec
        self.layout = layout
        self.register_buffer("scale", torch.ones(layout.shape, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(layout.shape, dtype=torch.int32))
        self.drop: Callable[[Tensor], Tensor] | None = None
        self.enabled = True
        self.shared_by: frozenset[tuple[str, str]] = frozenset()
        self.greatest_scale = math.inf
        self._cached: tuple[tuple[Any, ...], tuple[Tensor, ...], Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``; same shape and dtype."""
        if not self.enabled:
            return x
        split = self.layout.split(x)
        keep = None if self.drop is None else self.drop(split)
        spec = self.spec
        return self.layout.merge(
            fake_quantize(split, self.scale, self.zero_point, spec.quant_min, spec.quant_max, keep)
        )

    def constant(self, x: Tensor) -> Tensor:
        """Fake-quantize a weight, and keep the result until the weight or its grid changes.

        Writes in place are noticed, except through ``x.data``, which hides them from autograd's version counter; after
        those, call :meth:`train`. Where gradients are wanted, and while torch traces or compiles, nothing is kept.

        Args:
            x: The weight.
        """
        if not self._keeps(x):
            self._cached = None
            return cast(Tensor, self(x))
        try:
            sources = (x, self.scale, self.zero_point)
            key = (self.spec, x.dtype, x.shape, x.stride(), *map(_identity, sources))
        except (NotImplementedError, RuntimeError):  # tensors without a storage, such as those of vmap
            return cast(Tensor, self(x))
        cached = self._cached  # read once: another thread may replace it
        if cached is not None and cached[0] == key and cached[2]._version == cached[3]:
            return cached[2]
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used outside that mode
            y: Tensor = self(x)
            if type(y) is Tensor:  # a fake tensor of torch.export must not outlive its tracing
                # The aliases keep the storages alive, so that no address in the key is reused. The version of the
                # result tells whether a forward has changed it in place.
                self._cached = (key, tuple(tensor.detach() for tensor in sources), y, y._version)
        return y

    def _keeps(self, x: Tensor) -> bool:
        """Return True if the quantized ``x`` may be kept for later calls."""
        if not self.enabled or self.drop is not None or torch.compiler.is_compiling() or torch._C._is_tracing():
            return False
        if self._forward_hooks or self._forward_pre_hooks:  # they expect every call
            return False
        tensors = (x, self.scale, self.zero_point)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors)

    def train(self, mode: bool = True) -> FakeQuantize:
        """Switch to train or eval mode, and forget the kept tensor: the weight may have changed unnoticed."""
        self._cached = None
        return super().train(mode)

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x`` on the grid, as floats; same shape."""
        spec = self.spec
        q = quantize(self.layout.split(x), self.scale, self.zero_point, spec.quant_min, spec.quant_max)
        return self.layout.merge(q)

    def values(self, q: Tensor) -> Tensor:
        """Return the float values of integers ``q``; same shape."""
        return self.layout.merge(dequantize(self.layout.split(q), self.scale, self.zero_point))

    def rows(self, x: Tensor) -> Tensor:
        """Return ``x`` as (scales, values per scale), in the order of the flattened scales."""
        return self.layout.rows(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """Move the buffers, but keep their dtypes: in half precision a scale would give other integers."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        kind = "symmetric" if self.spec.symmetric else "affine"
        return f"{self.spec.bits} bits, {kind}, scale {tuple(self.scale.shape)}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept tensor out of copies and pickles."""
        return {**self.__dict__, "_cached": None}


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    """Return what changes when a tensor gets another storage, another place in it, or other values."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor._version
