from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import exportable, seeded
from torch import Tensor, nn

from lightning_ptq import export_onnx, export_program, verify_export
from lightning_ptq.errors import ExportError

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass
class Scores:
    scores: Tensor
    features: list[Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).relu()
        return self.head(features), features


class Dataclass(Net):
    def forward(self, x: Tensor) -> Any:
        scores, features = super().forward(x)
        return Scores(scores, [features])


class Random(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0] + torch.randn(len(x), 3)


class Number(Net):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return 1


ROWS = seeded(0, 6, 4)


def test_tensors_of_dataclasses_are_outputs(tmp_path: Path) -> None:
    net, path = exportable(Dataclass, [ROWS]), tmp_path / "net.onnx"
    result = export_onnx(net, path, ROWS, output_names=["scores", "features"])
    assert [row.name for row in result.parity.outputs] == ["scores", "features"]
    assert [len(value.type.tensor_type.shape.dim) for value in onnx.load(path).graph.output] == [2, 2]
    assert verify_export(path, net, [ROWS[:2]]).passed
    with pytest.raises(ExportError, match=r"returns a Scores.*register_dataclass\(Scores\)"):
        export_program(net, ROWS)


def test_forwards_without_tensors_and_tensors_without_values_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="the forward of Number returns no tensor, got a int"):
        export_onnx(exportable(Number, [ROWS]), path, ROWS, verify=False)
    net = exportable(Net, [ROWS])
    with pytest.raises(ExportError, match=r"body\.\w+ is on the meta device"):
        export_onnx(copy.deepcopy(net).to("meta"), path, ROWS)
    with pytest.raises(ExportError, match=r"x \(6, 4\) are on the meta device"):
        export_onnx(net, path, ROWS.to("meta"))
    assert not path.exists()


def test_errors_of_the_runtime_name_the_file_and_the_sizes(tmp_path: Path) -> None:
    net, path = exportable(Net, [ROWS]), tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"cannot run \S*[/\\]net\.onnx on .* Got: 2 Expected: 6"):
        export_onnx(net, path, ROWS, dynamic_axes={}, batches=[ROWS[:2]])


def test_a_file_is_in_float_also_under_autocast(tmp_path: Path) -> None:
    net, path = exportable(Net, [ROWS]), tmp_path / "net.onnx"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = export_onnx(net, path, ROWS)
    assert result.parity.passed
    assert {value.type.tensor_type.elem_type for value in onnx.load(path).graph.output} == {onnx.TensorProto.FLOAT}


def test_a_module_that_draws_random_numbers_is_not_verified(tmp_path: Path) -> None:
    net, path = exportable(Random, [ROWS]), tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="two forwards of Random on the same inputs differ"):
        export_onnx(net, path, ROWS)
    assert not list(tmp_path.iterdir())
    export_onnx(net, path, ROWS, verify=False)
    with pytest.raises(ExportError, match="two forwards of Random on the same inputs differ"):
        verify_export(path, net, [ROWS])


@pytest.mark.parametrize(("target", "kind"), [("onnxruntime", "INT2"), ("openvino", "INT4"), ("tensorrt", "INT8")])
def test_weights_are_stored_in_types_that_the_target_loads(target: Any, kind: str, tmp_path: Path) -> None:
    if not hasattr(onnx.TensorProto, "INT2"):
        pytest.skip("onnx is older than opset 25")
    net, path = exportable(Net, [ROWS], "w2a8", target), tmp_path / "net.onnx"
    export_onnx(net, path, ROWS, target=target, opset=25, verify=False)
    stored = {item.data_type for item in onnx.load(path).graph.initializer if item.name.endswith(".weight")}
    assert stored == {getattr(onnx.TensorProto, kind)}


def test_labels_folders_and_opsets_to_come_are_refused(tmp_path: Path) -> None:
    net, path = exportable(Net, [ROWS]), tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"too many positional arguments.*without labels"):
        export_onnx(net, path, ROWS, batches=[(ROWS, torch.zeros(6))])
    with pytest.raises(ExportError, match=r"path must be the path of a file, got '.*/'"):
        export_onnx(net, f"{path}/", ROWS)
    with pytest.raises(ExportError, match=r"torch cannot write opset 99, .* Write for example opset=21"):
        export_onnx(net, path, ROWS, opset=99)
    assert not list(tmp_path.iterdir())
