"""Equal changes of an exported program after which engines find the patterns that they compute in integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_ptq.export.lowering import decomposed

_NEUTRAL = (1.0, 0.0, 0.0, 1.0)  # weight, bias, mean and variance of a folded batch norm


def simplify(program: Any) -> None:
    """Remove folded batch norms that a forward still calls, and what quantizes a tensor again on the same grid.

    Where a concatenation is quantized, its inputs are quantized on the same grid: engines concatenate integers, and the
    operators that compute its inputs return integers.

    Args:
        program: An exported program, changed in place.
    """
    graph: fx.Graph = program.graph
    for node in list(graph.nodes):
        same = _same_value(node)
        # The signature of the program names the nodes that are its outputs.
        if same is None or any(user.op == "output" for user in node.users):
            continue
        node.replace_all_uses_with(same)
        _erase_unused(graph, node)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.cat.default:
            _quantize_inputs(graph, node)
        if node.target is torch.ops.aten.clamp.default and node.meta["val"].is_floating_point():
            # The exporter of torch fails where one bound is written as an int, and the other as a float.
            node.args = (node.args[0], *(None if bound is None else float(bound) for bound in node.args[1:]))
    # Exporters that trace the program once more number these in order. The comparison with a file needs equal names.
    quantize = decomposed().quantize_per_tensor.default
    for index, node in enumerate(node for node in graph.nodes if node.target is quantize):
        node.name = f"quantize_per_tensor_{index}" if index else "quantize_per_tensor"


def _quantize_inputs(graph: fx.Graph, node: Any) -> None:
    """Quantize the inputs of a concatenation on the grid of its output, if all that reads the output is quantized."""
    ops = decomposed()
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    grids = {user.args[1:] if _calls(user, quantize) else None for user in node.users}
    grid = grids.pop() if len(grids) == 1 else None
    if grid is None:
        return
    quantized: dict[Any, Any] = {}
    for x in node.args[0]:
        if x in quantized or (_calls(x, dequantize) and x.args[1:] == grid):
            continue
        found = x
        with graph.inserting_before(node):
            for operator in (quantize, dequantize):
                value = operator(found.meta["val"], *grid)
                found = graph.call_function(operator, (found, *grid))
                found.meta = {**x.meta, "val": value}
        quantized[x] = found
    node.args = ([quantized.get(x, x) for x in node.args[0]], *node.args[1:])


def _same_value(node: Any) -> Any:
    """Return an earlier node that has the value of a node; None if none is known."""
    ops = decomposed()
    if node.target is torch.ops.aten.batch_norm.default:
        return _input_of_folded_norm(node)
    if node.target is not ops.dequantize_per_tensor.default:
        return None
    # Quantized, dequantized, and both again: the second time changes nothing.
    quantize = node.args[0]
    inner: Any = quantize.args[0] if _calls(quantize, ops.quantize_per_tensor.default) else None
    if _calls(inner, ops.dequantize_per_tensor.default) and inner.args[1:] == quantize.args[1:] == node.args[1:]:
        return inner
    return None


def _input_of_folded_norm(node: Any) -> Any:
    """Return the input of a batch norm that neither scales nor shifts, unless a later operator writes to it."""
    x, *tensors = node.args[:5]
    neutral = all(
        _calls(tensor, torch.ops.aten.full_like.default) and tensor.args[1] == value
        for tensor, value in zip(tensors, _NEUTRAL, strict=True)
        if tensor is not None
    )
    training, eps = node.args[5], node.args[7]
    if not isinstance(x, fx.Node) or x.op != "call_function" or not neutral or training or eps:
        return None
    in_place = any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in node.users)
    return None if in_place and len(x.users) > 1 else x


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node, and those of its inputs that nothing else uses."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        if not each.users and each.op == "call_function":
            _erase_unused(graph, each)
