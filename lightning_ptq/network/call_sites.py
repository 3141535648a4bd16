"""Call sites: functions that a forward calls on tensors, as operations that can be quantized.

A call site is named by the module whose forward calls the function and by the position of the call among that module's
calls of the function, such as ``attention.matmul_1``. It is a module of its own below the caller, so that calibration,
tuning, allocation, packing and reports treat it like a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ptq.network.op import FLOAT_BITS, QuantizedOp
from lightning_ptq.numerics.qconfig import LayerQConfig, Operations

Compute = Callable[..., Tensor]


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right)


def _baddbmm(left: Tensor, right: Tensor, added: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)


def _addmm(left: Tensor, right: Tensor, added: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(added, left, right, beta=beta, alpha=alpha)


def _einsum(left: Tensor, right: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, left, right)


OF_TWO: dict[str, Compute] = {
    "matmul": _matmul, "baddbmm": _baddbmm, "addmm": _addmm, "einsum": _einsum, "attention": _matmul,
    "add": torch.add, "mul": torch.mul,
}  # fmt: skip
"""What a site computes from two activations, by the name of its function."""

COMPUTE: dict[str, Compute] = {
    **OF_TWO,
    "grouped_mm": getattr(torch, "_grouped_mm", _matmul),
    **{name: getattr(F, name) for name in ("linear", "conv1d", "conv2d", "conv3d")},
}
"""What a site computes from two activations, or from an activation and a parameter, by the name of its function."""


class CallSite(QuantizedOp):
    """A call of a function of two tensors.

    Args:
        function: Name of the function, a key of the table of what sites compute.
    """

    input_names: ClassVar[tuple[str, ...]] = ("left", "right")
    is_linear: ClassVar[bool] = False
    quantized_from: ClassVar[Operations] = "products"

    def __init__(self, function: str) -> None:
        super().__init__()
        self.init_op()
        self.function = function
        self.register_buffer("place", torch.empty(0), persistent=False)  # tells on which device the module is

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that are quantized, by name, of a call with these arguments."""
        return dict(zip(self.input_names, args, strict=False))

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call; operations on single elements count as nothing."""
        if self.function in ("add", "mul"):
            return 0.0
        if self.function == "einsum":
            return _einsum_macs(kwargs["equation"], *args)
        return float(output.numel() * args[0].shape[-1])

    def forward(self, left: Tensor, right: Tensor, **rest: Any) -> Tensor:
        """Compute the function of the quantized inputs.

        Args:
            left: First operand.
            right: Second operand.
            rest: Further arguments of the function.
        """
        if self.mode == "quantized":
            quantizers = self.input_quantizers
            left = quantizers["left"](left) if "left" in quantizers else left
            right = quantizers["right"](right) if "right" in quantizers else right
        if self.function not in ("add", "mul"):
            # Kernels round differently for other strides, which captured inputs do not keep.
            left, right = left.contiguous(), right.contiguous()
        return COMPUTE[self.function](left, right, **rest)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return self.function


class JoinSite(CallSite):
    """A concatenation. Its tensors share one grid, as integer runtimes demand."""

    input_names = ("input",)

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the joined tensor, whose range is that of all the tensors together."""
        return {"input": torch.cat([tensor.flatten() for tensor in args[0]])}

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return 0: nothing is multiplied."""
        return 0.0

    def forward(self, tensors: Any, dim: int = 0) -> Tensor:  # type: ignore[override]  # a list of tensors
        """Join the tensors and quantize the result."""
        joined = torch.cat(list(tensors), dim)
        quantizer = self.input_quantizers.get("input") if self.mode == "quantized" else None
        return joined if quantizer is None else quantizer(joined)


def _einsum_macs(equation: str, *operands: Tensor) -> float:
    """Return the product of the sizes of all indices."""
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        before, _, after = term.partition("...")
        inner = operand.dim() - len(before) - len(after)
        labels = [*before, *(f"...{i - inner}" for i in range(inner)), *after]
        for label, size in zip(labels, operand.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return float(math.prod(sizes.values()))


class WeightedSite(QuantizedOp):
    """A call of a function of an input and a parameter, which another operation has quantized already."""

    input_names = ("input",)
    is_linear = False
    quantized_from = "products"

    def __init__(self) -> None:
        super().__init__()
        self.init_op()
        self.register_buffer("place", torch.empty(0), persistent=False)  # tells on which device the module is

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the input of a call."""
        return {"input": args[0]}

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call."""
        x, weight = args[:2]
        function = kwargs["function"]
        if function == "einsum":
            return _einsum_macs(kwargs["equation"], *((weight, x) if kwargs["weight_first"] else (x, weight)))
        if function.startswith("conv"):
            return float(output.numel() * weight[0].numel())
        return float(output.numel() * x.shape[-2 if kwargs["weight_first"] else -1])

    def bit_operations(self, macs: float, qconfig: LayerQConfig | None = None) -> float:
        """Return the bit operations of multiply-accumulates of the input and a weight.

        Args:
            macs: Number of multiply-accumulates.
            qconfig: Specs of the operation, which are taken to be those of the weight too; None for float.
        """
        inputs = qconfig.activation.bits if qconfig and qconfig.activation else FLOAT_BITS
        return macs * inputs * (qconfig.weight.bits if qconfig else FLOAT_BITS)

    def forward(self, x: Tensor, weight: Tensor, function: str, weight_first: bool = False, **rest: Any) -> Tensor:
        """Compute a function of the quantized input and the weight.

        Args:
            x: The input.
            weight: The weight, or a part of it.
            function: Name of the function.
            weight_first: Whether the weight is the left operand of a matrix product.
            rest: Further arguments of the function.
        """
        quantizer = self.input_quantizers.get("input") if self.mode == "quantized" else None
        x = x if quantizer is None else quantizer(x)
        return COMPUTE[function](*((weight, x) if weight_first else (x, weight)), **rest)
