"""Parity: whether an exported file computes what the quantized module computes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ptq.arguments import check_is_module
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.errors import ExportError, ParityError, SaturatingKernelsWarning, warn
from lightning_ptq.export.agreement import (
    MAX_DISAGREEMENT,
    MIN_SNR,
    Parity,
    TensorParity,
    Tolerance,
    compared,
    tolerance_of,
    why_not,
)
from lightning_ptq.export.inputs import ExampleInputs, batches_of, path_argument
from lightning_ptq.export.program import exported, try_forward
from lightning_ptq.export.sessions import open_session, run_session
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.runtime.structure import is_float, tensors_in

Pairs = dict[str, list[tuple[Any, Any]]]
"""What the module computes and what the file does, for each batch, by the name of the output."""

_DOUBTFUL, _BETTER = 100.0, 10.0  # decibels: what equal integers reach, and more than chance makes


def verify_export(
    path: str | os.PathLike[str],
    module: nn.Module,
    batches: Iterable[Any],
    *,
    every_tensor: bool = False,
    min_snr: float = MIN_SNR,
    max_disagreement: float = MAX_DISAGREEMENT,
) -> Parity:
    """Run an ONNX file in onnxruntime, and compare its outputs with those of the quantized module.

    An output passes if its signal-to-noise ratio is high enough, or if it holds scores of classes, nearly all
    predictions are equal, and the ratio is at most 15 dB lower. Runtimes add in another order, so a value in the middle
    between two integers may be rounded to either, and a deep network makes much of that. So an output also passes if it
    is as near to the module's as the module is to itself with scales that differ by 2e-7.

    On x86 CPUs without VNNI instructions, onnxruntime's default kernels add products of unsigned activations and signed
    weights in 16 bits, which overflow. A file that differs by this alone passes with a warning, which names the option
    that selects other kernels.

    Args:
        path: The file.
        module: The quantized module, on any device.
        batches: Inputs of the module's forward, each a tensor, a tuple or a dictionary.
        every_tensor: Also compare every quantized tensor inside the network, so that the first one that differs is
            named. It is measured on the first batch.
        min_snr: Least signal-to-noise ratio, in decibels.
        max_disagreement: Greatest share of differing predictions.

    Returns:
        What was found.

    Raises:
        ParityError: If an output is beyond the tolerance; the message names the first tensor that differs.
        ExportError: If onnxruntime is missing, or cannot run the file.
    """
    found = compare_export(path, module, batches, every_tensor, tolerance_of(min_snr, max_disagreement))
    if not found.passed:
        raise ParityError(why_not(found))
    return found


def compare_export(
    path: Any,
    module: nn.Module,
    batches: Any,
    every_tensor: bool,
    tolerance: Tolerance = (MIN_SNR, MAX_DISAGREEMENT),
    shown: Path | None = None,
) -> Parity:
    """Return what :func:`verify_export` returns, also where an output is beyond the tolerance.

    Messages name the file ``shown`` where it is still to be moved there.
    """
    check_is_module(module)
    path = path_argument(path)
    if not path.is_file():
        raise ExportError(f"there is no file {str(path)!r}. Give the path that export_onnx wrote.")
    kept = [ExampleInputs.of(module, batch) for batch in batches_of(batches)]
    if not kept:
        raise ExportError("there is no batch to compare the exported file on. Pass at least one batch of inputs.")
    samples = sum(inputs.samples for inputs in kept)
    if not samples:
        raise ExportError("the batches to compare the exported file on hold no sample. Pass at least one sample.")
    references = [_reference(module, inputs) for inputs in kept]
    pairs = _pairs(path, kept, references, shown or path)
    parity = Parity(path, samples, _outputs(pairs), [], *tolerance)
    if _least(parity.outputs) < _DOUBTFUL:
        exact = _exact_pairs(path, kept, references, shown or path)
        if exact is not None and _least(_outputs(exact)) > _least(parity.outputs) + _BETTER:
            pairs, parity = exact, replace(parity, outputs=_outputs(exact), saturates=True)
    if every_tensor:
        parity = replace(parity, tensors=list(_inside(path, module, kept[0], parity.saturates)))
    if not parity.passed:
        _check_repeatable(module, kept[0])  # or noise of the module's own would count as rounding
        parity = replace(parity, outputs=_with_rounding(parity.outputs, module, kept, pairs))
    if parity.passed and parity.saturates:
        warn(
            f"on this CPU, onnxruntime's default kernels add in 16 bits, which {shown or path} overflows. It is"
            " verified with session.x64quantprecision = 1, which adds in 32 bits.",
            SaturatingKernelsWarning,
            stacklevel=3,
        )
    return parity


def _reference(module: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Return what the module computes.

    Raises:
        ExportError: If there is NaN in it.
    """
    found = tensors_in(_run(module, inputs))
    if any(bool(tensor.isnan().any()) for tensor in found):
        raise ExportError(
            f"the module returns NaN on inputs of the shapes {inputs.shapes}, so nothing can be compared with it. Give"
            " inputs without NaN and infinities."
        )
    return found


