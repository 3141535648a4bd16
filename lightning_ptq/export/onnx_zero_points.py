"""Zero points of the weights in an ONNX graph, as the kernels of onnxruntime want them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_ptq.export.onnx_graph import add_constant, constant_of
from lightning_ptq.export.onnx_weights import has_blocks, set_values

_NEVER_SATURATES = 64  # two products of such weights and of 255 fit into 16 bits


def without_zero_points(graph: Any) -> None:
    """Leave out zero points of weights that are 0, as those of symmetric grids are.

    Args:
        graph: The graph, changed in place.
    """
    for node in list(graph):
        of_weights = node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
        if of_weights and len(node.inputs) > 2 and _is_zero(node.inputs[2]):
            source = node.inputs[2].producer()
            node.resize_inputs(2)
            if source is not None and not source.outputs[0].uses():
                graph.remove(source, safe=True)


def with_zero_points(graph: Any) -> None:
    """Give weights with a scale per channel their zero points, which are 0, also where they could be left out.

    Kernels of onnxruntime that cannot saturate take unsigned weights. Where the zero points are left out, it shifts the
    weights by one number for all channels, and then fails. It also fails where two weights share their zero points.

    Args:
        graph: The graph, changed in place.
    """
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or len(node.inputs) > 2 or has_blocks(node):
            continue
        scale = constant_of(node.inputs[1])
        if scale is not None and scale.ndim == 1 and str(node.inputs[0].dtype) == "INT8":
            node.resize_inputs(3)
            zeros = np.zeros(scale.size, np.int8)
            node.replace_input_with(2, add_constant(graph, f"{node.inputs[0].name}.zero_point", zeros))


def unsign_shared(graph: Any) -> None:
    """Store 8-bit weights that several products read as unsigned integers, with zero points of 128.

    Kernels of onnxruntime that cannot saturate take unsigned weights. It converts signed ones when it loads the file,
    and fails where two products read the same ones, as the steps of a recurrent layer do.

    Args:
        graph: The graph, changed in place.
    """
    for value in list(graph.initializers.values()):
        nodes = [use.node for use in value.uses()]
        shared = sum(len(node.outputs[0].uses()) for node in nodes) > 1
        if not shared or str(value.dtype) != "INT8" or not all(map(_can_be_unsigned, nodes)):
            continue
        array = value.const_value.numpy()
        if np.abs(array.astype(np.int16)).max(initial=0) <= _NEVER_SATURATES:  # then nothing is converted
            continue
        set_values(value, (array.astype(np.int16) + 128).astype(np.uint8))
        for node in nodes:
            scale = constant_of(node.inputs[1])
            node.resize_inputs(3)
            zeros = np.full(scale.shape, 128, np.uint8)
            node.replace_input_with(2, add_constant(graph, f"{value.name}.{node.name}.zero_point", zeros))


def _can_be_unsigned(node: Any) -> bool:
    """Return True for a node that dequantizes signed weights on a symmetric grid for products with unsigned inputs."""
    if node.op_type != "DequantizeLinear" or has_blocks(node) or constant_of(node.inputs[1]) is None:
        return False
    if len(node.inputs) > 2 and not _is_zero(node.inputs[2]):
        return False
    others = [use.node.inputs[0].producer() for use in node.outputs[0].uses() if use.idx == 1]
    whole = len(others) == len(node.outputs[0].uses())
    return whole and all(
        other is not None and other.op_type == "DequantizeLinear" and str(other.inputs[0].dtype) == "UINT8"
        for other in others
    )


def _is_zero(value: Any) -> bool:
    """Return True for a constant of zeros."""
    array = constant_of(value)
    return array is not None and not array.any()
