"""Export of a quantized module to ONNX, with weights stored as integers."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_ptq.arguments import whole
from lightning_ptq.errors import ExportError, ParityError
from lightning_ptq.export import onnx_clips, onnx_graph, onnx_moves, onnx_weights, onnx_zero_points
from lightning_ptq.export.agreement import MAX_DISAGREEMENT, MIN_SNR, Parity, Tolerance, tolerance_of, why_not
from lightning_ptq.export.inputs import Axes, ExampleInputs, batches_of, default_axes, path_argument
from lightning_ptq.export.parity import compare_export, producer
from lightning_ptq.export.program import check_exportable, exported, in_float32, quiet
from lightning_ptq.export.sessions import EXPORTERS, RUNTIME, require
from lightning_ptq.export.targets import Target, TargetName, target_named
from lightning_ptq.export.translation import translations
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.numerics.qconfig import QConfig

DEFAULT_OPSET = 21
LEAST_OPSET = 18  # of torch's exporter
_MOST_BYTES = 2**31 - 2**20  # of a protobuf message, less what surrounds the tensors


@dataclass(frozen=True)
class OnnxExport:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: The file.
        bytes: Its size, with that of external data.
        float_bytes: Bytes that the module's parameters take in float32.
        opset: Version of its operators.
        dynamic_axes: Axes of the inputs that may have any size, by input.
        products: Number of matrix products and convolutions.
        float_products: Those that are computed in float, as the operator and the module that runs it.
        parity: How far its outputs are from those of the module; None if that was not measured.
    """

    path: Path
    bytes: int
    float_bytes: int
    opset: int
    dynamic_axes: dict[str, dict[int, str]]
    products: int
    float_products: list[str] = field(default_factory=list)
    parity: Parity | None = None


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    target: TargetName | None = None,
    dynamic_axes: Axes | None = None,
    opset: int = DEFAULT_OPSET,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
    batches: Iterable[Any] | None = None,
    min_snr: float = MIN_SNR,
    max_disagreement: float = MAX_DISAGREEMENT,
) -> OnnxExport:
    """Write a quantized module to an ONNX file whose weights are integers, and verify the file in onnxruntime.

    Args:
        module: A quantized module in float32. It is not changed.
        path: The file, by convention ``*.onnx``. It is written as a whole or not at all.
        example_inputs: Inputs of the module's forward: a tensor, a tuple of positional arguments, or a dictionary of
            keyword arguments.
        target: Inference engine that is to run the file; what it does not take is an error.
        dynamic_axes: Names of the axes of any size; see :func:`~lightning_ptq.export_program`, also for the default.
        opset: Version of the ONNX operators, 18 or later. Weights of 3 and 4 bits are stored in 4 bits from opset 21
            on, those of 2 bits in 2 bits from 25 on; all others take 8 bits.
        output_names: Names of the outputs; by default those of torch's exporter.
        verify: Run the file in onnxruntime and compare its outputs with the module's; see
            :func:`~lightning_ptq.verify_export`.
        batches: Inputs to compare on; the example inputs by default.
        min_snr: Least signal-to-noise ratio of an output, in decibels.
        max_disagreement: Greatest share of predictions that may differ where the ratio is lower.

    Returns:
        What was written.

    Raises:
        ExportError: If a package is missing, the module cannot be exported, or the file cannot be written.
        ParityError: If the file computes something else. It then stays beside the path, with ``.failed`` in its name.
        QConfigError: If the target does not take how the module is quantized.
    """
    require(*EXPORTERS, *([RUNTIME] if verify else []))
    opset, engine = whole("opset", opset, LEAST_OPSET, error=ExportError), target_named(target)
    outputs, tolerance = onnx_graph.names_argument(output_names), tolerance_of(min_snr, max_disagreement)
    check_exportable(module)
    _check_ops(module, engine, opset)
    file, inputs = _writable(path_argument(path)), ExampleInputs.of(module, example_inputs)
    compared = [inputs] if batches is None else batches_of(batches)
    model = _translated(module, inputs, dynamic_axes, opset)
    graph, axes = model.graph, default_axes(inputs) if dynamic_axes is None else dynamic_axes
    dynamic = _finish(graph, engine, opset, axes, outputs)
    floats, parity = onnx_graph.float_products(graph), None
    onnx_graph.clean(graph)
    model.producer_name = "lightning_ptq"
    with _written(model, file) as (draft, size):
        if verify:
            parity = replace(_verified(draft, file, module, compared, tolerance), path=file)
        _move(draft.parent, file)
    products = sum(node.op_type in onnx_graph.PRODUCTS for node in graph)
    float_bytes = sum(parameter.numel() * 4 for parameter in module.parameters())
    return OnnxExport(file, size, float_bytes, opset, dynamic, products, floats, parity)


