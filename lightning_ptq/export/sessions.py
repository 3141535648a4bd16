"""The optional packages of the export, and running exported files in onnxruntime."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning_ptq.errors import ExportError
from lightning_ptq.export.inputs import ExampleInputs

EXPORTERS, RUNTIME = ("onnx", "onnxscript"), "onnxruntime"

EXACT_OPTION = ("session.x64quantprecision", "1")
"""Option of a session: on x86 CPUs, kernels that add in 32 bits instead of 16."""


def require(*packages: str) -> None:
    """Raise unless some optional packages can be imported.

    Raises:
        ExportError: Naming the missing one, and the command that installs it.
    """
    for name in packages:
        if find_spec(name) is None:
            raise ExportError(
                f"export to ONNX needs the package {name!r}, which is not installed. Run pip install"
                " 'lightning-ptq[onnx]'."
            )


def open_session(model: Any, exact: bool = False) -> Any:
    """Return a session of onnxruntime on the CPU.

    Args:
        model: Path or bytes of the model.
        exact: Whether to use kernels that cannot saturate, also on an x86 CPU without VNNI; they take longer.
    """
    require(RUNTIME)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry(*EXACT_OPTION)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load the exported model ({_shortened(error)}).") from error


def run_session(session: Any, inputs: ExampleInputs, path: Any, outputs: list[str] | None = None) -> list[Any]:
    """Run a session on inputs."""
    wanted = [value.name for value in session.get_inputs()]
    tensors, named = inputs.tensors, inputs.named
    feed = {name: named[name] for name in wanted if name in named}
    if len(feed) != len(wanted):
        if len(tensors) != len(wanted):
            raise ExportError(f"{path} takes the inputs {wanted}, got {len(tensors)} tensors. Pass the same inputs.")
        feed = dict(zip(wanted, tensors, strict=True))
    try:
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in feed.items()}
        found: list[Any] = session.run(outputs, arrays)
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run {path} on inputs of the shapes {inputs.shapes} ({_shortened(error)}). Sizes that"
            " vary between batches belong into dynamic_axes of export_onnx."
        ) from error
    return found


def _shortened(error: BaseException) -> str:
    """Return the message of an error in one line, its start and its end where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:100]} ... {text[-300:]}"
