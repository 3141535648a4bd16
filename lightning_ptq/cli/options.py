"""Options of the subcommands, as arguments of functions: jsonargparse reads names, types and help from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ptq.callbacks import AdaQuantLayerwise, BitAllocator, CalibrationCapture, ExportONNX, StatsTuning
from lightning_ptq.callbacks.accuracy import Direction
from lightning_ptq.callbacks.one_call import is_narrow
from lightning_ptq.callbacks.trainer.muting import Step
from lightning_ptq.export.targets import TargetName


def callbacks_from(
    qconfig: str = "w8a8",
    num_samples: int | None = None,
    step: Step = "training",
    overrides: dict[str, str] | None = None,
    exclude: list[str] | None = None,
    size: float | None = None,
    bops: float | None = None,
    max_drop: float | None = None,
    monitor: str | None = None,
    mode: Direction | None = None,
    candidates: list[str] | None = None,
    tune: bool | None = None,
    steps: int | None = None,
    statistics: bool = False,
    target: TargetName | None = None,
    report_dir: str | None = None,
) -> list[Any]:
    """Return the callbacks of a run. The short form of trainer.callbacks, which holds all options of all callbacks.

    Args:
        qconfig: Bit widths of weights and activations, such as w8a8, w4a8 or w4g64a8.
        num_samples: Number of calibration samples, from the train loader; by default all of them.
        step: Calibration forward: training (training_step), predict (predict_step or forward), or the import path of a
            function of module and batch.
        overrides: Bit widths by layer-name pattern, such as '{"head*": w8a8}'.
        exclude: Patterns of layers that stay float, such as '[head, "*.gate"]'.
        size: Budget for the packed weights, within which bit widths are allocated layer by layer: a fraction of the
            float model's bytes, or bytes.
        bops: The same for the bit operations of one sample.
        max_drop: Accepted drop of a metric of the model's validation, in its unit; the smallest network is found.
        monitor: Name under which validation_step logs this metric.
        mode: Whether the metric is better the higher (max) or the lower (min) it is.
        candidates: Bit widths to allocate from; w8a8, w4a8, w4a4, w2a4 by default; with max_drop w8a8, w6a8, ... w2a8
        tune: Whether AdaQuant tunes weights and scales; false rounds to the nearest. By default true where any layer
            may have fewer than 8 bits.
        steps: Steps of AdaQuant per unit; by default they depend on the bit widths.
        statistics: Whether means, deviations and biases are corrected at the end.
        target: Inference engine that will run the network; sets what its integer kernels need.
        report_dir: Folder for the report: tables, plots, report.json and report.html.
    """
    capture = CalibrationCapture(
        qconfig, num_samples, step, overrides, exclude, target=target, report_dir=report_dir, save_checkpoint=False
    )
    callbacks: list[Any] = [capture]
    goal = {
        "size": size,
        "bops": bops,
        "max_drop": max_drop,
        "monitor": monitor,
        "mode": mode,
        "candidates": candidates,
    }
    if any(value is not None for value in goal.values()):
        callbacks.append(BitAllocator(**goal))  # type: ignore[arg-type]  # the signature above has the types
    if tune if tune is not None else len(callbacks) > 1 or is_narrow(capture.qconfig):
        callbacks.append(AdaQuantLayerwise(steps=steps))
    if statistics:
        callbacks.append(StatsTuning())
    return callbacks


def outputs(
    output: Path | None = Path("quantized.ckpt"), packed: Path | None = None, onnx: Path | None = None,
    validate: bool = True,
) -> None:  # fmt: skip
    """Files that are written, and the check of the result.

    Args:
        output: Lightning checkpoint of the quantized model; null to write none.
        packed: File for the weights at their true bit width, by convention *.safetensors.
        onnx: File for the network in ONNX with integer weights.
        validate: Whether the model's validation runs before and after, where model and data have one.
    """


def onnx_export(
    onnx: Path = Path("model.onnx"), target: TargetName | None = None, network: str | None = None, opset: int = 21,
    step: Step = "training", verify: bool = True,
) -> None:  # fmt: skip
    """The file, and how it is checked.

    Args:
        onnx: File to write.
        target: Inference engine that is to run the file; what it does not take is an error.
        network: Name of the submodule to export; by default the network that the step calls.
        opset: Version of the ONNX operators, 18 or later.
        step: Forward that shows the inputs of the network on a batch of the train loader: training, predict, or the
            import path of a function of module and batch.
        verify: Whether the file is run in onnxruntime and compared with the model.
    """


def exporter(onnx: Path) -> ExportONNX:
    """Return the callback that writes an ONNX file; a relative path starts at the current folder."""
    return ExportONNX(onnx.absolute())
