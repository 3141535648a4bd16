"""An ONNX graph as a whole after its translation: names, what stays float, and what is not to be in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ptq.arguments import texts
from lightning_ptq.errors import ExportError

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
"""Operators that multiply and accumulate."""

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Expand", "Gather")
_QUANTIZER = "_fake_quant."
_SCOPES = "pkg.torch.onnx.name_scopes"


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


def constant_of(value: Any) -> Any:
    """Return the array of a constant, or None."""
    found, node = value.const_value, value.producer()
    if node is not None and node.op_type == "Cast":  # torch leaves large constants as they are
        return constant_of(node.inputs[0])
    if found is None and node is not None and node.op_type == "Constant":
        found = next(iter(node.attributes.values())).value
    return None if found is None else np.asarray(found.numpy() if hasattr(found, "numpy") else found)


def add_constant(graph: Any, name: str, array: Any) -> Any:
    """Return a new constant of a graph."""
    value = initializer(name, array)
    graph.initializers[name] = value
    return value


def initializer(name: str, array: Any) -> Any:
    """Return a value that is a constant, for a graph to take."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


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


def name_inputs(graph: Any, names: Sequence[str]) -> None:
    """Give the inputs of a graph the names that they have in the forward; torch's exporter changes some.

    Args:
        graph: The graph, changed in place.
        names: Names of its inputs, in order.
    """
    inputs = list(graph.inputs)
    for value in _values(graph):
        if value.name in names and not value.is_graph_input():
            value.name = f"{value.name}.inner"
    for value, name in zip(inputs, names, strict=True):
        value.name = name


def tidy(graph: Any, axes: Mapping[str, Mapping[int, str]], outputs: list[str] | None) -> dict[str, dict[int, str]]:
    """Give axes, weights and outputs readable names, and remove what tells of the machine that exported.

    Args:
        graph: The graph, changed in place.
        axes: Names of the axes of inputs.
        outputs: Names of the outputs; by default ``"output"``, or ``"output_0"`` and so on; ``"result"`` where an input
            is called so.

    Returns:
        The axes that are dynamic, by input.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for value in _values(graph):
        if value.shape is not None:  # sizes that the forward has fixed are symbols too
            dims = [int(str(dim.value)) if _is_fixed(dim) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)
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
    given = outputs or _default_names(graph)
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


def _is_fixed(dim: Any) -> bool:
    """Return True for a symbol whose value is a number."""
    return not isinstance(dim, int) and str(dim.value).isdigit()


def _default_names(graph: Any) -> list[str]:
    """Return the names of the outputs, which are not those of inputs."""
    taken = any(value.name.startswith("output") for value in graph.inputs)
    name = "result" if taken else "output"
    return [name] if len(graph.outputs) == 1 else [f"{name}_{index}" for index in range(len(graph.outputs))]


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
