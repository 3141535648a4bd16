"""Translation of the operators of quantized programs into those of ONNX.

Grids are exactly those of the module: a grid narrower than its type is kept by a Clip of the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_ptq.export.lowering import decomposed

_NUMPY = {torch.int8: np.int8, torch.uint8: np.uint8}
_ONNX = {2: np.uint8, 3: np.int8}  # the exporter passes element types by their numbers in ONNX


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return the functions that build ONNX nodes, by operator, for ``torch.onnx.export``.

    Args:
        opset: Version of the ONNX operators.
    """
    import onnx_ir as ir
    from onnxscript import opset18, opset21

    op: Any = opset21 if opset >= 21 else opset18
    ops = decomposed()

    def constant(value: Any, kind: Any) -> Any:
        return op.Constant(value=ir.tensor(np.asarray(value, kind)))

    def kind_of(dtype: Any) -> Any:
        return _NUMPY[dtype] if isinstance(dtype, torch.dtype) else _ONNX[int(dtype)]

    def quantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
        kind = kind_of(dtype)
        q = op.QuantizeLinear(x, constant(scale, np.float32), constant(zero_point, kind))
        limits = np.iinfo(kind)
        if (quant_min, quant_max) == (limits.min, limits.max):
            return q
        return op.Clip(q, constant(quant_min, kind), constant(quant_max, kind))

    def dequantize(
        q: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any, out_dtype: Any = None
    ) -> Any:
        return op.DequantizeLinear(q, constant(scale, np.float32), constant(zero_point, kind_of(dtype)))

    def dequantize_channels(
        q: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: Any,
        out_dtype: Any = None,
    ) -> Any:  # fmt: skip
        return op.DequantizeLinear(q, scales, _typed(op, zero_points, kind_of(dtype)), axis=axis)

    def dequantize_groups(
        q: Any, scales: Any, zero_points: Any, quant_min: int, quant_max: int, dtype: Any, group_size: int,
        output_dtype: Any = None,
    ) -> Any:  # fmt: skip
        return op.DequantizeLinear(q, scales, _typed(op, zero_points, kind_of(dtype)), axis=1, block_size=group_size)

    return {
        ops.quantize_per_tensor.default: quantize,
        ops.dequantize_per_tensor.default: dequantize,
        ops.dequantize_per_channel.default: dequantize_channels,
        ops.dequantize_per_channel_group.default: dequantize_groups,
    }


def _typed(op: Any, zero_points: Any, kind: Any) -> Any:
    """Return zero points in the type of the integers."""
    import onnx_ir as ir

    return op.Cast(zero_points, to=ir.DataType.from_numpy(np.dtype(kind)).value)
