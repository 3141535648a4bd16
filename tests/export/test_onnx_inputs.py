from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import exportable, seeded
from torch import Tensor, nn

from lightning_ptq import export_onnx, export_program
from lightning_ptq.errors import ExportError
from lightning_ptq.export.inputs import ExampleInputs

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Capitals(Layer):
    def forward(self, X: Tensor, output: Tensor) -> Tensor:  # what is tested
        return self.linear(X) * output


class Product(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) @ y


class Nested(Layer):
    def forward(self, x: Tensor, extra: Any, factor: float = 2.0) -> Tensor:
        return self.linear(x) * factor + extra["a"][0] - extra["a"][1]


class Returned(Layer):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return y, x, {"again": y}


class Keywords(Layer):
    def forward(self, a: Tensor, b: Tensor, **more: Tensor) -> Tensor:
        return self.linear(a) - 2 * b + 3 * more["c"]


def rows(size: int = 3) -> Tensor:
    return seeded(size, size, 4)


def ends(path: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """Shapes of the inputs, and names of the outputs."""
    graph = onnx.load(path).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    return shapes, [value.name for value in graph.output]


def nested(size: int) -> Any:
    return rows(size), {"a": [rows(size), rows(size)]}


def test_inputs_keep_their_names_and_axes(tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", exportable(Capitals, [{"X": rows(), "output": rows()}])
    result = export_onnx(net, path, (rows(), rows()), batches=[(rows(5), rows(5))])
    assert result.dynamic_axes == {"X": {0: "batch"}, "output": {0: "batch"}}
    assert ends(path) == ({"X": ["batch", 4], "output": ["batch", 4]}, ["result"])


def test_sizes_that_the_forward_fixes_are_not_dynamic(tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", exportable(Product, [{"x": rows(3), "y": rows(4)}])
    assert export_onnx(net, path, (rows(3), rows(4))).dynamic_axes == {"x": {0: "batch"}}
    assert ends(path)[0] == {"x": ["batch", 4], "y": [4, 4]}
    with pytest.raises(ExportError, match="axis 0 of 'y' was to be dynamic, but the forward depends on its size, 4"):
        export_onnx(net, path, (rows(3), rows(4)), dynamic_axes={"y": {0: "rows"}})


@pytest.mark.parametrize("size", [1, 3])
def test_tensors_in_lists_and_dictionaries_are_inputs_with_axes_of_their_own(size: int, tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", exportable(Nested, [dict(zip(("x", "extra"), nested(3), strict=True))])
    export_onnx(net, path, nested(size), batches=[nested(5)])
    assert ends(path)[0] == {name: ["batch", 4] for name in ("x", "extra_a_0", "extra_a_1")}
    axes = {name: {0: "rows"} for name in ("x", "extra_a_0", "extra_a_1")}
    assert export_onnx(net, path, (*nested(3), 4.0), dynamic_axes=axes).dynamic_axes == axes
    with pytest.raises(ExportError, match="names 'extra'; the inputs are x, extra_a_0, extra_a_1"):
        export_program(net, nested(3), dynamic_axes={"extra": {0: "rows"}})


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(exportable(Returned, [rows()]), path, rows(), batches=[rows(5)])
    assert ends(path) == ({"x": ["batch", 4]}, ["output_0", "output_1", "output_2"])


def test_keyword_arguments_may_come_in_any_order(tmp_path: Path) -> None:
    path, names = tmp_path / "net.onnx", ("c", "b", "a")
    net = exportable(Keywords, [{name: rows() for name in names}])
    export_onnx(net, path, {name: rows() for name in names}, batches=[{name: rows(5) for name in names[::-1]}])
    assert list(ends(path)[0]) == ["a", "b", "c"]


def test_inputs_of_a_compiled_module_have_the_names_of_its_forward() -> None:
    assert list(ExampleInputs.of(torch.compile(exportable(Returned, [rows()])), rows()).named) == ["x"]
