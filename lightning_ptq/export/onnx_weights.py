"""Changes of an ONNX graph that keep weights integers up to where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np


def transpose_stored(graph: Any) -> None:
    """Store weights transposed where the graph would transpose them after they are dequantized.

    Runtimes look for a dequantized weight right before the product.

    Args:
        graph: The graph, changed in place.
    """
    for node in list(graph):
        dequantize = _dequantized(node.inputs[0]) if node.op_type == "Transpose" else None
        if dequantize is None or len(node.inputs[0].uses()) > 1:
            continue
        stored, order = dequantize.inputs[0], _order(node)
        axis = dequantize.attributes["axis"].value if "axis" in dequantize.attributes else 1
        per_tensor = not dequantize.inputs[1].shape.rank()
        if len(stored.uses()) > 1 or dequantize.inputs[1].shape.rank() > 1:  # shared, or with a scale per block
            continue
        set_values(stored, np.ascontiguousarray(stored.const_value.numpy().transpose(order)))
        if not per_tensor:
            import onnx_ir as ir

            dequantize.attributes["axis"] = ir.AttrInt64("axis", order.index(axis))
        (result,) = dequantize.outputs
        result.shape = stored.shape
        node.outputs[0].replace_all_uses_with(result)
        graph.remove(node, safe=True)


def _order(node: Any) -> list[int]:
    rank = len(node.inputs[0].shape)
    return list(node.attributes["perm"].value) if "perm" in node.attributes else list(range(rank))[::-1]


def gather_integers(graph: Any) -> None:
    """Look the rows of tables up before they are dequantized, with their scales.

    Otherwise each forward would dequantize the whole table.

    Args:
        graph: The graph, changed in place.
    """
    import onnx_ir as ir

    for node in list(graph):
        dequantize = _dequantized(node.inputs[0]) if node.op_type == "Gather" else None
        if dequantize is None or len(dequantize.inputs) > 2 or _axis(node, 0) or _axis(dequantize, 1):
            continue
        table, scale = dequantize.inputs
        if scale.shape.rank() != 1:
            continue
        indices, old = node.inputs[1], node.outputs[0]
        last = _constant(graph, f"{node.name}.last", np.array([-1], np.int64))
        rows = ir.node("Gather", [table, indices], attributes={"axis": 0})
        floats = ir.node("Cast", [rows.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
        scales = ir.node("Gather", [scale, indices], attributes={"axis": 0})
        column = ir.node("Unsqueeze", [scales.outputs[0], last])
        product = ir.node("Mul", [floats.outputs[0], column.outputs[0]])
        new = [rows, floats, scales, column, product]
        for index, each in enumerate(new[:-1]):
            each.outputs[0].name = f"{node.name}.{index}"
        product.outputs[0].name, product.outputs[0].dtype = f"{node.name}.rows", ir.DataType.FLOAT
        product.outputs[0].shape = old.shape
        for each in new:
            each.metadata_props.update(node.metadata_props)
        graph.insert_before(node, new)
        old.replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not dequantize.outputs[0].uses():
            graph.remove(dequantize, safe=True)


def _axis(node: Any, default: int) -> int:
    return int(node.attributes["axis"].value) if "axis" in node.attributes else default


def _dequantized(value: Any) -> Any:
    """Return the node that dequantizes an initializer to a value; None if there is none."""
    node = None if value is None else value.producer()
    found = node is not None and node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    return node if found else None


def _constant(graph: Any, name: str, array: Any) -> Any:
    value = initializer(name, array)
    graph.initializers[name] = value
    return value


def initializer(name: str, array: Any) -> Any:
    """Return a value that is a constant of the graph."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def set_values(value: Any, array: Any) -> None:
    """Give an initializer other values, possibly of another shape."""
    import onnx_ir as ir

    value.const_value = ir.tensor(array, name=value.name)
    value.shape = value.const_value.shape