def _finish(
    graph: Any, engine: Target | None, opset: int, axes: Axes, outputs: list[str] | None
) -> dict[str, dict[int, str]]:
    """Store weights and biases as the engine wants them, and give everything its name; return the dynamic axes."""
    onnx_zero_points.without_zero_points(graph)
    onnx_weights.gather_integers(graph)
    onnx_weights.transpose_stored(graph)
    onnx_moves.quantize_moves(graph)
    if engine is None or engine.integer_bias:
        onnx_weights.integer_biases(graph)
    if engine is None or engine.bounds_integers:
        onnx_clips.bound_integers(graph)
    onnx_weights.narrow(graph, opset, 2 if engine is None else engine.least_bits)
    if engine is None or engine.integer_bias:
        onnx_zero_points.unsign_shared(graph)
        onnx_zero_points.with_zero_points(graph)
    return onnx_graph.tidy(graph, axes, outputs)


def _verified(draft: Path, file: Path, module: nn.Module, batches: list[Any], tolerance: Tolerance) -> Parity:
    """Compare a written file with the module; one that computes something else is moved beside its place."""
    parity = compare_export(draft, module, batches, False, tolerance, file)
    if not parity.passed:
        failed = file.with_name(f"{file.stem}.failed{file.suffix}")
        parity = compare_export(draft, module, batches, True, tolerance, file)
        _move(draft.parent, failed)
        raise ParityError(why_not(replace(parity, path=failed)))
    return parity


def _check_ops(module: nn.Module, engine: Target | None, opset: int) -> None:
    """Raise if the target or the opset does not take how an operation is quantized."""
    for name, op in quantized_ops(module).items():
        if op.qconfig is None:
            continue
        if engine is not None:
            negative = any(bool((q.scale < 0).any()) for q in op.weight_quantizers.values())
            engine.check(QConfig(op.qconfig), name, negative)
        size = op.qconfig.weight.group_size
        if size is not None and op.weight_names and opset < DEFAULT_OPSET:
            raise ExportError(
                f"{name} has a scale per group of {size} weights, which ONNX has from opset 21 on, got opset={opset}."
                " Write opset=21."
            )


def _translated(module: nn.Module, inputs: ExampleInputs, axes: Axes | None, opset: int) -> Any:
    """Return the model of a module, whose inputs have the names that they have in the forward."""
    program = exported(module, inputs, axes, tensors_only=True)
    try:
        with quiet(), in_float32(module):
            result = torch.onnx.export(
                program, dynamo=True, opset_version=opset, custom_translation_table=translations(opset), verbose=False
            )
    except Exception as error:
        raise ExportError(_why(program, error)) from error
    model = result.model  # type: ignore[union-attr]  # it is None only where a file was written
    found = model.opset_imports.get("", opset)
    if found != opset:
        raise ExportError(
            f"torch cannot write opset {opset}, and wrote {found} instead. Write for example opset={DEFAULT_OPSET}."
        )
    onnx_graph.name_inputs(model.graph, list(inputs.named))
    return model


def _why(program: Any, error: BaseException) -> str:
    """Return a message that names the operator without a counterpart in ONNX, and the module that runs it."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(causes)
    operator = re.search(r"op='([\w.:]+)'", text)
    if operator is not None:
        return (
            f"{operator[1]}, which {_runner(program, operator[1]) or 'the module itself'} runs, has no counterpart in"
            " ONNX that torch's exporter knows. Compute it by other operators, or leave it outside the exported module."
        )
    lines = [line for line in text.splitlines() if line.strip()]
    return f"torch.onnx cannot translate the module ({lines[-1] if lines else type(error).__name__})."


def _runner(program: Any, operator: str) -> str:
    """Return the qualified name of the module that runs an operator, also one that another operator consists of."""
    with suppress(Exception), quiet():  # the error that is explained matters more than where it comes from
        for graph in (program.graph, program.run_decompositions().graph):
            for node in graph.nodes:
                if str(node.target).startswith(operator):
                    return producer(node)
    return ""


def _writable(target: Path) -> Path:
    """Return the path, after a trial that the temporary folder of :func:`_written` can be made beside it."""
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}). Give the path of a file in a folder.") from error
    return target


@contextmanager
def _written(model: Any, file: Path) -> Iterator[tuple[Path, int]]:
    """Write a model into a temporary folder beside its place; yield its path there and its size.

    Above 2 GB its tensors go to a second file.
    """
    import onnx_ir as ir

    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = {"external_data": f"{file.name}.data"} if total > _MOST_BYTES else {}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / file.name
        try:
            ir.save(model, draft, **external)
        except OSError as error:
            raise ExportError(f"{file} cannot be written ({error}).") from error
        yield draft, sum(part.stat().st_size for part in draft.parent.iterdir())


def _move(folder: Path, file: Path) -> None:
    """Move a written model to its place: its external data first, which the model names."""
    try:
        for part in sorted(folder.iterdir(), reverse=True):
            os.replace(part, file if part.suffix != ".data" else file.with_name(part.name))
    except OSError as error:
        raise ExportError(f"{file} cannot be written ({error}).") from error
