from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Kinds, Transformer, build, exportable, same_state, seeded, state, token_batches
from torch import Tensor, nn

from lightning_ptq import QConfig, export_onnx, export_program, inspect, verify_export
from lightning_ptq.errors import ExportError, ParityError, QConfigError, SurgeryError
from lightning_ptq.export import onnx as onnx_module
from lightning_ptq.export import onnx_weights, sessions
from lightning_ptq.export.parity import compare_export
from lightning_ptq.export.targets import configured

onnx, ir = pytest.importorskip("onnx"), pytest.importorskip("onnx_ir")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


IMAGES = [seeded(i, 6, 2, 6, 6) for i in range(3)]


def initializers(path: Path) -> dict[str, Any]:
    return {item.name: item for item in onnx.load(path).graph.initializer}


def count(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


WEIGHT_TYPES = {  # as ONNX calls them
    "w8a8": "INT8", "w5a8": "INT8", "w4a4": "INT4", "w3a3": "INT4", "w4": "INT4", "w4g8a8": "INT4", "w2a4": "INT4",
}  # fmt: skip


@pytest.mark.parametrize("qconfig", WEIGHT_TYPES)
def test_the_file_computes_the_same_integers_as_the_module(qconfig: str, tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES, qconfig, "onnxruntime")
    result = export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target="onnxruntime", batches=IMAGES)
    found = compare_export(tmp_path / "net.onnx", net, IMAGES, every_tensor=True)
    assert found.passed
    assert found.outputs[0].snr > 100
    assert all(row.snr == float("inf") for row in found.tensors)
    assert len(found.tensors) == (
        0 if qconfig == "w4" else 9
    )  # the input and the output of the block have two readers each, and the concatenation has two inputs
    kind = getattr(onnx.TensorProto, WEIGHT_TYPES[qconfig])
    weights = {name: item for name, item in initializers(tmp_path / "net.onnx").items() if name.endswith(".weight")}
    assert {item.data_type for item in weights.values()} == {kind}
    assert {"stem.weight", "block.conv1.weight", "head.weight"} <= weights.keys()
    assert result.products == 6
    assert len(result.float_products) == (6 if qconfig == "w4" else 0)
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


