"""How an ONNX graph stores weights and biases: as integers in the narrowest type, up to where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_ptq.export.onnx_graph import add_constant, constant_of, initializer

INTEGER_BIASES = ("Conv", "Gemm")
"""Operators whose integer kernels take a bias of 32-bit integers."""

_MOST_STEPS = 2**30  # of a bias, half of what 32 bits hold


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
        axis = _axis(dequantize, 1)
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
        last = add_constant(graph, f"{node.name}.last", np.array([-1], np.int64))
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


def narrow(graph: Any, opset: int, least: int = 2) -> None:
    """Store integer weights in the narrowest type that holds them: 8, 4 or, from opset 25, 2 bits.

    Weights of 4 and 2 bits are cast to 8 bits before they are dequantized. A runtime computes that once, when it loads
    the model, and then finds the pattern of its 8-bit kernels. Weights with a scale per block have none, so these are
    dequantized directly.

    Args:
        graph: The graph, changed in place.
        opset: Version of the ONNX operators.
        least: Bits of the narrowest type that the engine loads.
    """
    import onnx_ir as ir

    for node in list(graph):
        value = node.inputs[0] if node.op_type in ("DequantizeLinear", "Gather") else None
        if value is None or not value.is_initializer() or value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        array = value.const_value.numpy()
        kind = _narrowest(array, opset, least)
        if kind is None:
            continue
        wide = value.dtype
        value.const_value = ir.tensor(array.astype(kind.numpy()), dtype=kind, name=value.name)
        value.dtype = kind
        if has_blocks(node):
            if len(node.inputs) > 2:
                node.replace_input_with(2, _cast(graph, node, node.inputs[2], kind))
        else:
            node.replace_input_with(0, _cast(graph, node, value, wide))


def _narrowest(array: Any, opset: int, width: int) -> Any:
    """Return the narrowest type of ONNX for some 8-bit integers, or None if there is none below 8 bits."""
    import onnx_ir as ir

    if not array.size or opset < 21:
        return None
    signed = array.dtype == np.int8
    for bits, least in ((2, 25), (4, 21)):
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        kind = getattr(ir.DataType, f"{'' if signed else 'U'}INT{bits}", None)
        if opset >= least and bits >= width and kind is not None and array.min() >= low and array.max() <= high:
            return kind
    return None


def has_blocks(node: Any) -> bool:
    """Return True if a node has a scale per block of values."""
    return "block_size" in node.attributes and node.attributes["block_size"].value != 0


def _cast(graph: Any, before: Any, value: Any, kind: Any) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [value], attributes={"to": kind.value})
    (result,) = node.outputs
    result.name, result.dtype, result.shape = f"{value.name}.{before.name}", kind, value.shape
    graph.insert_before(before, node)
    return result


def integer_biases(graph: Any) -> None:
    """Store biases as 32-bit integers where input and weight are integers.

    Their scale is the product of the scales of input and weight, so that kernels add them to the accumulator.

    Args:
        graph: The graph, changed in place.
    """
    import onnx_ir as ir

    for node in list(graph):
        bias = node.inputs[2] if node.op_type in INTEGER_BIASES and len(node.inputs) > 2 else None
        if bias is None or not bias.is_initializer() or not _unscaled(node):
            continue
        values = bias.const_value.numpy()
        scale = _scale_of_products(node, values)
        if scale is None:
            continue
        integers = np.round(values.astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
        inputs = [
            graph.initializers.setdefault(name, initializer(name, array))
            for name, array in ((f"{bias.name}.integers", integers), (f"{bias.name}.scale", scale))
        ]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 0})
        (result,) = dequantize.outputs
        result.name, result.dtype, result.shape = f"{bias.name}.{node.name}", ir.DataType.FLOAT, bias.shape
        graph.insert_before(node, dequantize)
        node.replace_input_with(2, result)


def _scale_of_products(node: Any, bias: Any) -> Any:
    """Return the scales of a node's products, (outputs,), with which the bias fits into 32 bits; None without any.

    A channel with next to no weights gets a larger scale, which rounds them to 0. Onnxruntime would let its bias
    overflow otherwise, also one in float, and without a word.
    """
    inputs, weights = (_scale_of(value) for value in node.inputs[:2])
    if inputs is None or weights is None or inputs.size != 1 or weights.ndim > 1 or bias.ndim != 1:
        return None
    inputs = inputs.reshape(())
    scale = np.broadcast_to(inputs * weights, bias.shape).astype(np.float32)
    least = np.abs(bias.astype(np.float64)) / _MOST_STEPS
    small = np.abs(scale) < least
    if not small.any():
        return scale.copy()
    dequantize = node.inputs[1].producer()
    stored, of_weights = dequantize.inputs[:2]
    alone = len(node.inputs[1].uses()) == len(stored.uses()) == len(of_weights.uses()) == 1
    if weights.shape != bias.shape or not alone or not stored.is_initializer() or not of_weights.is_initializer():
        return None
    lifted = np.where(small, np.copysign(least / inputs, weights), weights).astype(np.float32)
    ratio = np.expand_dims(weights / lifted, [d for d in range(len(stored.shape)) if d != _axis(dequantize, 1)])
    integers = stored.const_value.numpy()
    set_values(stored, np.round(integers * ratio).astype(integers.dtype))
    set_values(of_weights, lifted)
    return (inputs * lifted).astype(np.float32)


def _unscaled(node: Any) -> bool:
    """Return True unless the node multiplies its product or its bias by a factor."""
    factors = (node.attributes[name].value for name in ("alpha", "beta") if name in node.attributes)
    return all(factor == 1 for factor in factors)


def _scale_of(value: Any) -> Any:
    """Return the scale of a tensor that is dequantized from 8-bit integers; None for any other."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or has_blocks(node):
        return None
    scale = constant_of(node.inputs[1])
    return None if scale is None else scale.astype(np.float32)


def _axis(node: Any, default: int) -> int:
    return int(node.attributes["axis"].value) if "axis" in node.attributes else default


def _dequantized(value: Any) -> Any:
    """Return the node that dequantizes an initializer to a value; None if there is none."""
    node = None if value is None else value.producer()
    found = node is not None and node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    return node if found else None


def set_values(value: Any, array: Any) -> None:
    """Give an initializer other values, possibly of another shape."""
    import onnx_ir as ir

    value.const_value = ir.tensor(array, name=value.name)
    value.shape = value.const_value.shape
