"""CPUs without VNNI: onnxruntime's default kernels add in 16 bits there, those of an option in 32 bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Kinds, Transformer, exportable, seeded, token_batches
from torch import nn

from lightning_ptq import export_onnx, verify_export
from lightning_ptq.errors import ParityError, SaturatingKernelsWarning
from lightning_ptq.export import parity
from lightning_ptq.export.inputs import ExampleInputs
from lightning_ptq.export.sessions import EXACT_OPTION, open_session, run_session

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
IMAGES = [seeded(i, 6, 2, 6, 6) for i in range(3)]


def snr(path: Path, net: nn.Module, batch: Any) -> float:
    """Ratio of the module's outputs to the difference, with kernels that cannot saturate, in decibels."""
    inputs = ExampleInputs.of(net, batch)
    with torch.no_grad():
        expected = (net(**batch) if isinstance(batch, dict) else net(batch)).numpy()
    (found,) = run_session(open_session(str(path), exact=True), inputs, path)
    return float(10 * np.log10((expected**2).sum() / max(((expected - found) ** 2).sum(), 1e-30)))


@pytest.mark.parametrize("qconfig", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_kernels_that_cannot_saturate_run_every_file(qconfig: str, target: str | None, tmp_path: Path) -> None:
    net = exportable(Kinds, IMAGES, qconfig, target)
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0], target=target, batches=IMAGES)
    assert snr(tmp_path / "net.onnx", net, IMAGES[0]) > (50 if target is None else 100)
    tokens = token_batches(2)
    text = exportable(Transformer, tokens, qconfig, target)
    export_onnx(text, tmp_path / "text.onnx", tokens[0], target=target, batches=tokens)
    assert snr(tmp_path / "text.onnx", text, tokens[0]) > 30


class Twice(nn.Module):
    """A convolution, a linear layer and a recurrent layer, each of which is used more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        both = [self.head(self.conv(each).flatten(1)) for each in (images, images.flip(-1))]
        result: torch.Tensor = self.rnn(torch.stack(both, 1))[0][:, -1]
        return result


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_kernels_that_cannot_saturate_run_weights_that_are_read_twice(target: str | None, tmp_path: Path) -> None:
    net, file = exportable(Twice, IMAGES, "w8a8", target), tmp_path / "net.onnx"
    found = export_onnx(net, file, IMAGES[0], target=target, batches=IMAGES)
    assert found.float_products == []
    assert snr(file, net, IMAGES[0]) > (50 if target is None else 80)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry(*EXACT_OPTION)
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["QGemm"], kinds["Conv"], kinds["Gemm"]) == (2, 5, 0, 0)
    stored = {each.name: each.data_type for each in onnx.load(file).graph.initializer}
    assert stored["conv.weight"] == stored["head.weight"] == onnx.TensorProto.UINT8
    assert stored["rnn.weight_ih_l0"] == onnx.TensorProto.INT8  # one product with the inputs of all steps


@pytest.mark.parametrize("qconfig", ["w4a8", "w7a8"])
def test_weights_that_never_saturate_stay_signed(qconfig: str, tmp_path: Path) -> None:
    net, file = exportable(Twice, IMAGES, qconfig), tmp_path / "net.onnx"
    export_onnx(net, file, IMAGES[0], batches=IMAGES)
    assert onnx.TensorProto.UINT8 not in {
        each.data_type for each in onnx.load(file).graph.initializer if "weight" in each.name
    }
    assert snr(file, net, IMAGES[0]) > 50


class Overflowing:
    """A session whose results are off, as are those of kernels that saturate."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, *arguments: Any) -> list[Any]:
        return [found + 0.3 * np.abs(found).max() for found in self.session.run(*arguments)]


def test_a_file_that_only_default_kernels_compute_wrongly_passes_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = exportable(Kinds, IMAGES, target="onnxruntime")
    right = export_onnx(net, tmp_path / "net.onnx", IMAGES[0], batches=IMAGES).parity

    def opened(model: Any, exact: bool = False) -> Any:
        session = open_session(model, exact=True)
        return session if exact else Overflowing(session)

    monkeypatch.setattr(parity, "open_session", opened)
    with pytest.warns(SaturatingKernelsWarning, match=r"net\.onnx overflows.*session\.x64quantprecision"):
        found = export_onnx(net, tmp_path / "net.onnx", IMAGES[0], batches=IMAGES).parity
    assert right is not None
    assert found is not None
    assert found.saturates
    assert found.passed
    assert found.outputs[0].snr > 100


def test_a_file_that_no_kernel_computes_rightly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = exportable(Kinds, IMAGES, target="onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", IMAGES[0])
    monkeypatch.setattr(parity, "open_session", lambda *arguments: Overflowing(open_session(*arguments)))
    with pytest.raises(ParityError, match="does not compute what the quantized module computes"):
        verify_export(tmp_path / "net.onnx", net, IMAGES)