def test_stored_integers_and_scales_are_those_of_the_module(tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES, "w4a8", "onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
    stored = initializers(tmp_path / "net.onnx")
    quantizer = net.stem.weight_fake_quant
    integers = onnx.numpy_helper.to_array(stored["stem.weight"]).astype(np.float32)
    assert torch.equal(torch.from_numpy(integers), quantizer.integers(net.stem.weight))
    assert np.array_equal(onnx.numpy_helper.to_array(stored["stem.weight.scale"]), quantizer.scale.flatten().numpy())
    steps = net.stem.bias / (net.stem.input_fake_quant.scale * quantizer.scale.flatten())
    assert np.array_equal(onnx.numpy_helper.to_array(stored["stem.bias.integers"]), steps.detach().round().numpy())
    assert not any(item.data_type == onnx.TensorProto.FLOAT and item.dims == [4, 2, 3, 3] for item in stored.values())


def test_grids_narrower_than_their_type_are_clipped(tmp_path: Path) -> None:
    for qconfig, clips in (("w8a8", 0), ("w8a5", 9)):
        net = exportable(Kinds, IMAGES, qconfig, "onnxruntime")
        export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
        assert count(tmp_path / "net.onnx")["Clip"] == clips


def test_integers_are_stored_in_the_narrowest_type_of_the_opset(tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES, "w2a8", "onnxruntime")
    for opset, kind, size in ((20, "INT8", 144), (21, "INT4", 72), (25, "INT2", 36)):
        export_onnx(net, tmp_path / "net.onnx", IMAGES[0], opset=opset, batches=IMAGES)
        stored = initializers(tmp_path / "net.onnx")["block.conv1.weight"]
        assert stored.data_type == getattr(onnx.TensorProto, kind)
        assert len(stored.raw_data) == size


def test_sizes_of_batches_and_sequences_may_vary(tmp_path: Path) -> None:
    batches = token_batches(4, lengths=(5, 9))
    net = exportable(Transformer, batches)
    axes = {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    result = export_onnx(net, tmp_path / "net.onnx", batches[0], dynamic_axes=axes, batches=batches)
    assert result.dynamic_axes == axes
    one = {name: value[:1] for name, value in batches[1].items()}
    assert verify_export(tmp_path / "net.onnx", net, [one]).passed
    images = exportable(Kinds, IMAGES)
    result = export_onnx(images, tmp_path / "images.onnx", IMAGES[0][:1], batches=[IMAGES[0][:5], IMAGES[1][:1]])
    assert result.dynamic_axes == {"x": {0: "batch"}}
    fixed = export_onnx(images, tmp_path / "fixed.onnx", IMAGES[0], dynamic_axes={})
    assert fixed.dynamic_axes == {}
    with pytest.raises(ExportError, match=r"onnxruntime cannot run .*fixed.onnx on inputs of the shapes x \(2, 2, 6"):
        verify_export(tmp_path / "fixed.onnx", images, [IMAGES[0][:2]])


def test_export_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES).train()
    net.block.eval()
    before, modes = copy.deepcopy(state(net)), [child.training for child in net.modules()]
    quantizers = [id(child) for child in net.modules()]
    export_onnx(net, tmp_path / "net.onnx", (IMAGES[0],))
    with pytest.raises(ExportError):
        export_onnx(net, tmp_path / "net.onnx", seeded(0, 6, 3, 6, 6))
    assert same_state(before, state(net))
    assert modes == [child.training for child in net.modules()]
    assert quantizers == [id(child) for child in net.modules()]
    assert "forward" not in vars(net)


def test_a_program_has_integer_weights_and_the_outputs_of_the_module(tmp_path: Path) -> None:
    for qconfig in ("w4a4", "w4g8a8"):
        net = exportable(Kinds, IMAGES, qconfig)
        program = export_program(net, IMAGES[0])
        with torch.no_grad():
            expected = [net(images) for images in (*IMAGES, IMAGES[0][:1])]
        torch.export.save(program, tmp_path / "net.pt2")
        for again in (program, torch.export.load(tmp_path / "net.pt2")):
            found = [again.module()(images) for images in (*IMAGES, IMAGES[0][:3])][:3]
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=False))
        operators = {str(node.target) for node in program.graph.nodes}
        assert "quantized_decomposed.quantize_per_tensor.default" in operators
        held = {**program.state_dict, **program.constants}
        assert not any(key.endswith("conv1.weight") for key in held)
        assert held["block.conv1.weight_fake_quant.stored"].dtype == torch.int8


def test_a_file_with_other_values_is_refused_and_the_first_tensor_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = exportable(Kinds, IMAGES, target="onnxruntime")

    def spoil(graph: Any, *_: Any) -> None:
        for name in ("block.conv2", "head"):
            value = graph.initializers[f"{name}.weight_fake_quant.stored"]
            value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)

    monkeypatch.setattr(onnx_weights, "narrow", spoil)
    with pytest.raises(ParityError, match=r"net.failed.onnx does not compute .* computed by block\.conv2 ") as error:
        export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
    assert "30 dB or more" in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["net.failed.onnx"]
    with pytest.raises(ParityError, match="every_tensor=True"):
        verify_export(tmp_path / "net.failed.onnx", net, IMAGES)
    assert verify_export(tmp_path / "net.failed.onnx", net, IMAGES, min_snr=-50).samples == 18