def _pairs(
    path: Path, batches: list[ExampleInputs], references: list[list[Tensor]], shown: Path, exact: bool = False
) -> Pairs:
    """Run a file on batches, and return what the module computes and what the file does, by output."""
    session = open_session(os.fspath(path), exact)
    names = [output.name for output in session.get_outputs()]
    pairs: Pairs = {name: [] for name in names}
    for inputs, expected in zip(batches, references, strict=True):
        results = run_session(session, inputs, shown)
        if len(expected) != len(results):
            raise ParityError(
                f"{shown} has {len(results)} outputs, and the module returns {len(expected)} tensors. Export it again."
            )
        for name, reference, result in zip(names, expected, results, strict=True):
            pairs[name].append((_array(reference), result if result.dtype.kind in "iub" else result.astype(np.float64)))
    return pairs


def _exact_pairs(path: Path, batches: list[ExampleInputs], references: list[list[Tensor]], shown: Path) -> Pairs | None:
    """Return the pairs of kernels that cannot saturate; None if onnxruntime has none for the file."""
    try:
        return _pairs(path, batches, references, shown, exact=True)
    except ExportError:
        return None


def _outputs(pairs: Pairs) -> list[TensorParity]:
    return [compared(name, found, scores=True) for name, found in pairs.items() if found]


def _least(rows: list[TensorParity]) -> float:
    return min((row.snr for row in rows), default=-math.inf)


def _with_rounding(
    outputs: list[TensorParity], module: nn.Module, batches: list[ExampleInputs], pairs: Pairs
) -> list[TensorParity]:
    """Add to each output what rounding alone may make of it."""
    again: Pairs = {row.name: [] for row in outputs}
    with _rounded_otherwise(module):
        for index, inputs in enumerate(batches):
            found = tensors_in(_run(module, inputs))
            for name, tensor in zip(again, found, strict=True):
                again[name].append((pairs[name][index][0], _array(tensor)))
    return [replace(row, rounding=compared(row.name, again[row.name], scores=True).snr) for row in outputs]


@contextmanager
def _rounded_otherwise(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, scales of activations are larger by 2e-7, so that other values are rounded up."""
    scales = [q.scale for op in quantized_ops(module).values() for q in op.input_quantizers.values()]
    before = [scale.clone() for scale in scales]
    with torch.no_grad():
        for scale in scales:
            scale.mul_(1 + 2**-22)
        try:
            yield
        finally:
            for scale, old in zip(scales, before, strict=True):
                scale.copy_(old)


def _run(module: nn.Module, inputs: ExampleInputs) -> Any:
    with eval_mode(module), torch.no_grad():
        return try_forward(module, inputs.beside(module))


def _check_repeatable(module: nn.Module, inputs: ExampleInputs) -> None:
    """Raise if the module computes something else each time: then no file can compute the same.

    Raises:
        ExportError: If two forwards on a batch differ.
    """
    first, second = (tensors_in(_run(module, inputs)) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=False)):
        raise ExportError(
            f"two forwards of {type(module).__name__} on the same inputs differ, so its file cannot be verified. Export"
            " the part that does not draw random numbers, or write verify=False."
        )


def _array(tensor: Tensor) -> Any:
    """Return a tensor as an array, in double precision unless it holds integers or truth values."""
    found = tensor.detach().cpu()
    return (found.double() if is_float(found) else found).numpy()


def _inside(path: Any, module: nn.Module, inputs: ExampleInputs, exact: bool) -> Iterator[TensorParity]:
    """Compare every quantized tensor inside the network on one batch.

    The integers are compared, not the float values between two operators: to ask for those would keep the runtime from
    using the integer kernels that are to be tested.
    """
    import onnx

    expected = _integers(module, inputs)
    with _rounded_otherwise(module):
        again = _integers(module, inputs)
    model = onnx.load(os.fspath(path))
    present = {name for node in model.graph.node for name in node.output}
    taken = {output.name for output in model.graph.output}
    names = [name for name in expected if name in present and name not in taken]
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = open_session(model.SerializeToString(), exact)
    results = run_session(session, inputs, path, names) if names else []
    for name, result in zip(names, results, strict=True):
        where, reference = expected[name]
        rounding = compared(where, [(reference, again[name][1])]).snr
        yield replace(compared(where, [(reference, result.astype(np.float64))]), rounding=rounding)


def _integers(module: nn.Module, inputs: ExampleInputs) -> dict[str, tuple[str, Any]]:
    """Return the integers of quantized activations by the name of the operator, with the module that computes them."""
    found: dict[str, tuple[str, Any]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if "quantize_per_tensor" in str(n.target) and "dequantize" not in str(n.target):
                found[n.name] = producer(n.args[0]), result.cpu().double().numpy()
            return result

    program = exported(module, inputs, None, tensors_only=True)
    moved = inputs.beside(module)
    # Arguments that are no tensors have placeholders too.
    leaves = pytree.tree_leaves((moved.args, moved.kwargs))
    with torch.no_grad():
        Recorder(program.module(check_guards=False)).run(*leaves)
    return found


def producer(node: Any) -> str:
    """Return the qualified name of the module that computes a value."""
    while isinstance(node, torch.fx.Node):
        scopes = [scope for scope, _ in (node.meta.get("nn_module_stack") or {}).values() if scope]
        if scopes:
            return str(scopes[-1])
        node = next(iter(node.all_input_nodes), None)
    return "the inputs"
