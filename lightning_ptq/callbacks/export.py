"""ExportONNX: an ONNX file with integer weights at the end of ``trainer.fit``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_ptq.arguments import flag, whole
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import OutputReader
from lightning_ptq.callbacks.base import StepCallback, capture_of
from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import log_artifact, log_scalars
from lightning_ptq.errors import ExportError, PTQError
from lightning_ptq.export.agreement import MAX_DISAGREEMENT, MIN_SNR, tolerance_of
from lightning_ptq.export.inputs import ExampleInputs, axes_argument, path_argument
from lightning_ptq.export.onnx import DEFAULT_OPSET, LEAST_OPSET, OnnxExport, export_onnx
from lightning_ptq.export.onnx_graph import names_argument
from lightning_ptq.export.sessions import EXPORTERS, RUNTIME, require
from lightning_ptq.report import PTQReport
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.memory import format_bytes
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import map_tensors

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class ExportONNX(StepCallback):
    """Writes the quantized network to an ONNX file with integer weights, and verifies it, as the last of the callbacks.

    The network is the module that the calibration forward calls: the ``LightningModule`` where its step calls
    ``self(...)``, otherwise the child that it calls. Its inputs are those of the calibration forward. The engine is the
    ``target`` of the CalibrationCapture. Loggers of W&B and MLflow get the file as an artifact.

    A file that cannot be written or is not verified is an error at the end of fit. The module stays quantized then, and
    ``quantized.ckpt`` is written.

    Args:
        path: The file; a relative path is below the Trainer's ``default_root_dir``.
        network: Qualified name of the submodule to export instead, ``""`` for the LightningModule; by
            default the one that the calibration forward calls.
        dynamic_axes: Names of the axes that may have any size, such as ``{"x": {0: "batch"}}``; by default the samples
            of every input, and the positions of the inputs of a text model.
        opset: Version of the ONNX operators.
        output_names: Names of the outputs; by default those of the exporter.
        verify: Whether the file is run in onnxruntime and compared with the module.
        samples: Number of calibration samples to compare on.
        min_snr: Least signal-to-noise ratio of an output, in decibels.
        max_disagreement: Greatest share of predictions that may differ where the ratio is lower.

    Attributes:
        result: The :class:`~lightning_ptq.export.onnx.OnnxExport` of the last run; None after an error.

    Raises:
        ExportError: If an optional package is missing; in fit, if the network cannot be exported.
        ParityError: In fit, if the file computes something else than the module.

    Example::

        callbacks = [CalibrationCapture("w8a8", target="onnxruntime"), AdaQuantLayerwise(), ExportONNX("model.onnx")]
    """

    role = "ExportONNX"
    title = "Export to ONNX"
    result: OnnxExport | None

    def __init__(
        self,
        path: str | os.PathLike[str] = "model.onnx",
        network: str | None = None,
        dynamic_axes: dict[str, dict[int, str]] | None = None,
        opset: int = DEFAULT_OPSET,
        output_names: list[str] | None = None,
        verify: bool = True,
        samples: int = 128,
        min_snr: float = MIN_SNR,
        max_disagreement: float = MAX_DISAGREEMENT,
    ) -> None:
        super().__init__()
        self.verify = flag("verify", verify)
        require(*EXPORTERS, *([RUNTIME] if verify else []))
        if network is not None and not isinstance(network, str):
            raise ExportError(
                f"network must be the name of a module, or None, got {network!r}. Write for example 'net'."
            )
        self.path, self.network, self.dynamic_axes = str(path_argument(path)), network, axes_argument(dynamic_axes)
        self.opset = whole("opset", opset, LEAST_OPSET, error=ExportError)
        self.output_names = names_argument(output_names)
        self.samples = whole("samples", samples, 1)
        self.min_snr, self.max_disagreement = tolerance_of(min_snr, max_disagreement)
        self._error: PTQError | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the order of the callbacks."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._error = None

    def check(self, trainer: Trainer, calibration: Calibration) -> None:
        """Check that the network to export is known."""
        self._network(calibration)

    def work(self, trainer: Trainer, calibration: Calibration, journal: Journal = NO_JOURNAL) -> OnnxExport | None:
        """Export on rank 0; an error is raised at the end of fit, when the result of the run is safe."""
        result, self._error = calibration.ranks.on_rank_zero(lambda: self._exported(trainer, calibration))
        if result is not None:
            log_scalars(trainer, {"ptq/export/bytes": result.bytes, **_snr(result)})
            log_artifact(trainer, result.path, "model")
        return result

    def _exported(self, trainer: Trainer, calibration: Calibration) -> tuple[OnnxExport | None, PTQError | None]:
        """Return what was written, or the error."""
        capture = capture_of(trainer)
        module = self._network(calibration)
        path = Path(trainer.default_root_dir) / self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            inputs = list(self._inputs(calibration, module))
            result = export_onnx(
                module, path, inputs[0], target=None if capture is None else capture.target, opset=self.opset,
                dynamic_axes=self.dynamic_axes, output_names=self.output_names, verify=self.verify, batches=inputs,
                min_snr=self.min_snr, max_disagreement=self.max_disagreement,
            )  # fmt: skip
        except PTQError as error:
            return None, error
        except OSError as error:
            return None, ExportError(f"{path} cannot be written ({error}). Give ExportONNX another path.")
        except Exception as error:  # whatever it is, the finished run is worth more
            found = ExportError(f"the export to {path} failed ({type(error).__name__}: {error}).")
            found.__cause__ = error
            return None, found
        return result, None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error of the export, after CalibrationCapture has completed the run."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.result is not None:
            verified = f", verified: {self.result.parity}" if self.result.parity is not None else ""
            rank_zero_info(f"{self.result.path}: {format_bytes(self.result.bytes)}{verified}.")

    def record(self, report: PTQReport) -> None:
        """Put the result into the report."""
        report.export = self.result

    def _network(self, calibration: Calibration) -> nn.Module:
        """Return the module to export."""
        if self.network is not None:
            try:
                return calibration.module.get_submodule(self.network)
            except AttributeError as error:
                names = [name for name, _ in calibration.module.named_children()]
                raise ExportError(
                    f"ExportONNX(network={self.network!r}): there is no such module. Its children are {names}."
                ) from error
        networks = OutputReader(calibration).networks
        if len(networks) != 1:
            raise ExportError(
                f"the calibration forward calls {len(networks)} networks on different batches: {sorted(networks)}."
                " Name the one to export: ExportONNX(network=...)."
            )
        return next(iter(networks.values()))

    def _inputs(self, calibration: Calibration, module: nn.Module) -> Iterator[ExampleInputs]:
        """Yield the arguments with which the calibration forward calls the network, for enough samples."""
        samples = 0
        for index in range(len(calibration.batches)):
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def keep(name: str, called: Any, args: Any, kwargs: Any, calls: list[Any] = calls) -> None:
                calls.append(map_tensors((args, kwargs), lambda tensor: tensor.detach().cpu().clone()))

            with hooked({"network": module}, before=keep):
                calibration.run(index)
            for args, kwargs in calls[-1:]:
                inputs = ExampleInputs.bound(module, args, kwargs)
                samples += inputs.samples
                yield inputs
            if samples >= self.samples:
                return
        if not samples:
            raise ExportError(
                f"the calibration forward does not call {type(module).__name__}. Name a network that it calls:"
                " ExportONNX(network=...)."
            )


def _snr(result: OnnxExport) -> dict[str, float]:
    """Return the least ratio of all outputs, for the logs."""
    rows = result.parity.outputs if result.parity is not None else []
    ratios = [row.snr for row in rows if row.snr < float("inf")]
    return {"ptq/export/snr": min(ratios)} if ratios else {}