def test_a_bias_that_32_bits_do_not_hold_beside_tiny_weights_keeps_its_value(tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
        with torch.no_grad():
            net[0].weight[1] *= 1e-9  # a dead channel, as training leaves them
            net[0].bias[1] = -5
            net[0].bias[2] = 3
            net[0].weight[2] *= 1e-6  # some of its integers stay
        return net

    net = exportable(make, IMAGES, target="onnxruntime")
    result = export_onnx(net, tmp_path / "net.onnx", IMAGES[0], batches=IMAGES)
    assert result.parity.outputs[0].snr > 100
    stored = initializers(tmp_path / "net.onnx")
    bias = onnx.numpy_helper.to_array(stored["0.bias.integers"]) * onnx.numpy_helper.to_array(stored["0.bias.scale"])
    assert np.allclose(bias, net[0].bias.detach(), rtol=1e-5)
    scale = onnx.numpy_helper.to_array(stored["0.weight.scale"])[:, None, None, None]
    weight = onnx.numpy_helper.to_array(stored["0.weight"]) * scale
    assert (abs(weight - net[0].weight_fake_quant(net[0].weight).detach().numpy()) <= 0.501 * scale).all()
    assert [int(abs(channel).max()) > 0 for channel in onnx.numpy_helper.to_array(stored["0.weight"])][:3] == [
        True, False, True,
    ]  # fmt: skip


def test_large_models_keep_their_tensors_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = exportable(Kinds, IMAGES)
    monkeypatch.setattr(onnx_module, "_MOST_BYTES", 100)
    result = export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert result.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert verify_export(tmp_path / "net.onnx", net, IMAGES).passed


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linalg.eigvalsh(x @ x.transpose(1, 2))[:, None]


def test_bad_input_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, path = exportable(Kinds, IMAGES), tmp_path / "net.onnx"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((build(Kinds), path, IMAGES[0]), {}, "Kinds is not quantized"),
        ((copy.deepcopy(net).half(), path, IMAGES[0]), {}, r"torch.float16.*Call module.float\(\) first"),
        ((net, path, seeded(0, 6, 3, 6, 6)), {}, r"fails on the example inputs .* x \(6, 3, 6, 6\)"),
        ((net, path, {"images": IMAGES[0]}), {}, "does not take the example inputs"),
        ((net, path, (IMAGES[0], IMAGES[0])), {}, "does not take the example inputs"),
        ((net, path, "an image"), {}, "hold no tensor, got str"),
        ((net, tmp_path, IMAGES[0]), {}, "cannot be written"),
        ((net, tmp_path / "no" / "net.onnx", IMAGES[0]), {}, "cannot be written"),
        ((net, path, IMAGES[0]), {"opset": 12}, "opset must be .* 18"),
        ((net, path, IMAGES[0]), {"opset": 99}, "99"),
        ((net, path, IMAGES[0]), {"dynamic_axes": {"y": {0: "batch"}}}, "dynamic_axes names 'y'; the inputs are x"),
        ((net, path, IMAGES[0]), {"dynamic_axes": {"x": {7: "batch"}}}, "axis 7 of 'x'"),
        ((net, path, IMAGES[0][:, :, :1]), {"dynamic_axes": {"x": {2: "height"}}}, "axis 2 of 'x' .* its size is 1"),
        ((net, path, IMAGES[0]), {"dynamic_axes": {"x": [0]}}, 'Write for example {"x": {0: "batch"}}'),
        ((net, path, IMAGES[0]), {"dynamic_axes": {"x": {0: None}}}, "names by input and axis"),
        ((net, path, IMAGES[0]), {"output_names": ["a", "b"]}, "has 2 names, .* returns 1 tensors"),
        ((net, path, IMAGES[0]), {"output_names": ["stem.weight"]}, "names an input or a tensor inside"),
        ((net, path, IMAGES[0]), {"output_names": ["a", "a"]}, "different names"),
        ((net, path, IMAGES[0]), {"output_names": "scores"}, r"Write \['scores'\]"),
        ((net, path, IMAGES[0]), {"min_snr": "30"}, "min_snr must be a number of decibels"),
        ((net, path, IMAGES[0]), {"max_disagreement": None}, "max_disagreement must be"),
        ((net, path, IMAGES[0]), {"batches": IMAGES[0]}, r"got a Tensor. Write \[batch\]"),
        (
            (net, path, IMAGES[0]),
            {"batches": [seeded(0, 6, 3, 6, 6)]},
            r"fails on the example inputs .* \(6, 3, 6, 6\)",
        ),
        ((net, path, IMAGES[0]), {"batches": [IMAGES[0][:0]]}, "hold no sample"),
        ((net, path, IMAGES[0] * torch.nan), {}, r"returns NaN on inputs of the shapes x \(6, 2, 6, 6\)"),
        ((net, None, IMAGES[0]), {}, "path must be the path of a file, got None"),
        ((net, "a\0b.onnx", IMAGES[0]), {}, "path must be the path of a file"),
        ((net, tmp_path / ("a" * 250), IMAGES[0]), {}, "cannot be written .*too long"),
        ((net, path, IMAGES[0]), {"batches": []}, "no batch"),
        ((exportable(Kinds, IMAGES, "w4g8a8"), path, IMAGES[0]), {"opset": 20}, "scale per group of 8.*opset=21"),
    ]
    for args, options, message in cases:
        with pytest.raises(ExportError, match=message):
            export_onnx(*args, **options)
    tokens = [seeded(i, 4, 3, 3) for i in range(2)]
    with pytest.raises(ExportError, match=r"aten\._linalg_eigh, which 1 runs, has no counterpart in ONNX"):
        export_onnx(exportable(lambda: nn.Sequential(nn.Linear(3, 3), Eigen()), tokens), path, tokens[0])
    monkeypatch.setattr(sessions, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'lightning-ptq\[onnx\]'"):
        export_onnx(net, path, IMAGES[0])
    with pytest.raises(ExportError, match="no file"):
        verify_export(path, net, IMAGES)
    with pytest.raises(SurgeryError, match=r"module must be an nn\.Module"):
        export_program(None, IMAGES[0])  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match=r"module must be an nn\.Module"):
        verify_export(path, None, IMAGES)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_targets_set_what_the_engine_needs() -> None:
    trt = configured("w8a8", "tensorrt")
    assert trt.default.activation.symmetric
    assert not trt.default.weight.signed_scale
    assert (trt.operations, trt.shared_scales, trt.integer_biases) == ("all", True, False)
    ort = configured("w4a4", "onnxruntime", operations="products")
    assert (ort.operations, ort.shared_scales, ort.integer_biases) == ("products", True, True)
    assert configured("w4a4", None) == QConfig.parse("w4a4")
    assert QConfig.from_dict(ort.to_dict()) == ort
    for arguments, message in (
        (("w4a4", "tensorrt"), "activations of 8 bits, got w4a4: write w4a8"),
        (("w4g32a8", "tensorrt"), "scale per group"),
        ((QConfig.parse("w4a8"), "tensorrt"), "signed_scales=False; .*symmetric_activations=True"),
        (("w8a8", "gpu"), "target must be one of"),
    ):
        with pytest.raises(QConfigError, match=message):
            configured(*arguments)
    for option in ({"signed_scales": True}, {"symmetric_activations": False}):
        with pytest.raises(QConfigError, match="tensorrt takes"):
            configured("w8a8", "tensorrt", **option)


