"""The rounding arithmetic: the only module that rounds a value to an integer grid.

``q = clamp(round(x / s) + z, quant_min, quant_max)``, ``x̂ = (q - z) · s``, rounding half to even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ptq.numerics.spec import Grid

_MIN_SCALE = float(torch.finfo(torch.float32).tiny) * 2**10
EMPTY_SCALE = 2.0**-17
"""Scale of weights or inputs that are all 0, such as those of a pruned channel; float16 and bfloat16 can hold it."""
_HALF = (torch.float16, torch.bfloat16)


def choose_qparams(minimum: Tensor, maximum: Tensor, spec: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid that covers a range.

    The range is first widened to contain 0, which must be exact on the grid (zero padding, ReLU).

    Args:
        minimum: Least values, of any shape (one entry per scale).
        maximum: Greatest values, of the same shape.
        spec: The grid; a :class:`~lightning_ptq.numerics.spec.QuantSpec` is one.

    Returns:
        The scale (float32, > 0) and the zero point (int32, within the grid; 0 for a symmetric spec), of that shape.

    Example:
        >>> scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), Grid(8, symmetric=False))
        >>> round(scale.item() * 255, 4), zero_point.item()
        (3.0, 85)
    """
    minimum, maximum = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-minimum / -spec.quant_min, maximum / spec.quant_max).clamp(min=_MIN_SCALE)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((maximum - minimum) / (spec.quant_max - spec.quant_min)).clamp(min=_MIN_SCALE)
    zero_point = (spec.quant_min - torch.round(minimum / scale)).clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point.to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the integers of ``x`` on the grid, as floats; scale and zero point broadcast against ``x``.

    As in torch's kernels, ``x`` is multiplied by the reciprocal of the scale, so both agree bit for bit. Half precision
    is computed in float32: in float16, the reciprocal of a scale below 1.5e-5 is infinite.

    Example:
        >>> quantize(torch.tensor([-9.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(0), -8, 7)
        tensor([-8.,  1.,  7.])
    """
    x, scale = _single(x), _single(scale)
    return (x * scale.reciprocal()).round_().add_(zero_point.round()).clamp_(quant_min, quant_max)


def _single(x: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, any other as it is."""
    return x.float() if x.dtype in _HALF else x


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values ``(q - z) · s`` of integers ``q``, in the dtype of the scale."""
    return (q.to(scale.dtype) - zero_point.round()).mul_(scale)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, keep: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize ``x``, with gradients for ``x``, ``scale`` and ``zero_point``.

    The gradient for ``x`` is straight-through inside the clamp and 0 outside it. For the scale it is that of LSQ (Esser
    et al., 2020, eq. 3), and for the zero point that of LSQ+ (Bhalgat et al., 2020, eq. 6), both without their factor.

    Args:
        x: Tensor of any shape, floating point. Half precision is computed in float32 and cast back.
        scale: Scale, not 0, broadcastable to ``x``; a negative scale mirrors the grid.
        zero_point: Zero point, broadcastable to ``x``; integers, or floats that are rounded and may carry a gradient.
        quant_min: Least integer of the grid.
        quant_max: Greatest integer of the grid.
        keep: Where ``x`` is to be quantized: 1, and 0 where it passes as it is; floats, broadcastable to ``x``. None
            for all values.

    Example:
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> fake_quantize(torch.tensor([0.3, 9.0]), scale, torch.tensor(0), -8, 7).sum().backward()
        >>> round(scale.grad.item(), 4)  # (1 - 0.3 / 0.5) + 7
        7.4
    """
    dtype = x.dtype
    x, scale = _single(x), _single(scale)
    keep = None if keep is None else keep.to(x.dtype)
    if torch.is_grad_enabled() and not torch._C._is_tracing():  # a trace could neither check nor save the function
        result: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, keep)
    else:
        zero_point = zero_point.to(x.dtype)
        result = quantize(x, scale, zero_point, quant_min, quant_max).sub_(zero_point.round()).mul_(scale)
        result = result if keep is None else torch.lerp(x, result, keep)
    return result.to(dtype)


class _FakeQuantize(torch.autograd.Function):
    """Forward and LSQ+ backward in few in-place passes, because a tuning step spends most of its time here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, keep: Tensor | None
    ) -> Tensor:
        zero_point = zero_point.to(x.dtype).round()
        q = (x * scale.reciprocal()).round_().add_(zero_point)
        result = q.clamp(quant_min, quant_max).sub_(zero_point).mul_(scale)
        if keep is not None:
            # Values that pass count as inside the clamp, where the gradient of x passes. They add nothing to that of
            # the scale, which is the difference between a product with the result and one with x.
            result = torch.lerp(x, result, keep)
            q = q.mul_(keep)
        ctx.save_for_backward(x, scale, zero_point, q, result)
        ctx.bounds = (quant_min - 0.5, quant_max + 0.5)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, q, result = ctx.saved_tensors
        (grad,) = grads
        # The gradient where q is in bounds, else 0, in one pass over memory.
        grad_x = torch.ops.aten.hardtanh_backward(grad, q, *ctx.bounds)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:  # d x̂ / d s is q - z - x / s inside the clamp and q - z outside
            if scale.numel() == 1:
                total = torch.dot(grad.flatten(), result.flatten()) - torch.dot(grad_x.flatten(), x.flatten())
                grad_scale = (total / scale).reshape(scale.shape)
            else:
                grad_scale = (grad * result).addcmul_(grad_x, x, value=-1).sum_to_size(scale.shape) / scale
        if ctx.needs_input_grad[2]:  # d x̂ / d z is 0 inside the clamp and -s outside
            grad_zero_point = (grad_x - grad).mul_(scale).sum_to_size(zero_point.shape)
        return grad_x, grad_scale, grad_zero_point, None, None, None
