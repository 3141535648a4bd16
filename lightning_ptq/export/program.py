"""Export of a quantized module as a program of torch, with integer weights."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ptq.arguments import check_is_module
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.errors import ExportError
from lightning_ptq.export.inputs import Axes, ExampleInputs, checked_axes, default_axes, doubled, signature_of
from lightning_ptq.export.lowering import lowered
from lightning_ptq.export.simplify import simplify
from lightning_ptq.network.op import ops_in_mode, quantized_ops
from lightning_ptq.runtime.eager import eagerly, no_inference_mode
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.runtime.structure import tensors_in


def export_program(module: nn.Module, example_inputs: Any, dynamic_axes: Axes | None = None) -> Any:
    """Export a quantized module by :func:`torch.export.export`, with integer weights.

    Activations are quantized and dequantized by the operators of torch's library ``quantized_decomposed``, weights are
    integers that are dequantized by them. Backends of PT2E quantization find their patterns in such a program. Its
    outputs are those of the module.

    Args:
        module: A quantized module in float32. It is not changed.
        example_inputs: Inputs of its forward: a tensor, a tuple of positional arguments, or a dictionary of keyword
            arguments. Sizes of axes that are to be dynamic must be 2 or more, except that of a batch.
        dynamic_axes: Names of the axes that may have any size, by input and axis, such as ``{"x": {0: "batch"}}``. By
            default the first axis of every input, and the second one of a text model's.

    Returns:
        A :class:`torch.export.ExportedProgram`. It shares the tensors that stay float with the module.

    Raises:
        ExportError: If the module is not quantized, or its forward cannot be traced.
    """
    return exported(module, ExampleInputs.of(module, example_inputs), dynamic_axes)


def exported(module: nn.Module, inputs: ExampleInputs, dynamic_axes: Axes | None, tensors_only: bool = False) -> Any:
    """Export a module; see :func:`export_program`.

    Args:
        module: A quantized module.
        inputs: Inputs of its forward.
        dynamic_axes: Names of the axes that may have any size.
        tensors_only: Whether the program returns a list of the tensors in the forward's output.
    """
    check_exportable(module)
    inputs = doubled(inputs).beside(module)
    axes = default_axes(inputs) if dynamic_axes is None else checked_axes(dynamic_axes, inputs)
    shapes = _dynamic(inputs, axes)
    with torch.no_grad(), no_inference_mode(), eval_mode(module), ops_in_mode(module, "quantized"), eagerly(module):
        _check_output(module, try_forward(module, inputs), tensors_only)
        forward = _with_plain_signature(module, inputs, tensors_only)
        with quiet(), in_float32(module), lowered(module), attributes(module, {"forward": forward}):
            try:
                program = torch.export.export(module, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
            except Exception as error:
                raise ExportError(
                    f"torch.export cannot trace {type(module).__name__} ({_first_line(error)}). Its forward must not"
                    " branch on values of tensors; sizes that it branches on must not be among dynamic_axes."
                ) from error
    simplify(program)
    _drop_unused(program)
    if dynamic_axes is not None:
        _check_dynamic(program, inputs, axes)
    return program


def check_exportable(module: Any) -> None:
    """Raise unless ``module`` is quantized and in float32.

    Raises:
        ExportError: Saying what is wrong.
    """
    check_is_module(module)
    if not any(op.is_quantized for op in quantized_ops(module).values()):
        raise ExportError(f"{type(module).__name__} is not quantized, so there is nothing to export. Run PTQ first.")
    scripted = [name for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule)]
    if scripted:
        raise ExportError(
            f"{scripted[0] or 'the module'} is scripted, and torch.export cannot trace scripted modules. Use the module"
            " that torch.jit.script was given."
        )
    empty = next((name for name, p in module.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ExportError(f"{empty} is on the meta device, so it has no values. Load the weights of the module first.")
    other = {name: p.dtype for name, p in module.named_parameters() if p.is_floating_point()}
    other = {name: dtype for name, dtype in other.items() if dtype != torch.float32}
    if other:
        name, dtype = next(iter(other.items()))
        raise ExportError(f"{name} is {dtype}; a module is exported in float32. Call module.float() first.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _dynamic(inputs: ExampleInputs, axes: Axes) -> Any:
    """Return what torch.export is told about the sizes of inputs."""
    from torch.export import Dim

    names = iter(inputs.named)

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {axis: Dim.AUTO for axis in axes.get(next(names), {}) if leaf.shape[axis] != 1}

    return pytree.tree_map(sizes, inputs.by_name)


def _with_plain_signature(module: nn.Module, inputs: ExampleInputs, tensors_only: bool) -> Callable[..., Any]:
    """Return the forward with the given arguments as its only parameters.

    The checks of sizes that torch.export generates do not know ``*args`` and ``**kwargs``.
    """
    forward, known = module.forward, signature_of(module).parameters
    args = inputs.args
    variadic = [name for name, parameter in known.items() if parameter.kind is inspect.Parameter.VAR_POSITIONAL]

    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return tensors_in(output) if tensors_only else output

    def parameter(index: int, name: str) -> inspect.Parameter:
        if name in known and not variadic:
            return known[name]
        positional = index < len(args)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind)

    parameters = [parameter(index, name) for index, name in enumerate(inputs.by_name)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it first
    return call


def try_forward(module: nn.Module, inputs: ExampleInputs) -> Any:
    """Return the output of the forward in float32; an error of the inputs is told apart from one of the export."""
    try:
        with in_float32(module):
            return module(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} fails on the example inputs ({_first_line(error)}), whose shapes are"
            f" {inputs.shapes}. Give inputs as those of the calibration."
        ) from error


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, autocast is off, as it is in calibration."""
    device_type = next((parameter.device.type for parameter in module.parameters()), "cpu")
    with torch.autocast(device_type, enabled=False):
        yield