def test_a_module_that_a_target_does_not_take_is_refused_before_the_export(tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES, "w4a8")
    with pytest.raises(QConfigError, match=r"stem: tensorrt takes positive scales only, .* no zero points"):
        export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target="tensorrt")
    net = exportable(Kinds, IMAGES, "w4a8", "tensorrt")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target="tensorrt")
    stored = initializers(tmp_path / "net.onnx")
    assert stored["stem.weight"].data_type == onnx.TensorProto.INT8
    assert stored["stem.bias"].data_type == onnx.TensorProto.FLOAT
    assert (onnx.numpy_helper.to_array(stored["stem.weight.scale"]) > 0).all()


def test_inspect_tells_what_a_target_does_not_take() -> None:
    net = build(Kinds)
    for qconfig in ("w4a8", None):
        assert inspect(net, IMAGES[0], qconfig, target="tensorrt").covered == 1.0
    with pytest.raises(QConfigError, match="signed_scales=False"):
        inspect(net, IMAGES[0], QConfig.parse("w4a8", symmetric_activations=True), target="tensorrt")
    assert inspect(net, IMAGES[0], QConfig.parse("w4a8"), target="onnxruntime").covered == 1.0


def test_rows_of_large_tables_are_looked_up_as_integers(tmp_path: Path) -> None:
    batches = [torch.arange(12).view(3, 4) + 29995 for _ in range(2)]  # torch folds no constants of this size
    net = exportable(lambda: nn.Sequential(nn.Embedding(30007, 4), nn.Linear(4, 3)), batches, target="onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", batches[0])
    tables = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if "0.weight" in node.input]
    assert [node.op_type for node in tables] == ["Gather"]


