"""From a trained network to an ONNX file with integers, timed: python recipes/deploy.py --network resnet18

Quantizes a network, exports it to ONNX, and compares the file with the float network in onnxruntime, and in OpenVINO if
it is installed: score, size, and time of a forward. The static quantization of onnxruntime stands beside it.
"""

from __future__ import annotations

import copy
import json as json_
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

import cifar10
import imagenet
import numpy as np
import pytorch_lightning as pl
import text
import torch
from jsonargparse import auto_cli
from measuring import Classifier, console, quiet, trainer, validated
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, ExportONNX
from lightning_ptq.export.inputs import ExampleInputs, default_axes

Network = Literal["resnet18", "resnet20", "efficientnet_lite0", "minilm"]
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def load(network: Network, data: Path | None, labels: Path | None, weights: Path | None) -> tuple[Any, Any, Any, str]:
    """Return a float module, loaders of calibration and test samples, and the name of its score."""
    if network == "resnet18":  # random weights and images: only its times mean something
        torch.manual_seed(0)
        images = TensorDataset(torch.randn(32, 3, 224, 224), torch.zeros(32, dtype=torch.long))
        return Classifier(resnet18(), 1000), DataLoader(images, 8), DataLoader(images, 8), "top1"
    if data is None:
        raise SystemExit(f"--network {network} needs --data, and --labels or --weights; see --help.")
    if network == "resnet20":
        return (*cifar10.load(data, weights or data, 1024, 0), "top1")
    if network == "efficientnet_lite0":
        return (*imagenet.load(data, labels or data), "top1")
    return (*text.load(data, labels or data), "spearman")


def session(path: Path, threads: int) -> Run:
    """Return a function that runs a file in onnxruntime."""
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    loaded = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: loaded.run(None, dict(feed))


def openvino_session(path: Path, threads: int) -> Run:
    """Return a function that runs a file in OpenVINO."""
    import openvino

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
    compiled = core.compile_model(core.read_model(path), "CPU")
    return lambda feed: list(compiled(dict(feed)).values())


def score_of(run: Run, names: list[str], module: pl.LightningModule, test: Any, score: str) -> float:
    """Return the score of the module where a file computes its forward."""
    module = copy.deepcopy(module)

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        return torch.from_numpy(run({name: inputs[name].numpy() for name in names})[0])

    module.__dict__["forward"] = forward
    return validated(module, test, score)


def milliseconds(runs: Mapping[str, Run], feed: Mapping[str, np.ndarray], repeats: int) -> dict[str, float]:
    """Return the median time of a run of each kind, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(feed)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found[2:]) for name, found in times.items()}  # the first two warm up


def float_file(module: nn.Module, inputs: ExampleInputs, path: Path) -> None:
    """Export the float module by torch alone."""
    from torch.export import Dim

    axes = default_axes(inputs)
    shapes = {name: dict.fromkeys(axes.get(name, {}), Dim.DYNAMIC) for name in inputs.by_name}
    program = torch.export.export(module.eval(), inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
    torch.onnx.export(program, f=str(path), dynamo=True, opset_version=21, external_data=False, verbose=False)


def static_file(source: Path, target: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    """Quantize a float file by onnxruntime's own static quantization."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def main(
    network: Network = "resnet18",
    data: Path | None = None,
    labels: Path | None = None,
    weights: Path | None = None,
    qconfigs: list[str] = ["w8a8"],  # noqa: B006  jsonargparse shows it
    tune: bool = True,
    target: Literal["onnxruntime", "openvino"] = "onnxruntime",
    static: bool = True,
    threads: int = 1,
    batch_size: int = 1,
    repeats: int = 30,
    json: Path | None = None,
) -> None:
    """Quantize, export, verify and time a network.

    Args:
        network: resnet18 (random weights), resnet20 (CIFAR-10), efficientnet_lite0 (photographs) or minilm (sentences).
        data: What cifar10.py and imagenet.py call --data, and text.py --calib.
        labels: What imagenet.py calls --classes, and text.py --test.
        weights: What cifar10.py calls --weights.
        qconfigs: Bit widths, each for a file of its own.
        tune: Whether AdaQuant tunes the network; without it, values are rounded to the nearest.
        target: Engine that the network is quantized for.
        static: Whether onnxruntime's own static quantization is measured too.
        threads: Threads of a forward.
        batch_size: Samples of a timed forward.
        repeats: Timed forwards of each file.
        json: File for the measurements.
    """
    quiet()
    module, calibration, test, score = load(network, data, labels, weights)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            module, calibration, test, score, Path(folder), qconfigs, tune, target, static, threads, batch_size, repeats
        )
    table = Table("what", f"{score}, %", "file, MB", "share of float", "ms", "times faster", "verified")
    for row in rows:
        table.add_row(*[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()])
    console.print(table)
    if json is not None:
        json.write_text(json_.dumps(rows, indent=1))


def measure(
    module: pl.LightningModule, calibration: Any, test: Any, score: str, folder: Path, qconfigs: list[str],
    tune: bool, target: Any, static: bool, threads: int, batch_size: int, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row of measurements for each file."""
    batch = next(iter(calibration))
    given = dict(batch) if isinstance(batch, Mapping) or hasattr(batch, "items") else batch[0]
    inputs = ExampleInputs.of(module, given)
    names = list(inputs.by_name)
    paths = {"float": folder / "float.onnx"}
    scores, verified = {"float": validated(module, test, score)}, {"float": ""}
    float_file(copy.deepcopy(module), inputs, paths["float"])
    if static:
        paths["onnxruntime static"] = folder / "static.onnx"
        feeds = []
        for each in calibration:
            found = ExampleInputs.of(module, dict(each) if hasattr(each, "items") else each[0])
            feeds.append({name: value.numpy() for name, value in found.by_name.items()})
        static_file(paths["float"], paths["onnxruntime static"], feeds)
        verified["onnxruntime static"] = ""
    for qconfig in qconfigs:
        pl.seed_everything(0, verbose=False)
        quantized, path = copy.deepcopy(module), folder / f"{qconfig}.onnx"
        callbacks: list[Any] = [CalibrationCapture(qconfig, target=target)]
        callbacks += [AdaQuantLayerwise()] * tune + [ExportONNX(str(path))]
        trainer(callbacks).fit(quantized, calibration)
        scores[f"{qconfig}, fake-quantized"] = validated(quantized, test, score)
        paths[qconfig] = path
        export = callbacks[-1].result
        verified[qconfig] = str(export.parity)
        console.print(export)
    runs = {name: session(path, threads) for name, path in paths.items()}
    for name, run in runs.items():
        if name != "float":
            scores[name] = score_of(run, names, module, test, score)
    feed = {name: value[:batch_size].numpy() for name, value in inputs.by_name.items()}
    try:
        runs.update({f"{name}, OpenVINO": openvino_session(path, threads) for name, path in paths.items()})
    except ImportError:
        console.print("OpenVINO is not installed: pip install openvino")
    times = milliseconds(runs, feed, repeats)
    rows = []
    size = paths["float"].stat().st_size
    for name in dict.fromkeys([*scores, *runs]):
        path, base = paths.get(name), "float, OpenVINO" if name.endswith("OpenVINO") else "float"
        rows.append(
            {
                "what": name, "score": scores.get(name, ""), "megabytes": path.stat().st_size / 1e6 if path else "",
                "share": path.stat().st_size / size if path else "", "ms": times.get(name, ""),
                "faster": times[base] / times[name] if name in times else "", "verified": verified.get(name, ""),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
