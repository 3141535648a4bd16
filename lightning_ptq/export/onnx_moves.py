"""Operators that move values between integers: a pair of QuantizeLinear and DequantizeLinear on both of their sides.

Quantization gives the same integers before and after an operator that only moves or selects values, so the outputs of
the graph stay what they are, and runtimes find operators between integers. Onnxruntime would insert these pairs by
itself, but where activations are signed, version 1.32 writes some that it cannot load.
"""

from __future__ import annotations

from typing import Any

from lightning_ptq.export.onnx_graph import constant_of

MOVES = ("Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose outputs hold values of their first input only."""


def quantize_moves(graph: Any) -> None:
    """Quantize the inputs and outputs of operators that move values, where one side is quantized already.

    Args:
        graph: The graph, changed in place.
    """
    for node in reversed(list(graph)):
        if node.op_type in MOVES and (quantize := _next_quantizer(node)) is not None:
            _quantize_input(graph, node, quantize)
    for node in list(graph):
        dequantize = _quantized_input(node) if node.op_type in MOVES else None
        if dequantize is not None:
            for value in node.outputs:
                _quantize_output(graph, node, value, dequantize)


def _next_quantizer(node: Any) -> Any:
    """Return a quantizer of a node's output, if all that reads the output quantizes it on one grid; otherwise None."""
    if len(node.outputs) > 1 or node.outputs[0].is_graph_output() or _quantized_input(node) is not None:
        return None
    readers = [use.node for use in node.outputs[0].uses()]
    if not readers or any(reader.op_type != "QuantizeLinear" for reader in readers):
        return None
    grid = _grid(readers[0])
    return readers[0] if grid is not None and all(_grid(reader) == grid for reader in readers) else None


def _quantized_input(node: Any) -> Any:
    """Return the node that dequantizes an activation to a node's first input, with one scale; None if there is none."""
    found = node.inputs[0].producer()
    if found is None or found.op_type != "DequantizeLinear" or found.inputs[0].is_initializer():
        return None
    return found if _grid(found) is not None else None


def _grid(node: Any) -> tuple[Any, ...] | None:
    """Return scale, zero point and type of a node that quantizes or dequantizes a tensor with one scale, or None."""
    arrays = [constant_of(value) for value in node.inputs[1:]]
    if len(arrays) != 2 or any(array is None or array.size != 1 for array in arrays):
        return None
    return (float(arrays[0].reshape(())), int(arrays[1].reshape(())), arrays[1].dtype)


def _quantize_input(graph: Any, node: Any, like: Any) -> None:
    """Quantize the first input of a node on the grid of a later quantizer."""
    added = _pair(node, node.inputs[0], like)
    graph.insert_before(node, added)
    node.replace_input_with(0, added[-1].outputs[0])


def _quantize_output(graph: Any, node: Any, value: Any, like: Any) -> None:
    """Quantize an output of a node for all that does not quantize it itself, on the grid of an earlier dequantizer."""
    readers = [use for use in value.uses() if use.node.op_type != "QuantizeLinear"]
    if not readers and not value.is_graph_output():
        return
    added = _pair(node, value, like)
    graph.insert_after(node, added)
    result = added[-1].outputs[0]
    for use in readers:
        use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = result


def _pair(node: Any, value: Any, like: Any) -> list[Any]:
    """Return nodes that quantize and dequantize an input or output of a node, on the grid of another one."""
    import onnx_ir as ir

    grid = like.inputs[1:]
    quantize = ir.node("QuantizeLinear", [value, *grid])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid])
    kinds = (ir.DataType.from_numpy(constant_of(grid[1]).dtype), value.dtype)
    for each, kind in zip((quantize, dequantize), kinds, strict=True):
        each.outputs[0].name = f"{value.name}.{node.name}.{each.op_type}"
        each.outputs[0].dtype, each.outputs[0].shape = kind, value.shape
        each.metadata_props.update(node.metadata_props)
    return [quantize, dequantize]
