"""Bounds of activations, as integers: Relu and Clip before a QuantizeLinear become bounds of its integers.

Rounding keeps order, so the integers are the same, and kernels find the quantizer right behind the operator whose
result it rounds. Where the grid ends at the bound, nothing is left to do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_ptq.export.onnx_graph import add_constant, constant_of


def bound_integers(graph: Any) -> None:
    """Replace Relu and Clip by bounds of integers, where all that reads their output quantizes it.

    Args:
        graph: The graph, changed in place.
    """
    for node in list(graph):
        bounds = _bounds(node)
        if bounds is None or node.outputs[0].is_graph_output():
            continue
        quantizers = [use.node for use in node.outputs[0].uses()]
        if not quantizers or not all(map(_has_one_scale, quantizers)):
            continue
        for quantizer in quantizers:
            _limit(graph, quantizer, bounds)
        graph.remove(node, safe=True)


def _bounds(node: Any) -> tuple[float, float] | None:
    """Return the least and the greatest output of a node; None if it does more than to bound its input."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip" or not node.outputs[0].dtype.is_floating_point():
        return None
    low, high = (
        np.asarray(default) if value is None else constant_of(value)
        for value, default in zip((*node.inputs[1:], None, None), (-np.inf, np.inf), strict=False)
    )
    return None if low is None or high is None else (float(low.reshape(())), float(high.reshape(())))


def _has_one_scale(node: Any) -> bool:
    arrays = [constant_of(value) for value in node.inputs[1:]] if node.op_type == "QuantizeLinear" else []
    return len(arrays) == 2 and all(array is not None and array.size == 1 for array in arrays)


def _limit(graph: Any, quantizer: Any, bounds: tuple[float, float]) -> None:
    """Let a quantizer read the input of the node that bounds it, and bound its integers instead."""
    scale, zero_point = (constant_of(value).reshape(()) for value in quantizer.inputs[1:])
    readers, kind = [use.node for use in quantizer.outputs[0].uses()], np.iinfo(zero_point.dtype)
    clip = readers[0] if len(readers) == 1 and readers[0].op_type == "Clip" else None  # of a grid below 8 bits
    grid = (kind.min, kind.max) if clip is None else tuple(int(constant_of(value)) for value in clip.inputs[1:])
    # As runtimes do: rounded half to even, and the zero point added to the integer.
    steps = np.rint(np.asarray(bounds, np.float32) / np.float32(scale)) + np.float32(zero_point)
    limits = tuple(int(value) for value in steps.clip(*grid))
    quantizer.replace_input_with(0, quantizer.inputs[0].producer().inputs[0])
    if limits == grid:
        return
    clip = clip or _clip_after(graph, quantizer)
    for place, (value, name) in enumerate(zip(limits, ("least", "greatest"), strict=True), 1):
        of_clip = f"{clip.outputs[0].name}.{name}"
        clip.replace_input_with(place, add_constant(graph, of_clip, np.asarray(value, zero_point.dtype)))


def _clip_after(graph: Any, quantizer: Any) -> Any:
    """Return a new node that is to bound the integers of a quantizer for all that reads them."""
    import onnx_ir as ir

    integers = quantizer.outputs[0]
    readers = list(integers.uses())
    clip = ir.node("Clip", [integers, None, None])
    (result,) = clip.outputs
    # The bounded integers have the name by which the comparison with the module finds them.
    result.name, integers.name = integers.name, f"{integers.name}.unbounded"
    result.dtype, result.shape = integers.dtype, integers.shape
    clip.metadata_props.update(quantizer.metadata_props)
    graph.insert_after(quantizer, clip)
    for use in readers:
        use.node.replace_input_with(use.idx, result)
    return clip