def _check_output(module: nn.Module, output: Any, tensors_only: bool) -> None:
    """Raise if the output of the forward cannot be that of a program."""
    if not tensors_in(output):
        raise ExportError(
            f"the forward of {type(module).__name__} returns no tensor, got a {type(output).__name__}. Export a module"
            " whose forward returns its result."
        )
    known = (Tensor, bool, int, float, complex, str, type(None))
    other = next((leaf for leaf in pytree.tree_leaves(output) if not isinstance(leaf, known)), None)
    if other is not None and not tensors_only:
        kind = type(other).__name__
        raise ExportError(
            f"the forward of {type(module).__name__} returns a {kind}, which torch.export does not know. Return a tuple"
            f" or a dictionary, or call torch.export.register_dataclass({kind}) if it is a dataclass."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporters inside the ``with`` block; what matters is in errors and results."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _drop_unused(program: Any) -> None:
    """Remove the parameters that a program does not use: the float weights, and folded batch norms."""
    from torch.export.graph_signature import InputKind

    specs = program.graph_signature.input_specs
    unused = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    for spec in list(specs):
        if spec.arg.name in unused and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
            program.graph.erase_node(unused[spec.arg.name])
    program.graph_module.recompile()


def _check_dynamic(program: Any, inputs: ExampleInputs, axes: Axes) -> None:
    """Raise if the forward has fixed a size that was to be dynamic."""
    given = set(program.graph_signature.user_inputs)
    found = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    shapes = [value.shape for value in found if isinstance(value, Tensor)]
    for name, shape in zip(inputs.named, shapes, strict=True):
        for axis in axes.get(name, ()):
            if str(shape[axis]).isdigit():  # also a symbol that the forward has fixed
                raise ExportError(
                    f"axis {axis} of {name!r} was to be dynamic, but the forward depends on its size, {shape[axis]}."
                    " Leave the axis out of dynamic_axes, or change the forward."
                )
