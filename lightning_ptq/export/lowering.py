"""Lowering: fake quantizers become the quantize and dequantize operators that other programs know.

They are the operators of torch's ``quantized_decomposed`` library, which PT2E backends consume. Weights become integers
that are dequantized; nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.network.op import quantized_ops
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.granularity import ChannelScales, GroupScales

INTEGERS = "stored"
"""Name of the buffer with the integers of a lowered weight."""


def decomposed() -> Any:
    """Return the namespace of torch's operators for quantized programs."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


class LoweredActivation(FakeQuantize):
    """Quantizes and dequantizes a tensor by two operators.

    Args:
        quantizer: The quantizer to be lowered.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__(quantizer.spec)
        self.grid = (quantizer.scale.item(), int(quantizer.zero_point), *_integers(quantizer))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``; same shape and dtype."""
        ops = decomposed()
        return cast(Tensor, ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.grid), *self.grid))


class LoweredWeight(FakeQuantize):
    """Holds the integers of a weight, and dequantizes them.

    Args:
        quantizer: The quantizer to be lowered.
        weight: The weight.
    """

    def __init__(self, quantizer: FakeQuantize, weight: Tensor) -> None:
        super().__init__(quantizer.spec, quantizer.layout)
        layout, integers = quantizer.layout, quantizer.integers(weight.detach())
        self.axis: int | None = None
        scale, zero_point = quantizer.scale.detach().flatten(), quantizer.zero_point.detach().flatten()
        if isinstance(layout, GroupScales):
            integers = layout.split(integers).flatten(1)
            scale, zero_point = scale.view(layout.shape[:2]), zero_point.view(layout.shape[:2])
        elif isinstance(layout, ChannelScales):
            # Scales vary along one dimension; those of grouped transposed convolutions along two, which become one.
            self.axis = next((d for d, size in enumerate(layout.shape) if size > 1), 0)
            if layout.groups > 1:
                integers, self.axis = layout.rows(integers), 0
        self.range = _integers(quantizer)
        self.register_buffer(INTEGERS, integers.to(self.range[-1]).contiguous())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(torch.int64))

    def constant(self, x: Any) -> Tensor:
        """Return the weight; ``x`` is not used."""
        return self.forward(x)

    def forward(self, x: Any) -> Tensor:
        """Return the weight; ``x`` is not used."""
        ops, integers, layout = decomposed(), self.get_buffer(INTEGERS), self.layout
        values: Tensor
        if isinstance(layout, GroupScales):
            values = ops.dequantize_per_channel_group(
                integers, self.scale, self.zero_point, *self.range, layout.size, torch.float32
            )
            return layout.merge(values.view(*layout.shape[:2], layout.size))
        if self.axis is None:
            values = ops.dequantize_per_tensor(integers, self.scale.item(), int(self.zero_point), *self.range)
            return values
        values = ops.dequantize_per_channel(integers, self.scale, self.zero_point, self.axis, *self.range)
        return layout.from_rows(values) if isinstance(layout, ChannelScales) and layout.groups > 1 else values


def _integers(quantizer: FakeQuantize) -> tuple[int, int, torch.dtype]:
    """Return least and greatest integer of a grid, and the type that holds them."""
    spec = quantizer.spec
    return spec.quant_min, spec.quant_max, torch.int8 if spec.quant_min < 0 else torch.uint8


@contextmanager
def lowered(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, the module's quantizers are operators that programs outside the library know.

    Args:
        module: A quantized module.
    """
    with ExitStack() as stack:
        for op in quantized_ops(module).values():
            weights = op.weights
            quantizers: dict[str, nn.Module] = {
                f"{name}_fake_quant": LoweredActivation(quantizer) for name, quantizer in op.input_quantizers.items()
            }
            for name, quantizer in op.weight_quantizers.items():
                quantizers[f"{name}_fake_quant"] = LoweredWeight(quantizer, weights[name])
            before = {name: op._modules[name] for name in quantizers}
            op._modules.update(quantizers)
            stack.callback(op._modules.update, before)
        yield