def test_weights_stay_integers_up_to_where_they_are_used(tmp_path: Path) -> None:
    batches = token_batches(3, lengths=(5,))
    net = exportable(Transformer, batches, "w4a8", "onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", batches[0], target="onnxruntime", batches=batches)
    graph = onnx.load(tmp_path / "net.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    stored = initializers(tmp_path / "net.onnx")
    for node in graph.node:
        operands = [producers[name].op_type for name in node.input if name in producers]
        if node.op_type == "MatMul":
            assert operands == ["DequantizeLinear", "DequantizeLinear"]
        if node.op_type == "DequantizeLinear":  # the rows of the table are dequantized after they are looked up
            assert "embed.weight" not in producers.get(node.input[0], node).input
    assert stored["embed.weight"].data_type == onnx.TensorProto.INT4
    assert list(stored["layers.0.up.weight"].dims) == [16, 32]  # transposed
    (up,) = [node for node in graph.node if "layers.0.up.weight.scale" in node.input]
    assert {item.name: item.i for item in up.attribute}["axis"] == 1  # onnxruntime would not notice another one


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm with an activation of its own, as timm has."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return x.relu_()


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(2, 4, 1), NormAndActivation(4), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.norm(self.stem(x)), x], 1))


def test_what_changes_nothing_is_not_exported(tmp_path: Path) -> None:
    net = exportable(Concatenated, IMAGES, target="onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0], batches=IMAGES)
    found = count(tmp_path / "net.onnx")
    # The norm is folded. Quantized are the input, both inputs of the concatenation, and for all its readers its output.
    assert (found["BatchNormalization"], found["QuantizeLinear"]) == (0, 4)
    assert all(row.snr == float("inf") for row in compare_export(tmp_path / "net.onnx", net, IMAGES, True).tensors)
    model = onnx.load(tmp_path / "net.onnx")
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    (concat,) = [node for node in model.graph.node if node.op_type == "Concat"]
    assert [producers[name] for name in concat.input] == ["DequantizeLinear"] * 2
    program = export_program(net, IMAGES[0])
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        assert all(torch.equal(program.module()(images), net(images)) for images in IMAGES)


class Predictions(nn.Module):
    """Returns classes, not scores; takes an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.first(x) * scale).argmax(1)


def test_outputs_of_integers_are_compared(tmp_path: Path) -> None:
    batch = {"x": seeded(0, 8, 4), "scale": 2.0}
    net = exportable(Predictions, [batch])
    parity = export_onnx(net, tmp_path / "net.onnx", batch).parity
    assert parity is not None
    assert (parity.outputs[0].snr, parity.outputs[0].agreement) == (float("inf"), 1.0)
    assert len(verify_export(tmp_path / "net.onnx", net, [batch], every_tensor=True).tensors) > 1
    with torch.no_grad():
        net.head.bias.add_(torch.tensor([0.0, 9.0, 0.0]))
    with pytest.raises(ParityError, match=r"dB, .* % of the predictions equal"):
        verify_export(tmp_path / "net.onnx", net, [batch])
