"""Changes of an ONNX graph after its translation: narrow storage, integer biases, names, and what stays float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lightning_ptq.arguments import texts
from lightning_ptq.errors import ExportError
from lightning_ptq.export.onnx_weights import initializer, set_values

INTEGER_BIASES = ("Conv", "Gemm")
"""Operators whose integer kernels take a bias of 32-bit integers."""

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
"""Operators that multiply and accumulate."""

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Expand", "Gather")
_QUANTIZER = "_fake_quant."
_SCOPES = "pkg.torch.onnx.name_scopes"
_MOST_STEPS = 2**30  # of a bias, half of what 32 bits hold


def narrow(graph: Any, opset: int) -> None:
    """Store integer weights in the narrowest type that holds them: 8, 4 or, from opset 25, 2 bits.

    Weights of 4 and 2 bits are cast to 8 bits before they are dequantized. A runtime computes that once, when it loads
    the model, and then finds the pattern of its 8-bit kernels. Weights with a scale per block have none, so these are
    dequantized directly.

    Args:
        graph: The graph, changed in place.
        opset: Version of the ONNX operators.
    """
    import onnx_ir as ir

    for node in list(graph):
        value = node.inputs[0] if node.op_type in ("DequantizeLinear", "Gather") else None
        if value is None or not value.is_initializer() or value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        array = value.const_value.numpy()
        kind = _narrowest(array, opset)
        if kind is None:
            continue
        wide = value.dtype
        value.const_value = ir.tensor(array.astype(kind.numpy()), dtype=kind, name=value.name)
        value.dtype = kind
        if _has_blocks(node):
            if len(node.inputs) > 2:
                node.replace_input_with(2, _cast(graph, node, node.inputs[2], kind))
        else:
            node.replace_input_with(0, _cast(graph, node, value, wide))


def _narrowest(array: Any, opset: int) -> Any:
    """Return the narrowest type of ONNX for some 8-bit integers, or None if there is none below 8 bits."""
    import onnx_ir as ir

    if not array.size or opset < 21:
        return None
    signed = array.dtype == np.int8
    for bits, least in ((2, 25), (4, 21)):
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        kind = getattr(ir.DataType, f"{'' if signed else 'U'}INT{bits}", None)
        if opset >= least and kind is not None and array.min() >= low and array.max() <= high:
            return kind
    return None


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


def _is_zero(value: Any) -> bool:
    """Return True for a constant of zeros."""
    array = _constant(value)
    return array is not None and not array.any()


def _constant(value: Any) -> Any:
    """Return the array of a constant, or None."""
    found, node = value.const_value, value.producer()
    if node is not None and node.op_type == "Cast":  # torch leaves large constants as they are
        return _constant(node.inputs[0])
    if found is None and node is not None and node.op_type == "Constant":
        found = next(iter(node.attributes.values())).value
    return None if found is None else np.asarray(found.numpy() if hasattr(found, "numpy") else found)


def _has_blocks(node: Any) -> bool:
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
    stored, axis = dequantize.inputs[0], dequantize.attributes["axis"].value if "axis" in dequantize.attributes else 1
    of_weights = dequantize.inputs[1]
    alone = len(node.inputs[1].uses()) == len(stored.uses()) == len(of_weights.uses()) == 1
    if weights.shape != bias.shape or not alone or not stored.is_initializer() or not of_weights.is_initializer():
        return None
    lifted = np.where(small, np.copysign(least / inputs, weights), weights).astype(np.float32)
    ratio = np.expand_dims(weights / lifted, [d for d in range(len(stored.shape)) if d != axis])
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
    if node is None or node.op_type != "DequantizeLinear" or _has_blocks(node):
        return None
    scale = _constant(node.inputs[1])
    return None if scale is None else scale.astype(np.float32)


def float_products(graph: Any) -> list[str]:
    """Return the products that are computed in float, as the operator and the module that runs it.

    Args:
        graph: The graph.
    """
    found = []
    for node in graph:
        operands = node.inputs[:2] if node.op_type in PRODUCTS else ()
        if operands and not all(_is_dequantized(value) for value in operands if value is not None):
            found.append(f"{node.op_type} in {scope_of(node) or 'the module itself'}")
    return found


def _is_dequantized(value: Any) -> bool:
    node = value.producer()
    while node is not None and node.op_type in _MOVES:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def scope_of(node: Any) -> str:
    """Return the qualified name of the module that ran a node; empty where it is not known."""
    scopes = str(node.metadata_props.get(_SCOPES, ""))
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return next((name for name in reversed(names[:-1]) if name), "")


def names_argument(names: Any) -> list[str] | None:
    """Return the argument ``output_names``; raise :class:`ExportError` if it is no list of different names."""
    if names is None:
        return None
    found = texts("output_names", names, "output", ExportError)
    if len(set(found)) != len(found) or not all(found):
        raise ExportError(f"output_names must be different names, got {found}. Write for example ['scores', 'boxes'].")
    return found


def tidy(graph: Any, axes: Mapping[str, Mapping[int, str]], outputs: list[str] | None) -> dict[str, dict[int, str]]:
    """Give axes, weights and outputs readable names, and remove what tells of the machine that exported.

    Args:
        graph: The graph, changed in place.
        axes: Names of the axes of inputs.
        outputs: Names of the outputs; by default ``"output"``, or ``"output_0"`` and so on.

    Returns:
        The axes that are dynamic, by input.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for value in graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            dim = value.shape[axis]
            if not isinstance(dim, int):
                taken = names.setdefault(str(dim.value), name)
                dynamic.setdefault(value.name, {})[axis] = taken
    for value in _values(graph):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else names.get(str(dim.value), dim) for dim in value.shape]
            value.shape = ir.Shape(dims)
        value.metadata_props.clear()
    for name in [name for name in graph.initializers if _QUANTIZER in name]:
        value = graph.initializers[name]
        value.name = name.replace(f"{_QUANTIZER}stored", "").replace(_QUANTIZER, ".")
    given = outputs or (["output"] if len(graph.outputs) == 1 else [f"output_{i}" for i in range(len(graph.outputs))])
    if len(given) != len(graph.outputs):
        raise ExportError(
            f"output_names has {len(given)} names, {given}; the forward returns {len(graph.outputs)} tensors. Write a"
            " name for each."
        )
    inner = {value.name for value in _values(graph)} - {value.name for value in graph.outputs}
    if outputs and (twice := inner.intersection(given)):
        raise ExportError(
            f"output_names has {sorted(twice)}, which names an input or a tensor inside the network. Write other names."
        )
    for value, name in zip(graph.outputs, given, strict=True):
        if not value.is_graph_input():
            value.name = name
    return dynamic


def clean(graph: Any) -> None:
    """Remove unused initializers, and the exporter's notes on nodes, which hold source lines and paths."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_output():
            graph.initializers.pop(name)
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
