from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import exportable, seeded
from torch import Tensor, nn

from lightning_ptq import ReconstructionConfig, calibrate, export_onnx
from lightning_ptq.calibration.calibration import _greatest_scale
from lightning_ptq.export.parity import compare_export
from lightning_ptq.export.targets import configured
from lightning_ptq.network.units import find_units
from lightning_ptq.tuning.tuners import make_tuner

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

IMAGES = [5 * seeded(i, 6, 2, 6, 6) for i in range(2)]


class Bounded(nn.Module):
    """Convolutions with bounded activations, the last of which is read by a convolution and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).clamp(-1, 0.5)
        h = self.conv1(h).relu()
        return self.conv2(h) + h


def floats(path: Path) -> Counter[str]:
    """Count Relu, and Clip of floats."""
    model = onnx.load(path)
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    clips = (node for node in model.graph.node if node.op_type in ("Relu", "Clip"))
    return Counter(node.op_type for node in clips if made[node.input[0]] != "QuantizeLinear")


@pytest.mark.parametrize("qconfig", ["w8a8", "w4a4"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_bounds_are_those_of_the_integers(qconfig: str, factor: float, tmp_path: Path) -> None:
    net = exportable(Bounded, IMAGES, qconfig, "onnxruntime")
    for name, buffer in net.named_buffers():  # so that the grids end before, at and behind the bounds
        if name.endswith("input_fake_quant.scale"):
            buffer.mul_(factor)
    for layer in (net.stem, net.conv1, net.conv2):
        layer.round_bias()
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0], verify=False)
    found = compare_export(tmp_path / "net.onnx", net, IMAGES, every_tensor=True)
    assert all(row.snr > 80 for row in [*found.outputs, *found.tensors])
    assert len(found.tensors) >= 4
    assert not floats(tmp_path / "net.onnx")


def test_a_bound_stays_where_its_floats_are_read(tmp_path: Path) -> None:
    class Net(Bounded):
        def forward(self, x: Tensor) -> Any:
            h = self.stem(x).clamp(-1, 0.5)
            return self.conv2(self.conv1(h)), h.mean()

    net = exportable(Net, IMAGES, "w8a8", "onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
    assert floats(tmp_path / "net.onnx") == {"Clip": 1}


def test_engines_that_fuse_bounds_themselves_keep_them(tmp_path: Path) -> None:
    net = exportable(Bounded, IMAGES, "w8a8", "tensorrt")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target="tensorrt")
    assert floats(tmp_path / "net.onnx") == {"Clip": 1, "Relu": 1}


def test_a_grid_ends_where_the_values_end_on_either_side() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(-6.0, 1.0), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight *= 20
    calibration = calibrate(net, [seeded(0, 64, 4)], configured("w8a8", None, first_last_bits=None))
    ((which, quantizer),) = calibration.layers["2"].input_quantizers.items()
    observer, expected = calibration.observers["2", which], {200: 6.0 / 200, 250: 1.0 / 5}
    for zero_point, greatest in expected.items():  # the end that needs the greater scale decides
        quantizer.zero_point.fill_(zero_point)
        quantizer.scale.fill_(1e-3)
        assert _greatest_scale(quantizer, observer) == pytest.approx(greatest, rel=1e-5)


@pytest.mark.parametrize(("qconfig", "bounded"), [("w8a8", True), ("w8a4", False)])
def test_tuning_keeps_a_grid_of_8_bits_within_the_values(qconfig: str, bounded: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    calibration = calibrate(net, [20 * batch for batch in IMAGES], configured(qconfig, None, first_last_bits=None))
    (quantizer,) = calibration.layers["2"].input_quantizers.values()
    assert quantizer.scale.item() * quantizer.spec.quant_max <= 6.00001
    unit = next(unit for unit in find_units(net, calibration.trace, "layer") if unit.name == "2")
    tuner = make_tuner(unit, "2", calibration.layers["2"], ReconstructionConfig())
    variable, _ = tuner.variables["input_fake_quant.scale"]
    variable.data.fill_(1.0)
    value = tuner.tensors()["input_fake_quant.scale"]
    assert (value.item() * quantizer.spec.quant_max < 6.00001) is bounded
    value.sum().backward()
    assert variable.grad > 0  # so that it can come back
    tuner.write()
    assert quantizer.scale.item() == value.item()
