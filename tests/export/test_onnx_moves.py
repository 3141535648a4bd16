from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import exportable, seeded
from torch import Tensor, nn

from lightning_ptq import export_onnx
from lightning_ptq.export.onnx_moves import MOVES

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Shuffle(nn.Module):
    """Channels of a concatenation are shuffled and split, as in ShuffleNet; one half is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.left(x), self.right(x)], 1)
        first, second = h.view(h.shape[0], 2, 4, *h.shape[2:]).transpose(1, 2).flatten(1, 2).chunk(2, 1)
        pooled = F.max_pool2d(first.relu(), 2)
        return self.conv(pooled) + self.other(second[:, :, ::2, ::2])


def readers(model: onnx.ModelProto, name: str) -> list[str]:
    found = [node.op_type for node in model.graph.node if name in node.input]
    return found + ["output"] * any(output.name == name for output in model.graph.output)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("qconfig", ["w8a8", "w4a4"])
def test_what_moves_values_lies_between_integers(symmetric: bool, qconfig: str, tmp_path: Path) -> None:
    batches = [seeded(i, 6, 2, 6, 6) for i in range(2)]
    net = exportable(Shuffle, batches, qconfig, "onnxruntime", symmetric_activations=symmetric)
    result = export_onnx(net, tmp_path / "net.onnx", batches[0], batches=batches)
    assert result.parity is not None
    assert result.parity.outputs[0].snr > 100
    model = onnx.load(tmp_path / "net.onnx")
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    moves = [node for node in model.graph.node if node.op_type in MOVES and made.get(node.input[0]) != "Constant"]
    assert Counter(node.op_type for node in moves) >= Counter({"Reshape": 2, "Transpose": 1, "MaxPool": 1, "Slice": 1})
    for node in moves:
        assert made[node.input[0]] == "DequantizeLinear", node.name
        for output in node.output:
            assert set(readers(model, output)) == {"QuantizeLinear"}, node.name


def test_outputs_that_are_moved_integers_and_floats_that_are_moved(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (self.a(x) + self.b(x)).flatten(1), self.a(x).transpose(1, 2)

    batches = [seeded(i, 6, 2, 6, 6) for i in range(2)]
    net = exportable(Net, batches, "w8a8", "onnxruntime", symmetric_activations=True)
    result = export_onnx(net, tmp_path / "net.onnx", batches[0], output_names=["flat", "moved"])
    assert result.parity is not None
    assert [row.snr > 100 for row in result.parity.outputs] == [True, True]
    model = onnx.load(tmp_path / "net.onnx")
    assert [output.name for output in model.graph.output] == ["flat", "moved"]
    (transpose,) = (node for node in model.graph.node if node.op_type == "Transpose")
    assert {node.op_type for node in model.graph.node if transpose.input[0] in node.output} == {"Conv"}


def test_readers_on_two_grids_keep_what_moves_values_in_float(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.max_pool2d(x.sigmoid(), 2)
            return self.a(h).sigmoid() - self.b(h).sigmoid()

    batches = [seeded(i, 6, 2, 6, 6) for i in range(2)]
    net = exportable(Net, batches, "w8a8", operations="layers")
    net.b.input_fake_quant.scale.mul_(3.0)
    result = export_onnx(net, tmp_path / "net.onnx", batches[0])
    assert result.parity is not None
    assert result.parity.outputs[0].snr > 80
    model = onnx.load(tmp_path / "net.onnx")
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    assert [node.op_type for node in model.graph.node if pool.input[0] in node.output] == ["Sigmoid"]
    assert readers(model, pool.output[0]) == ["QuantizeLinear", "QuantizeLinear"]
